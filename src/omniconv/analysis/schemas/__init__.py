"""The published JSON schemas, one for each kind of result that a command writes; made from the results' types, never by hand."""

import json
from importlib.resources import files
from typing import Any


def names() -> tuple[str, ...]:
    """The kinds of results that have a schema.

    >>> "list" in names()
    True
    """
    found = (item.name for item in files(__package__).iterdir() if item.name.endswith(".json"))
    return tuple(sorted(name.removesuffix(".json") for name in found))


def schema(name: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of one kind of result.

    Raises:
        ValueError: There is no such kind.

    >>> schema("list")["properties"]["kind"]["const"]
    'list'
    """
    if name not in names():
        raise ValueError(f"schema: the name must be one of {', '.join(names())}, got {name!r}")
    made: dict[str, Any] = json.loads(files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return made
