"""Deformable convolution: every tap of every output looks where a learned offset sends it, between positions if need be.

    y[n, o, p] = bias[o] + Σ_c Σ_t weight[o, c, t] · mask[n, t, p] · x(n, c, p·S − P + t·D + offset[n, t, p])

x(n, c, ·) is bilinear interpolation, zero outside. Offsets are (Δy, Δx), interleaved per tap, per offset group: channel
((g·k + t)·2 + 0) of the offset is Δy of tap t in group g, the next one Δx. Without a mask it is version 1, with one version 2.

Params  C·O·k/G + 3·Go·k·C·k        with the layer's offset and mask convolution (2 in place of 3 without masks)
MACs    N·Out·(C·O·k/G + 3·Go·k·C·k)
Paper   Dai et al. 2017, arXiv:1703.06211; Zhu et al. 2019, arXiv:1811.11168 (version 2)
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.geometry import Grid, Padding, grid
from omniconv.problem import Problem
from omniconv.techniques._activation import activate, check_activation
from omniconv.techniques._bound import activation_error, gamma
from omniconv.techniques._equation import at_tap, mixed, taps_of, with_bias
from omniconv.techniques._grid import check_channels, grid_stage, settled
from omniconv.techniques._layer import Layer
from omniconv.techniques._operator import check_bias, check_weight, deliver, fail, receive
from omniconv.techniques._technique import Operand, Peer, Stage, Technique
from omniconv.techniques.standard import Conv2d


def _windows(op: str, input: Tensor, weight: Tensor, stride: Any, padding: Padding, dilation: Any) -> Grid:
    return grid(op, input.shape[2:], weight.shape[2:], stride, padding, dilation)


def _bases(windows: Grid, tap: Sequence[int], outputs: Sequence[int], like: Tensor) -> list[Tensor]:
    """p·S − P + t·D of one tap for the outputs of both axes, as (Oh, 1) and (1, Ow)."""
    rows, columns = (
        torch.arange(n, device=like.device, dtype=like.dtype) * s - before + t * d
        for n, s, (before, _), t, d in zip(outputs, windows.stride, windows.pads, tap, windows.dilation, strict=True)
    )
    return [rows[:, None], columns[None, :]]


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
    n, c, h, w = input.shape
    windows = _windows("reference", input, weight, stride, padding, dilation)
    outputs = windows.output_size((h, w), weight.shape[2:])
    taps = list(taps_of(weight.shape[2:]))
    groups = offset.shape[1] // (2 * len(taps))
    places = offset.reshape(n, groups, len(taps), 2, *outputs)
    masks = None if mask is None else mask.reshape(n, groups, len(taps), *outputs)
    y = input.new_zeros(n, weight.shape[0], *outputs)
    for t, tap in enumerate(taps):
        row, column = (base + places[:, :, t, axis] for axis, base in enumerate(_bases(windows, tap, outputs, offset)))
        sample = torch.stack([_interpolated(part, row[:, g], column[:, g]) for g, part in enumerate(input.chunk(groups, 1))], 1)
        if masks is not None:
            sample = sample * masks[:, :, None, t]
        y = y + mixed(sample.flatten(1, 2), at_tap(weight, tap), c // weight.shape[1])
    return activate(with_bias(y, bias), activation)


def _interpolated(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """x (N, C, H, W) at (row, column) (N, Oh, Ow): its four neighbours there, each by its nearness; zero outside."""
    height, width = x.shape[2:]
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    total = x.new_zeros(x.shape[0], *row.shape[1:], x.shape[1])
    for below, right in product((0, 1), (0, 1)):
        i, j = row.detach().floor() + below, column.detach().floor() + right
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        nearness = (1 - (row - i).abs()) * (1 - (column - j).abs())
        value = x[batch, :, i.clamp(0, height - 1).nan_to_num().long(), j.clamp(0, width - 1).nan_to_num().long()]
        total = total + torch.where(inside[..., None], value * nearness[..., None], 0)
    return total.movedim(-1, 1)


def convolve(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, windows: Grid, offset_groups: int
) -> Tensor:
    """Gathers the four neighbours of one tap at a time, as whole rows of channels, and multiplies them by the tap's weights."""
    n, c, h, w = x.shape
    outputs = windows.output_size((h, w), weight.shape[2:])
    taps = list(taps_of(weight.shape[2:]))
    groups = c // weight.shape[1]
    # rows of channels, (N·H·W·Go, C/Go): one index brings a whole row; the last is zero, for what lies outside
    rows = x.reshape(n, offset_groups, c // offset_groups, h * w).permute(0, 3, 1, 2).flatten(0, 2)
    rows, outside = F.pad(rows, (0, 0, 0, 1)), n * h * w * offset_groups
    places = offset.reshape(n, offset_groups, len(taps), 2, *outputs)
    masks = None if mask is None else mask.reshape(n, offset_groups, len(taps), *outputs)
    batch = torch.arange(n, device=x.device).reshape(-1, 1, 1, 1) * (h * w)
    group = torch.arange(offset_groups, device=x.device).reshape(1, -1, 1, 1)
    y: Tensor | None = None
    for t, tap in enumerate(taps):
        base_row, base_column = _bases(windows, tap, outputs, offset)
        row, column = base_row + places[:, :, t, 0], base_column + places[:, :, t, 1]  # (N, Go, Oh, Ow)
        # far away, infinite and NaN places read nothing, and no gradient goes through them
        near = (row > -1) & (row < h) & (column > -1) & (column < w)
        row, column = torch.where(near, row, 0), torch.where(near, column, 0)
        top, left = row.detach().floor(), column.detach().floor()
        down, right = row - top, column - left
        sample: Tensor | None = None
        for i, j in product((0, 1), (0, 1)):
            at_row, at_column = top + i, left + j
            inside = near & (at_row >= 0) & (at_row < h) & (at_column >= 0) & (at_column < w)
            share = (down if i else 1 - down) * (right if j else 1 - right)
            share = torch.where(inside, share, 0)
            where = (batch + at_row.long() * w + at_column.long()) * offset_groups + group
            index = torch.where(inside, where, outside).movedim(1, -1)  # (N, Oh, Ow, Go)
            value = rows.index_select(0, index.flatten()).reshape(*index.shape, c // offset_groups)
            share = share.movedim(1, -1).unsqueeze(-1)
            sample = value * share if sample is None else torch.addcmul(sample, value, share)
        assert sample is not None
        if masks is not None:
            sample = sample * masks[:, :, t].movedim(1, -1).unsqueeze(-1)
        product_of_tap = _mixed_rows(sample.reshape(-1, groups, c // groups), at_tap(weight, tap), groups)
        y = product_of_tap if y is None else y + product_of_tap
    assert y is not None
    y = y if bias is None else y + bias
    return y.reshape(n, *outputs, weight.shape[0]).movedim(-1, 1)


def _mixed_rows(sample: Tensor, weight: Tensor, groups: int) -> Tensor:
    """(M, G, C/G) with (O, C/G) to (M, O)."""
    if groups == 1:
        return sample.flatten(1) @ weight.t()
    per_group = weight.reshape(groups, -1, weight.shape[1])
    return torch.bmm(sample.transpose(0, 1), per_group.transpose(1, 2)).transpose(0, 1).flatten(1)


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

    Between positions the input is interpolated bilinearly, outside it is zero; where an offset is infinite or NaN the tap reads
    nothing. Arguments mean what they mean in ``torchvision.ops.deform_conv2d``; groups and offset groups are read off the shapes.
    Half types accumulate in float32, coordinates too, and round once.

    Args:
        input: (N, C, H, W) or (C, H, W).
        offset: (N, 2·Go·k, Oh, Ow), k = Kh·Kw: for each offset group and tap Δy, then Δx, in positions of the input. Go divides C.
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
    op = "deform_conv2d"
    x, offset, weight, bias, mask = receive(op, 2, input, offset=offset, weight=weight, bias=bias, mask=mask)
    if padding_mode != "zeros":
        fail(op, "padding_mode must be 'zeros' for a deformable convolution", repr(padding_mode))
    batched = input.dim() == 4
    if weight.dim() != 4 or weight.shape[1] < 1 or x.shape[1] % weight.shape[1]:
        fail(op, f"weight must be (O, C/G, Kh, Kw) for {x.shape[1]} input channels", tuple(weight.shape))
    check_weight(op, x, weight, x.shape[1] // weight.shape[1])
    check_bias(op, bias, weight.shape[0])
    check_activation(op, activation)
    windows = _windows(op, x, weight, stride, padding, dilation)
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
    return deliver(input, 2, convolve, operands, windows, offset_groups, activation=activation)


def _with_batch(op: str, name: str, t: Tensor, batched: bool) -> Tensor:
    if t.dim() != (4 if batched else 3):
        fail(op, f"{name} must have {4 if batched else 3} axes, as the input", f"shape {tuple(t.shape)}")
    return t if batched else t.unsqueeze(0)


class DeformConv2d(Layer):
    """A deformable layer with the convolution that makes its offsets; see :func:`omniconv.functional.deform_conv2d`.

    ``offset_conv`` has the main kernel, stride, padding and dilation and starts at zero; with ``modulated`` it makes mask
    logits too, and mask = mask_scale · sigmoid(logit), so that a fresh layer with the default scale 2 *is* a standard convolution
    (1 is the paper's and mmcv's). The state dict holds ``weight``, ``bias`` and ``offset_conv.*``. With ``offset="external"``
    there is no offset convolution: ``forward`` takes (input, offset, mask) and torchvision's state dict loads strictly.

    Example:
        >>> DeformConv2d(2, 4, 3, padding=1)(torch.ones(1, 2, 5, 5)).shape
        torch.Size([1, 4, 5, 5])
    """

    technique, rank, op = "deformable", 2, deform_conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int = 1,
        modulated: bool = True,
        offset: str = "learned",
        mask_scale: float = 2.0,
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        windows = settled(name, 2, kernel_size, stride, padding, dilation, "zeros")
        self.kernel_size, self.stride, self.padding, self.dilation = windows
        check_channels(name, groups=groups, in_channels=in_channels, out_channels=out_channels)
        check_channels(name, groups=1, offset_groups=offset_groups)
        if in_channels % offset_groups:
            fail(name, "in_channels must be divisible by offset_groups", f"{in_channels} and {offset_groups}")
        if offset not in ("learned", "external"):
            fail(name, "offset must be 'learned' or 'external'", repr(offset))
        if isinstance(mask_scale, bool) or not isinstance(mask_scale, (int, float)):
            raise TypeError(f"{name}: mask_scale must be a number, got {mask_scale!r}")
        if not 0 < mask_scale < math.inf:
            fail(name, "mask_scale must be above 0 and finite", mask_scale)
        check_activation(name, activation)
        self.in_channels, self.out_channels, self.groups, self.offset_groups = in_channels, out_channels, groups, offset_groups
        self.modulated, self.mask_scale, self.activation = modulated, float(mask_scale), activation
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size, **made))
        self.bias = nn.Parameter(torch.empty(out_channels, **made)) if bias else None
        channels = (3 if modulated else 2) * offset_groups * math.prod(self.kernel_size)
        self.offset_conv = None
        if offset == "learned":
            self.offset_conv = Conv2d(
                in_channels,
                channels,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                **made,
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills weight and bias as torch.nn does those of a convolution, the offset convolution with zeros."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            limit = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -limit, limit)
        if self.offset_conv is not None:
            for parameter in self.offset_conv.parameters():
                nn.init.zeros_(parameter)

    def offsets(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """The offset and the mask that the layer makes for an input.

        Raises:
            ValueError: The layer's offsets are external.
        """
        if self.offset_conv is None:
            fail(type(self).__name__, "forward must be given an offset where offset='external'", None)
        made = self.offset_conv(input)
        if not self.modulated:
            return made, None
        split = 2 * self.offset_groups * math.prod(self.kernel_size)
        offset, logits = made.split([split, split // 2], dim=made.dim() - 3)
        return offset, self.mask_scale * logits.sigmoid()

    def operands(self, input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        if isinstance(input, Tensor) and input.dim() in (3, 4) and input.shape[-3] != self.in_channels:
            fail(type(self).__name__, f"input must have {self.in_channels} channels", f"shape {tuple(input.shape)}")
        if offset is None:
            offset, mask = self.offsets(input)
        elif self.offset_conv is not None:
            fail(type(self).__name__, "an offset is only given where offset='external'", "one beside a learned offset convolution")
        return {
            "input": input,
            "offset": offset,
            "weight": self.weight,
            "bias": self.bias,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "mask": mask,
            "activation": self.activation,
        }

    def forward(self, input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The op on the input, with the layer's own offsets or the given ones."""
        return deform_conv2d(**self.operands(input, offset, mask))

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"offset_groups={self.offset_groups}, modulated={self.modulated}, "
            f"offset={'external' if self.offset_conv is None else 'learned'!r}, "
            f"mask_scale={self.mask_scale}, activation={self.activation!r}"
        )


def bound(
    u: float,
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
    """γ(C/G·k + 8)·Σ|w̃||x| with w̃ = weight·mask·nearness, and a coordinate term, through the activation.

    A coordinate base + offset is rounded once, by at most u·(|base| + |offset|); the four shares then err by as much again,
    relative to their sum of 1. Along an axis the interpolated value changes by at most 2·max|x| per step (the difference of two
    neighbours, or a ramp to the zero outside), so a tap errs by Σ|w|·mask·2·max|x| times the errors of both coordinates.
    """
    windows = _windows("bound", input, weight, stride, padding, dilation)
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    strength = None if mask is None else mask.abs()
    made = gamma(weight[0].numel() + 8, u) * reference(
        input.abs(), offset, weight.abs(), None if bias is None else bias.abs(), mask=strength, **settings
    )
    n, c = input.shape[:2]
    outputs = windows.output_size(input.shape[2:], weight.shape[2:])
    taps = list(taps_of(weight.shape[2:]))
    groups = offset.shape[1] // (2 * len(taps))
    places = offset.reshape(n, groups, len(taps), 2, *outputs).abs()
    masks = None if strength is None else strength.reshape(n, groups, len(taps), *outputs)
    steepest = 2 * (input.abs().amax((2, 3)) if input.numel() else input.new_zeros(n, c)).reshape(n, groups, c // groups, 1, 1)
    coordinates = input.new_zeros(n, weight.shape[0], *outputs)
    for t, tap in enumerate(taps):
        row, column = _bases(windows, tap, outputs, offset)
        distance = row.abs() + places[:, :, t, 0] + column.abs() + places[:, :, t, 1] + 4
        per_channel = 2 * u * distance if masks is None else 2 * u * distance * masks[:, :, t]
        error = (steepest * per_channel.unsqueeze(2)).flatten(1, 2)
        coordinates = coordinates + mixed(error, at_tap(weight, tap).abs(), c // weight.shape[1])
    before = reference(input, offset, weight, bias, mask=mask, **settings)
    return activation_error(before, made + coordinates, activation, u)


def _output(problem: Problem) -> tuple[int, ...]:
    windows = grid(problem.technique, problem.size, problem.kernel, problem.stride, problem.padding, problem.dilation)
    return windows.output_size(problem.size, problem.kernel)


def operands(problem: Problem) -> dict[str, Operand]:
    """Input, offset, weight, bias and mask."""
    out_channels, taps = problem.out_channels or problem.channels, math.prod(problem.kernel)
    outputs = (problem.batch, problem.offset_groups * taps, *_output(problem))
    return {
        "input": Operand((problem.batch, problem.channels, *problem.size)),
        "offset": Operand((problem.batch, 2 * outputs[1], *outputs[2:]), "offset"),
        "weight": Operand((out_channels, problem.channels // problem.groups, *problem.kernel)),
        "bias": Operand((out_channels,)),
        "mask": Operand(outputs, "unit"),
    }


def arguments(problem: Problem) -> dict[str, Any]:
    """The op's keyword arguments."""
    return {"stride": problem.stride, "padding": problem.padding, "dilation": problem.dilation}


def stages(problem: Problem, modulated: bool = True) -> tuple[Stage, ...]:
    """The offset convolution, beside the path, and the main one: 8 flops a tap and channel to interpolate, 1 to mask."""
    c, taps, out_channels = problem.channels, math.prod(problem.kernel), problem.out_channels or problem.channels
    made = (3 if modulated else 2) * problem.offset_groups * taps
    extras = (9 if modulated else 8) * math.prod(_output(problem)) * taps * c
    return (
        grid_stage(problem, c, made, 1, "offset", side=True),
        grid_stage(problem, c, out_channels, problem.groups, flops=extras),
    )


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem: learned offsets and masks."""
    out_channels = problem.out_channels or problem.channels
    groups = {"groups": problem.groups, "offset_groups": problem.offset_groups}
    return DeformConv2d(problem.channels, out_channels, problem.kernel, **(arguments(problem) | groups))


def variant(base: Problem) -> Problem:
    """The same layer, its taps moved."""
    return base.replace(padding_mode="zeros")


def _grid_sample(
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
    """What is written today without torchvision: grid_sample for every tap, then one matrix product."""
    n, c, h, w = input.shape
    windows = _windows("torch", input, weight, stride, padding, dilation)
    outputs = windows.output_size((h, w), weight.shape[2:])
    taps = list(taps_of(weight.shape[2:]))
    groups = offset.shape[1] // (2 * len(taps))
    places = offset.reshape(n * groups, len(taps), 2, *outputs)
    parts = input.reshape(n * groups, c // groups, h, w)
    columns = []
    for t, tap in enumerate(taps):
        row, column = (base + places[:, t, axis] for axis, base in enumerate(_bases(windows, tap, outputs, offset)))
        # grid_sample's coordinates run from −1 to 1 over the centres with align_corners=True
        points = torch.stack([2 * column / max(w - 1, 1) - 1, 2 * row / max(h - 1, 1) - 1], -1)
        sample = F.grid_sample(parts, points, align_corners=True)
        if mask is not None:
            sample = sample * mask.reshape(n * groups, len(taps), 1, *outputs)[:, t]
        columns.append(sample.reshape(n, c, *outputs))
    stacked = torch.stack(columns, 2).flatten(1, 2)  # (N, C·k, Oh, Ow)
    product_of_all = F.conv2d(stacked, weight.flatten(1)[..., None, None], bias, groups=c // weight.shape[1])
    return activate(product_of_all, activation)


TECHNIQUE = Technique(
    name="deformable",
    title="Deformable",
    summary="every tap looks where a learned offset sends it, with a learned strength",
    sampling="grid + learned offset",
    mixing="all channels or groups",
    weights="free (× mask)",
    formula="y[n,o,p] = b[o] + Σ_c Σ_t W[o,c,t] · m[n,t,p] · x(n,c, p·S − P + t·D + Δ[n,t,p]), x(·) bilinear",
    when="Detection and segmentation of objects whose shape and scale vary; a few late layers of a backbone.",
    traps=(
        "Offsets are (Δy, Δx) interleaved per tap and per output position: not (x, y), and not one per tap.",
        "The offset convolution costs too: 3·Go·k·C·k parameters and as many MACs an output, which most counters leave out.",
        "With mask = sigmoid a fresh layer halves its output; this layer's scale of 2 makes it a standard convolution.",
    ),
    paper="Dai et al. 2017, arXiv:1703.06211; Zhu et al. 2019, arXiv:1811.11168",
    ops={2: deform_conv2d},
    modules={2: DeformConv2d},
    reference=reference,
    composite=convolve,
    takes=frozenset({"kernel", "stride", "padding", "dilation", "out_channels", "groups", "offset_groups"}),
    operands=operands,
    arguments=arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    peers=(Peer("torch grid_sample", _grid_sample),),
)
