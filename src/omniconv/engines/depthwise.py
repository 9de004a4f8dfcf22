"""The native depthwise engine: which calls it takes, its raw ops as torch sees them, and their gradient.

Every technique whose channels do not meet ends here. The arithmetic is in ``csrc/kernels/depthwise_*.kernel.cpp``.
"""

from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from omniconv import _native, settings
from omniconv.engines.plan_cache import Calls
from omniconv.geometry import PADDING_MODES, Grid
from omniconv.layout import arrange, is_channels_last, is_channels_last_quickly
from omniconv.ops.activation import activate, followed_apart
from omniconv.ops.grid import convolve, is_plain
from omniconv.ops.layer import one_position
from omniconv.ops.operator import accumulated_in, finalize_output
from omniconv.ops.technique import Engine

LANES = 16  # channels of the widest vector: with fewer, a channels-last tensor goes the contiguous way
ACTIVATION_CODES = {None: 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4, "gelu": 5, "sigmoid": 6}
_CURVED = ("silu", "gelu", "sigmoid")  # in float64 these are torch's, on the result

Integers = tuple[int, ...]
Shape = Sequence[int]
Windows = tuple[Integers, Integers, Integers]  # stride, (before, after) of every axis in a row, dilation


def wants_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd would record an op of these operands."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active."""
    # the dispatcher's own functions, which the tracer knows; a raw op has neither a tangent nor a batching rule
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_out_of_proportion(weight: Tensor, windows: Grid) -> bool:
    # the kernels set up tables by stride and by window
    return any(s > 64 for s in windows.stride) or any(
        d > 1 and d * (k - 1) > 1 << 20 for d, k in zip(windows.dilation, weight.shape[-len(windows.dilation) :], strict=True)
    )


# in order; the first that holds sends a call to the composite path
REFUSALS: tuple[tuple[str, Callable[[Tensor, Tensor, Tensor | None, Grid], bool]], ...] = (
    ("the native library is not there", lambda x, w, b, g: not _native.AVAILABLE),
    ("composite paths were asked for", lambda x, w, b, g: settings.is_composite_only()),
    ("the tensors are not on the CPU", lambda x, w, b, g: x.device.type != "cpu"),
    ("there are no channels or no samples", lambda x, w, b, g: x.shape[1] == 0 or x.shape[0] == 0),
    (
        "a stride is above 64, or a window covers more than a million positions of an axis",
        lambda x, w, b, g: _is_out_of_proportion(w, g),
    ),
    ("a torch.func transform or forward-mode differentiation is active", lambda x, w, b, g: is_transformed()),
    (
        "a gradient is wanted through reflect, replicate or circular padding",
        lambda x, w, b, g: g.mode != "zeros" and wants_gradient(x, w, b),
    ),
)


ENGINE = Engine("depthwise", "every channel is a group of its own", tuple(reason for reason, _ in REFUSALS))


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid) -> str | None:
    """Why the engine does not take a call; None where it does."""
    for reason, holds in REFUSALS:
        if holds(x, weight, bias, windows):
            return reason
    return None


def fused_activation(x: Tensor, activation: str | None) -> str | None:
    """The activation, where the kernels can end with it; None where torch must follow."""
    return activation if x.dtype != torch.float64 or activation not in _CURVED else None


class Known(NamedTuple):
    """What was found out about a call with a batch axis, of shapes and settings alone: its windows, and the same for the raw op."""

    windows: Grid
    integers: Windows


_known = Calls[Known]()
_PLAIN = frozenset((Tensor, torch.nn.Parameter))  # subclasses have ways of their own


def call_key(
    op: Hashable,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    mode: Any,
    activation: Any,
    groups: Any = None,
) -> Hashable:
    """What all checks of a call depend on; None where they have to be made, and where the engine may have to refuse.

    To look a call up takes a third of the time of checking it (2.5 and 8 µs; the raw op takes 4.7).
    """
    if torch.compiler.is_compiling() or type(input) not in _PLAIN or type(weight) not in _PLAIN:
        return None
    dtype = input.dtype
    if not (
        weight.dtype is dtype
        and input.is_cpu
        and weight.is_cpu
        and input.layout is weight.layout is torch.strided
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
        and not settings.is_composite_only()
        # 1 is equal to True and 1.0, which are refused
        and (type(stride) is int or is_plain(stride))
        and (type(padding) is int or is_plain(padding))
        and (type(dilation) is int or is_plain(dilation))
    ):
        return None
    try:
        if bias is None:
            return op, input.shape, weight.shape, None, dtype, stride, padding, dilation, mode, activation, groups
        if type(bias) in _PLAIN and bias.dtype is dtype and bias.is_cpu and bias.layout is torch.strided:
            return op, input.shape, weight.shape, bias.shape, dtype, stride, padding, dilation, mode, activation, groups
    except RuntimeError:  # a nested tensor has no shape; it is refused by name
        pass
    return None


def known(key: Hashable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Known | None:
    """What :func:`remember` was told of such a call; None where nothing was, or a gradient is wanted that the engine refuses."""
    found = _known.find(key)
    return None if found is None or (found.windows.mode != "zeros" and wants_gradient(x, weight, bias)) else found


def remember(key: Hashable, rank: int, input: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid) -> None:
    """Notes a call that passed its checks, if the engine takes all calls like it."""
    if key is None or input.dim() != rank + 2 or refusal(input, weight, bias, windows) is not None:
        return
    _known.note(key, Known(windows, raw_windows(windows)))


def raw_windows(windows: Grid) -> Windows:
    """Windows as the raw ops take them."""
    return windows.stride, sum(windows.pads, ()), windows.dilation


def _may_come_in_chunks(windows: Grid) -> bool:
    """Whether every sum must take its taps in order, so that the bits of a position do not depend on the length.

    So it is along one axis with nothing padded after: a causal filter, or one over a chunk and what came before it. It costs
    nothing below 17 taps, where the kernels have no other order, and a quarter of the time at 31 (N8 C512 T512, float32: 1.17 and
    1.50 ms with AVX-512, 1.47 and 1.77 with AVX2).
    """
    if len(windows.pads) != 1 or windows.fitted:  # fitted pads may be symbolic: to compare them would pin the size
        return False
    return windows.pads[0][1] == 0


def chunks_differ(weight: Tensor, bias: Tensor | None, stride: Integers, dilation: Integers, activation: str | None) -> str | None:
    """Why the bits of an output may depend on the chunk that it comes in; None where they do not. weight (C·M, 1, K)."""
    windows = Grid(stride, ((0, 0),), dilation)
    reason = refusal(one_position(weight, weight.shape[0]), weight, bias, windows) or fused_apart(weight, activation)
    if reason is None and weight.shape[2] > 1 and not weight.isfinite().all():  # pads are left out of a sum, a past of zeros is not
        return "a weight is not finite: with the zeros of a past it makes NaN, with those of the pads it does not"
    return reason


def fused_apart(weight: Tensor, *activations: str | None) -> str | None:
    """The same for activations alone."""
    reasons = (None if fused_activation(weight, a) == a else followed_apart(a) for a in activations)
    return next(filter(None, reasons), None)


def deliver_depthwise(
    input: Tensor, rank: int, x: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid, activation: str | None
) -> Tensor:
    """A checked call, as its caller expects the result: by the engine, or where it refuses by the composite path."""
    if refusal(x, weight, bias, windows) is None:
        y = depthwise(x, weight, bias, windows, activation)
        return y if input.dim() == rank + 2 else y.squeeze(0)
    return finalize_output(input, rank, convolve, (x, weight, bias), windows, max(x.shape[1], 1), activation=activation)


def staged_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid, activation: str | None) -> Tensor:
    """The same as a stage of a composed technique, which sees to batch axis and accumulation itself."""
    if refusal(x, weight, bias, windows) is None:
        return depthwise(x, weight, bias, windows, activation)
    return activate(convolve(x, weight, bias, windows, max(x.shape[1], 1)), activation)


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    windows: Grid,
    activation: str | None,
    integers: Windows | None = None,
) -> Tensor:
    """activation(x (N, C, …) ∗ weight (C·M, 1, K…) + bias), checked and not refused, in the memory format of the rule.

    ``integers`` are the :func:`raw_windows`, where they are known.
    """
    last = is_channels_last_quickly(x)
    relaid = last and (x.shape[1] < LANES or weight.shape[0] != x.shape[1])
    if relaid or not last:
        x = x.contiguous()
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    integers = integers or raw_windows(windows)
    ordered, flush = _may_come_in_chunks(windows), not settings.is_precise()
    if wants_gradient(x, weight, bias):
        y = activate(_Depthwise.apply(x, weight, bias, integers, ordered, flush), activation)
    else:
        fused = fused_activation(x, activation)
        mode = PADDING_MODES.index(windows.mode)
        y = _FORWARD(x, weight, bias, *integers, mode, ACTIVATION_CODES[fused], ordered, flush)
        y = y if fused is activation else activate(y, activation)
    return arrange(y, channels_last=True) if relaid else y


class _Depthwise(torch.autograd.Function):
    """The raw ops under autograd; zero padding only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows, ordered: bool, flush: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.windows, ctx.flush = windows, flush
        return _FORWARD(x, weight, bias, *windows, 0, 0, ordered, flush)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient of this gradient is wanted
            return *_differentiable(x, weight, bias, ctx.windows, grad_y, ctx.needs_input_grad[:3]), None, None, None
        last = is_channels_last_quickly(x)
        if last or not grad_y.is_contiguous():
            grad_y = arrange(grad_y, last)
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_x = _grad_input(grad_y, weight, x, ctx.windows, ctx.flush) if of_x else None
        grad_weight = grad_bias = None
        if of_weight or of_bias:
            grad_weight, grad_bias = _GRAD_WEIGHT(grad_y, x, weight.shape[2:], *ctx.windows, of_bias, ctx.flush)
            # each in its own dtype: a causal filter's bias may be wider than its weight
            grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to((weight if bias is None else bias).dtype)
        return grad_x, grad_weight if of_weight else None, grad_bias if of_bias else None, None, None, None


def _grad_input(grad_y: Tensor, weight: Tensor, x: Tensor, windows: Windows, flush: bool) -> Tensor:
    """The gradient of ``x``; the raw op knows one output per channel."""
    stride, pads, dilation = windows
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


def _differentiable(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows, grad_y: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients, by the composite path, as functions that autograd can differentiate again."""
    stride, pads, dilation = windows
    grid = Grid(stride, tuple(zip(pads[::2], pads[1::2], strict=True)), dilation)
    with torch.enable_grad():
        # by aliases of their own: operands may depend on one another, and hooks on them must not run here
        x, weight, bias = x.view_as(x), weight.view_as(weight), None if bias is None else bias.view_as(bias)
        wide = accumulated_in(x)
        y = convolve(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), grid, x.shape[1]).to(x.dtype)
        wanted = [t for t, need in zip((x, weight, bias), needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def _fake(x: Tensor, channels: int, size: Any) -> Tensor:
    """An output (N, channels, size…): channels-last where the raw op makes it so."""
    if is_channels_last(x) and x.shape[1] == channels >= LANES:
        return x.new_empty((x.shape[0], *size, channels)).movedim(-1, 1)
    return x.new_empty((x.shape[0], channels, *size))


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    pads: Any,
    dilation: Any,
    mode: int,
    activation: int,
    ordered: bool,
    flush: bool,
) -> Tensor:
    grid = Grid(tuple(stride), tuple(zip(pads[::2], pads[1::2], strict=True)), tuple(dilation))
    return _fake(x, weight.shape[0], grid.output_size(x.shape[2:], weight.shape[2:]))


def _fake_grad_input(grad_y: Tensor, weight: Tensor, size: Any, stride: Any, pads: Any, dilation: Any, flush: bool) -> Tensor:
    return _fake(grad_y, grad_y.shape[1], size)


def _fake_grad_weight(
    grad_y: Tensor, x: Tensor, kernel: Any, stride: Any, pads: Any, dilation: Any, bias: bool, flush: bool
) -> tuple[Tensor, Tensor]:
    kept, outputs = torch.float64 if x.dtype == torch.float64 else torch.float32, grad_y.shape[1]
    return x.new_empty((outputs, 1, *kernel), dtype=kept), x.new_empty((outputs if bias else 0,), dtype=kept)


if _native.AVAILABLE:
    torch.library.register_fake("omniconv::depthwise", _fake_forward)
    torch.library.register_fake("omniconv::depthwise_grad_input", _fake_grad_input)
    torch.library.register_fake("omniconv::depthwise_grad_weight", _fake_grad_weight)
    # bound once: to look an op up costs a microsecond
    _FORWARD = torch.ops.omniconv.depthwise.default
    _GRAD_INPUT = torch.ops.omniconv.depthwise_grad_input.default
    _GRAD_WEIGHT = torch.ops.omniconv.depthwise_grad_weight.default

    @register_flop_formula(torch.ops.omniconv.depthwise)
    def _forward_flops(x: Shape, weight: Shape, *settings: Any, out_shape: Shape, **_: Any) -> int:
        return 2 * prod(out_shape) * prod(weight[2:])

    @register_flop_formula(torch.ops.omniconv.depthwise_grad_input)
    def _grad_input_flops(grad_y: Shape, weight: Shape, size: Shape, *settings: Any, out_shape: Shape, **_: Any) -> int:
        return 2 * prod(grad_y) * prod(min(k, i) for k, i in zip(weight[2:], size, strict=True))

    @register_flop_formula(torch.ops.omniconv.depthwise_grad_weight)
    def _grad_weight_flops(grad_y: Shape, x: Shape, kernel: Shape, *settings: Any, out_shape: Any, **_: Any) -> int:
        return 2 * prod(grad_y) * prod(kernel)
