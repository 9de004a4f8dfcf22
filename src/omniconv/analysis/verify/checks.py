"""What is checked of one problem."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omniconv.analysis.cost import Cost, Counts, cost
from omniconv.analysis.receptive_field import receptive_field
from omniconv.analysis.verify.counters import Way, ways
from omniconv.analysis.verify.oracle import counted, gradient_sums, ones_of, reach, roomy, seen, summed
from omniconv.problem import Problem
from omniconv.techniques import Stage, Technique

EVERY_TAP = "macs_dense of a stage = sum of ones, padded with ones"
REAL_INPUTS = "macs_valid of a stage = sum of ones, padded with zeros"
OTHER_MODES = "macs_valid = macs_dense where the padding is no zeros"
PARAMETERS = "params = numbers in the layer"
OP = "macs_valid = what the op makes of ones, summed"
GRADIENT = "macs_valid = the op's gradient of ones, summed"
FIELD = "receptive field = reach of the float64 gradient"
GRAPH = "positions that the recorded graph sees = where the float64 gradient is"
DISPATCHED_DENSE = "macs_dense counted at the dispatcher = sum of ones"
DISPATCHED_VALID = "macs_valid counted at the dispatcher = sum of ones"
DISPATCHED_BACKWARD = "macs_valid of the backward pass = twice the sum of ones"
DISPATCHED_PARAMETERS = "params counted at the dispatcher = numbers in the layer"


@dataclass(frozen=True)
class Check:
    """One comparison: ``expected`` is counted or measured, ``got`` is what a formula or a counter says.

    ``of`` names the part: a stage of the technique, an operand, a way to call it, a layer of a model.
    """

    check: str
    technique: str
    problem: str
    of: str
    expected: Any
    got: Any
    ok: bool


def of_problem(technique: Technique, problem: Problem, *, field: bool = True) -> Iterator[Check]:
    """Every check of one problem.

    Args:
        technique: Whose formulas.
        problem: What they are asked about.
        field: The receptive field too, which depends on the windows alone and not on padding, groups and channels.

    >>> from omniconv.techniques import parse
    >>> all(check.ok for check in of_problem(*parse("grouped2d c4-6 i5 k3 p1 g2")))
    True
    """

    def check(name: str, of: str, expected: Any, got: Any) -> Check:
        return Check(name, technique.name, str(problem), of, expected, got, expected == got)

    stages = technique.stages(problem)
    for stage in stages:
        yield check(EVERY_TAP, stage.name, counted(stage, real=False), stage.macs_dense)
        yield check(
            REAL_INPUTS if stage.padding_mode == "zeros" else OTHER_MODES, stage.name, counted(stage, real=True), stage.macs_valid
        )
    for bias in (True, False):
        of = "layer" if bias else "layer without bias"
        yield check(PARAMETERS, of, _numbers(technique, problem, bias), technique.cost(problem, bias=bias).params)
    yield from _of_the_op(technique, problem, stages)
    if field:
        expected = technique.cost(problem).receptive_field
        yield check(FIELD, "input", seen(technique, problem, expected), expected)
        yield from _of_the_graph(technique, problem, expected)


def _numbers(technique: Technique, problem: Problem, bias: bool) -> int:
    """Numbers in the parameters of the problem's layer."""
    with torch.device("meta"):
        layer = technique.layer(problem)
    return sum(p.numel() for name, p in layer.named_parameters() if bias or not name.endswith("bias"))


def _of_the_op(technique: Technique, problem: Problem, stages: tuple[Stage, ...]) -> Iterator[Check]:
    """Where one stage is the whole path: the op itself on ones, and its gradients."""
    path = [stage for stage in stages if not stage.side]
    if len(path) != 1:
        return
    counted_macs, bypassed = problem.batch * path[0].macs_valid, problem.batch * path[0].bypassed
    text = str(problem)
    made, got = summed(technique, problem), counted_macs + bypassed
    yield Check(OP, technique.name, text, "output", made, got, made == got)
    for name, total in gradient_sums(technique, problem).items():
        got = counted_macs + (0 if name == technique.stage_arguments[0].weight else bypassed)
        yield Check(GRADIENT, technique.name, text, name, total, got, total == got)


def _of_the_graph(technique: Technique, problem: Problem, field: tuple[int, ...]) -> Iterator[Check]:
    """The field by the graph that runs, holes and all. Learned offsets have none: where a tap looks is in the data."""
    if technique.moves_taps:
        return
    wide = roomy(problem, field)
    operands = ones_of(technique, wide)
    names = list(operands)

    def op(*tensors: Tensor) -> Tensor:
        return technique.call(wide, dict(zip(names, tensors, strict=True)), **technique.linear)

    window = receptive_field(op, *operands.values(), wrt=names.index("input")).window
    expected, got = reach(technique, wide, window.position), torch.zeros(wide.size, dtype=torch.bool)
    got[tuple(map(slice, window.start, window.stop))] = torch.from_numpy(window.mask)
    counts = int(expected.sum()), int(got.sum())
    yield Check(
        GRAPH, technique.name, str(problem), f"output {window.position} over {wide.size}", *counts, torch.equal(expected, got)
    )


def of_counters(technique: Technique, problem: Problem) -> Iterator[Check]:
    """What is counted at the dispatcher, for every way to run a problem, against ones.

    The backward pass makes a gradient of either factor of every product, which is one product each. A number that is not exact, as
    its status says, is no agreement; but where offsets move the taps, which of them meet a real input can only be estimated.

    >>> from omniconv.techniques import parse
    >>> all(check.ok for check in of_counters(*parse("transposed1d c2-3 i5 k4 s2 p1")))
    True
    """
    for way in ways(technique, problem):
        found = cost(way.call, backward=way.backward, **way.inputs)
        yield from _of_way(technique, problem, way, found)


def _of_way(technique: Technique, problem: Problem, way: Way, found: Cost) -> Iterator[Check]:
    def check(name: str, expected: int, counts: Cost | Counts, metric: str) -> Check:
        got, status = getattr(counts, metric), found.status[metric]
        sure = status == "exact" or (metric == "macs_valid" and status == "estimate" and technique.moves_taps)
        said = got if sure else f"{got} ({status})"
        return Check(name, technique.name, str(problem), way.name, expected, said, expected == said)

    dense, valid = (problem.batch * sum(counted(stage, real=real) for stage in way.stages) for real in (False, True))
    yield check(DISPATCHED_DENSE, dense, found, "macs_dense")
    yield check(DISPATCHED_VALID, valid, found, "macs_valid")
    if way.owns:
        yield check(DISPATCHED_PARAMETERS, _numbers(technique, problem, bias=True), found, "params")
    if way.backward and found.backward is not None:
        yield check(DISPATCHED_BACKWARD, 2 * valid, found.backward, "macs_valid")
