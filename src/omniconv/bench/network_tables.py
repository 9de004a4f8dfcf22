"""A NetworkBenchmark as tables and in words."""

import re
from dataclasses import dataclass
from functools import partial

from omniconv.analysis.layers import shortened
from omniconv.analysis.tables import Column, Table, amount, figures
from omniconv.bench.network import NetworkBenchmark, Part
from omniconv.bench.report import milliseconds
from omniconv.timing import LEAST, WITHIN_NOISE, Timing, Versus

_STYLES = {"faster": "green", "slower": "yellow"}


@dataclass(frozen=True)
class _Candidate:
    """One line of the first table."""

    name: str
    timing: Timing
    versus: Versus | None


_WHOLE: tuple[Column, ...] = (
    Column("candidate", "the whole network", lambda c: c.name, style=lambda c: "bold"),
    Column("ms", "ms", lambda c: 1e3 * c.timing.median, lambda c: milliseconds(c.timing), right=True),
    Column("ratio", "× the first", lambda c: c.versus and c.versus.ratio, lambda c: _interval(c.versus), right=True),
    Column("low", "", lambda c: c.versus and c.versus.low, hidden=True),
    Column("high", "", lambda c: c.versus and c.versus.high, hidden=True),
    Column(
        "verdict", "", lambda c: c.versus and c.versus.verdict, lambda c: c.versus.verdict if c.versus else "",
        style=lambda c: _STYLES.get(c.versus.verdict, "") if c.versus else "",
    ),
)  # fmt: skip


def _interval(versus: Versus | None) -> str:
    """1.31 (1.28–1.35)."""
    if versus is None:
        return ""
    return f"{versus.ratio:.2f}" + ("" if versus.low is None else f" ({versus.low:.2f}–{versus.high:.2f})")


def _median(name: str, part: Part) -> float | None:
    return 1e3 * part.timings[name].median if name in part.timings else None


def _ratio(name: str, part: Part) -> float | None:
    return part.versus[name].ratio if name in part.versus else None


def _ratio_text(name: str, part: Part) -> str:
    versus = part.versus.get(name)
    return "–" if versus is None else f"{'≈' if versus.verdict == WITHIN_NOISE else ''}{versus.ratio:.2f}"


def _style(name: str, part: Part) -> str:
    return _STYLES.get(part.versus[name].verdict, "") if name in part.versus else ""


def _verdict(name: str, part: Part) -> str | None:
    return part.versus[name].verdict if name in part.versus else None


def _columns(result: NetworkBenchmark) -> tuple[Column, ...]:
    names = list(dict.fromkeys(name for part in result.layers for name in part.timings))
    first, others = names[:1], names[1:]
    columns = [
        Column("layer", "layer", lambda p: " ".join(p.names), lambda p: shortened(p.names, 34)),
        Column("problem", "", lambda p: p.problem, lambda p: p.problem or p.type, under="layer"),
        Column("technique", "technique", lambda p: p.technique, needs=110),
        Column("calls", "calls", lambda p: p.calls, right=True, needs=90),
        Column("macs", "MACs", lambda p: p.macs, lambda p: amount(p.macs), right=True, needs=90),
    ]
    for name in first:
        columns.append(Column(f"{name}_ms", f"{name}\nms", partial(_median, name), partial(_ms, name), right=True))
    for name in others:
        key, head = re.sub(r"\W+", "_", name), name.partition(",")[0].replace("-", "\n-")
        columns += [
            Column(f"{key}_ms", "", partial(_median, name), hidden=True),
            Column(
                f"{key}_ratio", f"{head} ×", partial(_ratio, name), partial(_ratio_text, name), right=True,
                style=partial(_style, name),
            ),
            Column(f"{key}_verdict", "", partial(_verdict, name), hidden=True),
        ]  # fmt: skip
    columns.append(Column("share", "share", lambda p: p.share, lambda p: "–" if p.share is None else f"{p.share:.1%}", right=True))
    return tuple(columns)


def _ms(name: str, part: Part) -> str:
    value = _median(name, part)
    return "–" if value is None else figures(value)


def network_tables(result: NetworkBenchmark) -> list[Table]:
    """The whole network by candidate, then its layers, those that take most time first."""
    made = []
    if result.whole is not None:
        lines = [_Candidate(name, timing, result.whole.versus.get(name)) for name, timing in result.whole.timings.items()]
        made.append(Table("", _WHOLE, lines))
    if result.layers:
        made.append(Table("", _columns(result), sorted(result.layers, key=lambda part: -(part.share or 0.0))))
    return made


def network_headline(result: NetworkBenchmark) -> str:
    """What was measured where, in one line."""
    threads = result.settings.threads
    return (
        f"{result.target} ({result.source}) on {' '.join(result.inputs)}, {result.machine.cpu}, "
        f"{threads} thread{'s' * (threads > 1)}, torch {result.machine.torch}"
    )


def network_remarks(result: NetworkBenchmark) -> tuple[str, ...]:
    """How to read the tables, what was noted, and the verdict."""
    legend = (
        f"×: how many times as fast as the first: median over rounds in turns, with the interval that holds it; ≈ within noise, "
        f"not beyond 1 by {LEAST:.0%}. Where nothing differs, {result.settings.risk:.0%} of all runs say "
        f"otherwise of anything. share: time of all calls over the whole network's. MACs on real inputs."
    )
    against = () if result.settings.against is None else (f"other: {result.settings.against}.",)
    return (legend, *against, *(f"Note: {note}." for note in result.notes), verdict(result))


def verdict(result: NetworkBenchmark) -> str:
    """One line: what is faster or slower than the first, whole and by layers."""
    words = []
    if result.whole is not None:
        for name, versus in result.whole.versus.items():
            times = "" if versus.verdict == WITHIN_NOISE else f" × {versus.ratio:.2f}"
            words.append(f"{name}: {versus.verdict}{times}")
    counts: dict[str, int] = {}
    for part in result.layers:
        for versus in part.versus.values():
            counts[versus.verdict] = counts.get(versus.verdict, 0) + 1
    layers = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    words += [f"layers: {layers}"] * bool(layers)
    return "; ".join(words or ["measured"]) + ("; interrupted" if result.interrupted else "")
