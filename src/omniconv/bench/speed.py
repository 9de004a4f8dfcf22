"""A Benchmark as tables, and what the README says of the committed ones."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omniconv.analysis.tables import Column, Table, amount, as_markdown, figures
from omniconv.bench.peers import BOTH, DIRECTIONS
from omniconv.bench.report import milliseconds
from omniconv.bench.results import Benchmark, Measured, Row, fastest, load
from omniconv.bench.runner import HALF
from omniconv.ops.sequence import LAYOUTS
from omniconv.problem import Problem

RESULTS = Path("benchmarks") / "results"
NO_RESULTS = "No results are committed yet: `make bench` measures this machine."

_DIRECTION = {"forward": "forward", BOTH: "forward + backward"}


def group_of(row: Row) -> str:
    """The group in which a row is summed up: half types, float64, or the number of axes."""
    problem = Problem.parse(row.problem)
    if problem.dtype in HALF:
        return ", ".join(HALF)
    return "f64" if problem.dtype == "f64" else f"{problem.rank}-D"


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows by group and direction, in the order of the README: 2-D, 1-D, 3-D, half types, float64."""
    order = ["2-D", "1-D", "3-D", ", ".join(HALF), "f64"]
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((group_of(row), row.direction), []).append(row)
    return {key: found[key] for key in sorted(found, key=lambda key: (order.index(key[0]), DIRECTIONS.index(key[1])))}


def geomean(values: Sequence[float]) -> float:
    """The geometric mean.

    >>> geomean([1.0, 4.0])
    2.0
    """
    return math.exp(math.fsum(map(math.log, values)) / len(values))


@dataclass(frozen=True)
class Summary:
    """A group in numbers; ratios are the best peer's time over ours. ``losses`` are the rows below 1, the worst first."""

    name: str
    shapes: int
    ratio: float | None
    worst: float | None
    losses: tuple[Row, ...]
    to_floor: float | None
    torch_ratio: float | None
    torch_worst: float | None
    f32_ratio: float | None
    f32_worst: float | None
    cold_ratio: float | None
    scaling: float | None
    layouts: Mapping[str, float]


def summaries(rows: Iterable[Row]) -> tuple[Summary, ...]:
    """Every group and direction of the verified rows in numbers."""
    made = []
    for (group, direction), members in grouped(row for row in rows if row.status == "verified").items():

        def mean(values: Iterable[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return geomean(known) if known else None

        ratios = {row.ratio: row for row in members if row.ratio is not None}
        eager = [row.torch_ratio for row in members if row.torch_ratio is not None]
        half = [row.f32_ratio for row in members if row.f32_ratio is not None]
        by_layout = {layout: [row.layouts[layout] for row in members if layout in row.layouts] for layout in LAYOUTS}
        losses = sorted((row for row in members if row.ratio is not None and row.ratio < 1), key=lambda row: row.ratio or 0.0)
        made.append(
            Summary(
                f"{group} {_DIRECTION[direction]}", len(members), mean(r.ratio for r in members), min(ratios, default=None),
                tuple(losses), mean(r.to_floor for r in members), mean(eager), min(eager, default=None),
                mean(half), min(half, default=None), mean(r.cold_ratio for r in members), mean(r.scaling for r in members),
                {layout: geomean(ratios) for layout, ratios in by_layout.items() if ratios},
            )
        )  # fmt: skip
    return tuple(made)


def times(value: float | None, noise: bool = False) -> str:
    """A ratio with two decimals, ≈ before it where it is within noise.

    >>> times(1.234), times(0.999, noise=True), times(None), times(123.4)
    ('1.23', '≈1.00', '–', '123')
    """
    if value is None:
        return "–"
    return f"{'≈' if noise else ''}{value:.2f}" if value < 100 else f"{value:.0f}"


def _ours(row: Row) -> str:
    if row.status == "failed":
        return "FAILED"
    best = fastest(row.ours)
    return "–" if best is None or best.hot is None else milliseconds(best.hot)


def _theirs(row: Row) -> str:
    best = fastest(row.peers)
    if best is not None and best.hot is not None:
        return milliseconds(best.hot)
    return "≠" if any(way.agrees is False for way in row.peers) else "–"


def _peer(row: Row) -> str:
    wrong = [f"≠ {way.name}" for way in row.peers if way.agrees is False]
    return "; ".join(([row.best_peer] if row.best_peer else []) + wrong)


def _median_ms(
    ways: Callable[[Row], Sequence[Measured]], cold: bool = False, quantity: str = "median"
) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        best = fastest(ways(row), cold=cold)
        if best is None:
            return None
        return 1e3 * float(getattr(best.cold if cold else best.hot, quantity))

    return value


def _in_layout(layout: str) -> Callable[[Row], float | None]:
    return lambda row: row.layouts.get(layout)


def _style(row: Row) -> str:
    if row.ratio is None or not row.differs:
        return ""
    return "green" if row.ratio > 1 else "yellow"


def _columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """Those that have something to say of the rows; machines get all."""
    half, cold = any(row.f32 for row in rows), any(row.cold_ratio is not None for row in rows)
    scaled = any(row.scaling is not None for row in rows)
    return (
        Column("network", "network", lambda r: r.network, under="problem"),
        Column("problem", "layer", lambda r: r.problem, lambda r: r.problem.partition(" ")[2], folds=True),
        Column("direction", "", lambda r: r.direction, hidden=True),
        Column("ours_ms", "ours\nms", _median_ms(lambda r: r.ours), _ours, right=True),
        Column("peer_ms", "best peer\nms", _median_ms(lambda r: r.peers), _theirs, right=True),
        Column("peer", "", lambda r: r.best_peer, _peer, under="peer_ms"),
        Column("ratio", "ratio", lambda r: r.ratio, lambda r: times(r.ratio, r.differs is False), right=True, style=_style),
        Column("cold_ratio", "cold\nratio", lambda r: r.cold_ratio, lambda r: times(r.cold_ratio), right=True, hidden=not cold),
        Column("to_floor", "×\nfloor", lambda r: r.to_floor, lambda r: times(r.to_floor), right=True),
        Column("limit", "limit", lambda r: r.floor and r.floor.limit, needs=100),
        Column("torch_ratio", "torch\nratio", lambda r: r.torch_ratio, lambda r: times(r.torch_ratio), right=True, needs=100),
        Column("f32_ratio", "our f32\nratio", lambda r: r.f32_ratio, lambda r: times(r.f32_ratio), right=True, hidden=not half),
        Column("scaling", "scaling", lambda r: r.scaling, lambda r: times(r.scaling), right=True, hidden=not scaled, needs=100),
        Column("macs", "MACs", lambda r: r.macs, lambda r: amount(r.macs), right=True, needs=100),
        Column("bytes", "MB", lambda r: r.bytes, lambda r: figures(r.bytes / 1e6), right=True, needs=120),
        Column("format", "", lambda r: r.best, hidden=True),
        *(Column(f"ratio_{layout}", "", _in_layout(layout), hidden=True) for layout in LAYOUTS if any(r.layouts for r in rows)),
        Column("ours_q1_ms", "", _median_ms(lambda r: r.ours, quantity="low"), hidden=True),
        Column("ours_q3_ms", "", _median_ms(lambda r: r.ours, quantity="high"), hidden=True),
        Column("peer_q1_ms", "", _median_ms(lambda r: r.peers, quantity="low"), hidden=True),
        Column("peer_q3_ms", "", _median_ms(lambda r: r.peers, quantity="high"), hidden=True),
        Column("ours_cold_ms", "", _median_ms(lambda r: r.ours, cold=True), hidden=True),
        Column("peer_cold_ms", "", _median_ms(lambda r: r.peers, cold=True), hidden=True),
        Column("cold_to_floor", "", lambda r: r.cold_to_floor, hidden=True),
        Column("differs", "", lambda r: r.differs, hidden=True),
        Column("error_share", "", lambda r: r.share, hidden=True),
        Column("gradient_error_share", "", lambda r: r.gradient_share, hidden=True),
        Column("status", "", lambda r: r.status, hidden=True),
        Column("reason", "", lambda r: r.reason, hidden=True),
    )


def tables(result: Benchmark) -> list[Table]:
    """A table for every group and direction."""
    return [
        Table(f"{group}, {_DIRECTION[direction]}", _columns(rows), rows)
        for (group, direction), rows in grouped(result.rows).items()
    ]


def headline(result: Benchmark) -> str:
    """What was measured, in one line."""
    s, threads = result.settings, result.settings.threads
    return f"{s.technique} ({result.path}) on {result.machine.cpu}, {threads} thread{'s' * (threads > 1)}; {_peaks(result)}"


def _peaks(result: Benchmark) -> str:
    levels = ", ".join(f"{level.name} {level.bandwidth / 1e9:.0f}" for level in result.peaks.levels)
    return f"peak {result.peaks.flops / 1e9:.0f} GFLOP/s, copies {levels} GB/s"


def remarks(result: Benchmark) -> tuple[str, ...]:
    """What must be said below the tables: who is absent and why, how to read, and the verdict."""
    missing = {absent.reason: {absent.name: None} for absent in result.absent}
    for row in result.rows:
        for way in row.peers:
            if way.agrees is None and way.reason:
                reason = f"{way.reason} ({Problem.parse(row.problem).dtype})"
                missing.setdefault(reason, {})[_without_layout(way.name)] = None
    lines = sorted(f"Absent: {', '.join(names)}: {reason}." for reason, names in missing.items())
    return (*lines, *result.notes, verdict(result))


def _without_layout(name: str) -> str:
    before, _, last = name.rpartition(" ")
    return before if last in LAYOUTS else name


def verdict(result: Benchmark) -> str:
    """One line: how much was verified, how the groups compare, what failed."""
    done = sum(row.status == "verified" for row in result.rows)
    words = f"{done}{'' if done == len(result.rows) else f' of {len(result.rows)}'} verified"
    for s in summaries(result.rows):
        words += f"; {s.name} × {times(s.ratio)}"
    for failure in dict.fromkeys(f"{row.problem}: {row.reason}" for row in result.failed):
        words += f"; FAILED: {failure}"
    return words + ("; interrupted" if result.interrupted else "")


def _readme_columns(known: Sequence[Summary]) -> tuple[Column, ...]:
    """Every time has the same columns but those of which nothing is known in any group: scaling and layouts."""
    scaled, layouts = any(s.scaling is not None for s in known), [n for n in LAYOUTS if any(n in s.layouts for s in known)]
    scaling = Column("scaling", "one thread ÷ ours", lambda s: s.scaling, lambda s: times(s.scaling), right=True)
    return (*_README, *map(_of_layout, layouts), *[scaling] * scaled)


def _of_layout(layout: str) -> Column:
    """The best peer in a layout over ours in the same."""
    return Column(layout, f"both in {layout}", lambda s: s.layouts.get(layout), lambda s: times(s.layouts.get(layout)), right=True)


_README: tuple[Column, ...] = (
    Column("group", "group", lambda s: s.name),
    Column("shapes", "layers", lambda s: s.shapes, right=True),
    Column("ratio", "best peer ÷ ours, geomean", lambda s: s.ratio, lambda s: times(s.ratio), right=True),
    Column("worst", "worst", lambda s: s.worst, lambda s: times(s.worst), right=True),
    Column("torch", "torch ÷ ours", lambda s: s.torch_ratio, lambda s: times(s.torch_ratio), right=True),
    Column("torch_worst", "worst", lambda s: s.torch_worst, lambda s: times(s.torch_worst), right=True),
    Column("f32", "our f32 ÷ ours", lambda s: s.f32_ratio, lambda s: times(s.f32_ratio), right=True),
    Column("f32_worst", "worst", lambda s: s.f32_worst, lambda s: times(s.f32_worst), right=True),
    Column("floor", "ours ÷ floor", lambda s: s.to_floor, lambda s: times(s.to_floor), right=True),
)


def readme_table(results: Sequence[Benchmark]) -> str:
    """The README's words on these results: machine, groups, and every loss by name."""
    if not results:
        return NO_RESULTS
    return "\n\n".join(map(_readme_section, results))


def _readme_section(result: Benchmark) -> str:
    known = summaries(result.rows)
    packages = ", ".join(f"{p.name} {p.version}" for p in result.packages if p.version and p.name not in ("omniconv", "onnx"))
    threads = result.settings.threads
    lines = [
        f"{result.machine.cpu} ({result.machine.capability}), {threads} thread{'s' * (threads > 1)}; {packages}; {_peaks(result)}.",
        as_markdown([Table("", _readme_columns(known), known)]),
    ]
    losses = [f"- {s.name}: {'; '.join(map(_loss, s.losses))}" for s in known if s.losses]
    lines.append("\n".join(["Losses, best peer ÷ ours (≈ within noise):", "", *losses]) if losses else "Losses: none.")
    return "\n\n".join(lines)


def _loss(row: Row) -> str:
    return f"{row.network} `{row.problem.partition(' ')[2]}` {times(row.ratio, row.differs is False)} ({row.best_peer})"


def committed(technique: str, repository: Path) -> tuple[Path, ...]:
    """The committed results of a technique, in order of their names."""
    return tuple(sorted((repository / RESULTS).glob(f"{technique}-*.json")))


def update_readme(technique: str, readme: Path) -> bool:
    """Puts the committed results beside a README between its marks; returns whether that changed it.

    Raises:
        ValueError: The README lacks the marks, or a result is malformed.
    """
    return fill_readme(technique, readme, lambda: readme_table([load(path) for path in committed(technique, readme.parent)]))


def fill_readme(mark: str, readme: Path, make: Callable[[], str]) -> bool:
    """Puts what is made between the marks of this name in a README; returns whether that changed it.

    Raises:
        ValueError: The README lacks the marks.
    """
    begin, end = f"<!-- bench:{mark} -->", f"<!-- /bench:{mark} -->"
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"bench: the README must be readable, got '{readme}' ({error.strerror})") from None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"bench: the README must have one '{begin}' before one '{end}', got '{readme}'")
    before, after = text.partition(begin)[0], text.partition(end)[2]
    new = f"{before}{begin}\n{make()}\n{end}{after}"
    if new == text:
        return False
    readme.write_text(new, encoding="utf-8")
    return True
