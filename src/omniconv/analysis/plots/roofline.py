"""A roofline as a plot: roofs of arithmetic and of every level of memory, layers below them."""

from collections.abc import Sequence
from typing import Any

from omniconv.analysis.layers import shortened
from omniconv.analysis.plots.style import COLOURS, FAINT, INK, PAPER, figure, styled
from omniconv.analysis.roofline import Point, Roofline
from omniconv.analysis.tables import figures

NAMED = 8  # layers with a number and a line beside the plot


def roofline_plot(result: Roofline) -> Any:
    """GFLOP/s over flops a byte, both logarithmic.

    A marker's area grows with the time that its layers take; the numbered ones lose most time below their roof.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    with styled():
        drawn = figure(10.4, 5.2)
        axes, side = drawn.subplots(1, 2, width_ratios=(3.0, 1.45))
        axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity, flops per byte", ylabel="GFLOP/s")
        axes.set_title(f"{result.target}, {result.dtype}", fontsize=11)
        _limits(axes, result)
        _roofs(axes, result)
        colours = _points(axes, result.points)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(numticks=12))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(which="major")
        named = result.furthest[:NAMED]
        _numbers(axes, named, colours)
        _list(side, result, named)
    return drawn


def _limits(axes: Any, result: Roofline) -> None:
    top = result.roofs.rates[result.dtype] / 1e9
    intensities = [p.intensity for p in result.points] or [1.0]
    rates = [p.rate / 1e9 for p in result.points] or [top]
    ridge = result.roofs.rates[result.dtype] / result.roofs.levels[-1].bandwidth
    axes.set_xlim(min(*intensities, ridge / 8) / 1.8, max(*intensities, 2 * ridge) * 1.8)
    axes.set_ylim(min(*rates, top / 10) / 2.2, top * 2.4)


def _roofs(axes: Any, result: Roofline) -> None:
    left, right = axes.get_xlim()
    top = result.roofs.rates[result.dtype] / 1e9
    fastest = max(level.bandwidth for level in result.roofs.levels) / 1e9
    axes.plot([top / fastest, right], [top, top], color=INK, linewidth=1.6, zorder=2)
    box = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.4, "alpha": 0.75}
    axes.annotate(  # over the markers, which crowd below the roof
        f"arithmetic {top:.0f} GFLOP/s", (right, top), (-4, 4), textcoords="offset points", ha="right", va="bottom", fontsize=8.5,
        bbox=box, zorder=5,
    )  # fmt: skip
    for index, level in enumerate(result.roofs.levels):
        bandwidth = level.bandwidth / 1e9
        ridge = top / bandwidth
        if ridge <= left:  # above the roof of arithmetic wherever the plot reaches
            continue
        axes.plot([left, ridge], [left * bandwidth, top], color=INK, linewidth=1.0, linestyle=(0, (5, 2 + index)), zorder=2)
        # below one another at the left end, where the lines are a factor of their bandwidths apart
        x = left * 1.12
        axes.text(
            x, x * bandwidth, f"{level.name} {bandwidth:.0f} GB/s", fontsize=8, rotation=_slope(axes),
            rotation_mode="anchor", ha="left", va="bottom", bbox=box, zorder=3,
        )  # fmt: skip


def _slope(axes: Any) -> float:
    """The angle of bandwidth lines on the page, in degrees."""
    from math import atan2, degrees, log10

    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    return degrees(atan2(4.3 / log10(high / low), 6.3 / log10(right / left)))


def _points(axes: Any, points: Sequence[Point]) -> dict[str, str]:
    """A colour a technique; returns them."""
    total = sum(point.seconds for point in points) or 1.0
    kinds = dict.fromkeys(map(_kind, points))
    colours = {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}
    for kind, colour in colours.items():
        mine = [point for point in points if _kind(point) == kind]
        axes.scatter(
            [p.intensity for p in mine], [p.rate / 1e9 for p in mine], s=[28 + 700 * p.seconds / total for p in mine],
            color=colour, alpha=0.72, linewidths=0.6, edgecolors=PAPER, label=kind, zorder=4,
        )  # fmt: skip
    if points:
        legend = axes.legend(
            loc="lower right", fontsize=8.5, labelspacing=0.35, handletextpad=0.3, frameon=True, framealpha=0.9, edgecolor=FAINT
        )
        for handle in legend.legend_handles:
            handle.set_sizes([36])  # one size, whatever the first layer's is
    return colours


def _kind(point: Point) -> str:
    return point.technique or "other"


def _numbers(axes: Any, named: Sequence[Point], colours: dict[str, str]) -> None:
    for index, point in enumerate(named, 1):
        box = {"facecolor": colours[_kind(point)], "edgecolor": INK, "boxstyle": "circle,pad=0.18", "linewidth": 0.5}
        axes.annotate(
            str(index), (point.intensity, point.rate / 1e9), (0, 0), textcoords="offset points", ha="center", va="center",
            fontsize=7, fontweight="bold", color=PAPER, zorder=6, bbox=box,
        )  # fmt: skip


def _list(side: Any, result: Roofline, named: Sequence[Point]) -> None:
    """The numbered layers in words, beside the plot."""
    side.set_axis_off()
    side.set_title("Most time lost below the roof", fontsize=9.5)
    for index, point in enumerate(named):
        y = 0.97 - 0.105 * index
        side.text(0.0, y, str(index + 1), fontsize=8.5, fontweight="bold", transform=side.transAxes, va="top")
        side.text(0.07, y, shortened(point.names, 36), fontsize=8.5, transform=side.transAxes, va="top")
        words = f"{point.share:.0%} of {point.limit}, {figures(1e3 * point.seconds)} ms"
        side.text(0.07, y - 0.042, words, fontsize=8, color="#5b6474", transform=side.transAxes, va="top")
    roofs = result.roofs
    foot = f"{roofs.cpu}\n{roofs.capability}, {roofs.threads} thread{'s' * (roofs.threads > 1)}, torch {roofs.torch}"
    side.text(0.0, 0.0, foot, fontsize=7.5, color="#5b6474", transform=side.transAxes, va="bottom")
