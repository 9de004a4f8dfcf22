"""``omniconv receptive-field``."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from omniconv.analysis.plots.receptive_field import receptive_field_map
from omniconv.analysis.plots.style import SUFFIXES, check_extra
from omniconv.analysis.receptive_field import FieldReport, ReceptiveField, field_report
from omniconv.analysis.tables import Column, Table
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
    progress,
)


def _sizes(values: tuple[Any, ...]) -> str:
    """One number per axis; ∞ where the field grows with the input."""
    return " × ".join("∞" if v is None else f"{v:g}" for v in values) or "–"


def _known(values: tuple[float | None, ...]) -> str:
    return _sizes(values) if values and None not in values else "–"


_FIELDS: tuple[Column, ...] = (
    Column("layer", "layer", lambda f: f.of, style=lambda f: "bold", folds=True),
    Column("output", "output", lambda f: _sizes(f.output)),
    Column("size", "field", lambda f: _sizes(f.size), right=True),
    Column("jump", "jump", lambda f: _known(f.jump), right=True),
    Column("centre", "centre of\noutput 0", lambda f: _known(f.centre), right=True, needs=90),
    Column("coverage", "seen", lambda f: f.coverage, lambda f: f"{f.coverage:.0%}", right=True),
    Column("unevenness", "uneven", lambda f: f.unevenness, lambda f: f"{f.unevenness:.2f}", right=True, needs=80),
    Column("phases", "phases", lambda f: _phases(f), needs=100),
    Column("status", "", lambda f: f.status, lambda f: "" if f.status == "exact" else "at least", style=lambda f: "bold red"),
)
_CAPTION = "field and jump in input positions; ∞: grows with the input; seen: share of the box; uneven: 0 is even"


def _phases(field: ReceptiveField) -> str:
    """Sizes of the phases along every axis, where there are more than one."""
    return " × ".join("/".join(str(p.size) for p in axis) for axis in field.phases if len(axis) > 1)


def _remarks(report: FieldReport) -> list[str]:
    said = []
    for field in report.layers:
        for part in field.not_understood:
            said.append(f"{field.of}: {part.op} in '{part.module}': {part.what}")
        if field.sees_everything:
            first = field.sees_everything[-1]
            more = len(field.sees_everything) - 1
            rest = f" and {more} more" if more else ""
            said.append(f"{field.of} sees everything, by {first.op} in '{first.module}'{rest}")
        said += [f"{field.of}: {note}" for note in field.notes]
    if report.effective is not None:
        found = report.effective
        widths = zip(found.sigma, found.sigma_error, strict=True)
        sigma = " × ".join(f"{width:.1f}" + ("" if error is None else f" ± {error:.1f}") for width, error in widths)
        said.append(f"{found.of} reacts to a bell of σ {sigma} positions ({found.measure} gradient, {found.samples} inputs)")
        for area in found.areas:
            error = "" if area.error is None else f" ± {area.error:.0f}"
            said.append(f"  {area.share:.0%} of it on {area.positions:,}{error} positions")
    return said


def command(
    target: Annotated[
        str, typer.Argument(help="package.module:factory, file.py:factory, timm:NAME, torchvision:NAME, a .pt2 file or a problem.")
    ],
    input: Annotated[
        list[str] | None, typer.Option("--input", help="An example input, as 1x3x224x224[:dtype]; repeatable.")
    ] = None,
    layer: Annotated[list[str] | None, typer.Option("--layer", help="A module inside, by its dotted name; repeatable.")] = None,
    position: Annotated[str | None, typer.Option(help="Which output, as 3x4; with one --layer or the output.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Leave out what mixes the whole image, such as gates and means.")] = False,
    effective: Annotated[bool, typer.Option("--effective", help="Measure too what the last of the layers reacts to.")] = False,
    samples: Annotated[int, typer.Option(help="Random inputs of --effective.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """What the outputs of a network see of its input: size, jump, holes and gridding; and what they react to.

    Without --layer: every child of the network, and its output. A .png or .svg file gets the picture of the last one.
    """
    name = "receptive-field"
    try:
        check_file(name, output, force, (*TEXT_SUFFIXES, *SUFFIXES))
        if output is not None and output.suffix.lower() in SUFFIXES:
            check_extra(name)
        with progress("fields") as tell:
            report = field_report(
                target, input=input or (), layers=layer or None, position=position, local=local, seed=seed,
                samples=samples if effective else 0,
                progress=lambda done: tell(done / samples, "gradients"),
            )  # fmt: skip
    except ValueError as error:
        give_up(error)
    table = Table(report.target, _FIELDS, report.layers, _CAPTION)
    remarks = _remarks(report)

    def show(console: Console) -> None:
        draw(table, console)
        for remark in remarks:
            console.print(Text(remark))

    writers = plot_writers(lambda: receptive_field_map(report.layers[-1], report.effective))
    deliver(name, report, [table], form, output, show=show, remarks=remarks, writers=writers)
