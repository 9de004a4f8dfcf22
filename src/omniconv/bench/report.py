"""A Comparison as tables, and as one self-contained page: no network, pictures and plot inside."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

from omniconv.analysis.page import environment
from omniconv.analysis.tables import Column, Table, amount, figures
from omniconv.bench.compare import PEER_TOLERANCE, Comparison, Row
from omniconv.bench.plot import montage, photograph, scatter
from omniconv.problem import Problem
from omniconv.techniques import find
from omniconv.timing import Timing

TEMPLATE = "report.html.jinja"
LEGEND = (
    "× std: the layer's time over the standard layer's. × torch: the op's time over plain torch's on the same operands, "
    "≈ where they do not differ beyond noise. Below 1 is faster."
)

LEGEND_OF_DIFFERENCE = f" ≠: plain torch's answer is more than {PEER_TOLERANCE:.0%} away, so its time says nothing."


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
    if row.peer_agrees is False:
        return "≠"
    return _ratio(row.to_peer, noise=row.peer_differs is False)


def _to_peer_style(row: Row) -> str:
    if row.to_peer is None or not row.peer_differs:
        return ""
    return "green" if row.to_peer < 1 else "yellow"


def _share(row: Row) -> str:
    return "–" if row.share is None else f"{max(row.share, row.gradient_share or 0.0):.0%}"


def _latency_ms(quantity: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        return None if row.latency_s is None else 1e3 * float(getattr(row.latency_s, quantity))

    return value


COLUMNS: tuple[Column, ...] = (
    Column("section", "", lambda r: r.section, hidden=True),
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
        _latency_ms("median"),
        _latency,
        right=True,
        style=lambda r: "bold red" if r.status == "failed" else "",
    ),
    Column("to_standard", "× std", lambda r: r.to_standard, lambda r: _ratio(r.to_standard), right=True),
    Column("to_peer", "×\ntorch", lambda r: r.to_peer, _to_peer, right=True, style=_to_peer_style),
    Column("error_share", "error /\nbound", lambda r: r.share, _share, right=True, needs=110),
    Column("latency_q1_ms", "", _latency_ms("low"), hidden=True),
    Column("latency_q3_ms", "", _latency_ms("high"), hidden=True),
    Column("samples", "", lambda r: r.latency_s.samples if r.latency_s else None, hidden=True),
    Column("peer", "", lambda r: r.peer, hidden=True),
    Column("peer_agrees", "", lambda r: r.peer_agrees, hidden=True),
    Column("peer_differs", "", lambda r: r.peer_differs, hidden=True),
    Column("status", "", lambda r: r.status, hidden=True),
    Column("reason", "", lambda r: r.reason, hidden=True),
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
    legend = LEGEND + (LEGEND_OF_DIFFERENCE if any(row.peer_agrees is False for row in result.rows) else "")
    return [*made[:-1], Table(made[-1].title, COLUMNS, made[-1].rows, legend)]


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
    picture: str
    facts: tuple[tuple[str, str], ...]


def report(result: Comparison) -> str:
    """The page.

    Raises:
        ValueError: The extra ``plot`` is not installed.
    """
    check_extra()
    text = (
        environment("omniconv.bench")
        .get_template(TEMPLATE)
        .render(
            result=result,
            headline=headline(result),
            tables=[replace(table, columns=_with_bars(table)) for table in tables(result)],
            pixels=None if result.pixels is None else photograph(result.pixels),
            stem=None if result.stem is None else montage(result.stem),
            cards=[_card(result, index) for index in range(len(result.rows))],
            plots={theme: scatter(result.rows, theme) for theme in ("light", "dark")},
            techniques=len(dict.fromkeys(row.technique for row in result.rows)),
        )
    )
    return str(text).rstrip("\n")


def _with_bars(table: Table) -> tuple[Column, ...]:
    """The columns, with the times drawn as shares of the slowest."""
    slowest = max((row.latency_s.median for row in table.rows if row.latency_s), default=1.0)

    def bar(row: Row) -> float:
        return row.latency_s.median / slowest if row.latency_s else 0.0

    return tuple(replace(column, bar=bar) if column.name == "latency_ms" else column for column in table.columns)


def _card(result: Comparison, index: int) -> _Card:
    row = result.rows[index]
    technique = find(row.technique)
    features = result.features.get(index)
    shape = " × ".join(map(str, technique.output_shape(Problem.parse(row.problem))))
    against = f"{_to_peer(row)} × {row.peer}" if row.to_peer is not None else _to_peer(row)
    facts = (
        ("output", shape),
        ("parameters", f"{row.params:,}"),
        ("MACs", f"{row.macs_dense:,}"),
        ("on real inputs", f"{row.macs_valid:,}"),
        ("receptive field", " × ".join(map(str, row.receptive_field))),
        ("time", f"{_latency(row)} ms" if row.latency_s else _latency(row)),
        ("the op alone", against),
    )
    return _Card(row, row.title, technique.summary, "" if features is None else montage(features), facts)
