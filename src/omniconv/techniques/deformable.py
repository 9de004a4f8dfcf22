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


def _bases(windows: Grid, kernel: Sequence[int], outputs: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """p·S − P + t·D of every tap and output: rows (Kh, 1, Oh, 1) and columns (1, Kw, 1, Ow)."""
    rows, columns = (
        torch.arange(k, device=like.device, dtype=like.dtype)[:, None] * d
        + torch.arange(n, device=like.device, dtype=like.dtype) * s
        - before
        for k, n, s, (before, _), d in zip(kernel, outputs, windows.stride, windows.pads, windows.dilation, strict=True)
    )
    return rows[:, None, :, None], columns[None, :, None, :]


def _places(offset: Tensor, windows: Grid, kernel: Sequence[int]) -> list[Tensor]:
    """The row and the column where each tap of each output looks, (N, Go, k, Oh, Ow) each."""
    n, channels, *outputs = offset.shape
    moved = offset.reshape(n, channels // (2 * math.prod(kernel)), *kernel, 2, *outputs)
    bases = _bases(windows, kernel, outputs, offset)
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
    windows = _windows("reference", input, weight, stride, padding, dilation)
    row, column = _places(offset, windows, weight.shape[2:])
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
    row, column = _places(offset.to(torch.promote_types(offset.dtype, torch.float32)), windows, kernel)
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
        for given, name in ((offset, "an offset"), (mask, "a mask")):
            if given is not None and self.offset_conv is not None:
                must = f"{name} is only given where offset='external'"
                fail(type(self).__name__, must, "one beside a learned offset convolution")
        if offset is None:
            offset, mask = self.offsets(input)
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
    kernel, outputs = weight.shape[2:], offset.shape[2:]
    groups = offset.shape[1] // (2 * math.prod(kernel))
    moved = offset.abs().reshape(n, groups, *kernel, 2, *outputs).unbind(4)
    row, column = (base.abs() + by for base, by in zip(_bases(windows, kernel, outputs, offset), moved, strict=True))
    error = 2 * u * (row + column + 4).flatten(2, 3)
    if strength is not None:
        error = error * strength.reshape(error.shape)
    steepest = 2 * (input.abs().amax((2, 3)) if input.numel() else input.new_zeros(n, c)).reshape(n, groups, c // groups, 1, 1)
    coordinates = input.new_zeros(n, weight.shape[0], *outputs)
    for t, tap in enumerate(taps_of(kernel)):
        per_channel = (steepest * error[:, :, None, t]).flatten(1, 2)
        coordinates = coordinates + mixed(per_channel, at_tap(weight, tap).abs(), c // weight.shape[1])
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
    rows, columns = _places(offset, windows, weight.shape[2:])
    groups, taps, *outputs = rows.shape[1:]
    parts = input.reshape(n * groups, c // groups, h, w)
    strengths = None if mask is None else mask.reshape(n * groups, taps, 1, *outputs)
    samples = []
    for t in range(taps):
        row, column = rows[:, :, t].flatten(0, 1), columns[:, :, t].flatten(0, 1)
        # grid_sample's coordinates run from −1 to 1 over the centres with align_corners=True
        points = torch.stack([2 * column / max(w - 1, 1) - 1, 2 * row / max(h - 1, 1) - 1], -1)
        sample = F.grid_sample(parts, points, align_corners=True)
        if strengths is not None:
            sample = sample * strengths[:, t]
        samples.append(sample.reshape(n, c, *outputs))
    stacked = torch.stack(samples, 2).flatten(1, 2)  # (N, C·k, Oh, Ow)
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
