"""The roofline of a network on this machine: what each layer reaches, beside what its arithmetic intensity allows.

    attainable(I) = min(peak rate of arithmetic, I · bandwidth)        I = flops / bytes, each tensor moved once

with the bandwidth of the level of memory that holds the layer's tensors; Williams, Waterman, Patterson 2009. A layer's point lies
at its intensity and at flops / measured time. Flops are 2 a multiply-accumulate, that of zeros in pads too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from omniconv.analysis import targets
from omniconv.analysis.cost import Cost
from omniconv.analysis.layers import Kind, captured, ready
from omniconv.analysis.peaks import Level, Roofs, machine_roofs
from omniconv.analysis.targets import Target
from omniconv.analysis.untouched import untouched
from omniconv.problem import DTYPES
from omniconv.timing import Interrupted, Machine, Timing, alternate, machine

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Point:
    """Layers that are alike. ``flops`` and ``bytes`` are of one call, ``rate`` is flops a second, ``share`` rate over attainable.

    ``limit`` is what the layer cannot do better than: "arithmetic" or the level of memory that holds its tensors.
    """

    names: tuple[str, ...]
    calls: int
    type: str
    technique: str | None
    problem: str | None
    dtype: str
    flops: int
    bytes: int
    intensity: float
    level: str
    limit: str
    attainable: float
    time_s: Timing
    rate: float
    share: float

    @property
    def seconds(self) -> float:
        """What all calls take together."""
        return self.calls * self.time_s.median

    @property
    def lost(self) -> float:
        """Seconds that all calls take beyond what the roof allows."""
        return self.seconds * max(1 - self.share, 0.0)


@dataclass(frozen=True)
class Roofline:
    """The result: points in the order of the network, the roofs, and how and where it was measured."""

    target: str
    source: str
    inputs: tuple[str, ...]
    channels_last: bool
    dtype: str
    roofs: Roofs
    points: tuple[Point, ...]
    notes: tuple[str, ...]
    machine: Machine
    interrupted: bool = False

    @property
    def furthest(self) -> tuple[Point, ...]:
        """The points, those that lose most time below their roof first."""
        return tuple(sorted(self.points, key=lambda point: -point.lost))


def roofline(
    target: str | Target,
    *,
    input: tuple[str, ...] = (),
    channels_last: bool = False,
    threads: int = 1,
    budget: float = 0.2,
    refresh: bool = False,
    progress: Progress | None = None,
) -> Roofline:
    """Measures every kind of layer of a network, and the machine's peaks unless they are known.

    Args:
        target: A target's text or what :func:`omniconv.analysis.targets.load` made of one.
        input: Example inputs, as there.
        channels_last: In channels-last memory format.
        threads: Of torch.
        budget: Seconds a kind of layers.
        refresh: Measure the peaks even if they are known.
        progress: Called with the share of the work done and what is at work.

    Raises:
        ValueError: The target or a setting is not usable.
        Interrupted: Ctrl-C; it carries the Roofline of what was done.
    """
    if not 1 <= threads <= 1024:
        raise ValueError(f"roofline: threads must be between 1 and 1024, got {threads}")
    if not 0 < budget <= 86400:
        raise ValueError(f"roofline: the budget must be above 0 and at most 86400 seconds, got {budget:g}")
    found = targets.load(target, input=input, caller="roofline") if isinstance(target, str) else target
    report = progress or (lambda share, what: None)
    with untouched(), torch.no_grad():
        torch.set_num_threads(threads)
        return _measured(found, channels_last, budget, refresh, report)


def _measured(target: Target, channels_last: bool, budget: float, refresh: bool, report: Progress) -> Roofline:
    module = target.network()
    args, kwargs = target.example_inputs()
    report(0.0, "running the network")
    kinds = captured(module, args, kwargs, caller="roofline")
    if not kinds:
        raise ValueError(f"roofline: the network must have convolutions or linear layers, got none in '{target.text}'")
    dtype = max(_dtypes(kinds), key=lambda name: sum(k.flops for k in kinds if DTYPES[name] is k.dtype))
    report(0.05, "peaks of the machine")
    roofs: Roofs | None = None
    points: list[Point] = []
    state = machine()
    try:
        for name in sorted(_dtypes(kinds), key=lambda name: name == dtype):  # the network's own last: it holds all
            roofs = machine_roofs(name, refresh=refresh and roofs is None)
        assert roofs is not None
        result = partial(
            Roofline, target.text, target.source, tuple(map(str, target.inputs)), channels_last, dtype, roofs,
            notes=(roofs.note,) if roofs.note else (), machine=state,
        )  # fmt: skip
        for done, kind in enumerate(kinds):
            report(0.1 + 0.9 * done / len(kinds), kind.names[0] or kind.type)
            if kind.cost is not None and kind.flops and kind.dtype in DTYPES.values():
                timing = alternate({"layer": ready(kind, channels_last)}, budget=budget)["layer"]
                points.append(_point(kind, kind.cost, timing, roofs))
    except KeyboardInterrupt:
        if roofs is None:
            raise  # nothing to keep yet
        raise Interrupted(result(points=tuple(points), interrupted=True)) from None
    report(1.0, "done")
    return result(points=tuple(points))


def _dtypes(kinds: tuple[Kind, ...]) -> tuple[str, ...]:
    """The dtypes of the layers, those of the house."""
    return tuple(name for name, value in DTYPES.items() if any(kind.dtype is value for kind in kinds)) or ("f32",)


def _point(kind: Kind, cost: Cost, timing: Timing, roofs: Roofs) -> Point:
    dtype = next(name for name, value in DTYPES.items() if value is kind.dtype)
    flops, moved = cost.flops, cost.bytes_min
    level = level_of(roofs.levels, moved)
    intensity = flops / moved
    attainable = min(roofs.rates[dtype], intensity * level.bandwidth)
    rate = flops / timing.median
    return Point(
        kind.names, kind.calls, kind.type, kind.technique, None if kind.problem is None else str(kind.problem), dtype, flops, moved,
        intensity, level.name, "arithmetic" if attainable == roofs.rates[dtype] else level.name, attainable, timing, rate,
        rate / attainable,
    )  # fmt: skip


def level_of(levels: tuple[Level, ...], size: int) -> Level:
    """The smallest level that holds so many bytes.

    >>> level_of((Level("L1", 100, 2e9), Level("DRAM", None, 1e9)), 101).name
    'DRAM'
    """
    return next(level for level in levels if level.size is None or size <= level.size)
