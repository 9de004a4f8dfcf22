"""The native lightweight convolution: its raw ops as torch sees them, and their gradient.

The arithmetic is in ``csrc/kernels/lightweight.kernel.cpp``; which calls it takes, in ``_sequence_engine.py``.
"""

from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from omniconv import _native, settings
from omniconv.engines.depthwise import ACTIVATION_CODES, fused_activation, wants_gradient
from omniconv.engines.plan_cache import Calls
from omniconv.engines.sequence import LAYOUTS_BY_PLACE, PLACES, REFUSALS, refusal
from omniconv.geometry import PADDING_MODES, Grid
from omniconv.ops.activation import activate
from omniconv.ops.operator import accumulated_in
from omniconv.ops.sequence import Axes, normalised
from omniconv.ops.technique import Engine

ENGINE = Engine("lightweight", "a head has one kernel for all positions", tuple(reason for reason, _ in REFUSALS))

Shape = Sequence[int]
Windows = tuple[int, tuple[int, int], int]  # layout, (before, after), dilation
Composite = Callable[..., Tensor]

_known = Calls[tuple[Axes, Grid]]()


def known(key: Hashable, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Axes, Grid] | None:
    """What :func:`remember` was told of such a call; None where nothing was, or a gradient is wanted that the engine refuses."""
    found = _known.find(key)
    return None if found is None or (found[1].mode != "zeros" and wants_gradient(x, weight, bias)) else found


def remember(key: Hashable, input: Tensor, weight: Tensor, bias: Tensor | None, axes: Axes, windows: Grid) -> None:
    """Notes a call that passed its checks, if the engine takes all calls like it."""
    if key is None or input.dim() != 3 or refusal(input, weight, bias, windows, weight.shape[1]) is not None:
        return
    _known.note(key, (axes, windows))


def lightweight(
    composite: Composite,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axes: Axes,
    windows: Grid,
    mask: Tensor | None,
    softmax: bool,
    dropout: float,
    activation: str | None,
) -> Tensor | None:
    """A checked call, contiguous in its layout; None where the engine refuses. ``composite`` makes gradients of gradients."""
    if refusal(x, weight, bias, windows, weight.shape[1]) is not None:
        return None
    return unrefused(composite, x, weight, bias, axes, windows, mask, softmax, dropout, activation)


def unrefused(
    composite: Composite,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axes: Axes,
    windows: Grid,
    mask: Tensor | None,
    softmax: bool,
    dropout: float,
    activation: str | None,
) -> Tensor:
    """The same of a call that is known not to be refused."""
    if dropout:  # of H·K numbers, by torch, in the type of the sums: the composite path draws the same
        weight, softmax = normalised(weight.to(accumulated_in(weight)), 1, softmax, dropout), False
    x, weight = x.contiguous(), weight.contiguous()
    bias, mask = None if bias is None else bias.contiguous(), None if mask is None else mask.contiguous()
    place = (PLACES[axes.order], windows.pads[0], windows.dilation[0])
    flush = not settings.is_precise()
    if wants_gradient(x, weight, bias):
        return activate(_Lightweight.apply(x, weight, bias, mask, place, softmax, flush, composite), activation)
    fused = fused_activation(x, activation)
    y: Tensor = _FORWARD(x, weight, bias, mask, *place, PADDING_MODES.index(windows.mode), softmax, ACTIVATION_CODES[fused], flush)
    return y if fused is activation else activate(y, activation)


class _Lightweight(torch.autograd.Function):
    """The raw ops under autograd; zero padding only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        place: Windows,
        softmax: bool,
        flush: bool,
        composite: Composite,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mask)
        ctx.place, ctx.softmax, ctx.flush, ctx.composite = place, softmax, flush, composite
        return _FORWARD(x, weight, bias, mask, *place, 0, softmax, 0, flush)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, bias, mask = ctx.saved_tensors
        place, softmax, flush = ctx.place, ctx.softmax, ctx.flush
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # the gradient of this gradient is wanted
            found = _differentiable(ctx.composite, x, weight, bias, mask, place, softmax, grad_y, needed)
            return *found, None, None, None, None, None
        axes, grad_y = LAYOUTS_BY_PLACE[place[0]], grad_y.contiguous()
        grad_x = grad_weight = grad_bias = None
        if needed[0]:
            grad_x = _GRAD_INPUT(grad_y, weight, mask, x.shape[axes.time : axes.time + 1], *place, softmax, flush)
        if needed[1] or needed[2]:
            grad_weight, grad_bias = _GRAD_WEIGHT(grad_y, x, weight, mask, *place, softmax, needed[2], flush)
            grad_weight = grad_weight.to(weight.dtype) if needed[1] else None
            grad_bias = grad_bias.to(x.dtype) if needed[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _differentiable(
    composite: Composite,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    place: Windows,
    softmax: bool,
    grad_y: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients, by the composite path, as functions that autograd can differentiate again."""
    layout, pads, dilation = place
    grid = Grid((1,), (pads,), (dilation,))
    with torch.enable_grad():
        # by aliases of their own: operands may depend on one another, and hooks on them must not run here
        aliases = tuple(None if t is None else t.view_as(t) for t in (x, weight, bias))
        wide = accumulated_in(x)
        operands = (None if t is None else t.to(wide) for t in aliases)
        y = composite(*operands, LAYOUTS_BY_PLACE[layout], grid, mask, softmax, 0.0).to(x.dtype)
        wanted = [t for t, need in zip(aliases, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    layout: int,
    pads: Any,
    dilation: int,
    mode: int,
    softmax: bool,
    activation: int,
    flush: bool,
) -> Tensor:
    size = list(x.shape)
    size[LAYOUTS_BY_PLACE[layout].time] += pads[0] + pads[1] - dilation * (weight.shape[1] - 1)
    return x.new_empty(size)


def _fake_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    length: Any,
    layout: int,
    pads: Any,
    dilation: int,
    softmax: bool,
    flush: bool,
) -> Tensor:
    size = list(grad_y.shape)
    size[LAYOUTS_BY_PLACE[layout].time] = length[0]
    return grad_y.new_empty(size)


def _fake_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    layout: int,
    pads: Any,
    dilation: int,
    softmax: bool,
    bias: bool,
    flush: bool,
) -> tuple[Tensor, Tensor]:
    kept, channels = torch.float64 if x.dtype == torch.float64 else torch.float32, x.shape[LAYOUTS_BY_PLACE[layout].channel]
    return x.new_empty(weight.shape, dtype=kept), x.new_empty((channels if bias else 0,), dtype=kept)


if _native.AVAILABLE:
    torch.library.register_fake("omniconv::lightweight", _fake_forward)
    torch.library.register_fake("omniconv::lightweight_grad_input", _fake_grad_input)
    torch.library.register_fake("omniconv::lightweight_grad_weight", _fake_grad_weight)
    # bound once: to look an op up costs a microsecond
    _FORWARD = torch.ops.omniconv.lightweight.default
    _GRAD_INPUT = torch.ops.omniconv.lightweight_grad_input.default
    _GRAD_WEIGHT = torch.ops.omniconv.lightweight_grad_weight.default

    # a softmax counts 4 a weight, as in what the technique says of itself
    @register_flop_formula(torch.ops.omniconv.lightweight)
    def _forward_flops(
        x: Shape, weight: Shape, bias: Any, mask: Any, layout: int, pads: Any, dilation: int, mode: int, softmax: bool,
        *settings: Any, out_shape: Shape, **_: Any,
    ) -> int:  # fmt: skip
        return 2 * prod(out_shape) * weight[1] + 4 * softmax * prod(weight)

    @register_flop_formula(torch.ops.omniconv.lightweight_grad_input)
    def _grad_input_flops(
        grad_y: Shape, weight: Shape, mask: Any, length: Any, layout: int, pads: Any, dilation: int, softmax: bool,
        *settings: Any, out_shape: Shape, **_: Any,
    ) -> int:  # fmt: skip
        return 2 * prod(grad_y) * weight[1] + 4 * softmax * prod(weight)

    @register_flop_formula(torch.ops.omniconv.lightweight_grad_weight)
    def _grad_weight_flops(
        grad_y: Shape, x: Shape, weight: Shape, mask: Any, layout: int, pads: Any, dilation: int, softmax: bool,
        *settings: Any, out_shape: Any, **_: Any,
    ) -> int:  # fmt: skip
        return 2 * prod(grad_y) * weight[1] + 8 * softmax * prod(weight)
