"""``omniconv compare``."""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from omniconv.bench.compare import Comparison, compare
from omniconv.bench.report import check_extra, headline, report, tables
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
from omniconv.problem import DTYPES
from omniconv.timing import Interrupted


def command(
    picture: Annotated[
        Path | None, typer.Argument(help="A picture; by default the photograph that ships with the package.", show_default=False)
    ] = None,
    sequence: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A WAV or CSV for the techniques on sequences; by default the picture's rows."),
    ] = None,
    channels: Annotated[int, typer.Option(help="Channels of the layer, in and out.")] = 64,
    kernel: Annotated[int, typer.Option(help="Taps per axis.")] = 3,
    size: Annotated[int, typer.Option(help="Height and width of the feature maps.")] = 56,
    batch: Annotated[int, typer.Option(help="Samples.")] = 1,
    dtype: Annotated[str, typer.Option(help=f"Of the maps and the weights: {', '.join(DTYPES)}.")] = "f32",
    backward: Annotated[bool, typer.Option("--backward", help="Verify gradients and time forward and backward.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Maps and layers in channels-last format.")] = False,
    seed: Annotated[int, typer.Option(help="Of the stem and the weights.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads for torch; by default its own choice.", show_default=False)] = None,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="Time for the measurement.")] = 10.0,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """The same layer by every technique, on a picture: verified against its reference, counted and timed.

    FILE may end in .html (a report with the feature maps and a plot), .json, .csv or .md.
    """
    try:
        check_file("compare", output, force, TEXT_SUFFIXES)
        if form is Format.html or (output is not None and output.suffix.lower() == ".html"):
            check_extra()
        _check(threads, budget)
        if threads is not None:
            torch.set_num_threads(threads)
        with progress("stem") as tell:
            result = compare(
                picture, sequence, channels=channels, kernel=kernel, size=size, batch=batch, backward=backward, dtype=dtype,
                channels_last=channels_last, seed=seed, budget=budget,
                progress=tell,
            )  # fmt: skip
    except ValueError as error:
        give_up(error)
    except Interrupted as stopped:
        result = stopped.done
    warn_of_load(result.machine)
    deliver(
        "compare", result, tables(result), form, output,
        show=partial(_show, result), remarks=(*result.notes, result.verdict), writers={".html": lambda: report(result)},
    )  # fmt: skip
    if result.interrupted:
        raise typer.Exit(130)
    if result.failed:
        raise typer.Exit(1)


def _check(threads: int | None, budget: float) -> None:
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"compare: threads must be between 1 and 1024, got {threads}")
    if not 0 < budget <= 86400:
        raise ValueError(f"compare: the budget must be above 0 and at most 86400 seconds, got {budget:g}")


def _show(result: Comparison, console: Console) -> None:
    console.print(Text(headline(result)))
    for table in tables(result):
        console.print()
        draw(table, console)
    style = "bold red" if result.failed else "bold green"
    console.print(Text(result.verdict, style="bold" if result.interrupted else style))
