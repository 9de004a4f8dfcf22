"""A Checkup as a table and in words."""

import re
from functools import partial

from omniconv.analysis.layers import shortened
from omniconv.analysis.tables import Column, Table, figures
from omniconv.bench.checkup import LAST, OURS, STOCK, Checkup, Finding, Quote
from omniconv.timing import WITHIN_NOISE

_FINDINGS: tuple[Column, ...] = (
    Column("layer", "layer", lambda f: " ".join(f.names), lambda f: shortened(f.names, 34)),
    Column("problem", "", lambda f: f.problem, lambda f: f.problem or f.type, under="layer"),
    Column("calls", "calls", lambda f: f.calls, right=True, needs=110),
)
_QUOTES: tuple[Column, ...] = (
    Column("committed", "committed:\ntorch ÷ ours", lambda f: f.quote and f.quote.ratio, lambda f: _quote(f.quote), right=True),
    Column("committed_low", "", lambda f: f.quote and f.quote.low, hidden=True),
    Column("committed_high", "", lambda f: f.quote and f.quote.high, hidden=True),
    Column("committed_source", "", lambda f: f.quote and f.quote.source, hidden=True),
)
_STYLES = {"faster": "green", "slower": "yellow"}


def _measured_columns() -> tuple[Column, ...]:
    return (
        Column("stock_ms", "torch\nms", lambda f: _ms(f, STOCK), lambda f: _figures(_ms(f, STOCK)), right=True),
        *(_beside(name, head) for name, head in {OURS: "ours", STOCK + LAST: "torch\ncl", OURS + LAST: "ours\ncl"}.items()),
        Column("verdict", "", lambda f: f.verdict, hidden=True),
        Column("gained_ms", "gain\nms", lambda f: 1e3 * f.gained, lambda f: _figures(1e3 * f.gained or None), right=True),
        Column("reason", "", lambda f: f.reason, hidden=True),
    )


def _beside(name: str, head: str) -> Column:
    """A candidate beside stock torch."""
    key = f"{re.sub(r'[^a-z]+', '_', name)}_ratio"
    return Column(key, f"{head} ×", partial(_ratio, name), partial(_shown_ratio, name), right=True, style=partial(_style, name))


def _ms(finding: Finding, name: str) -> float | None:
    return None if finding.timings is None or name not in finding.timings else 1e3 * finding.timings[name].median


def _figures(value: float | None) -> str:
    return "–" if value is None else figures(value)


def _ratio(name: str, finding: Finding) -> float | None:
    return None if finding.versus is None or name not in finding.versus else finding.versus[name].ratio


def _shown_ratio(name: str, finding: Finding) -> str:
    ratio = _ratio(name, finding)
    if ratio is None or finding.versus is None:
        return "–"
    return f"{'≈' if finding.versus[name].verdict == WITHIN_NOISE else ''}{ratio:.2f}"


def _style(name: str, finding: Finding) -> str:
    return "" if finding.versus is None or name not in finding.versus else _STYLES.get(finding.versus[name].verdict, "")


def _quote(quote: Quote | None) -> str:
    if quote is None:
        return "–"
    if quote.exact:
        return f"{'' if quote.differs else '≈'}{quote.ratio:.2f}"
    return f"{quote.low:.2f}–{quote.high:.2f} *" if quote.layers > 1 else f"{quote.ratio:.2f} *"


def checkup_tables(result: Checkup) -> list[Table]:
    """The convolutions: where something is measured those that gain most first, else those on slow paths first."""
    slow = Column(
        "slow",
        "slow in torch",
        lambda f: f.slow,
        lambda f: ", ".join(f.slow) or "–",
        folds=True,
        needs=100 if result.measured else 0,
    )
    columns = (*_FINDINGS, slow, *(_measured_columns() if result.measured else _QUOTES))
    found = sorted(result.findings, key=lambda f: (-f.gained, not f.slow))
    return [Table("", columns, found)]


def checkup_remarks(result: Checkup) -> tuple[str, ...]:
    """What the rules mean, where numbers are from, and the verdict."""
    why = {name: reason for f in result.findings for name, reason in zip(f.slow, f.why, strict=True)}
    lines = [f"{name}: {reason}." for name, reason in why.items()]
    sources = dict.fromkeys(f.quote.source for f in result.findings if f.quote is not None)
    if result.measured:
        lines.append(
            "×: how many times as fast as torch in the network's own memory format (cl: channels-last), ≈ within noise. Where "
            f"nothing differs, {result.risk:.0%} of all runs say otherwise of anything."
        )
        absent = {f.reason: f.names[0] for f in reversed(result.findings) if f.reason}
        lines += [f"Not measured: {name}: {reason}." for reason, name in absent.items()]
    elif sources:
        lines.append(
            "committed: eager torch's time over ours, forward, ≈ within noise; * the range over layers like this one, which itself "
            "was not measured. --measure measures it here."
        )
        lines += [f"from {source}" for source in sources]
    return (*lines, *(f"Note: {note}." for note in result.notes), verdict(result))


def verdict(result: Checkup) -> str:
    """One line: how many layers are on slow paths, and what a measurement says of replacing them."""
    slow = sum(len(f.names) for f in result.findings if f.slow)
    words = f"{slow} of {sum(len(f.names) for f in result.findings)} convolutions on slow paths of torch by rule"
    if result.measured:
        faster, slower, noise = (
            sum(len(f.names) for f in result.findings if f.verdict == name) for name in ("faster", "slower", WITHIN_NOISE)
        )
        total = sum(f.calls * f.timings[STOCK].median for f in result.findings if f.timings)
        gained = sum(f.gained for f in result.findings)
        words += f"; measured: omniconv faster in {faster}, torch in {slower}, {noise} within noise"
        if gained:
            words += f"; where it is faster it saves {figures(1e3 * gained)} of {figures(1e3 * total)} ms"
    else:
        words += "; what replacing them gains: --measure"
    return words + ("; interrupted" if result.interrupted else "")
