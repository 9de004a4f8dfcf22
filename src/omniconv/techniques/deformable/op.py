"""The definition, the composite path and the function; see the package for the formula."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniconv.geometry import Grid, Padding, grid
from omniconv.ops.activation import activate, check_activation
from omniconv.ops.operator import (
    check_bias,
    check_weight,
    fail,
    finalize_output,
    intercepted,
    interceptors,
    is_intercepted,
    prepare_operands,
)
from omniconv.ops.reference import at_tap, mixed, taps_of, with_bias
from omniconv.ops.tracing import call_with_number_sizes, is_traced, with_recorded_sizes


def make_windows(op: str, input: Tensor, weight: Tensor, stride: Any, padding: Padding, dilation: Any) -> Grid:
    """The windows of a call, normalized and checked."""
    return grid(op, input.shape[2:], weight.shape[2:], stride, padding, dilation)


def bases_of(windows: Grid, kernel: Sequence[int], outputs: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """p·S − P + t·D of every tap and output: rows (Kh, 1, Oh, 1) and columns (1, Kw, 1, Ow)."""
    rows, columns = (
        torch.arange(k, device=like.device, dtype=like.dtype)[:, None] * d
        + torch.arange(n, device=like.device, dtype=like.dtype) * s
        - before
        for k, n, s, (before, _), d in zip(kernel, outputs, windows.stride, windows.pads, windows.dilation, strict=True)
    )
    return rows[:, None, :, None], columns[None, :, None, :]


def places_of(offset: Tensor, windows: Grid, kernel: Sequence[int]) -> list[Tensor]:
    """The row and the column where each tap of each output looks, (N, Go, k, Oh, Ow) each."""
    n, channels, *outputs = offset.shape
    moved = offset.reshape(n, channels // (2 * math.prod(kernel)), *kernel, 2, *outputs)
    bases = bases_of(windows, kernel, outputs, offset)
    return [(base + by).flatten(2, 3) for base, by in zip(bases, moved.unbind(4), strict=True)]


def reference(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: Padding = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """The definition, tap by tap and corner by corner."""
    n, c = input.shape[:2]
    windows = make_windows("reference", input, weight, stride, padding, dilation)
    row, column = places_of(offset, windows, weight.shape[2:])
    groups, outputs = row.shape[1], row.shape[3:]
    masks = None if mask is None else mask.reshape(row.shape)
    y = input.new_zeros(n, weight.shape[0], *outputs)
    for t, tap in enumerate(taps_of(weight.shape[2:])):
        parts = [_interpolated(part, row[:, g, t], column[:, g, t]) for g, part in enumerate(input.chunk(groups, 1))]
        sample = torch.stack(parts, 1)
        if masks is not None:
            sample = sample * masks[:, :, None, t]
        y = y + mixed(sample.flatten(1, 2), at_tap(weight, tap), c // weight.shape[1])
    return activate(with_bias(y, bias), activation)


def _interpolated(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """x (N, C, H, W) at (row, column) (N, Oh, Ow): its four neighbours there, each by its nearness; zero outside."""
    height, width = x.shape[2:]
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    # two steps outside is as far as infinity: nothing there, in both neighbours
    row, column = row.clamp(-2, height), column.clamp(-2, width)
    top, left = row.detach().floor(), column.detach().floor()
    down, right = row - top, column - left
    total = x.new_zeros(x.shape[0], *row.shape[1:], x.shape[1])
    for below, beside in product((0, 1), (0, 1)):
        i, j = top + below, left + beside
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        nearness = (down if below else 1 - down) * (right if beside else 1 - right)
        value = x[batch, :, i.nan_to_num().clamp(0, height - 1).long(), j.nan_to_num().clamp(0, width - 1).long()]
        total = total + torch.where(inside[..., None], value, 0) * nearness[..., None]
    return total.movedim(-1, 1)


def convolve(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, windows: Grid, offset_groups: int
) -> Tensor:
    """Gathers the four neighbours of one tap at a time, as whole rows of channels, and multiplies them by the tap's weights.

    Scratch is one tap's samples, and indices of the size of the offsets: those of all taps are made at once, since their many
    small ops would cost more than the convolution (16 channels at 14×14, 3×3: 2.2 ms instead of 0.5).

    ms of one forward on one thread, 3×3, in one run   64 channels at 56×56   256 channels at 28×28
    this                                                 4.5                    10.7
    rows of two neighbours, half the gathers             5.2                    11.2
    grid_sample, one product                             6.1                    11.4   (has no forward-mode derivative)
    embedding_bag, four weighted rows                    4.7                    10.2   (has no second derivative either)
    one gather and bmm for four neighbours              11.6                    10.9
    """
    n, c, h, w = x.shape
    out_channels, kernel, outputs = weight.shape[0], weight.shape[2:], offset.shape[2:]
    groups = c // weight.shape[1]
    # half types that are not widened before still have places between 256 and 65536
    row, column = places_of(offset.to(torch.promote_types(offset.dtype, torch.float32)), windows, kernel)
    row, column = row.clamp(-2, h), column.clamp(-2, w)  # with two zeros around the input, infinity is at most here
    top, left = row.detach().floor(), column.detach().floor()
    down, right = row - top, column - left
    # rows of channels, (N·(H+4)·(W+4)·Go, C/Go): one index brings a whole row
    rows = F.pad(x.movedim(1, -1), (0, 0, 2, 2, 2, 2)).reshape(-1, c // offset_groups)
    batch = torch.arange(n, device=x.device).reshape(-1, 1, 1, 1, 1)
    group = torch.arange(offset_groups, device=x.device).reshape(-1, 1, 1, 1)
    # a place that is not a number gets some index, and stays no number by its shares
    line = batch * (h + 4) + top.nan_to_num().long() + 2
    index = _per_tap((line * (w + 4) + left.nan_to_num().long() + 2) * offset_groups + group)
    corners = [
        (step * offset_groups, [share.unsqueeze(-1).to(x.dtype) for share in _per_tap(near_row * near_column)])
        for near_row, lines in ((1 - down, 0), (down, w + 4))
        for near_column, step in ((1 - right, lines), (right, lines + 1))
    ]
    strengths = None if mask is None else _per_tap(mask.reshape(row.shape))
    # all taps transposed in one blocked copy; left to BLAS, each tap copies every k-th number: 4 times slower at 2048 channels, 7×7
    per_tap = weight.reshape(-1, math.prod(kernel)).t().contiguous().reshape(-1, groups, out_channels // groups, weight.shape[1])
    y = (x.new_zeros(out_channels) if bias is None else bias).reshape(groups, 1, -1)
    for t, tap_weight in enumerate(per_tap.unbind()):
        (_, share), *others = corners
        sample = rows.index_select(0, index[t]) * share[t]
        for step, share in others:
            sample = torch.addcmul(sample, rows.index_select(0, index[t] + step), share[t])
        if strengths is not None:
            sample = sample * strengths[t].unsqueeze(-1)
        sample = sample.reshape(n * math.prod(outputs), groups, c // groups).transpose(0, 1)
        y = torch.baddbmm(y, sample, tap_weight.transpose(1, 2))
    return y.transpose(0, 1).reshape(n, *outputs, out_channels).movedim(-1, 1)


def _per_tap(x: Tensor) -> tuple[Tensor, ...]:
    """(N, Go, k, Oh, Ow) as k of (N·Oh·Ow·Go,); one unbind, whose gradient is one stack instead of k tensors of zeros."""
    return x.permute(2, 0, 3, 4, 1).flatten(1).unbind()


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: Padding = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Tensor:
    """Convolves with taps that offsets move, each with a strength if a mask is given.

        y[n, o, p] = bias[o] + Σ_c Σ_t weight[o, c, t] · mask[n, t, p] · input(n, c, place(n, t, p))
        place(n, t, p) = p·stride − before + t·dilation + offset[n, t, p]

    Between positions the input is interpolated bilinearly, outside it is zero: an infinite offset reads nothing, one that is NaN
    makes its outputs NaN. At whole positions, where the slope jumps, the gradient of an offset is the slope to the right, as in
    torchvision. Arguments mean what they mean in ``torchvision.ops.deform_conv2d``; groups and offset groups are read off the
    shapes. Half types accumulate in float32, coordinates too, and round once.

    Args:
        input: (N, C, H, W) or (C, H, W).
        offset: (N, 2·Go·k, Oh, Ow), k = Kh·Kw: for each offset group and tap Δy, then Δx, in positions of the input. Go divides C.
            ``offset.unflatten(1, (Go, Kh, Kw, 2))`` shows it by group, tap and axis.
        weight: (O, C/G, Kh, Kw).
        bias: (O,).
        stride: Input steps between windows: one int, or one per axis.
        padding: As for :func:`conv2d`.
        dilation: Input steps between taps; 1 is dense.
        mask: (N, Go·k, Oh, Ow), a factor for every tap.
        padding_mode: "zeros" alone is defined.
        activation: None, "relu", "relu6", "silu", "hardswish", "gelu" or "sigmoid", applied to the result.

    Returns:
        (N, O, Oh, Ow); channels-last exactly where the input is and is not also contiguous.

    Raises:
        TypeError: An operand is not a dense floating tensor, or a setting is not made of integers.
        ValueError: Shapes, dtypes, devices or settings do not fit together.

    Example:
        >>> x, weight = torch.arange(9.0).view(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
        >>> offset = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)  # Δy = 0, Δx = 1: look one to the right
        >>> deform_conv2d(x, offset, weight)[0, 0].tolist()
        [[1.0, 2.0, 0.0], [4.0, 5.0, 0.0], [7.0, 8.0, 0.0]]

    Source: Dai et al. 2017, arXiv:1703.06211; Zhu et al. 2019, arXiv:1811.11168.
    """
    if interceptors and is_intercepted():
        return intercepted(deform_conv2d, locals())
    op = "deform_conv2d"
    if is_traced():
        return call_with_number_sizes(deform_conv2d, locals())
    x, offset, weight, bias, mask = prepare_operands(op, 2, input, offset=offset, weight=weight, bias=bias, mask=mask)
    if padding_mode != "zeros":
        fail(op, "padding_mode must be 'zeros' for a deformable convolution", repr(padding_mode))
    batched = input.dim() == 4
    if weight.dim() != 4 or weight.shape[1] < 1 or x.shape[1] % weight.shape[1]:
        fail(op, f"weight must be (O, C/G, Kh, Kw) for {x.shape[1]} input channels", tuple(weight.shape))
    check_weight(op, x, weight, x.shape[1] // weight.shape[1])
    check_bias(op, bias, weight.shape[0])
    check_activation(op, activation)
    windows = make_windows(op, x, weight, stride, padding, dilation)
    outputs = windows.output_size(x.shape[2:], weight.shape[2:])
    taps = weight.shape[2] * weight.shape[3]
    offset = _with_batch(op, "offset", offset, batched)
    mask = None if mask is None else _with_batch(op, "mask", mask, batched)
    offset_groups = offset.shape[1] // (2 * taps)
    if offset.shape[1] != 2 * taps * offset_groups or offset_groups < 1 or x.shape[1] % offset_groups:
        must = f"offset must have 2·Go·{taps} channels, Go a divisor of the {x.shape[1]} input channels"
        fail(op, must, offset.shape[1])
    for name, t, channels in (("offset", offset, offset.shape[1]), ("mask", mask, offset_groups * taps)):
        if t is not None and t.shape != (x.shape[0], channels, *outputs):
            fail(op, f"{name} must have shape {(x.shape[0], channels, *outputs)}", tuple(t.shape))
    operands = (x, offset, weight, bias, mask)
    return finalize_output(input, 2, with_recorded_sizes(convolve), operands, windows, offset_groups, activation=activation)


def _with_batch(op: str, name: str, t: Tensor, batched: bool) -> Tensor:
    if t.dim() != (4 if batched else 3):
        fail(op, f"{name} must have {4 if batched else 3} axes, as the input", f"shape {tuple(t.shape)}")
    return t if batched else t.unsqueeze(0)
