"""``omniconv bench``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from omniconv.bench.networks import measurable
from omniconv.bench.peers import DIRECTIONS
from omniconv.bench.results import Benchmark
from omniconv.bench.runner import run
from omniconv.bench.speed import headline, remarks, tables, update_readme
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
    notes,
    progress_bar,
    warn_of_load,
)
from omniconv.problem import DTYPES
from omniconv.timing import Interrupted


def command(
    technique: Annotated[str, typer.Argument(help=f"What to measure: {', '.join(measurable())}.", show_default=False)],
    direction: Annotated[
        str | None, typer.Option(help=f"{' or '.join(DIRECTIONS)} (forward + backward); by default each.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of every layer, in place of its own: {', '.join(DTYPES)}.", show_default=False)
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Only layers whose network or text contains it.", show_default=False)
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads, ours and the peers'.")] = 1,
    cold: Annotated[bool, typer.Option("--cold", help="Measure with empty caches too.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compare with torch.compile too; it takes a while.")] = False,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="Time for the measurement of one layer.")] = 2.0,
    readme: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measure nothing: put benchmarks/results beside FILE into its table.", show_default=False
        ),
    ] = None,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """How fast: layers of real networks, ours beside every peer and the machine's limits, verified before timed."""
    try:
        if readme is not None:
            changed = update_readme(technique, readme)
            notes().print(Text(f"{readme} {'written' if changed else 'is up to date'}"), soft_wrap=True)
            return
        check_file("bench", output, force, TEXT_SUFFIXES)
        with progress_bar() as bar:
            task = bar.add_task("peaks", total=1.0)
            result = run(
                technique, directions=DIRECTIONS if direction is None else (direction,), dtype=dtype, only=only, threads=threads,
                cold=cold, compiled=compiled, budget=budget,
                progress=lambda share, what: bar.update(task, completed=share, description=what),
            )  # fmt: skip
    except ValueError as error:
        give_up(error)
    except Interrupted as stopped:
        result = stopped.done
    warn_of_load(result.machine)
    deliver("bench", result, tables(result), form, output, show=partial(_show, result), remarks=remarks(result))
    if result.interrupted:
        raise typer.Exit(130)
    if result.failed:
        raise typer.Exit(1)


def _show(result: Benchmark, console: Console) -> None:
    console.print(Text(headline(result)))
    for table in tables(result):
        console.print()
        draw(table, console)
    console.print()
    *others, last = remarks(result)
    for line in others:
        console.print(Text(line, style="dim"))
    style = "bold red" if result.failed else "bold green"
    console.print(Text(last, style="bold" if result.interrupted else style))
