"""The native engines of lightweight and dynamic convolution: their raw operators as torch sees them, and their gradients.

The arithmetic is in ``csrc/kernels/lightweight*.kernel.cpp`` and ``dynamic*.kernel.cpp``. The softmax of dynamic kernels is made a
tile of positions at a time, and nothing of the size of the kernels is stored. Which weights are dropped is a hash of their place
and of one number drawn by torch: forward and backward each make it anew.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniconv.engines.engine import Engine, raw_op
from omniconv.geometry import PADDING_MODES, Grid
from omniconv.ops.operator import accumulated_in
from omniconv.ops.sequence import LAYOUTS, Axes, normalised

_LAYOUTS = tuple(LAYOUTS.values())  # a raw operator is given the place of its layout
_PLACES = {axes.order: place for place, axes in enumerate(_LAYOUTS)}  # dynamo has no rule for a dataclass as a key
_FARTHEST = 1 << 20  # positions between the first and the last tap: a tile copies as many

Composite = Callable[..., Tensor]


class Plan(NamedTuple):
    """A call as the raw operators take it; ``dropped`` of 2³² weights are."""

    layout: int
    pads: tuple[int, int]
    dilation: int
    mode: int
    softmax: bool
    dropped: int = 0

    @property
    def axes(self) -> Axes:
        """Where batch, channel and time lie."""
        return _LAYOUTS[self.layout]

    @property
    def windows(self) -> tuple[int, tuple[int, int], int]:
        """The layout, pads and dilation, as the raw gradients take them."""
        return self[:3]

    @property
    def grid(self) -> Grid:
        """The windows."""
        return Grid((1,), (self.pads,), (self.dilation,), PADDING_MODES[self.mode])


def plan_of(axes: Axes, windows: Grid, softmax: bool, dropped: int = 0) -> Plan:
    """Returns the plan of a call in that layout with these windows."""
    return Plan(_PLACES[axes.order], windows.pads[0], windows.dilation[0], PADDING_MODES.index(windows.mode), softmax, dropped)


def _too_far(taps_axis: int) -> Callable[..., bool]:
    return lambda x, kernel, bias, windows: windows.dilation[0] * (kernel.shape[taps_axis] - 1) > _FARTHEST


class _SequenceEngine(Engine):
    """An engine of kernels along a sequence; ``composite`` is the technique's own composite path."""

    def __init__(self, name: str, when: str, taps_axis: int, composite: Composite) -> None:
        super().__init__(name, when, (("a window covers more than a million positions", _too_far(taps_axis)),))
        self._composite = composite

    def run(
        self, plan: Plan, activation: str | None, x: Tensor, kernel: Tensor, bias: Tensor | None, *more: Tensor | None
    ) -> Tensor:
        """Returns a checked and supported call, contiguous in its layout; ``more`` are the mask (N, T) and the seed."""
        bias = None if bias is None else bias.contiguous()
        return self.run_native(plan, activation, x.contiguous(), kernel.contiguous(), bias, *(more or self._no_more))

    _no_more: tuple[None, ...]


class LightweightEngine(_SequenceEngine):
    """One kernel (H, K) for all positions; operands x, weight, bias, mask."""

    _no_more = (None,)

    def __init__(self, composite: Composite) -> None:
        super().__init__("lightweight", "a head has one kernel for all positions", 1, composite)

    def forward(self, plan: Plan, activation: int, flush: bool, *operands: Any) -> Tensor:
        x, weight, bias, mask = operands
        y: Tensor = _LIGHTWEIGHT(x, weight, bias, mask, *plan.windows, plan.mode, plan.softmax, activation, flush)
        return y

    def gradients(
        self, plan: Plan, flush: bool, grad_y: Tensor, needed: Sequence[bool], *operands: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, _, mask = operands
        of_x, of_weight, of_bias = needed
        grad_y, windows, time = grad_y.contiguous(), plan.windows, plan.axes.time
        grad_x = grad_weight = grad_bias = None
        if of_x:
            grad_x = _LIGHTWEIGHT_GRAD_INPUT(grad_y, weight, mask, x.shape[time : time + 1], *windows, plan.softmax, flush)
        if of_weight or of_bias:
            grad_weight, grad_bias = _LIGHTWEIGHT_GRAD_WEIGHT(grad_y, x, weight, mask, *windows, plan.softmax, of_bias, flush)
            grad_weight = grad_weight.to(weight.dtype) if of_weight else None
            grad_bias = grad_bias.to(x.dtype) if of_bias else None
        return grad_x, grad_weight, grad_bias

    def composite(self, plan: Plan, *operands: Any) -> Tensor:
        x, weight, bias, mask = operands
        return self._composite(x, weight, bias, plan.axes, plan.grid, mask, plan.softmax, 0.0)


class DynamicEngine(_SequenceEngine):
    """A kernel for every position, or one a sample (N, H, K, 1); operands x, kernels, bias, mask, seed."""

    _no_more = (None, None)

    def __init__(self, composite: Composite) -> None:
        super().__init__("dynamic", "a kernel is made for every position", 2, composite)

    def forward(self, plan: Plan, activation: int, flush: bool, *operands: Any) -> Tensor:
        x, kernels, bias, mask, seed = operands
        weights = plan.softmax, seed, plan.dropped
        y: Tensor = _DYNAMIC(x, kernels, bias, mask, *plan.windows, plan.mode, *weights, activation, flush)
        return y

    def gradients(
        self, plan: Plan, flush: bool, grad_y: Tensor, needed: Sequence[bool], *operands: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, kernels, _, mask, seed = operands
        of_x, of_kernels, of_bias = needed
        grad_y, axes, weights = grad_y.contiguous(), plan.axes, (plan.softmax, seed, plan.dropped)
        grad_x = grad_kernels = grad_bias = None
        if of_x:
            length = x.shape[axes.time : axes.time + 1]
            grad_x = _DYNAMIC_GRAD_INPUT(grad_y, kernels, mask, length, *plan.windows, *weights, flush)
        if of_kernels:
            grad_kernels = _DYNAMIC_GRAD_KERNELS(grad_y, x, kernels, mask, *plan.windows, *weights, flush)
        if of_bias:
            grad_bias = grad_y.sum((axes.batch, axes.time), dtype=accumulated_in(grad_y)).to(grad_y.dtype)
        return grad_x, grad_kernels, grad_bias

    def composite(self, plan: Plan, *operands: Any) -> Tensor:
        x, kernels, bias, mask, seed = operands
        softmax = plan.softmax
        if seed is not None:
            kernels = normalised(kernels, 2, softmax, 0.0) * _DROPOUT_SCALE(kernels.detach(), seed, plan.dropped)
            softmax = False
        return self._composite(x, kernels, bias, plan.axes, plan.grid, mask, softmax, 0.0)


def _resized(x: Tensor, layout: int, length: Any) -> Tensor:
    """Returns an empty tensor of the shape of ``x`` with another length."""
    size: list[Any] = list(x.shape)
    size[_LAYOUTS[layout].time] = length
    return x.new_empty(size)


def _empty_result(taps_axis: int, kernel: str) -> Callable[[Any], Tensor]:
    def result(a: Any) -> Tensor:
        reach = a.dilation * (getattr(a, kernel).shape[taps_axis] - 1)
        return _resized(a.x, a.layout, a.x.shape[_LAYOUTS[a.layout].time] + a.pads[0] + a.pads[1] - reach)

    return result


def _empty_weights(a: Any) -> tuple[Tensor, Tensor]:
    kept, channels = _kept(a.x), a.x.shape[_LAYOUTS[a.layout].channel]
    return a.x.new_empty(a.weight.shape, dtype=kept), a.x.new_empty((channels if a.bias else 0,), dtype=kept)


def _kept(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# a softmax counts 4 a weight, as in what the techniques say of themselves, and twice that in its gradient
_LIGHTWEIGHT = raw_op(
    "lightweight",
    _empty_result(1, "weight"),
    lambda a, y: 2 * prod(y) * a.weight[1] + 4 * a.softmax * prod(a.weight),
)
_LIGHTWEIGHT_GRAD_INPUT = raw_op(
    "lightweight_grad_input",
    lambda a: _resized(a.grad_y, a.layout, a.length[0]),
    lambda a, y: 2 * prod(a.grad_y) * a.weight[1] + 4 * a.softmax * prod(a.weight),
)
_LIGHTWEIGHT_GRAD_WEIGHT = raw_op(
    "lightweight_grad_weight", _empty_weights, lambda a, y: 2 * prod(a.grad_y) * a.weight[1] + 8 * a.softmax * prod(a.weight)
)
_DYNAMIC = raw_op(
    "dynamic",
    _empty_result(2, "kernels"),
    lambda a, y: 2 * prod(y) * a.kernels[2] + 4 * a.softmax * prod(a.kernels),
)
_DYNAMIC_GRAD_INPUT = raw_op(
    "dynamic_grad_input",
    lambda a: _resized(a.grad_y, a.layout, a.length[0]),
    lambda a, y: 2 * prod(a.grad_y) * a.kernels[2] + 4 * a.softmax * prod(a.kernels),
)
_DYNAMIC_GRAD_KERNELS = raw_op(
    "dynamic_grad_kernels",
    lambda a: a.kernels.new_empty(a.kernels.shape),
    lambda a, y: 2 * prod(a.grad_y) * a.kernels[2] + 8 * a.softmax * prod(a.kernels),
)
_DROPOUT_SCALE = raw_op("dynamic_dropout_scale", lambda a: a.kernels.new_empty(a.kernels.shape, dtype=_kept(a.kernels)))
