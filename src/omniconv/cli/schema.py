"""``omniconv schema``."""

import json
from typing import Annotated

import typer

from omniconv.analysis.schemas import names, schema
from omniconv.cli.output import give_up


def command(
    name: Annotated[
        str | None, typer.Argument(help=f"A kind of result: {', '.join(names())}; by default their names.", show_default=False)
    ] = None,
) -> None:
    """The JSON schema of what a command writes as JSON."""
    if name is None:
        typer.echo("\n".join(names()))
        return
    try:
        typer.echo(json.dumps(schema(name), indent=2, ensure_ascii=False))
    except ValueError as error:
        give_up(error)
