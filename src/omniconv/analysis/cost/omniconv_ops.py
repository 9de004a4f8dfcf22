"""Calls of omniconv's own ops: the convolution that one is, and its cost from the record of its technique."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from omniconv.analysis.cost.estimates import per_result
from omniconv.analysis.cost.work import Work, known_problem
from omniconv.ops.technique import Stage, StageArguments
from omniconv.problem import DTYPE_NAMES
from omniconv.techniques import TECHNIQUES, find_convolution, find_op

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class OpCost:
    """The forward of one call, and the backward pass that would follow."""

    forward: Work
    backward: Work


def op_cost(op: Callable[..., Any], arguments: Arguments) -> OpCost:
    """Returns what a call costs by the stages of its technique, without those that make offsets and kernels: they are other calls.

    Args:
        op: One of :mod:`omniconv.functional`.
        arguments: Of the call, by name; those left out left out.
    """
    technique, rank = find_op(op)
    problem = technique.problem(rank, arguments)
    if 0 in (problem.channels, *problem.size):
        return OpCost(Work(), Work())
    path = [stage for stage in technique.stages(problem, **technique.cost_options(arguments)) if not stage.side]
    if sum(op in t.ops.values() for t in TECHNIQUES) > 1:
        common = ("batch", "dtype", "channels_last", "padding")
        problem = find_convolution(path[0]).problem_of(path[0], **{name: getattr(problem, name) for name in common})
    stages = list(zip(path, technique.stage_arguments, strict=True))
    sums = [problem.batch * stage.out_channels * prod(stage.out) for stage in path]
    dense, valid = _gradients(problem.batch, stages, arguments)
    besides = sum(problem.batch * stage.flops + stage.batch_flops for stage in path)
    activations = problem.batch * _activation_flops(stages, arguments)
    biases = [None if names.bias is None else arguments.get(names.bias) for _, names in stages]
    adds = sum(count for bias, count in zip(biases, sums, strict=True) if bias is not None)
    bias_gradients = sum(count for bias, count in zip(biases, sums, strict=True) if _needs_gradient(bias))
    x = next(value for value in arguments.values() if isinstance(value, Tensor))
    named = problem.technique, known_problem(problem) if x.dtype in DTYPE_NAMES else None
    status = "estimate" if technique.moves_taps else "exact"
    forward = Work(
        problem.batch * sum(s.macs_dense for s in path), problem.batch * sum(s.macs_valid for s in path),
        besides + activations + adds, *named, valid=status, flops_status="estimate" if besides or activations else "exact",
    )  # fmt: skip
    # the gradient of what is normalised or interpolated takes about as much again as it does, for each of two operands
    extra = 2 * besides + activations + bias_gradients if dense or bias_gradients else 0
    return OpCost(forward, Work(dense, valid, extra, *named, valid=status))


def _gradients(batch: int, stages: Sequence[tuple[Stage, StageArguments]], arguments: Arguments) -> tuple[int, int]:
    """Returns the dense and valid MACs of the gradients: one forward's for each operand of a stage that needs one."""
    learned = {name for _, names in stages for name in (names.weight, names.bias)}
    needed = any(_needs_gradient(value) for name, value in arguments.items() if name not in learned)
    dense = valid = 0
    for stage, names in stages:
        weight = _needs_gradient(arguments[names.weight])
        dense += (needed + weight) * batch * stage.macs_dense
        valid += (needed + weight) * batch * stage.macs_valid
        needed = needed or weight
    return dense, valid


def _needs_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _activation_flops(stages: Sequence[tuple[Stage, StageArguments]], arguments: Arguments) -> int:
    """Returns the flops of one sample's activations, with which the op ends its stages."""
    given = [(None if names.activation is None else arguments.get(names.activation), stage) for stage, names in stages]
    return sum(per_result("silu" if name == "swish" else name) * stage.results for name, stage in given if name is not None)
