"""What is checked of one problem."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from omniconv.analysis.verify.oracle import counted, gradient_sums, seen, summed
from omniconv.problem import Problem
from omniconv.techniques import Stage, Technique

EVERY_TAP = "macs_dense of a stage = sum of ones, padded with ones"
REAL_INPUTS = "macs_valid of a stage = sum of ones, padded with zeros"
OTHER_MODES = "macs_valid = macs_dense where the padding is no zeros"
PARAMETERS = "params = numbers in the layer"
OP = "macs_valid = what the op makes of ones, summed"
GRADIENT = "macs_valid = the op's gradient of ones, summed"
FIELD = "receptive field = reach of the float64 gradient"


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
    got = problem.batch * path[0].macs_valid
    text = str(problem)
    made = summed(technique, problem)
    yield Check(OP, technique.name, text, "output", made, got, made == got)
    for name, total in gradient_sums(technique, problem).items():
        yield Check(GRADIENT, technique.name, text, name, total, got, total == got)
