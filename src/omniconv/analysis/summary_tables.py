"""A Summary for people: the tree or the costliest first, shares as bars, and the totals in lines below."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from omniconv.analysis.cost import Counts
from omniconv.analysis.summary import Line, Summary
from omniconv.analysis.tables import Column, Table, amount, figures

# what people sort by -> the field
METRICS = {
    "params": "params",
    "macs": "macs_dense",
    "valid": "macs_valid",
    "flops": "flops",
    "bytes": "bytes_min",
    "moved": "bytes_impl",
    "intensity": "intensity",
    "backward": "backward",
}
WORDS = {
    "params": "parameters",
    "macs_dense": "MACs",
    "macs_valid": "MACs on real inputs",
    "flops": "flops",
    "bytes_min": "bytes at least",
    "bytes_impl": "bytes as run",
    "intensity": "flops a byte",
    "backward": "MACs backward",
}
MOST_LINES = 60  # of a tree whose depth is not given
MARKS = {"exact": "", "estimate": "~", "lower_bound": "≥", "unknown": "?"}


@dataclass(frozen=True)
class Shown:
    """A line as it stands in a table: what its first cell says, and its share of the whole (or of the largest) in [0, 1]."""

    line: Line
    label: str
    share: float
    bar: float


def marked(value: float, status: str) -> str:
    """An amount with what its status puts before it; a question mark in place of what is unknown.

    >>> marked(36928, "exact"), marked(36928, "lower_bound"), marked(0, "unknown")
    ('36.9k', '≥36.9k', '?')
    """
    return MARKS[status] if status == "unknown" else MARKS[status] + amount(value)


def of(metric: str, line: Line | Summary) -> float:
    """A line's amount of a metric."""
    if metric == "backward":
        return line.backward.macs_dense if line.backward is not None else 0
    return float(getattr(line, metric))


def _cell(metric: str) -> Callable[[Shown], str]:
    def text(row: Shown) -> str:
        value, status = getattr(row.line, metric), row.line.status[metric]
        return "" if value == 0 and status == "exact" else marked(value, status if status != "estimate" else "exact")

    return text


def _megabytes(row: Shown) -> str:
    return "" if not row.line.bytes_min else MARKS[row.line.status["bytes_min"]] + figures(row.line.bytes_min / 1e6)


def _share(row: Shown) -> str:
    if not row.share:
        return ""
    return f"{100 * row.share:.0f} %" if row.share >= 0.0995 else f"{100 * row.share:.1f} %"


def _number(name: str, head: str, metric: str, needs: int = 0) -> Column:
    return Column(name, head, lambda row: getattr(row.line, metric), _cell(metric), right=True, needs=needs)


def _hidden(name: str, value: Callable[[Line], object]) -> Column:
    return Column(name, "", lambda row: value(row.line), hidden=True)


def _status(metric: str) -> Column:
    return _hidden(f"{metric}_status", lambda line: line.status[metric])


def _kind(row: Shown) -> str:
    if row.line.technique is None and row.line.name.endswith(f":{row.line.type}"):
        return "op"
    return row.line.technique or (row.line.type if row.line.name else "")


def _intensity(row: Shown) -> str:
    return figures(row.line.intensity) if row.line.flops else ""


def _backward_macs(row: Shown) -> str:
    return amount(int(of("backward", row.line))) if of("backward", row.line) else ""


def _columns(metric: str, backward: bool, tree: bool) -> tuple[Column, ...]:
    visible = (
        Column("layer", "layer", lambda row: row.line.name, lambda row: row.label, folds=not tree, guides=tree),
        Column("kind", "", _kind, folds=True, style=lambda row: "bold" if row.line.technique else "dim"),
        Column("output", "output", lambda row: row.line.output, lambda row: "×".join(map(str, row.line.output or ())), needs=3),
        _number("params", "params", "params"),
        _number("macs_dense", "MACs", "macs_dense"),
        _number("macs_valid", "valid\nMACs", "macs_valid", needs=4),
        Column("bytes_min", "MB", lambda row: row.line.bytes_min, _megabytes, right=True),
        Column("intensity", "flop/B", lambda row: row.line.intensity, _intensity, right=True, needs=2),
        Column(
            "macs_backward", "MACs\nback", lambda row: of("backward", row.line), _backward_macs, right=True, hidden=not backward
        ),
        Column("share", f"share of\n{WORDS[metric]}", lambda row: row.share, _share, right=True, bar=lambda row: row.bar),
    )
    more = ("type", "technique", "problem", "depth", "leaf", "calls", "ops", "flops", "bytes_impl")
    hidden = [_hidden(name, attrgetter(name)) for name in more]
    return (*visible, *hidden, *map(_status, ("macs_dense", "macs_valid", "flops", "bytes_min")))


def deepest(result: Summary) -> int:
    """The depth of the tree."""
    return max(line.depth for line in result.lines)


def readable_depth(result: Summary) -> int:
    """The deepest at which the tree keeps within a screen or two."""
    depths = [line.depth for line in result.lines]
    fitting = [d for d in range(1, max(depths) + 1) if sum(depth <= d for depth in depths) <= MOST_LINES]
    return max(fitting, default=1)


def tree_table(result: Summary, depth: int | None = None, metric: str = "macs_dense") -> Table:
    """The tree down to a depth, by default as deep as is readable."""
    wanted = readable_depth(result) if depth is None else depth
    lines = [line for line in result.lines if line.depth <= wanted]
    metric = metric if of(metric, result) else "params"
    whole = of(metric, result) or 1.0
    rows = []
    for line, guides in zip(lines, guides_of([line.depth for line in lines]), strict=True):
        label = line.name.rpartition(":")[2].rpartition(".")[2] if line.name else line.type
        share = min(of(metric, line) / whole, 1.0)
        rows.append(Shown(line, guides + label, share, share))
    below = deepest(result)
    caption = f"{wanted} of {below} levels: --depth {below} shows all" if wanted < below else ""
    return Table("", _columns(metric, result.backward is not None, tree=True), rows, caption)


def costliest_table(result: Summary, metric: str, most: int | None = None) -> Table:
    """The leaves alone, the costliest first."""
    leaves = sorted((line for line in result.lines if line.leaf), key=lambda line: -of(metric, line))
    shown = leaves if most is None else leaves[:most]
    whole = sum(of(metric, line) for line in leaves) or 1.0
    largest = of(metric, leaves[0]) or 1.0 if leaves else 1.0
    rows = [Shown(line, line.name or line.type, of(metric, line) / whole, of(metric, line) / largest) for line in shown]
    columns = _columns(metric, result.backward is not None, tree=False)
    if metric == "intensity":  # shares of it mean nothing
        columns = tuple(
            replace(c, hidden=c.name == "share" or c.hidden, needs=0 if c.name == "intensity" else c.needs) for c in columns
        )
    rest = len(leaves) - len(shown)
    caption = (
        f"and {rest} more, {sum(of(metric, line) for line in leaves[len(shown) :]) / whole:.0%} of the {WORDS[metric]}"
        if rest
        else ""
    )
    return Table("", columns, rows, caption if metric != "intensity" or not rest else f"and {rest} more")


def guides_of(depths: Sequence[int]) -> list[str]:
    """The lines that draw a tree before its names, depth first.

    >>> guides_of([0, 1, 2, 1])
    ['', '├ ', '│ └ ', '└ ']
    """
    made = []
    for i, depth in enumerate(depths):
        later = depths[i + 1 :]
        words = []
        for level in range(1, depth + 1):
            until = next((n for n, d in enumerate(later) if d < level), len(later))
            more = level in later[:until]
            words.append(("├ " if more else "└ ") if level == depth else ("│ " if more else "  "))
        made.append("".join(words))
    return made


def headline(result: Summary) -> str:
    """What was counted, in one line."""
    return f"{result.target} ({result.source}), input {', '.join(result.inputs) or 'none'}"


def totals(result: Summary) -> list[str]:
    """The totals, the backward pass, what has no formula, and the notes."""
    s = result.status
    first = [
        f"{result.params:,} parameters",
        f"{marked(result.macs_dense, s['macs_dense'])} MACs",
        f"{marked(result.macs_valid, s['macs_valid'])} of them on real inputs",
        f"{marked(result.flops, s['flops'])} flops",
    ]
    moved = [
        f"{marked(float(result.bytes_min), s['bytes_min'])}B moved at least",
        f"{marked(float(result.bytes_impl), s['bytes_impl'])}B as run",
        f"{figures(result.intensity)} flop/B",
        f"activations peak at {marked(float(result.peak_activation), s['peak_activation'])}B",
    ]
    lines = ["total: " + " · ".join(first), "memory: " + " · ".join(moved)]
    if result.backward is not None:
        lines.append("backward: " + _backward(result.backward))
    return [*lines, f"coverage: {result.coverage.text}" if result.coverage.ops else "coverage: nothing ran", *result.notes]


def _backward(counts: Counts) -> str:
    parts = [
        f"{amount(counts.macs_dense)} MACs",
        f"{amount(counts.macs_valid)} of them on real inputs",
        f"{amount(counts.flops)} flops",
        f"{amount(float(counts.bytes_min))}B moved at least",
        f"{figures(counts.intensity)} flop/B",
    ]
    return " · ".join(parts)
