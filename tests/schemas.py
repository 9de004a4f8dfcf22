"""Writes the published schemas from the types of the results: python tests/schemas.py (make schemas).

What `tables.plain` does to a value is done to its type: a dataclass is an object of its fields, a Problem its text, a number that
JSON lacks null. The schema itself is pydantic's.
"""

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, create_model
from pydantic.json_schema import GenerateJsonSchema

from omniconv.analysis.catalogue import Catalogue, Description
from omniconv.analysis.diff import Diff
from omniconv.analysis.doctor import Examination
from omniconv.analysis.receptive_field import FieldReport
from omniconv.analysis.roofline import Roofline
from omniconv.analysis.summary import Summary
from omniconv.analysis.tables import SCHEMA_VERSION
from omniconv.analysis.verify import Verification
from omniconv.analysis.what_if import WhatIf
from omniconv.bench.checkup import Checkup
from omniconv.bench.compare import Comparison
from omniconv.bench.network import NetworkBenchmark
from omniconv.bench.results import Benchmark
from omniconv.problem import Problem
from omniconv.surgery import DilatedTarget

# kind of result, as `deliver` is told -> what is delivered
RESULTS: dict[str, type] = {
    "bench": Benchmark,
    "bench-network": NetworkBenchmark,
    "compare": Comparison,
    "cost": WhatIf,
    "diff": Diff,
    "dilate": DilatedTarget,
    "doctor": Examination,
    "doctor-network": Checkup,
    "info": Description,
    "list": Catalogue,
    "receptive-field": FieldReport,
    "summary": Summary,
    "roofline": Roofline,
    "verify": Verification,
}
FOLDER = Path(__file__).parent.parent / "src/omniconv/analysis/schemas"


class Untitled(GenerateJsonSchema):
    """Without a title that repeats a field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def written(kind: Any, made: dict[type, Any]) -> Any:
    """The type of what `plain` makes of a value of this type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Problem:
        return str
    if kind is float:
        return float | None
    if dataclasses.is_dataclass(kind):
        if kind not in made:
            made[kind] = model(kind, made, {})
        return made[kind]
    if origin in (types.UnionType, typing.Union):
        return typing.Union[tuple(written(item, made) for item in inner)]  # noqa: UP007 as many as there are
    if origin in (tuple, list, frozenset):
        if origin is tuple and inner[-1:] != (...,):
            return tuple[tuple(written(item, made) for item in inner)]
        return list[written(inner[0], made)]
    if origin is not None and issubclass(origin, Mapping):
        return dict[str, written(inner[1], made)]
    return kind


def model(record: type, made: dict[type, Any], first: dict[str, Any]) -> Any:
    """A dataclass as a model of pydantic's with the same name, text and fields."""
    hints = typing.get_type_hints(record)
    kept = [f for f in dataclasses.fields(record) if f.metadata.get("json", True)]
    settings = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    required = {f.name: f.default if f.metadata.get("added") else ... for f in kept}  # what was added since, older files lack
    members = first | {name: (written(hints[name], made), default) for name, default in required.items()}
    return create_model(record.__name__, __doc__=record.__doc__, __config__=settings, **members)


def schema(name: str) -> str:
    """The schema of one kind of result, as the text of its file."""
    head = {"schema_version": (Literal[SCHEMA_VERSION], ...), "kind": (Literal[name], ...)}
    made = TypeAdapter(model(RESULTS[name], {}, head)).json_schema(schema_generator=Untitled)
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:omniconv:{name}:{SCHEMA_VERSION}"} | made
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for kind in RESULTS:
        (FOLDER / f"{kind}.json").write_text(schema(kind), encoding="utf-8")
    for file in FOLDER.glob("*.json"):
        if file.stem not in RESULTS:
            file.unlink()
    sys.stdout.write(f"{len(RESULTS)} schemas written\n")
