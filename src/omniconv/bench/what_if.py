"""Times for the ways to make one layer: each verified against its reference first, then all in turns in one process."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from omniconv.analysis.what_if import Way, WhatIf
from omniconv.bench.compare import fresh_layer
from omniconv.techniques import find
from omniconv.testing import verify_layer
from omniconv.timing import Interrupted, Timing, alternate, machine


def measured(result: WhatIf, *, budget: float = 10.0, progress: Callable[[float, str], None] | None = None) -> WhatIf:
    """The same ways with the time of a forward call of each; of a wrong one no time is given, but the reason.

    Args:
        result: The ways.
        budget: Seconds for the rounds.
        progress: Called with the share of the work that is done and what is going on.

    Raises:
        ValueError: The budget is not above 0 and at most a day.
        Interrupted: Ctrl-C; it carries what was measured until then.

    >>> from omniconv.analysis.what_if import what_if
    >>> measured(what_if("depthwise c4 i5 k3"), budget=0.01).ways[0].latency_s.median > 0
    True
    """
    if not 0 < budget <= 86400:
        raise ValueError(f"cost: the budget must be above 0 and at most 86400 seconds, got {budget:g}")
    tell = progress or (lambda share, what: None)
    state, calls, reasons = machine(), {}, {}
    with torch.no_grad():
        for index, way in enumerate(result.ways):
            tell(0.3 * index / len(result.ways), way.technique)
            try:
                calls[str(index)] = _verified(way)
            except Exception as error:  # whatever a layer raises is its own row's failure
                reasons[index] = " ".join(f"{type(error).__name__}: {error}".split())
        ways = [replace(way, reason=reasons.get(i, "")) for i, way in enumerate(result.ways)]
        try:
            timings = alternate(calls, budget=budget, progress=lambda share: tell(0.3 + 0.7 * share, "time"))
        except Interrupted as stopped:
            raise Interrupted(replace(result, ways=_timed(ways, stopped.done), machine=state, interrupted=True)) from None
    return replace(result, ways=_timed(ways, timings), machine=state)


def _verified(way: Way) -> Callable[[], object]:
    technique = find(way.technique)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(technique.operands(way.problem)["input"].shape, generator=generator).to(way.problem.torch_dtype)
    if way.problem.channels_last:
        x = x.to(memory_format=torch.channels_last)
    layer = fresh_layer(technique, way.problem, 0)
    verify_layer(layer, x)
    return partial(layer, x)


def _timed(ways: list[Way], timings: dict[str, Timing]) -> tuple[Way, ...]:
    """Every way with its time and its ratio to the standard layer of its number of axes."""
    standard = {way.problem.rank: timings.get(str(i)) for i, way in enumerate(ways) if way.technique == "standard"}
    made = []
    for i, way in enumerate(ways):
        time, base = timings.get(str(i)), standard.get(way.problem.rank)
        ratios = way.to_standard
        if ratios is not None and time is not None and base is not None:
            ratios = replace(ratios, time=time.median / base.median)
        made.append(replace(way, latency_s=time, to_standard=ratios))
    return tuple(made)
