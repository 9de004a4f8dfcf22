"""One layer, what if: what it costs by its own technique, or by every technique beside the standard layer."""

from dataclasses import dataclass
from math import prod

from omniconv.analysis.tables import Column, Table, amount, figures
from omniconv.analysis.targets import load
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, find
from omniconv.timing import Machine, Timing


@dataclass(frozen=True)
class Ratios:
    """A way's amounts over the standard layer's; ``receptive_field`` compares positions, ``time`` medians where they were taken."""

    params: float
    macs_dense: float
    macs_valid: float
    bytes: float
    intensity: float
    receptive_field: float
    time: float | None = None


@dataclass(frozen=True)
class Way:
    """The layer by one technique, bias included; ``bytes`` move each operand once, ``intensity`` is flops over them.

    ``same_output`` is whether its output has the standard layer's shape, without which ratios compare unlike things.
    ``latency_s`` and ``reason`` belong to the measurement: a Timing, or why there is none.
    """

    technique: str
    problem: Problem
    output: tuple[int, ...]
    params: int
    macs_dense: int
    macs_valid: int
    flops: int
    bytes: int
    intensity: float
    receptive_field: tuple[int, ...]
    same_output: bool = True
    to_standard: Ratios | None = None
    latency_s: Timing | None = None
    reason: str = ""


@dataclass(frozen=True)
class WhatIf:
    """The ways to make a layer, for each number of axes the standard one first; ``machine`` is where times were taken."""

    problem: Problem
    ways: tuple[Way, ...]
    notes: tuple[str, ...] = ()
    machine: Machine | None = None
    interrupted: bool = False


def way_of(problem: Problem, standard: Way | None = None) -> Way:
    """What a layer costs, and its ratios to the standard one.

    >>> way_of(Problem.parse("standard2d c64-128 i56 k3 p1")).params
    73856
    """
    technique = find(problem.technique)
    technique.check(problem)
    cost = technique.cost(problem)
    made = Way(
        technique.name, problem, technique.output_shape(problem), cost.params, cost.macs_dense, cost.macs_valid, cost.flops,
        cost.bytes, cost.flops / cost.bytes if cost.bytes else 0.0, cost.receptive_field,
    )  # fmt: skip
    if standard is None:
        return made
    ratios = Ratios(
        params=_ratio(made.params, standard.params),
        macs_dense=_ratio(made.macs_dense, standard.macs_dense),
        macs_valid=_ratio(made.macs_valid, standard.macs_valid),
        bytes=_ratio(made.bytes, standard.bytes),
        intensity=_ratio(made.intensity, standard.intensity),
        receptive_field=_ratio(prod(made.receptive_field), prod(standard.receptive_field)),
    )
    return Way(**{**vars(made), "to_standard": ratios, "same_output": made.output == standard.output})


def _ratio(value: float, base: float) -> float:
    return value / base if base else 1.0


def what_if(text: str, *, every: bool = False) -> WhatIf:
    """What one convolution costs, or with ``every`` what each technique makes of a standard one.

    Techniques that are not defined for the layer's axes follow on one axis of as many positions, beside a standard layer there.

    Args:
        text: A problem, as "standard n1 c64-128 i56 k3 p1".
        every: Whether to put every technique beside it.

    Raises:
        ValueError: The text is no problem, or with ``every`` not a standard one.

    Example:
        >>> ways = {way.technique: way for way in what_if("standard c64 i56 k3 p1", every=True).ways}
        >>> ways["depthwise"].params
        640
    """
    target = load(text, caller="cost")
    if target.problem is None:
        raise ValueError(f"cost: the target must be one convolution (omniconv summary takes networks), got '{target.text}'")
    problem = target.problem
    if not every:
        return WhatIf(problem, (way_of(problem),))
    if problem.technique != "standard":
        raise ValueError(f"cost: --all must start from a standard layer, got '{problem}'")
    ways = _beside(problem, [t.name for t in TECHNIQUES if problem.rank in t.ranks])
    notes = [f"{w.technique}: output {_times(w.output)}, not {_times(ways[0].output)}" for w in ways if not w.same_output]
    others = [t.name for t in TECHNIQUES if problem.rank not in t.ranks and 1 in t.ranks]
    if others and problem.rank > 1:
        flat = Problem.parse(f"standard1d n{problem.batch} c{problem.channels} i{prod(problem.size)} k{problem.kernel[0]} psame")
        base = flat.replace(out_channels=problem.out_channels, dtype=problem.dtype)
        along = _beside(base, ["standard", *others])
        notes.append(
            f"{', '.join(others)}: defined on one axis alone, so beside a standard layer on {prod(problem.size)} positions"
        )
        notes += [f"{w.technique}: output {_times(w.output)}, not {_times(along[0].output)}" for w in along if not w.same_output]
        ways += along
    left = [t.name for t in TECHNIQUES if t.name not in {way.technique for way in ways}]
    notes += [f"{name}: not defined on {problem.rank} ax{'i' if problem.rank == 1 else 'e'}s" for name in left]
    return WhatIf(problem, tuple(ways), tuple(notes))


def _beside(base: Problem, names: list[str]) -> list[Way]:
    standard = way_of(find("standard").variant_of(base))
    return [way_of(find(name).variant_of(base), standard) for name in names]


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _x(value: float | None) -> str:
    return "–" if value is None else figures(value)


def _ratio_column(name: str, head: str, needs: int = 0) -> Column:
    def value(way: Way) -> float | None:
        return None if way.to_standard is None else getattr(way.to_standard, name)

    return Column(f"{name}_ratio", head, value, lambda way: _x(value(way)), right=True, needs=needs)


def _milliseconds(way: Way) -> str:
    if way.latency_s is None:
        return "FAILED" if way.reason else "–"
    return figures(1e3 * way.latency_s.median)


def _columns(ratios: bool, measured: bool) -> tuple[Column, ...]:
    """Amounts, with ratios to the standard layer beside them, and times where they were taken."""
    x = "× std"
    columns = [
        Column("technique", "technique", lambda w: w.technique, style=lambda w: "bold"),
        Column("problem", "geometry", lambda w: w.problem, lambda w: str(w.problem).partition(" ")[2], under="technique"),
        Column("params", "params", lambda w: w.params, lambda w: amount(w.params), right=True),
        _ratio_column("params", x),
        Column("macs_dense", "MACs", lambda w: w.macs_dense, lambda w: amount(w.macs_dense), right=True),
        _ratio_column("macs_dense", x),
        Column("macs_valid", "valid\nMACs", lambda w: w.macs_valid, lambda w: amount(w.macs_valid), right=True, needs=128),
        Column("bytes", "MB", lambda w: w.bytes, lambda w: figures(w.bytes / 1e6), right=True, needs=92 if measured else 0),
        _ratio_column("bytes", x, needs=106),
        Column(
            "intensity",
            "flop/B",
            lambda w: w.intensity,
            lambda w: figures(w.intensity),
            right=True,
            needs=100 if measured else 90 if ratios else 0,
        ),
        _ratio_column("intensity", x, needs=114),
        Column(
            "receptive_field", "field", lambda w: w.receptive_field, lambda w: "×".join(map(str, w.receptive_field)), right=True
        ),
        _ratio_column("receptive_field", x, needs=121),
        Column(
            "latency_ms",
            "time\nms",
            lambda w: w.latency_s and 1e3 * w.latency_s.median,
            _milliseconds,
            right=True,
            hidden=not measured,
        ),
        _ratio_column("time", x),
        Column("latency_q1_ms", "", lambda w: w.latency_s and 1e3 * w.latency_s.low, hidden=True),
        Column("latency_q3_ms", "", lambda w: w.latency_s and 1e3 * w.latency_s.high, hidden=True),
        Column("output", "", lambda w: w.output, hidden=True),
        Column("flops", "", lambda w: w.flops, hidden=True),
        Column("reason", "", lambda w: w.reason, hidden=True),
    ]
    unwanted = {"time_ratio"} if not measured else set()
    return tuple(c for c in columns if (ratios or not c.name.endswith("_ratio")) and c.name not in unwanted)


LEGEND = "× std: over the standard layer's; MB and flop/B with each operand moved once; field: input positions that one output sees"


def tables(result: WhatIf) -> list[Table]:
    """A table for each number of axes."""
    measured, ratios = result.machine is not None, len(result.ways) > 1
    ranks = sorted({way.problem.rank for way in result.ways}, reverse=True)
    made = []
    for rank in ranks:
        ways = [way for way in result.ways if way.problem.rank == rank]
        title = str(ways[0].problem) if len(ranks) > 1 or not ratios else str(result.problem)
        made.append(Table(title, _columns(ratios, measured), ways, LEGEND if ratios and rank == ranks[-1] else ""))
    return made
