"""The native dynamic convolution: which calls it takes, its raw ops as torch sees them, and their gradient.

The arithmetic is in ``csrc/kernels/dynamic.kernel.cpp``: the softmax is made a tile of positions at a time, and nothing of the
size of the kernels is stored.
"""

from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from omniconv import _native, settings
from omniconv.engines.depthwise import ACTIVATION_CODES, fused_activation, wants_gradient
from omniconv.engines.plan_cache import Calls
from omniconv.engines.sequence import LAYOUTS_BY_PLACE, PLACES, REFUSALS
from omniconv.engines.sequence import refusal as refused_by_both
from omniconv.geometry import PADDING_MODES, Grid
from omniconv.ops.activation import activate
from omniconv.ops.operator import accumulated_in
from omniconv.ops.sequence import Axes, normalised
from omniconv.ops.technique import Engine

Shape = Sequence[int]
Windows = tuple[int, tuple[int, int], int]  # layout, (before, after), dilation
Composite = Callable[..., Tensor]


ENGINE = Engine("dynamic", "a kernel is made for every position", tuple(reason for reason, _ in REFUSALS))


def refusal(x: Tensor, kernels: Tensor, bias: Tensor | None, windows: Grid) -> str | None:
    """Why the engine does not take a call; None where it does."""
    return refused_by_both(x, kernels, bias, windows, kernels.shape[2])


class Known(NamedTuple):
    """What the checks of a call of three axes find, of shapes and settings alone."""

    place: Windows
    mode: str


_known = Calls[Known]()


def known(key: Hashable, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Known | None:
    """What :func:`remember` was told of such a call; None where nothing was, or a gradient is wanted that the engine refuses."""
    found = _known.find(key)
    return None if found is None or (found.mode != "zeros" and wants_gradient(x, kernels, bias)) else found


def remember(key: Hashable, x: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, windows: Grid) -> None:
    """Notes a call without mask and dropout that passed its checks, if the engine takes all calls like it."""
    if key is None or refusal(x, kernels, bias, windows) is not None:
        return
    _known.note(key, Known(_place(axes, windows), windows.mode))


def _place(axes: Axes, windows: Grid) -> Windows:
    return PLACES[axes.order], windows.pads[0], windows.dilation[0]


def dynamic(
    composite: Composite,
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    axes: Axes,
    windows: Grid,
    mask: Tensor | None,
    softmax: bool,
    dropout: float,
    activation: str | None,
) -> Tensor:
    """The call, checked and not refused, contiguous in its layout. ``composite`` makes gradients of gradients.

    Which weights are dropped is a hash of their place and of one number drawn by torch: forward and backward each make it anew.
    """
    found = Known(_place(axes, windows), windows.mode)
    return apply(composite, x, kernels, bias, found, mask, softmax, round(dropout * 2**32), activation)


def apply(
    composite: Composite,
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    call: Known,
    mask: Tensor | None = None,
    softmax: bool = True,
    dropped: int = 0,
    activation: str | None = None,
) -> Tensor:
    """The same of a call that is known; ``dropped`` of 2³² weights are."""
    x, kernels = x.contiguous(), kernels.contiguous()
    bias, mask = None if bias is None else bias.contiguous(), None if mask is None else mask.contiguous()
    place, flush = call.place, not settings.is_precise()
    seed = torch.randint(-(2**63), 2**63 - 1, (1,)) if dropped else None
    if wants_gradient(x, kernels, bias):
        y = _Dynamic.apply(x, kernels, bias, mask, seed, place, softmax, dropped, flush, composite)
        return activate(y, activation)
    fused, mode = fused_activation(x, activation), PADDING_MODES.index(call.mode)
    y = _FORWARD(x, kernels, bias, mask, *place, mode, softmax, seed, dropped, ACTIVATION_CODES[fused], flush)
    return y if fused is activation else activate(y, activation)


class _Dynamic(torch.autograd.Function):
    """The raw ops under autograd; zero padding only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernels: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        place: Windows,
        softmax: bool,
        dropped: int,
        flush: bool,
        composite: Composite,
    ) -> Tensor:
        ctx.save_for_backward(x, kernels, bias, mask, seed)
        ctx.place, ctx.softmax, ctx.dropped, ctx.flush, ctx.composite = place, softmax, dropped, flush, composite
        return _FORWARD(x, kernels, bias, mask, *place, 0, softmax, seed, dropped, 0, flush)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, kernels, bias, mask, seed = ctx.saved_tensors
        place, needed = ctx.place, ctx.needs_input_grad[:3]
        weights = ctx.softmax, seed, ctx.dropped
        if torch.is_grad_enabled():  # the gradient of this gradient is wanted
            found = _differentiable(ctx.composite, x, kernels, bias, mask, place, weights, grad_y, needed)
            return *found, None, None, None, None, None, None, None
        axes, grad_y = LAYOUTS_BY_PLACE[place[0]], grad_y.contiguous()
        grad_x = grad_kernels = grad_bias = None
        if needed[0]:
            grad_x = _GRAD_INPUT(grad_y, kernels, mask, x.shape[axes.time : axes.time + 1], *place, *weights, ctx.flush)
        if needed[1]:
            grad_kernels = _GRAD_KERNELS(grad_y, x, kernels, mask, *place, *weights, ctx.flush)
        if needed[2]:
            grad_bias = grad_y.sum((axes.batch, axes.time), dtype=accumulated_in(grad_y)).to(grad_y.dtype)
        return grad_x, grad_kernels, grad_bias, None, None, None, None, None, None, None


def _differentiable(
    composite: Composite,
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    place: Windows,
    weights: tuple[bool, Tensor | None, int],
    grad_y: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients, by the composite path, as functions that autograd can differentiate again."""
    (layout, pads, dilation), (softmax, seed, dropped) = place, weights
    grid = Grid((1,), (pads,), (dilation,))
    with torch.enable_grad():
        # by aliases of their own: operands may depend on one another, and hooks on them must not run here
        aliases = tuple(None if t is None else t.view_as(t) for t in (x, kernels, bias))
        wide = accumulated_in(x)
        signal, numbers, shift = (None if t is None else t.to(wide) for t in aliases)
        if seed is not None and numbers is not None:
            numbers = normalised(numbers, 2, softmax, 0.0) * _DROPS(kernels.detach(), seed, dropped)
        y = composite(signal, numbers, shift, LAYOUTS_BY_PLACE[layout], grid, mask, softmax and seed is None, 0.0).to(x.dtype)
        wanted = [t for t, need in zip(aliases, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _outputs(x: Tensor, kernels: Tensor, layout: int, pads: Any, dilation: int) -> Any:
    """The shape of the result."""
    size = list(x.shape)
    size[LAYOUTS_BY_PLACE[layout].time] += pads[0] + pads[1] - dilation * (kernels.shape[2] - 1)
    return size


def _fake_forward(
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    layout: int,
    pads: Any,
    dilation: int,
    mode: int,
    softmax: bool,
    seed: Tensor | None,
    dropped: int,
    activation: int,
    flush: bool,
) -> Tensor:
    return x.new_empty(_outputs(x, kernels, layout, pads, dilation))


def _fake_grad_input(
    grad_y: Tensor,
    kernels: Tensor,
    mask: Tensor | None,
    length: Any,
    layout: int,
    pads: Any,
    dilation: int,
    softmax: bool,
    seed: Tensor | None,
    dropped: int,
    flush: bool,
) -> Tensor:
    size = list(grad_y.shape)
    size[LAYOUTS_BY_PLACE[layout].time] = length[0]
    return grad_y.new_empty(size)


def _fake_grad_kernels(
    grad_y: Tensor,
    x: Tensor,
    kernels: Tensor,
    mask: Tensor | None,
    layout: int,
    pads: Any,
    dilation: int,
    softmax: bool,
    seed: Tensor | None,
    dropped: int,
    flush: bool,
) -> Tensor:
    return kernels.new_empty(kernels.shape)


def _fake_drops(kernels: Tensor, seed: Tensor, dropped: int) -> Tensor:
    return kernels.new_empty(kernels.shape, dtype=torch.float64 if kernels.dtype == torch.float64 else torch.float32)


if _native.AVAILABLE:
    torch.library.register_fake("omniconv::dynamic", _fake_forward)
    torch.library.register_fake("omniconv::dynamic_grad_input", _fake_grad_input)
    torch.library.register_fake("omniconv::dynamic_grad_kernels", _fake_grad_kernels)
    torch.library.register_fake("omniconv::dynamic_dropout_scale", _fake_drops)
    # bound once: to look an op up costs a microsecond
    _FORWARD = torch.ops.omniconv.dynamic.default
    _GRAD_INPUT = torch.ops.omniconv.dynamic_grad_input.default
    _GRAD_KERNELS = torch.ops.omniconv.dynamic_grad_kernels.default
    _DROPS = torch.ops.omniconv.dynamic_dropout_scale.default

    # a softmax counts 4 a weight, as in what the technique says of itself
    @register_flop_formula(torch.ops.omniconv.dynamic)
    def _forward_flops(
        x: Shape, kernels: Shape, bias: Any, mask: Any, layout: int, pads: Any, dilation: int, mode: int, softmax: bool,
        *settings: Any, out_shape: Shape, **_: Any,
    ) -> int:  # fmt: skip
        return 2 * prod(out_shape) * kernels[2] + 4 * softmax * prod(kernels)

    @register_flop_formula(torch.ops.omniconv.dynamic_grad_input)
    def _grad_input_flops(
        grad_y: Shape, kernels: Shape, mask: Any, length: Any, layout: int, pads: Any, dilation: int, softmax: bool,
        *settings: Any, out_shape: Shape, **_: Any,
    ) -> int:  # fmt: skip
        return 2 * prod(grad_y) * kernels[2] + 4 * softmax * prod(kernels)

    @register_flop_formula(torch.ops.omniconv.dynamic_grad_kernels)
    def _grad_kernels_flops(
        grad_y: Shape, x: Shape, kernels: Shape, mask: Any, layout: int, pads: Any, dilation: int, softmax: bool,
        *settings: Any, out_shape: Shape, **_: Any,
    ) -> int:  # fmt: skip
        return 2 * prod(grad_y) * kernels[2] + 8 * softmax * prod(kernels)
