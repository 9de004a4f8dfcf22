"""Shared by the techniques whose windows lie on a grid: the composite path, the layer, and what a Problem means to them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.geometry import LARGEST, PADDING_MODES, Grid, Padding, Pairs, grid, is_integer, normal_padding, pads_of, per_axis
from omniconv.layout import arrange, is_channels_last_quickly
from omniconv.ops.activation import activate, check_activation
from omniconv.ops.layer import Layer
from omniconv.ops.operator import fail
from omniconv.ops.technique import Operand, Peer, Stage
from omniconv.problem import Problem

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def make_windows(
    op: str,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    mode: str,
) -> Grid:
    """:func:`omniconv.geometry.grid`, remembered: the answer is a matter of these integers alone, and is asked at every call."""
    if torch.compiler.is_compiling() or not (is_plain(stride) and is_plain(padding) and is_plain(dilation)):
        return grid(op, size, kernel, stride, padding, dilation, mode)
    try:
        return _remembered(op, size, kernel, stride, padding, dilation, mode)
    except TypeError:  # a symbolic size has no hash
        return grid(op, size, kernel, stride, padding, dilation, mode)


_remembered = lru_cache(maxsize=4096)(grid)


def is_plain(value: Any) -> bool:
    """Ints, names and pairs of them, told from what is equal to them but not allowed, such as True and 1.0."""
    kind = type(value)
    if kind is tuple:
        return all(type(part) is int or (type(part) is tuple and is_plain(part)) for part in value)
    return kind is int or kind is str


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid, groups: int = 1) -> Tensor:
    """torch's convolution; uneven pads, and modes other than zeros, are copied in first."""
    convolution = _CONVOLUTIONS[x.dim() - 2]
    if x.shape[1] == 1:
        x, weight = _without_layout(x), _without_layout(weight)
    if not _symbolic(windows) and windows.mode == "zeros" and all(before == after for before, after in windows.pads):
        pads = tuple(before for before, _ in windows.pads)
        return convolution(x, weight, bias, windows.stride, pads, windows.dilation, groups)
    return convolution(pad(x, windows), weight, bias, windows.stride, 0, windows.dilation, groups)


Settings = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, pads, dilation and groups as torch takes them


def settings_of(x: Tensor, windows: Grid, groups: int) -> Settings | None:
    """What torch's convolution is asked for where it does all of a call itself; None where something is done before it or after."""
    if x.dtype not in (torch.float32, torch.float64) or x.shape[1] == 1 or windows.mode != "zeros":
        return None
    if any(before != after for before, after in windows.pads):
        return None
    return windows.stride, tuple(before for before, _ in windows.pads), windows.dilation, groups


def convolve_again(asked: Settings, activation: str | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns a call like one that passed its checks, by :func:`settings_of`; outside torch.func transforms."""
    last = is_channels_last_quickly(x)
    y = activate(_CONVOLUTIONS[x.dim() - 2](x, weight, bias, *asked), activation)
    return y if last and is_channels_last_quickly(y) else arrange(y, last)


def _without_layout(x: Tensor) -> Tensor:
    """A view whose strides do not read as channels-last, which one channel makes ambiguous.

    On AVX-512 torch 2.13's conv2d is silently wrong for such strides: C = 1, 4×4, kernel 3, stride (1, 2), conv3d likewise.
    """
    return x.squeeze(1).unsqueeze(1)


def _symbolic(windows: Grid) -> bool:
    """Whether the pads may be symbolic; to compare them would pin the size that is being traced."""
    return windows.fitted and torch.compiler.is_compiling()


def pad(x: Tensor, windows: Grid) -> Tensor:
    """A copy of ``x`` with the pads of the windows on every axis."""
    if windows.mode != "zeros" and _symbolic(windows):
        return _padded_by_index(x, windows)
    flat = [p for pair in reversed(windows.pads) for p in pair]
    return F.pad(x, flat, mode="constant" if windows.mode == "zeros" else windows.mode)


def _padded_by_index(x: Tensor, windows: Grid) -> Tensor:
    """:func:`pad` without comparing pads and sizes, which torch's own padding modes do."""
    for axis, (before, after) in enumerate(windows.pads, start=2):
        last = x.shape[axis] - 1
        reads = torch.arange(x.shape[axis] + before + after, device=x.device) - before
        if windows.mode == "reflect":
            reads = last - (last - reads.abs()).abs()
        elif windows.mode == "replicate":
            reads = reads.clamp(0, last)
        else:
            reads = reads.remainder(last + 1)
        x = x.index_select(axis, reads)
    return x


def _plain_torch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    groups: int | None = None,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Tensor:
    windows = grid("torch", input.shape[2:], weight.shape[2:], stride, padding, dilation, padding_mode)
    return activate(convolve(input, weight, bias, windows, groups or input.shape[1] // weight.shape[1]), activation)


torch_convolution = Peer("torch", _plain_torch)


class GridLayer(Layer, nn.modules.conv._ConvNd):
    """A layer on top of torch.nn's Conv{1,2,3}d: its constructor's freedom is ours, its state dict and isinstance are torch's."""

    padding: Any

    def _build(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: Padding,
        dilation: int | Sequence[int],
        groups: int,
        bias: bool,
        padding_mode: str,
        device: Any,
        dtype: Any,
        activation: str | None,
    ) -> None:
        """Checks the arguments by name, then lets torch.nn build the parameters."""
        name = type(self).__name__
        kernel, strides, normal, dilations = normalized(name, self.rank, kernel_size, stride, padding, dilation, padding_mode)
        check_channels(name, groups=groups, in_channels=in_channels, out_channels=out_channels)
        check_activation(name, activation)
        made = (in_channels, out_channels, kernel, strides, 0, dilations, groups, bias, padding_mode, device, dtype)
        super().__init__(*made)  # type: ignore[arg-type]  # torch.nn.Conv{1,2,3}d's, behind this class in every layer's bases
        self.padding = (
            normal if isinstance(normal, str) or any(b != a for b, a in normal) else tuple(b for b, _ in normal)
        )  # torch's form
        if normal != "same_minimal":  # torch.nn's own form of the pads, for tools that read it
            pads = pads_of(normal, (), kernel, strides, dilations)
            self._reversed_padding_repeated_twice = [p for pair in reversed(pads) for p in pair]
        self.activation = activation

    def operands(self, input: Tensor) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        return {
            "input": input, "weight": self.weight, "bias": self.bias, "stride": self.stride, "padding": self.padding,
            "dilation": self.dilation, "padding_mode": self.padding_mode, "activation": self.activation,
        }  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """The op on the input."""
        return type(self).op(**self.operands(input))

    def extra_repr(self) -> str:
        """torch.nn's line, and the activation."""
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


def normalized(
    name: str,
    rank: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    padding_mode: str,
) -> tuple[tuple[int, ...], tuple[int, ...], str | Pairs, tuple[int, ...]]:
    """Kernel, stride, padding and dilation of a layer, checked under its name and in their normal form."""
    if padding_mode not in PADDING_MODES:
        fail(name, f"padding_mode must be one of {', '.join(PADDING_MODES)}", repr(padding_mode))
    return (
        per_axis(name, "kernel_size", kernel_size, rank),
        per_axis(name, "stride", stride, rank),
        normal_padding(name, padding, rank),
        per_axis(name, "dilation", dilation, rank),
    )


def check_channels(name: str, *, groups: int, **channels: int) -> None:
    """Raises unless the channel counts are positive ints that the groups divide."""
    for argument, value in {"groups": groups, **channels}.items():
        if not is_integer(value):
            raise TypeError(f"{name}: {argument} must be an int, got {value!r}")
        if not 1 <= value <= LARGEST:
            fail(name, f"{argument} must be at least 1 and at most {LARGEST}", value)
        if value % groups:
            fail(name, f"{argument} must be divisible by groups", f"{value} and {groups}")


TAKES = frozenset({"kernel", "stride", "padding", "dilation", "padding_mode"})


def window_arguments(problem: Problem) -> dict[str, Any]:
    """The keyword arguments of a Problem that every grid op takes."""
    return {
        "stride": problem.stride, "padding": problem.padding, "dilation": problem.dilation, "padding_mode": problem.padding_mode
    }  # fmt: skip


def grid_operands(problem: Problem, out_channels: int, groups: int) -> dict[str, Operand]:
    """Input, weight (O, C/G, K…) and bias of a Problem."""
    return {
        "input": Operand((problem.batch, problem.channels, *problem.size)),
        "weight": Operand((out_channels, problem.channels // groups, *problem.kernel)),
        "bias": Operand((out_channels,)),
    }


def grid_stage(problem: Problem, in_channels: int, out_channels: int, groups: int, name: str = "main", **changes: Any) -> Stage:
    """The Stage of a grid convolution with the problem's windows, or with some of them changed."""
    make_windows = {f: changes.pop(f, getattr(problem, f)) for f in ("size", "kernel", "stride", "padding", "dilation")}
    size, kernel = make_windows["size"], make_windows["kernel"]
    windows = grid(problem.technique, **make_windows, mode=problem.padding_mode)
    return Stage(
        name, in_channels, out_channels, size, windows.output_size(size, kernel), kernel, windows.stride, windows.pads,
        windows.dilation, groups, problem.padding_mode, **({"biases": out_channels} | changes),
    )  # fmt: skip
