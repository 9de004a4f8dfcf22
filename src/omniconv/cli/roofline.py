"""``omniconv roofline``."""

from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from omniconv.analysis.layers import shortened
from omniconv.analysis.plots.roofline import roofline_plot
from omniconv.analysis.plots.style import SUFFIXES, check_extra
from omniconv.analysis.roofline import Roofline, roofline
from omniconv.analysis.tables import Column, Table, figures
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
    plot_writers,
    progress,
    warn_of_load,
)
from omniconv.timing import Interrupted

LEGEND = (
    "Roof: the lower of peak arithmetic and intensity × bandwidth of the memory that holds the layer's tensors; of roof: what the "
    "layer reaches of it. lost: time beyond the roof, all calls. Flops are 2 a MAC."
)
_COLUMNS: tuple[Column, ...] = (
    Column("layer", "layer", lambda p: " ".join(p.names), lambda p: shortened(p.names, 34)),
    Column("problem", "", lambda p: p.problem, lambda p: p.problem or p.type, under="layer"),
    Column("technique", "technique", lambda p: p.technique, needs=100),
    Column("calls", "calls", lambda p: p.calls, right=True, needs=90),
    Column("intensity", "flops\n/byte", lambda p: p.intensity, lambda p: figures(p.intensity), right=True),
    Column("time_ms", "ms\na call", lambda p: 1e3 * p.time_s.median, lambda p: figures(1e3 * p.time_s.median), right=True),
    Column("gflops", "GFLOP/s", lambda p: p.rate / 1e9, lambda p: figures(p.rate / 1e9), right=True),
    Column("attainable", "roof", lambda p: p.attainable / 1e9, lambda p: figures(p.attainable / 1e9), right=True, needs=90),
    Column(
        "share", "of roof", lambda p: p.share, lambda p: f"{p.share:.0%}", right=True, bar=lambda p: min(p.share, 1.0),
        style=lambda p: "green" if p.share > 0.7 else "yellow" if p.share < 0.3 else "",
    ),
    Column("limit", "limit", lambda p: p.limit, under="share"),
    Column("lost_ms", "lost\nms", lambda p: 1e3 * p.lost, lambda p: figures(1e3 * p.lost), right=True),
)  # fmt: skip


def table(result: Roofline, most: int | None = None) -> Table:
    """The layers, those that lose most time first."""
    shown = result.furthest if most is None else result.furthest[:most]
    rest = len(result.points) - len(shown)
    more = f"{rest} more kinds of layers: --all shows them. " if rest else ""
    return Table("", _COLUMNS, shown, more + LEGEND)


def headline(result: Roofline) -> str:
    """The machine's peaks, in one line."""
    roofs = result.roofs
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in roofs.rates.items())
    levels = ", ".join(f"{level.name} {level.bandwidth / 1e9:.0f}" for level in roofs.levels)
    when = f"measured {roofs.measured[:10]}, --refresh measures anew" if roofs.cached else "measured now"
    threads = f"{roofs.threads} thread{'s' * (roofs.threads > 1)}"
    return f"{result.target} on {roofs.cpu}, {threads}: {rates} GFLOP/s; copies {levels} GB/s ({when})"


def command(
    target: Annotated[str, typer.Argument(help="pkg.module:factory, timm:NAME, torchvision:NAME, a .pt2, or a problem's text.")],
    input: Annotated[
        list[str] | None, typer.Option("--input", help="Example input, as 1x3x224x224; several in turn.", show_default=False)
    ] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="In channels-last memory format.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="Time for the measurement of one kind of layers.")] = 0.2,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure the machine's peaks even if they are known.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show every layer, not only those that lose most.")] = False,
    form: FormatOption = Format.table,
    output: FileOption = None,
    force: ForceOption = False,
) -> None:
    """How far below the machine's roofs the layers of a network are. FILE may end in .png or .svg too."""
    try:
        check_file("roofline", output, force, (*TEXT_SUFFIXES, *SUFFIXES))
        if output is not None and output.suffix.lower() in SUFFIXES:
            check_extra("roofline")
        with progress("roofline") as tell:
            result = roofline(
                target, input=tuple(input or ()), channels_last=channels_last, threads=threads, budget=budget, refresh=refresh,
                progress=tell,
            )  # fmt: skip
    except ValueError as error:
        give_up(error)
    except Interrupted as stopped:
        result = stopped.done
    warn_of_load(result.machine)
    for note in result.notes:
        notes().print(Text(f"note: {note}"), soft_wrap=True)
    deliver(
        "roofline", result, [table(result)], form, output, show=partial(_show, result, None if everything else 20),
        remarks=(headline(result), *result.notes), writers=plot_writers(lambda: roofline_plot(result)),
    )  # fmt: skip
    if result.interrupted:
        raise typer.Exit(130)


def _show(result: Roofline, most: int | None, console: Console) -> None:
    console.print(Text(headline(result)))
    console.print()
    draw(table(result, most), console)
    if result.interrupted:
        console.print(Text("interrupted", style="bold"))
