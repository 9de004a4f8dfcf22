"""A Comparison as tables, and as one self-contained page: no network, pictures and plot inside."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import log10
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from omniconv.analysis.tables import Column, Table, amount, figures
from omniconv.bench.compare import Comparison, Features, Row
from omniconv.problem import Problem
from omniconv.techniques import find
from omniconv.timing import Timing

TEMPLATE = "report.html.jinja"
LEGEND = (
    "× std: the layer's time over the standard layer's. × torch: the op's time over plain torch's on the same operands, "
    "≈ where they do not differ beyond noise. Below 1 is faster."
)


def _latency(row: Row) -> str:
    if row.status == "failed":
        return "FAILED"
    return "–" if row.latency_s is None else milliseconds(row.latency_s)


def milliseconds(timing: Timing) -> str:
    """Median ± half the interquartile range.

    >>> milliseconds(Timing(0.00512, 0.0050, 0.0052, samples=9, repeats=1))
    '5.12 ±0.10'
    """
    median = figures(1e3 * timing.median)
    decimals = len(median.partition(".")[2])
    return f"{median} ±{500 * timing.spread:.{decimals}f}"


def _ratio(value: float | None, noise: bool | None = False) -> str:
    return "–" if value is None else f"{'≈' if noise else ''}{value:.2f}"


def _to_peer(row: Row) -> str:
    return _ratio(row.to_peer, noise=row.peer_differs is False)


def _to_peer_style(row: Row) -> str:
    if row.to_peer is None or not row.peer_differs:
        return ""
    return "green" if row.to_peer < 1 else "yellow"


def _share(row: Row) -> str:
    return "–" if row.share is None else f"{max(row.share, row.gradient_share or 0.0):.0%}"


def _timing(name: str, of: Callable[[Row], Timing | None]) -> tuple[Callable[[Row], float | None], ...]:
    def part(field: str) -> Callable[[Row], float | None]:
        def value(row: Row) -> float | None:
            timing = of(row)
            return None if timing is None else 1e3 * float(getattr(timing, field))

        return value

    return tuple(part(field) for field in ("median", "low", "high"))


_LATENCY = _timing("latency", lambda row: row.latency_s)

COLUMNS: tuple[Column, ...] = (
    Column("technique", "technique", lambda r: r.technique, style=lambda r: "bold"),
    Column("problem", "geometry", lambda r: r.problem, lambda r: r.problem.partition(" ")[2], under="technique"),
    Column("params", "params", lambda r: r.params, lambda r: amount(r.params), right=True),
    Column("macs_dense", "MACs", lambda r: r.macs_dense, lambda r: amount(r.macs_dense), right=True),
    Column("macs_valid", "valid\nMACs", lambda r: r.macs_valid, lambda r: amount(r.macs_valid), right=True, needs=94),
    Column(
        "receptive_field",
        "field",
        lambda r: r.receptive_field,
        lambda r: "×".join(map(str, r.receptive_field)),
        right=True,
        needs=86,
    ),
    Column("bytes", "MB", lambda r: r.bytes, lambda r: figures(r.bytes / 1e6), right=True, needs=102),
    Column(
        "latency_ms",
        "time\nms",
        _LATENCY[0],
        _latency,
        right=True,
        style=lambda r: "bold red" if r.status == "failed" else "",
    ),
    Column("to_standard", "× std", lambda r: r.to_standard, lambda r: _ratio(r.to_standard), right=True),
    Column("to_peer", "×\ntorch", lambda r: r.to_peer, _to_peer, right=True, style=_to_peer_style),
    Column("error_share", "error/\nbound", lambda r: r.share, _share, right=True, needs=110),
)

_FOR_MACHINES: tuple[Column, ...] = (
    Column("section", "section", lambda r: r.section),
    *COLUMNS,
    Column("latency_q1_ms", "", _LATENCY[1]),
    Column("latency_q3_ms", "", _LATENCY[2]),
    Column("peer", "", lambda r: r.peer),
    Column("peer_differs", "", lambda r: r.peer_differs),
    Column("status", "", lambda r: r.status),
    Column("reason", "", lambda r: r.reason),
)


def headline(result: Comparison) -> str:
    """What was compared, in one line."""
    s = result.settings
    what = "forward + backward" if s.backward else "forward"
    form = ", channels-last" if s.channels_last else ""
    return (
        f"{result.picture} → {s.batch} × {s.channels} maps of {s.size} × {s.size}, kernel {s.kernel}, {s.dtype}{form}; {what} on "
        f"{result.machine.threads} thread{'s' * (result.machine.threads > 1)}"
    )


def tables(result: Comparison) -> list[Table]:
    """A table for the picture and one for the sequence."""
    steps = {Problem.parse(row.problem).size[0] for row in result.rows if row.section == "sequence"}
    titles = {
        "picture": f"Picture: {result.picture}",
        "sequence": f"Sequence: {result.sequence}, {', '.join(map(str, sorted(steps)))} steps",
    }
    sections = {section: [row for row in result.rows if row.section == section] for section in titles}
    made = [Table(titles[section], COLUMNS, rows) for section, rows in sections.items() if rows]
    return [*made[:-1], Table(made[-1].title, COLUMNS, made[-1].rows, LEGEND)]


def check_extra() -> None:
    """Raises ValueError where what a page needs is not installed."""
    for package in ("matplotlib", "jinja2"):
        if find_spec(package) is None:
            raise ValueError(f"compare: a report needs the extra 'plot' (pip install \"omniconv[plot]\"), got no {package}")


@dataclass(frozen=True)
class _Card:
    """What the page shows of one row."""

    row: Row
    title: str
    summary: str
    shape: str
    picture: str
    facts: tuple[tuple[str, str], ...]


def report(result: Comparison) -> str:
    """The page.

    Raises:
        ValueError: The extra ``plot`` is not installed.
    """
    check_extra()
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("omniconv.bench", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    slowest = {
        section: max((r.latency_s.median for r in result.rows if r.section == section and r.latency_s), default=0.0)
        for section in ("picture", "sequence")
    }
    return environment.get_template(TEMPLATE).render(
        result=result,
        headline=headline(result),
        tables=tables(result),
        bar=lambda row: 100 * row.latency_s.median / slowest[row.section] if row.latency_s else 0,
        pixels=None if result.pixels is None else _png(_colours(result.pixels)),
        stem=None if result.stem is None else _montage(result.stem),
        cards=[_card(result, index) for index in range(len(result.rows))],
        plots={theme: _plot(result.rows, theme) for theme in ("light", "dark")},
        techniques=len(dict.fromkeys(row.technique for row in result.rows)),
    )


def _card(result: Comparison, index: int) -> _Card:
    row = result.rows[index]
    technique = find(row.technique)
    features = result.features.get(index)
    shape = " × ".join(map(str, technique.output_shape(Problem.parse(row.problem))))
    facts = (
        ("parameters", f"{row.params:,}"),
        ("MACs", f"{row.macs_dense:,}"),
        ("on real inputs", f"{row.macs_valid:,}"),
        ("receptive field", " × ".join(map(str, row.receptive_field))),
        ("time", f"{_latency(row)} ms" if row.latency_s else _latency(row)),
    )
    return _Card(row, row.title, technique.summary, shape, "" if features is None else _montage(features), facts)


def _png(rgb: np.ndarray[Any, Any]) -> str:
    """An 8-bit (H, W, 3) array as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colours(pixels: Tensor) -> np.ndarray[Any, Any]:
    return (pixels.movedim(0, -1).numpy() * 255).round().astype(np.uint8)


def _montage(features: Features) -> str:
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


def _plot(rows: Sequence[Row], theme: str) -> str:
    """Time over MACs, both logarithmic, as an SVG data URI; empty where nothing was timed."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

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
        axes.set_xlim(min(x) / 2.2, max(x) * 3.2)
        axes.set_ylim(min(y) / 1.8, max(y) * 1.8)
        _throughput_lines(axes, colours)
        for section, marker in (("picture", "o"), ("sequence", "s")):
            chosen = [(px, py) for px, py, r in points if r.section == section]
            macs, times = [p[0] for p in chosen], [p[1] for p in chosen]
            axes.scatter(macs, times, s=46, marker=marker, color=colours[section], label=section, zorder=3)
        _labels(figure, axes, points, colours)
        axes.tick_params(which="both", colors=colours["ink"])
        axes.grid(which="major", color=colours["faint"], linewidth=0.5)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(colours["ink"])
        axes.legend(frameon=False, labelcolor=colours["ink"], loc="upper left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


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


def _labels(figure: Any, axes: Any, points: Sequence[tuple[float, float, Row]], colours: dict[str, str]) -> None:
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
