"""The native depthwise engine: which calls it takes, its raw operators as torch sees them, and their gradient.

Every technique whose channels do not meet ends here. The arithmetic is in ``csrc/kernels/depthwise_*.kernel.cpp``.
"""

from collections.abc import Hashable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniconv.engines.engine import CallPlan, Engine, cache_plan, raw_op, unfused_reason
from omniconv.geometry import PADDING_MODES, Grid
from omniconv.layout import arrange, is_channels_last, is_channels_last_quickly
from omniconv.ops.activation import activate
from omniconv.ops.grid import convolve
from omniconv.ops.layer import one_position
from omniconv.ops.operator import accumulated_in, finalize_output

LANES = 16  # channels of the widest vector: with fewer, a channels-last tensor goes the contiguous way

Integers = tuple[int, ...]


class Plan(NamedTuple):
    """The windows of a call as the raw operators take them; ``pads`` are (before, after) of every axis in a row."""

    stride: Integers
    pads: Integers
    dilation: Integers
    mode: int
    ordered: bool
    fitted: bool  # whether the pads follow from the size, which may be symbolic


def plan_of(windows: Grid) -> Plan:
    """Returns the plan of a call with these windows."""
    mode = PADDING_MODES.index(windows.mode)
    return Plan(windows.stride, sum(windows.pads, ()), windows.dilation, mode, _may_come_in_chunks(windows), windows.fitted)


def _may_come_in_chunks(windows: Grid) -> bool:
    """Returns whether every sum must take its taps in order, so that the bits of a position do not depend on the length.

    So it is along one axis with nothing padded after: a causal filter, or one over a chunk and what came before it. It costs
    nothing below 17 taps, where the kernels have no other order, and a quarter of the time at 31 (N8 C512 T512, float32: 1.17 and
    1.50 ms with AVX-512, 1.47 and 1.77 with AVX2).
    """
    if len(windows.pads) != 1 or windows.fitted:  # fitted pads may be symbolic: to compare them would pin the size
        return False
    return windows.pads[0][1] == 0


def _is_out_of_proportion(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid | None) -> bool:
    # the kernels set up tables by stride and by window
    assert windows is not None
    return any(s > 64 for s in windows.stride) or any(
        d > 1 and d * (k - 1) > 1 << 20 for d, k in zip(windows.dilation, weight.shape[-len(windows.dilation) :], strict=True)
    )


class _DepthwiseEngine(Engine):
    def forward(self, plan: Plan, activation: int, flush: bool, *operands: Any) -> Tensor:
        x, weight, bias = operands
        stride, pads, dilation, mode, ordered, _ = plan
        y: Tensor = _FORWARD(x, weight, bias, stride, pads, dilation, mode, activation, ordered, flush)
        return y

    def gradients(
        self, plan: Plan, flush: bool, grad_y: Tensor, needed: Sequence[bool], *operands: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, bias = operands
        of_x, of_weight, of_bias = needed
        last = is_channels_last_quickly(x)
        if last or not grad_y.is_contiguous():
            grad_y = arrange(grad_y, last)
        grad_x = _grad_input(grad_y, weight, x, plan, flush) if of_x else None
        grad_weight = grad_bias = None
        if of_weight or of_bias:
            grad_weight, grad_bias = _GRAD_WEIGHT(grad_y, x, weight.shape[2:], *plan[:3], of_bias, flush)
            grad_weight = grad_weight.to(weight.dtype) if of_weight else None
            grad_bias = grad_bias.to(bias.dtype) if of_bias else None
        return grad_x, grad_weight, grad_bias

    def composite(self, plan: Plan, *operands: Any) -> Tensor:
        x, weight, bias = operands
        stride, pads, dilation, mode, _, fitted = plan
        grid = Grid(stride, tuple(zip(pads[::2], pads[1::2], strict=True)), dilation, PADDING_MODES[mode], fitted)
        return convolve(x, weight, bias, grid, x.shape[1])


ENGINE = _DepthwiseEngine(
    "depthwise",
    "every channel is a group of its own",
    (("a stride is above 64, or a window covers more than a million positions of an axis", _is_out_of_proportion),),
)


def cache_depthwise(key: Hashable, input: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid) -> None:
    """Keeps the plan of a call with a batch axis that passed its checks, if the engine takes all calls like it."""
    if key is None or input.dim() != len(windows.stride) + 2:
        return
    if ENGINE.unsupported_reason(input, weight, bias, windows) is None:
        cache_plan(key, CallPlan(run_depthwise, plan_of(windows)))


def chunks_differ(weight: Tensor, bias: Tensor | None, stride: Integers, dilation: Integers, activation: str | None) -> str | None:
    """Returns why the bits of an output may depend on the chunk that it comes in, or None. weight (C·M, 1, K)."""
    windows = Grid(stride, ((0, 0),), dilation)
    reason = ENGINE.unsupported_reason(one_position(weight, weight.shape[0]), weight, bias, windows)
    reason = reason or unfused_reason(weight, activation)
    if reason is None and weight.shape[2] > 1 and not weight.isfinite().all():  # pads are left out of a sum, a past of zeros is not
        return "a weight is not finite: with the zeros of a past it makes NaN, with those of the pads it does not"
    return reason


def finalize_depthwise(
    input: Tensor, rank: int, x: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid, activation: str | None
) -> Tensor:
    """Returns a checked call's result as its caller expects it: by the engine, or by the composite path."""
    if ENGINE.unsupported_reason(x, weight, bias, windows) is None:
        y = run_depthwise(plan_of(windows), activation, x, weight, bias)
        return y if input.dim() == rank + 2 else y.squeeze(0)
    return finalize_output(input, rank, convolve, (x, weight, bias), windows, max(x.shape[1], 1), activation=activation)


def stage_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid, activation: str | None) -> Tensor:
    """Returns a stage of a composed technique, which sees to batch axis and accumulation itself."""
    if ENGINE.unsupported_reason(x, weight, bias, windows) is None:
        return run_depthwise(plan_of(windows), activation, x, weight, bias)
    return activate(convolve(x, weight, bias, windows, max(x.shape[1], 1)), activation)


def run_depthwise(plan: Plan, activation: str | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns activation(x (N, C, …) ∗ weight (C·M, 1, K…) + bias), checked and supported, in the memory format of the rule."""
    last = is_channels_last_quickly(x)
    relaid = last and (x.shape[1] < LANES or weight.shape[0] != x.shape[1])
    if relaid or not last:
        x = x.contiguous()
    y = ENGINE.run_native(plan, activation, x, weight.contiguous(), None if bias is None else bias.contiguous())
    return arrange(y, channels_last=True) if relaid else y


def _grad_input(grad_y: Tensor, weight: Tensor, x: Tensor, plan: Plan, flush: bool) -> Tensor:
    """Returns the gradient of ``x``; the raw operator knows one output per channel."""
    stride, pads, dilation = plan[:3]
    op, size, multiplier = _GRAD_INPUT, x.shape[2:], weight.shape[0] // x.shape[1]
    if multiplier == 1:
        return op(grad_y, weight, size, stride, pads, dilation, flush)
    if len(size) == 3:
        wide = accumulated_in(x)
        single = op(grad_y.to(wide), weight.to(wide), size, stride, pads, dilation, flush)
        return single.reshape(-1, x.shape[1], multiplier, *size).sum(2).to(x.dtype)
    # the outputs of a channel stand along one more axis, on which the input is one long: output m reads tap M − 1 − m there
    whole = grad_y.reshape(-1, x.shape[1], multiplier, *grad_y.shape[2:])
    taps = weight.reshape(x.shape[1], 1, multiplier, *weight.shape[2:]).flip(2)
    far = multiplier - 1
    return op(whole, taps, (1, *size), (1, *stride), (far, far, *pads), (1, *dilation), flush).squeeze(2)


def _empty(x: Tensor, channels: int, size: Any) -> Tensor:
    """Returns an empty (N, channels, size…), channels-last where the raw operator makes it so."""
    if is_channels_last(x) and x.shape[1] == channels >= LANES:
        return x.new_empty((x.shape[0], *size, channels)).movedim(-1, 1)
    return x.new_empty((x.shape[0], channels, *size))


def _empty_result(a: Any) -> Tensor:
    grid = Grid(tuple(a.stride), tuple(zip(a.pads[::2], a.pads[1::2], strict=True)), tuple(a.dilation))
    return _empty(a.x, a.weight.shape[0], grid.output_size(a.x.shape[2:], a.weight.shape[2:]))


def _empty_weights(a: Any) -> tuple[Tensor, Tensor]:
    kept, outputs = torch.float64 if a.x.dtype == torch.float64 else torch.float32, a.grad_y.shape[1]
    return a.x.new_empty((outputs, 1, *a.kernel), dtype=kept), a.x.new_empty((outputs if a.bias else 0,), dtype=kept)


_FORWARD = raw_op("depthwise", _empty_result, lambda a, y: 2 * prod(y) * prod(a.weight[2:]))
_GRAD_INPUT = raw_op(
    "depthwise_grad_input",
    lambda a: _empty(a.grad_y, a.grad_y.shape[1], a.size),
    lambda a, y: 2 * prod(a.grad_y) * prod(min(k, i) for k, i in zip(a.weight[2:], a.size, strict=True)),
)
_GRAD_WEIGHT = raw_op("depthwise_grad_weight", _empty_weights, lambda a, y: 2 * prod(a.grad_y) * prod(a.kernel))
