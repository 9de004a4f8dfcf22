"""Calls of the library's own ops: the convolution that one is, and its cost from the record of its technique."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from omniconv.analysis.cost.estimates import per_result
from omniconv.analysis.cost.work import WORDS, Work, known_problem, technique_of
from omniconv.geometry import normal_padding, per_axis, spread
from omniconv.ops.sequence import axes_of
from omniconv.ops.technique import Stage
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, find
from omniconv.techniques.causal import causal_conv1d_fn, causal_conv1d_update

Arguments = Mapping[str, Any]

_TECHNIQUES: dict[Callable[..., Any], tuple[str, int]] = {
    op: (technique.name, rank) for technique in reversed(TECHNIQUES) for rank, op in technique.ops.items()
}
_STATEFUL = (causal_conv1d_fn, causal_conv1d_update)
_WEIGHTS = ("weight", "weight_column", "weight_row", "depthwise_weight", "pointwise_weight", "kernels")  # in the order of stages
_BIASES = ("bias", "depthwise_bias", "pointwise_bias")
_INPUTS = ("input", "x", "offset", "mask", "initial_states", "conv_state")


@dataclass(frozen=True)
class HouseWork:
    """The forward of one call, and the backward pass that would follow."""

    forward: Work
    backward: Work


def house_work(op: Callable[..., Any], given: Arguments) -> HouseWork:
    """What a call costs by the stages of its technique, those that make offsets and kernels apart: they are calls of their own.

    Args:
        op: One of :mod:`omniconv.functional`.
        given: Its arguments by name, those left out left out.
    """
    if op in _STATEFUL:
        return _stateful(given)
    name, rank = _TECHNIQUES[op]
    problem = _problem(name, rank, given)
    if 0 in (problem.channels, *problem.size):
        return HouseWork(Work(), Work())
    options: dict[str, Any] = {"context": "mean" if given["kernels"].shape[-1] == 1 else "position"} if name == "dynamic" else {}
    if name == "deformable":
        options = {"modulated": given.get("mask") is not None}
    stages = tuple(stage for stage in find(name).stages(problem, **options) if not stage.side)
    if not given.get("softmax", True):
        stages = tuple(replace(stage, flops=0, batch_flops=0) for stage in stages)
    if name in ("standard", "dilated", "grouped"):
        problem = _renamed(problem, stages[0])
    words = given["input"].dtype in WORDS
    return _work(problem.technique, known_problem(problem) if words else None, problem.batch, stages, given)


def _work(name: str, problem: Problem | None, batch: int, stages: tuple[Stage, ...], given: Arguments) -> HouseWork:
    """The sums over the stages, forward and backward."""
    weights = [given[n] for n in _WEIGHTS if given.get(n) is not None]
    wanted = any(_wants(given.get(n)) for n in _INPUTS)
    dense = valid = 0
    for stage, weight in zip(stages, weights, strict=True):
        gradients = wanted + _wants(weight)
        dense += gradients * batch * stage.macs_dense
        valid += gradients * batch * stage.macs_valid
        wanted = wanted or _wants(weight)
    made = [batch * stage.out_channels * prod(stage.out) for stage in stages]
    besides = sum(batch * stage.flops + stage.batch_flops for stage in stages)
    ends = _activations(given, made)
    adds = _bias_adds(given, made, lambda bias: True)
    sampled = "estimate" if name == "deformable" else "exact"
    forward = Work(
        batch * sum(s.macs_dense for s in stages), batch * sum(s.macs_valid for s in stages), besides + ends + adds, name, problem,
        valid=sampled, flops_status="estimate" if besides or ends else "exact",
    )  # fmt: skip
    sums = _bias_adds(given, made, _wants)
    # the gradient of what is normalised or interpolated takes about as much again as it does, for each of two operands
    backward = Work(dense, valid, 2 * besides + ends + sums if dense or sums else 0, name, problem, valid=sampled)
    return HouseWork(forward, backward)


def _wants(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _bias_adds(given: Arguments, made: list[int], which: Callable[[Any], bool]) -> int:
    """Additions of the biases that are there; only the first of two stages has one that is called so."""
    total = 0
    for name in _BIASES:
        bias = given.get(name)
        if bias is not None and which(bias):
            total += made[0 if name == "depthwise_bias" else -1]
    return total


def _activations(given: Arguments, made: list[int]) -> int:
    """Flops of the activations that the op ends its stages with."""
    names = ((given.get("depthwise_activation"), made[0]), (given.get("activation"), made[-1]))
    return sum(per_result("silu" if name == "swish" else name) * count for name, count in names if name is not None)


def _renamed(problem: Problem, stage: Stage) -> Problem:
    """What people call this convolution."""
    name = technique_of(stage)
    if name == problem.technique:
        return problem
    changes: dict[str, Any] = {}
    if name == "depthwise":
        multiplier = stage.out_channels // stage.in_channels
        changes = {"groups": 1, "out_channels": None, "multiplier": None if multiplier == 1 else multiplier}
    elif name == "pointwise":
        changes = {"dilation": (1,) * problem.rank, "padding": ((0, 0),) * problem.rank, "padding_mode": "zeros"}
    return problem.replace(technique=name, **changes)


def _problem(name: str, rank: int, given: Arguments) -> Problem:
    """The Problem that the arguments of an op of that technique make."""
    x = given["input"]
    whole = x.dim() == rank + 2
    shape = tuple(x.shape) if whole else (1, *x.shape)
    if "layout" in given:
        axes = axes_of(name, given["layout"], whole)
        shape = tuple(shape[axis] for axis in (axes.batch, axes.channel, axes.time))
    batch, channels, *size = shape
    made = _MADE[name](given, channels, rank)
    settings = {n: per_axis(name, n, given[n], rank) for n in ("stride", "dilation") if n in given and name != "pointwise"}
    if name == "pointwise" and "stride" in given:
        settings["stride"] = per_axis(name, "stride", given["stride"], rank)
    padding = given.get("padding", "same" if name in ("lightweight", "dynamic") else 0)
    problem = Problem(
        name, channels, tuple(size), batch, dtype=WORDS.get(x.dtype, "f32"), padding_mode=given.get("padding_mode", "zeros"),
        padding=() if name == "pointwise" else normal_padding(name, padding, rank),
        channels_last=rank == 2 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous(),
        **(settings | made),
    )  # fmt: skip
    return problem.replace(output_padding=_extra(given, problem)) if name == "transposed" else problem


def _extra(given: Arguments, problem: Problem) -> tuple[int, ...]:
    """The output padding, given or by the size that is wanted."""
    windows = spread(
        problem.technique, problem.size, problem.kernel, problem.stride, problem.padding, given.get("output_padding", 0),
        problem.dilation, given.get("output_size"),
    )  # fmt: skip
    return (0,) * problem.rank if isinstance(problem.padding, str) and problem.padding != "valid" else windows.output_padding


def _unless(value: int, default: int) -> int | None:
    """The number, None where it is what a Problem takes it to be."""
    return None if value == default else value


def _standard(given: Arguments, channels: int, rank: int) -> dict[str, Any]:
    weight = given["weight"]
    return {
        "out_channels": _unless(weight.shape[0], channels), "kernel": tuple(weight.shape[2:]), "groups": given.get("groups", 1)
    }  # fmt: skip


def _transposed(given: Arguments, channels: int, rank: int) -> dict[str, Any]:
    weight, groups = given["weight"], given.get("groups", 1)
    return {"out_channels": _unless(weight.shape[1] * groups, channels), "kernel": tuple(weight.shape[2:]), "groups": groups}


def _depthwise(given: Arguments, channels: int, rank: int) -> dict[str, Any]:
    weight = given["weight"]
    return {"kernel": tuple(weight.shape[2:]), "multiplier": _unless(weight.shape[0] // max(channels, 1), 1)}


def _pointwise(given: Arguments, channels: int, rank: int) -> dict[str, Any]:
    return {"out_channels": _unless(given["weight"].shape[0], channels)}


def _separable(given: Arguments, channels: int, rank: int) -> dict[str, Any]:
    column, row = given["weight_column"], given["weight_row"]
    return {
        "out_channels": _unless(row.shape[0], channels), "multiplier": _unless(column.shape[0], row.shape[0]),
        "kernel": (column.shape[2], row.shape[3]), "groups": given.get("groups", 1),
    }  # fmt: skip


def _depthwise_separable(given: Arguments, channels: int, rank: int) -> dict[str, Any]:
    filters, mixing = given["depthwise_weight"], given["pointwise_weight"]
    return {
        "out_channels": _unless(mixing.shape[0], channels), "multiplier": _unless(filters.shape[0] // max(channels, 1), 1),
        "kernel": tuple(filters.shape[2:]),
    }  # fmt: skip


def _deformable(given: Arguments, channels: int, rank: int) -> dict[str, Any]:
    weight = given["weight"]
    return {
        "out_channels": _unless(weight.shape[0], channels), "kernel": tuple(weight.shape[2:]),
        "groups": channels // weight.shape[1], "offset_groups": given["offset"].shape[-3] // (2 * prod(weight.shape[2:])),
    }  # fmt: skip


def _lightweight(given: Arguments, channels: int, rank: int) -> dict[str, Any]:
    return {"heads": given["weight"].shape[0], "kernel": (given["weight"].shape[1],)}


def _dynamic(given: Arguments, channels: int, rank: int) -> dict[str, Any]:
    return {"heads": given["kernels"].shape[-3], "kernel": (given["kernels"].shape[-2],)}


_MADE = {
    "standard": _standard,
    "transposed": _transposed,
    "depthwise": _depthwise,
    "pointwise": _pointwise,
    "separable": _separable,
    "depthwise_separable": _depthwise_separable,
    "deformable": _deformable,
    "lightweight": _lightweight,
    "dynamic": _dynamic,
}


def _stateful(given: Arguments) -> HouseWork:
    """The causal filter with a state: a depthwise convolution, whose every tap is real where there is a state before it."""
    x, weight = given["x"], given["weight"]
    width, shape = weight.shape[-1], tuple(x.shape)
    begins = given.get("initial_states") is None and "conv_state" not in given
    if "conv_state" in given and x.dim() == 2:
        shape = (*shape, 1)
    elif x.dim() == 2:
        shape = (1, *shape)
    batch, channels, steps = shape
    problem = Problem("depthwise", channels, (steps,), batch, kernel=(width,), padding="causal", dtype=WORDS.get(x.dtype, "f32"))
    (stage,) = find("depthwise").stages(problem)
    if not begins:
        stage = replace(stage, size=(steps + width - 1,), pads=((0, 0),))
    return _work("depthwise", problem if begins else None, batch, (stage,), given)
