"""The pictures of the report as data URIs: photograph, feature maps, and time over cost. Needs the extra ``plot``."""

import base64
import io
import re
from collections.abc import Sequence
from math import log10
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from omniconv.analysis.tables import amount
from omniconv.bench.compare import Features, Row


def _png(rgb: np.ndarray[Any, Any]) -> str:
    """An 8-bit (H, W, 3) array as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def photograph(pixels: Tensor) -> str:
    """A picture (3, H, W) in [0, 1] as a data URI."""
    return _png((pixels.movedim(0, -1).numpy() * 255).round().astype(np.uint8))


def montage(features: Features) -> str:
    """The maps side by side, or one sequence a line: each stretched between its 1st and 99th percentile, in colours."""
    from matplotlib import colormaps

    maps = features.maps.numpy()
    if not features.picture_shaped:
        maps = np.repeat(maps[:, None, : 6 * 64], 10, axis=1)
    axes = tuple(range(1, maps.ndim))
    low, high = (np.nanpercentile(np.nan_to_num(maps), q, axis=axes, keepdims=True) for q in (1, 99))
    level = np.clip((np.nan_to_num(maps) - low) / np.maximum(high - low, 1e-12), 0, 1)
    columns = 4 if features.picture_shaped else 1
    gap = 2
    tiles = [np.pad(colormaps["magma"](tile), ((0, gap), (0, gap), (0, 0))) for tile in level]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    lines = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    return _png((np.concatenate(lines)[:-gap, :-gap] * 255).round().astype(np.uint8))


_THEMES = {
    "light": {"ink": "#1f2430", "faint": "#c9ced8", "picture": "#c2410c", "sequence": "#1d6fb8"},
    "dark": {"ink": "#e6e8ee", "faint": "#454c5c", "picture": "#fb923c", "sequence": "#60b0f4"},
}


def scatter(rows: Sequence[Row], theme: str) -> str:
    """Time over MACs, both logarithmic, as an SVG data URI; empty where nothing was timed."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    points = [(r.macs_dense, 1e3 * r.latency_s.median, r) for r in rows if r.latency_s]
    if not points:
        return ""
    colours = _THEMES[theme]
    with rc_context({"svg.hashsalt": "omniconv", "font.size": 10, "text.color": colours["ink"], "axes.labelcolor": colours["ink"]}):
        figure = Figure(figsize=(8.6, 4.8), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set(xscale="log", yscale="log", xlabel="MACs (dense)", ylabel="time, ms")
        x = [p[0] for p in points]
        y = [p[1] for p in points]
        for axis, unit in ((axes.xaxis, _prefixed), (axes.yaxis, _plain)):
            axis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: unit(value)))
            axis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_xlim(min(x) / 2.2, max(x) * 3.2)
        axes.set_ylim(min(y) / 1.8, max(y) * 1.8)
        _throughput_lines(axes, colours)
        for section, marker in (("picture", "o"), ("sequence", "s")):
            chosen = [(px, py) for px, py, r in points if r.section == section]
            macs, times = [p[0] for p in chosen], [p[1] for p in chosen]
            axes.scatter(macs, times, s=46, marker=marker, color=colours[section], label=section, zorder=3)
        _labels(axes, points, colours)
        axes.tick_params(which="both", colors=colours["ink"])
        axes.grid(which="major", color=colours["faint"], linewidth=0.5)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(colours["ink"])
        axes.legend(frameon=False, labelcolor=colours["ink"], loc="upper left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plain(value: float) -> str:
    return f"{value:g}"


def _prefixed(value: float) -> str:
    return re.sub(r"\.0+(?=\D|$)", "", amount(value))


def _throughput_lines(axes: Any, colours: dict[str, str]) -> None:
    """Diagonals of equal speed: what lies below one is faster than it."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for power in range(-2, 5):
        rate = 10.0**power  # GMAC/s: a time of MACs / (rate · 10^6) ms
        low, high = left / (rate * 1e6), right / (rate * 1e6)
        if high < bottom or low > top:
            continue
        axes.plot([left, right], [low, high], color=colours["faint"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        x = min(right, top * rate * 1e6) * 0.93
        y = x / (rate * 1e6)
        if bottom < y < top and left < x:
            name = f"{rate:g} GMAC/s"
            axes.text(x, y, name, fontsize=8, color=colours["ink"], alpha=0.65, ha="right", va="bottom", zorder=2)


def _labels(axes: Any, points: Sequence[tuple[float, float, Row]], colours: dict[str, str]) -> None:
    """A name beside every point, on the first side where it covers no other name and no point."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    wide, high = 7.6 * 72, 4.0 * 72  # about what the axes measure, in points

    def place(x: float, y: float) -> tuple[float, float]:
        return wide * (log10(x) - log10(left)) / log10(right / left), high * (log10(y) - log10(bottom)) / log10(top / bottom)

    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in (place(x, y) for x, y, _ in points)]
    for x, y, row in sorted(points, key=lambda p: p[0]):
        px, py = place(x, y)
        length = 5.2 * len(row.technique)
        sides = [(8, -4, "left"), (-8, -4, "right"), (0, 8, "center"), (0, -16, "center"), (8, 8, "left"), (8, -15, "left")]
        sides += [(-8, 8, "right"), (-8, -15, "right"), (10, 18, "left"), (10, -26, "left")]
        boxes = []
        for dx, dy, align in sides:
            start = px + dx - {"left": 0.0, "center": length / 2, "right": length}[align]
            boxes.append((start, py + dy, start + length, py + dy + 9))
        free = [i for i, box in enumerate(boxes) if box[0] > 0 and box[2] < wide and not any(_meet(box, other) for other in taken)]
        best = free[0] if free else 0
        taken.append(boxes[best])
        dx, dy, align = sides[best]
        axes.annotate(
            row.technique,
            (x, y),
            (dx, dy),
            textcoords="offset points",
            ha=align,
            va="bottom",
            fontsize=9,
            color=colours[row.section],
        )


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
