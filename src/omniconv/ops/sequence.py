"""Shared by the techniques whose kernels are shared per head along a sequence: lightweight and dynamic.

Layouts, checks, the composite path, the definition, the error of a softmax, the layer, and what a Problem means to them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.geometry import LARGEST, PADDING_MODES, Grid, Padding, grid, is_integer, normal_padding, per_axis
from omniconv.ops.activation import activate, check_activation
from omniconv.ops.error_bound import activation_error, gamma, linear_error
from omniconv.ops.layer import Causal, Layer, causal_past
from omniconv.ops.operator import check_bias, check_dense, check_flags, fail, finalize_output
from omniconv.ops.reference import padded, sampled, with_bias
from omniconv.ops.technique import Arguments
from omniconv.ops.tracing import number_sizes, with_recorded_sizes
from omniconv.problem import DTYPE_NAMES, Problem


@dataclass(frozen=True)
class Axes:
    """Where batch, channel and time lie in a layout; ``order`` permutes (N, C, T) into it."""

    batch: int
    channel: int
    time: int
    order: tuple[int, int, int]

    def of(self, x: Tensor) -> Tensor:
        """(N, C, T) in the layout: a view."""
        return x.permute(self.order)

    def channel_first(self, x: Tensor) -> Tensor:
        """The layout's tensor as (N, C, T): a view."""
        return x.permute(self.batch, self.channel, self.time)


LAYOUTS = {"NCT": Axes(0, 1, 2, (0, 1, 2)), "NTC": Axes(0, 2, 1, (0, 2, 1)), "TNC": Axes(1, 2, 0, (2, 0, 1))}


def axes_of(op: str, layout: str, batched: bool) -> Axes:
    """The axes of a layout, once a missing batch axis has been put first: then (T, C) is a sample of NTC and of TNC alike."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        fail(op, f"layout must be one of {', '.join(LAYOUTS)}", repr(layout))
    return LAYOUTS["NTC" if layout == "TNC" and not batched else layout]


def check_axes(op: str, name: str, form: str, kernel: Tensor | None, count: int) -> None:
    """Raises unless there is a kernel, with that many axes."""
    if kernel is None:
        raise TypeError(f"{op}: {name} must be a Tensor, got None")
    if kernel.dim() != count:
        fail(op, f"{name} must be {form}", f"shape {tuple(kernel.shape)}")


def check_heads(op: str, name: str, form: str, shape: Sequence[int], heads: int, channels: int) -> None:
    """Raises ValueError unless there are channels and heads, and the heads divide the channels."""
    if channels < 1:
        fail(op, "input must have at least one channel", channels)
    if heads < 1 or channels % heads:
        fail(op, f"{name} must be {form} with H heads that divide the input's {channels} channels", f"shape {tuple(shape)}")


def check_dropout(op: str, weight_dropout: float) -> None:
    """Raises unless the rate is a number from 0 to 1."""
    if isinstance(weight_dropout, bool) or not isinstance(weight_dropout, (int, float)):
        raise TypeError(f"{op}: weight_dropout must be a number, got {weight_dropout!r}")
    if not 0 <= weight_dropout <= 1:
        fail(op, "weight_dropout must be at least 0 and at most 1", weight_dropout)


def received_mask(op: str, padding_mask: Tensor | None, x: Tensor, axes: Axes, batched: bool) -> Tensor | None:
    """The padding mask, checked, as (N, T).

    Raises:
        TypeError: It is not a tensor of bools.
        ValueError: Its shape or device is not the input's.
    """
    if padding_mask is None:
        return None
    check_dense(op, "padding_mask", padding_mask)
    if padding_mask.dtype != torch.bool:
        raise TypeError(f"{op}: padding_mask must be bool, True where the position is padding, got {padding_mask.dtype}")
    if padding_mask.device != x.device:
        fail(op, f"padding_mask must be on the input's device {x.device}", padding_mask.device)
    expected = (x.shape[axes.batch], x.shape[axes.time])[0 if batched else 1 :]
    if padding_mask.shape != expected:
        fail(op, f"padding_mask must have shape {tuple(expected)}", f"shape {tuple(padding_mask.shape)}")
    return padding_mask if batched else padding_mask.unsqueeze(0)


def masked(x: Tensor, mask: Tensor | None, axes: Axes) -> Tensor:
    """``x`` with zeros where the mask (N, T) is True."""
    if mask is None:
        return x
    return x.masked_fill(axes.of(mask.unsqueeze(1)), 0)


def make_windows(op: str, size: int, kernel: int, padding: Padding, dilation: int | Sequence[int], mode: str) -> Grid:
    """The windows along time. At stride 1 "same_minimal" is "same"; by that name it needs no size, which may be symbolic."""
    named = isinstance(padding, str) and padding == "same_minimal"
    return grid(op, (size,), (kernel,), 1, "same" if named else padding, dilation, mode)


def run(
    op: str,
    compute: Callable[..., Tensor],
    input: Tensor,
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    axes: Axes,
    windows: Grid,
    *,
    softmax: bool,
    padding_mask: Tensor | None,
    weight_dropout: float,
    training: bool,
    activation: str | None,
    native: Callable[..., Tensor | None] | None = None,
) -> Tensor:
    """Checks what both operators take besides their kernels, then computes and delivers.

    ``native(x, kernel, bias, axes, windows, mask, softmax, dropout, activation)`` is asked first; None sends a call to ``compute``.
    """
    check_bias(op, bias, x.shape[axes.channel])
    check_activation(op, activation)
    check_dropout(op, weight_dropout)
    check_flags(op, softmax=softmax, training=training)
    mask = received_mask(op, padding_mask, x, axes, input.dim() == 3)
    dropout = float(weight_dropout) if training else 0.0
    if native is not None:
        y = native(x, kernel, bias, axes, windows, mask, softmax, dropout, activation)
        if y is not None:
            return y if input.dim() == 3 else y.squeeze(0)
    compute = with_recorded_sizes(compute)
    return finalize_output(input, 1, compute, (x, kernel, bias), axes, windows, mask, softmax, dropout, activation=activation)


def normalised(kernel: Tensor, axis: int, softmax: bool, dropout: float) -> Tensor:
    """The kernel as it is applied: softmax over its taps, then DropConnect."""
    if softmax:
        kernel = kernel.softmax(axis)
    return F.dropout(kernel, dropout) if dropout else kernel


def pad_axis(x: Tensor, axis: int, windows: Grid) -> Tensor:
    """A copy of ``x`` padded on both sides of one axis by the pads of the windows; ``x`` itself where they are 0.

    torch's own padding modes know the last axes alone; pieces of ``x`` serve any axis.
    """
    (before, after), mode, size = windows.pads[0], windows.mode, x.shape[axis]
    if before == 0 and after == 0:
        return x
    if mode == "zeros":
        return F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (before, after))
    if mode == "reflect":
        left, right = x.narrow(axis, 1, before).flip(axis), x.narrow(axis, size - 1 - after, after).flip(axis)
    elif mode == "replicate":
        left, right = (
            x.narrow(axis, at, 1).expand([count if a == axis else n for a, n in enumerate(x.shape)])
            for at, count in ((0, before), (size - 1, after))
        )
    else:
        left, right = x.narrow(axis, size - before, before), x.narrow(axis, 0, after)
    return torch.cat([left, x, right], axis)


def shift_and_add(x: Tensor, taps: Sequence[Tensor], bias: Tensor | None, axis: int, step: int) -> Tensor:
    """Σ_i taps[i] · x shifted by i·step along ``axis``, plus the bias; ``x`` holds its pads already.

    One fused multiply-add over the whole tensor per tap. N8 C512 T512 H16 K31, float32, one AVX-512 core, ms forward: 5.5 in
    place, 10.5 out of place, 20 as product and sum, 37 as a depthwise F.conv1d, 142 unfolded (lightweight); 7.1 (dynamic).
    """
    outputs = x.shape[axis] - step * (len(taps) - 1)
    first = x.narrow(axis, 0, outputs)
    y = first * taps[0] if bias is None else torch.addcmul(bias, first, taps[0])
    # y is this function's own and no gradient needs its past values; but vmap has no rule for addcmul_
    multiply_add = torch.addcmul if _transformed() else Tensor.addcmul_
    for i, tap in enumerate(taps[1:], start=1):
        y = multiply_add(y, x.narrow(axis, i * step, outputs), tap)
    return y


def _transformed() -> bool:
    """Whether the call is being traced, which undoes updates in place anyway, or is inside a torch.func transform."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def definition(
    input: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    *,
    padding: Padding,
    dilation: int | Sequence[int],
    layout: str,
    padding_mode: str,
    padding_mask: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The one equation with a kernel per channel and position, tap by tap: kernels (N or 1, C, K, T or 1), as they are applied."""
    axes = LAYOUTS[layout]
    x = axes.channel_first(input)
    if padding_mask is not None:
        x = x.masked_fill(padding_mask[:, None, :], 0)
    taps = kernels.shape[2]
    windows = grid("reference", x.shape[2:], (taps,), 1, padding, dilation, padding_mode)
    outputs = windows.output_size(x.shape[2:], (taps,))
    x = padded(x, 2, windows.pads[0], padding_mode)
    y = x.new_zeros(*x.shape[:2], *outputs)
    for i in range(taps):
        y = y + kernels[:, :, i] * sampled(x, (i,), windows, outputs)
    return axes.of(activate(with_bias(y, bias), activation))


def of_channels(kernels: Tensor, axis: int, channels: int) -> Tensor:
    """The kernel of every channel: channel c has that of head c // (C/H), along ``axis``."""
    heads = kernels.shape[axis]
    return kernels.index_select(axis, torch.arange(channels, device=kernels.device) // (channels // heads))


EXP_ROUNDOFFS = 4  # two units in the last place: vectorised exponentials promise one


def softmax_error(logits: Tensor, axis: int, u: float) -> Tensor:
    """How far weights normalised with unit roundoff u may lie from ``logits.softmax(axis)``, for any logits.

    With d = max − logit, rounded once, exp(−d) is off by a factor of at most exp(u·d)·(1 + EXP_ROUNDOFFS·u); the sum by the mean
    of these and γ(K); the quotient by two roundings. Below the smallest normal number a weight may be flushed: K + 2 times in all.
    """
    taps = logits.shape[axis]
    # beyond 1024 every weight is 0 in float64 too, and infinite logits would make 0·inf
    distance = (logits.amax(axis, keepdim=True) - logits).clamp(max=1024.0)
    weights = logits.softmax(axis)
    exponential = (1 + EXP_ROUNDOFFS * u) * torch.exp(u * distance) - 1
    total = (1 + (weights * exponential).sum(axis, keepdim=True)) * (1 + gamma(taps, u)) - 1
    relative = (1 + exponential) * (1 + 2 * u) / (1 - total) - 1
    tiny = torch.finfo(torch.float32 if u > 2.0**-40 else torch.float64).tiny
    return weights * relative + (taps + 2) * tiny


def kernel_bound(
    reference: Callable[..., Tensor],
    u: float,
    input: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    axis: int,
    *,
    softmax: bool,
    activation: str | None,
    **settings: Any,
) -> Tensor:
    """The error of the normalised kernel carried through Σ w̃·x, which adds γ(K + 1)·Σ|w̃||x|; then through the activation."""
    weights = kernel.softmax(axis) if softmax else kernel
    error: Tensor | float = softmax_error(kernel, axis, u) if softmax else 0.0

    def convolution(w: Tensor, x: Tensor, b: Tensor | None) -> Tensor:
        return reference(x, w, b, softmax=False, **settings)

    made = linear_error(convolution, u, kernel.shape[axis] + 1, weights, error, input, bias)
    return activation_error(convolution(weights, input, bias), made, activation, u)


class SequenceLayer(Layer):
    """What the layers over sequences share: sizes and settings, checked by name, and the bias."""

    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int],
        heads: int,
        padding: Padding,
        *,
        bias: bool,
        weight_dropout: float,
        softmax: bool,
        layout: str,
        dilation: int | Sequence[int],
        padding_mode: str,
        activation: str | None,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value in (("channels", channels), ("heads", heads)):
            if not is_integer(value):
                raise TypeError(f"{name}: {argument} must be an int, got {value!r}")
            if not 1 <= value <= LARGEST:
                fail(name, f"{argument} must be at least 1 and at most {LARGEST}", value)
        if channels % heads:
            fail(name, "heads must divide channels", f"{heads} and {channels}")
        if padding_mode not in PADDING_MODES:
            fail(name, f"padding_mode must be one of {', '.join(PADDING_MODES)}", repr(padding_mode))
        check_flags(name, bias=bias, softmax=softmax)
        check_dropout(name, weight_dropout)
        check_activation(name, activation)
        axes_of(name, layout, batched=True)
        self.kernel_size = per_axis(name, "kernel_size", kernel_size, 1)
        self.dilation = per_axis(name, "dilation", dilation, 1)
        self.padding = normal_padding(name, padding, 1)
        self.channels, self.heads, self.layout = channels, heads, layout
        self.weight_dropout, self.softmax = weight_dropout, softmax
        self.padding_mode, self.activation = padding_mode, activation
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None

    def axes(self, input: Tensor) -> Axes:
        """The axes of an input, checked to be one of this layer's, with the batch axis first where it has none."""
        name = type(self).__name__
        check_dense(name, "input", input)
        if input.dim() not in (2, 3):
            fail(name, "input must have 3 axes, or 2 without the batch", f"shape {tuple(input.shape)}")
        axes = axes_of(name, self.layout, input.dim() == 3)
        if number_sizes(input)[axes.channel - 3] != self.channels:
            fail(name, f"input must have {self.channels} channels in layout {self.layout}", f"shape {tuple(input.shape)}")
        return axes

    def settings(self) -> dict[str, Any]:
        """The keyword arguments of the op that are no tensors."""
        return {
            "padding": self.padding, "dilation": self.dilation, "softmax": self.softmax, "layout": self.layout,
            "padding_mode": self.padding_mode, "weight_dropout": self.weight_dropout, "training": self.training,
            "activation": self.activation,
        }  # fmt: skip

    def operands(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        raise NotImplementedError

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """The op on the input; positions where ``padding_mask`` (N, T) is True count as zeros."""
        return type(self).op(**self.operands(input, padding_mask))

    def stream_reads(self) -> Causal:
        """How the layer reads a sequence that comes in chunks."""
        past = causal_past(self.padding, self.kernel_size, (1,), self.dilation, self.padding_mode)
        return Causal(past, 1, (self.layout,), self.channels, self.chunks_differ())

    def chunks_differ(self) -> str | None:
        """Why the bits of an output may depend on the chunk that it comes in; None where they do not."""
        return "the layer is made of torch's operators"

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"{self.channels}, kernel_size={self.kernel_size}, heads={self.heads}, padding={self.padding!r}, "
            f"bias={self.bias is not None}, weight_dropout={self.weight_dropout}, softmax={self.softmax}, "
            f"layout={self.layout!r}, dilation={self.dilation}, padding_mode={self.padding_mode!r}, activation={self.activation!r}"
        )


TAKES = frozenset({"kernel", "padding", "dilation", "heads", "padding_mode"})


def heads_of(problem: Problem) -> int:
    """The heads of a Problem: as many as channels where it names none, which is a depthwise convolution."""
    return problem.heads or problem.channels


def arguments(problem: Problem) -> dict[str, Any]:
    """The op's keyword arguments."""
    return {"padding": problem.padding, "dilation": problem.dilation, "padding_mode": problem.padding_mode}


def variant(base: Problem) -> Problem:
    """The same channels and kernel: up to 16 heads, a power of two; as long as the input, causal where the base is."""
    heads = next(h for h in (16, 8, 4, 2, 1) if base.channels % h == 0)
    return Problem(
        base.technique, base.channels, base.size, base.batch, kernel=base.kernel, dilation=base.dilation, heads=heads,
        padding="causal" if base.padding == "causal" else "same", padding_mode=base.padding_mode, dtype=base.dtype,
    )  # fmt: skip


def call_problem(name: str, arguments: Arguments, heads: int, taps: int) -> Problem:
    """Returns the Problem of a call of an op over sequences, whose kernel has so many heads and taps."""
    x = arguments["input"]
    whole = x.dim() == 3
    axes = axes_of(name, arguments.get("layout", "NCT"), whole)
    shape = x.shape if whole else (1, *x.shape)
    return Problem(
        name, shape[axes.channel], (shape[axes.time],), shape[axes.batch], kernel=(taps,), heads=heads,
        padding=normal_padding(name, arguments.get("padding", "same"), 1), padding_mode=arguments.get("padding_mode", "zeros"),
        dilation=per_axis(name, "dilation", arguments.get("dilation", 1), 1), dtype=DTYPE_NAMES.get(x.dtype, "f32"),
    )  # fmt: skip
