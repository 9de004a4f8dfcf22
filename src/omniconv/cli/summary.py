"""``omniconv summary``."""

from enum import Enum
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from omniconv.analysis.cost import cost
from omniconv.analysis.plots.cost_bars import cost_bars
from omniconv.analysis.plots.style import SUFFIXES, check_extra
from omniconv.analysis.summary import Summary, summary
from omniconv.analysis.summary_tables import METRICS, costliest_table, headline, totals, tree_table
from omniconv.analysis.tables import Table
from omniconv.analysis.targets import Target, load
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
    plot_writers,
)

Metric = Enum("Metric", {name: name for name in METRICS}, type=str)  # type: ignore[misc]

TargetArgument = Annotated[
    str,
    typer.Argument(
        help="package.module:factory, file.py:factory, timm:NAME, torchvision:NAME, FILE.pt2, FILE.onnx or the text of a problem.",
        show_default=False,
    ),
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SIZES",
        help="An input, as 1x3x224x224, 1x128:i64 or mask=1x128:bool; may be repeated.",
        show_default=False,
    ),
]


def command(
    target: TargetArgument,
    inputs: InputOption = None,
    sort: Annotated[
        Metric | None, typer.Option(help="A flat list in place of the tree, the costliest first.", show_default=False)
    ] = None,
    top: Annotated[int | None, typer.Option(metavar="N", help="Lines of the flat list; by default 20.", show_default=False)] = None,
    depth: Annotated[
        int | None, typer.Option(metavar="N", help="Levels of the tree; by default as many as are readable.", show_default=False)
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Count the backward pass too.")] = False,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """What a network costs, module by module: parameters, MACs, bytes, and what is not known. Nothing of it is run.

    FILE may end in .png or .svg too: bars of the layers' MACs, parameters and bytes.
    """
    try:
        check_file("summary", output, force, (*TEXT_SUFFIXES, *SUFFIXES))
        pictured = output is not None and output.suffix.lower() in SUFFIXES
        if pictured:
            check_extra("summary")
        for name, value in (("depth", depth), ("top", top)):
            if value is not None and value < 1:
                raise ValueError(f"summary: --{name} must be at least 1, got {value}")
        if sort is not None and sort.value == "backward" and not backward:
            raise ValueError("summary: --sort backward must come with --backward, got none")
        found = load(target, input=inputs or (), caller="summary")
        if pictured and found.onnx is not None:
            raise ValueError(f"summary: a picture must be of what runs in torch, got '{target}'")
        result = summary(found, backward=backward)
    except ValueError as error:
        give_up(error)
    metric = None if sort is None else METRICS[sort.value]
    whole = form is Format.csv or (output is not None and output.suffix.lower() == ".csv")
    deliver(
        "summary", result, [_table(result, metric, depth, top, whole)], form, output,
        show=partial(_show, result, _table(result, metric, depth, top, False)), remarks=(headline(result), *totals(result)),
        writers=plot_writers(partial(_picture, found)),
    )  # fmt: skip


def _picture(target: Target) -> Any:
    args, named = target.example_inputs()
    kwargs: dict[str, Any] = dict(named)
    return cost_bars(cost(target.network(), *args, **kwargs))


def _table(result: Summary, metric: str | None, depth: int | None, top: int | None, whole: bool) -> Table:
    """For people as much as they can read, for machines every line."""
    if metric is not None:
        return costliest_table(result, metric, None if whole else top or 20)
    return tree_table(result, max(line.depth for line in result.lines) if whole else depth)


def _show(result: Summary, table: Table, console: Console) -> None:
    console.print(Text(headline(result)))
    console.print()
    draw(table, console)
    console.print()
    for line in totals(result):
        name, colon, said = line.partition(": ")
        bold = bool(colon) and name in ("total", "memory", "backward", "coverage")
        text = Text.assemble((f"{name}: ", "bold"), said) if bold else Text(line, style="yellow")
        if name == "coverage" and (result.coverage.unknown or not result.coverage.ops):
            text.stylize("yellow")
        console.print(text)
