"""``omniconv cost``."""

from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from omniconv.analysis.what_if import WhatIf, tables, what_if
from omniconv.bench.what_if import measured
from omniconv.cli.output import (
    TEXT_SUFFIXES,
    FileOption,
    ForceOption,
    Format,
    FormatOption,
    check_file,
    deliver,
    draw,
    give_up,
    progress,
    warn_of_load,
)
from omniconv.timing import Interrupted


def command(
    problem: Annotated[
        str, typer.Argument(help="One convolution, as 'standard n1 c64-128 i56 k3 p1'; see Problem.", show_default=False)
    ],
    every: Annotated[bool, typer.Option("--all", help="The same layer by every technique, beside the standard one.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Time each, verified against its reference first.")] = False,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="Time for the measurement.")] = 10.0,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """What one convolution costs, and with --all what it would cost by every other technique."""
    try:
        check_file("cost", output, force, TEXT_SUFFIXES)
        result = what_if(problem, every=every)
        if measure:
            with progress("verify") as tell:
                result = measured(result, budget=budget, progress=tell)
    except ValueError as error:
        give_up(error)
    except Interrupted as stopped:
        result = stopped.done
    if result.machine is not None:
        warn_of_load(result.machine)
    deliver("cost", result, tables(result), form, output, show=partial(_show, result), remarks=_said(result))
    if result.interrupted:
        raise typer.Exit(130)
    if any(way.reason for way in result.ways):
        raise typer.Exit(1)


def _said(result: WhatIf) -> list[str]:
    said = list(result.notes)
    if result.machine is not None:
        m = result.machine
        threads = f"{m.threads} thread{'s' * (m.threads > 1)}"
        said.append(f"forward, median, in turns in one process: {m.cpu} ({m.capability}), {threads}, torch {m.torch}")
    said += [f"{way.technique} is not measured: {way.reason}" for way in result.ways if way.reason]
    return said + (["interrupted"] if result.interrupted else [])


def _show(result: WhatIf, console: Console) -> None:
    for table in tables(result):
        draw(table, console)
        console.print()
    for line in _said(result):
        console.print(Text(line, style="dim"))
