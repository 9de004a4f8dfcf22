"""Spatially separable convolution: a column of taps, then a row of taps.

    z[n, m, p] = Σ_c Σ_i weight_column[m, c, i] · x[n, c, p_y·S − P + i·D, p_x]
    y[n, o, p] = bias[o] + Σ_m Σ_j weight_row[o, m, j] · z[n, m, p_y, p_x·S − P + j·D]

Params  C·Cm·Ky + Cm·O·Kx                       Cm = channels between the two
MACs    N·(Outy·Inx·C·Cm·Ky + Out·Cm·O·Kx)      2/K of a standard convolution where C = Cm = O
Paper   Rigamonti et al. 2013 (learning separable filters); Jaderberg et al. 2014, arXiv:1405.3866

A single kernel is separable exactly where its matrix has rank 1: Sobel-x = [1 2 1]ᵀ ∘ [−1 0 1]. ``groups=C`` filters every channel
by itself: the image-filter case.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.geometry import Grid, Padding, grid
from omniconv.ops.activation import activate, check_activation
from omniconv.ops.error_bound import activation_error, linear_error
from omniconv.ops.grid import TAKES, call_problem, check_channels, grid_stage, normalized, window_arguments
from omniconv.ops.grid import convolve as convolve_on_grid
from omniconv.ops.layer import Layer
from omniconv.ops.operator import (
    check_bias,
    check_flags,
    check_weight,
    fail,
    finalize_output,
    intercepted,
    interceptors,
    is_intercepted,
    prepare_operands,
)
from omniconv.ops.reference import grid_convolution
from omniconv.ops.technique import Arguments, Operand, Peer, Stage, StageArguments, Technique
from omniconv.ops.tracing import call_with_number_sizes, is_traced
from omniconv.problem import Problem


def _column_and_row(windows: Grid) -> tuple[Grid, Grid]:
    """The windows of the two stages."""
    (sy, sx), (py, px), (dy, dx) = windows.stride, windows.pads, windows.dilation
    column = Grid((sy, 1), (py, (0, 0)), (dy, 1), windows.mode, windows.fitted)
    return column, Grid((1, sx), ((0, 0), px), (1, dx), windows.mode, windows.fitted)


def _windows(
    op: str,
    x: Tensor,
    weight_column: Tensor,
    weight_row: Tensor,
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    padding_mode: str,
) -> tuple[Grid, Grid]:
    kernel = (weight_column.shape[2], weight_row.shape[3])
    return _column_and_row(grid(op, x.shape[2:], kernel, stride, padding, dilation, padding_mode))


def reference(
    input: Tensor,
    weight_column: Tensor,
    weight_row: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Tensor:
    """The definition: one axis, then the other."""
    column, row = _windows("reference", input, weight_column, weight_row, stride, padding, dilation, padding_mode)
    z = grid_convolution(input, weight_column, None, column, groups)
    return activate(grid_convolution(z, weight_row, bias, row, groups), activation)


def convolve(
    x: Tensor, weight_column: Tensor, weight_row: Tensor, bias: Tensor | None, column: Grid, row: Grid, groups: int
) -> Tensor:
    """Two of torch's convolutions."""
    return convolve_on_grid(convolve_on_grid(x, weight_column, None, column, groups), weight_row, bias, row, groups)


def separable_conv2d(
    input: Tensor,
    weight_column: Tensor,
    weight_row: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Tensor:
    """Convolves with a column of taps, then with a row of taps.

        z[n, m, p] = Σ_c Σ_i weight_column[m, c, i] · input[n, c, p_y·stride − before + i·dilation, p_x]
        y[n, o, p] = bias[o] + Σ_m Σ_j weight_row[o, m, j] · z[n, m, p_y, p_x·stride − before + j·dilation]

    With ``groups=C`` every channel has its own separable filter (Gaussian, Sobel), and the result is that of a depthwise
    convolution with the outer product of column and row. Half types accumulate in float32 and round once, after both stages.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight_column: (Cm, C/G, Ky, 1).
        weight_row: (O, Cm/G, 1, Kx).
        bias: (O,), added after the row.
        stride: Input steps between windows: one int, or one per axis.
        padding: As for :func:`conv2d`.
        dilation: Input steps between taps; 1 is dense.
        groups: Parts into which the channels of both stages are split.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        activation: None, "relu", "relu6", "silu", "hardswish", "gelu" or "sigmoid", applied to the result.

    Returns:
        (N, O, Outy, Outx); channels-last exactly where the input is and is not also contiguous.

    Raises:
        TypeError: An operand is not a dense floating tensor, or a setting is not made of integers.
        ValueError: Shapes, dtypes, devices or settings do not fit together.

    Example:
        >>> column, row = torch.tensor([1.0, 2.0, 1.0]).view(1, 1, 3, 1), torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)
        >>> separable_conv2d(torch.arange(9.0).view(1, 1, 3, 3), column, row).item()
        8.0

    Source: Jaderberg et al. 2014, arXiv:1405.3866.
    """
    if interceptors and is_intercepted():
        return intercepted(separable_conv2d, locals())
    op = "separable_conv2d"
    if is_traced():
        return call_with_number_sizes(separable_conv2d, locals())
    x, weight_column, weight_row, bias = prepare_operands(
        op, 2, input, weight_column=weight_column, weight_row=weight_row, bias=bias
    )
    check_weight(op, x, weight_column, groups, "weight_column")
    if weight_column.shape[3] != 1:
        fail(op, "weight_column must be (Cm, C/G, Ky, 1)", tuple(weight_column.shape))
    if weight_row.dim() != 4 or weight_row.shape[2] != 1 or weight_row.shape[1] * groups != weight_column.shape[0]:
        fail(op, f"weight_row must be (O, {weight_column.shape[0] // groups}, 1, Kx)", tuple(weight_row.shape))
    if weight_row.shape[0] < 1 or weight_row.shape[0] % groups:
        fail(op, f"groups must divide the output channels, at least 1, of weight_row {tuple(weight_row.shape)}", groups)
    check_bias(op, bias, weight_row.shape[0])
    check_activation(op, activation)
    column, row = _windows(op, x, weight_column, weight_row, stride, padding, dilation, padding_mode)
    return finalize_output(input, 2, convolve, (x, weight_column, weight_row, bias), column, row, groups, activation=activation)


class SeparableConv2d(Layer):
    """A column-then-row layer; see :func:`omniconv.functional.separable_conv2d`.

    ``mid_channels`` lie between the two stages (the output channels where it is not given). The state dict holds
    ``weight_column``, ``weight_row`` and ``bias``.

    Example:
        >>> SeparableConv2d(2, 4, 3, padding="same")(torch.ones(1, 2, 5, 5)).shape
        torch.Size([1, 4, 5, 5])
    """

    technique, rank, op = "separable", 2, separable_conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        *,
        mid_channels: int | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        windows = normalized(name, 2, kernel_size, stride, padding, dilation, padding_mode)
        self.kernel_size, self.stride, self.padding, self.dilation = windows
        mid = out_channels if mid_channels is None else mid_channels
        check_channels(name, groups=groups, in_channels=in_channels, out_channels=out_channels, mid_channels=mid)
        check_flags(name, bias=bias)
        check_activation(name, activation)
        self.in_channels, self.out_channels, self.mid_channels, self.groups = in_channels, out_channels, mid, groups
        self.padding_mode, self.activation = padding_mode, activation
        ky, kx = self.kernel_size
        self.weight_column = nn.Parameter(torch.empty(mid, in_channels // groups, ky, 1, device=device, dtype=dtype))
        self.weight_row = nn.Parameter(torch.empty(out_channels, mid // groups, 1, kx, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills both weights and the bias as torch.nn fills those of a convolution."""
        for weight in (self.weight_column, self.weight_row):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if self.bias is not None:
            limit = 1 / math.sqrt(self.weight_row[0].numel())
            nn.init.uniform_(self.bias, -limit, limit)

    def operands(self, input: Tensor) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        return {
            "input": input,
            "weight_column": self.weight_column,
            "weight_row": self.weight_row,
            "bias": self.bias,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
            "activation": self.activation,
        }

    def forward(self, input: Tensor) -> Tensor:
        """The op on the input."""
        return separable_conv2d(**self.operands(input))

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"mid_channels={self.mid_channels}, bias={self.bias is not None}, padding_mode={self.padding_mode!r}, "
            f"activation={self.activation!r}"
        )


def bound(
    u: float,
    input: Tensor,
    weight_column: Tensor,
    weight_row: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Tensor:
    """The column's γ(C/G·Ky)·Σ|w||x| carried through the row, which adds its own."""
    column, row = _windows("bound", input, weight_column, weight_row, stride, padding, dilation, padding_mode)

    def down(x: Tensor, w: Tensor) -> Tensor:
        return grid_convolution(x, w, None, column, groups)

    def across(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return grid_convolution(x, w, b, row, groups)

    z = down(input, weight_column)
    z_error = linear_error(down, u, weight_column[0].numel(), input, 0.0, weight_column)
    error = linear_error(across, u, weight_row[0].numel() + 1, z, z_error, weight_row, bias)
    return activation_error(across(z, weight_row, bias), error, activation, u)


def _channels(problem: Problem) -> tuple[int, int, int]:
    """C, Cm and O."""
    out_channels = problem.out_channels or problem.channels
    return problem.channels, problem.multiplier or out_channels, out_channels


def operands(problem: Problem) -> dict[str, Operand]:
    """Input, the two weights and the bias."""
    channels, mid, out_channels = _channels(problem)
    return {
        "input": Operand((problem.batch, channels, *problem.size)),
        "weight_column": Operand((mid, channels // problem.groups, problem.kernel[0], 1)),
        "weight_row": Operand((out_channels, mid // problem.groups, 1, problem.kernel[1])),
        "bias": Operand((out_channels,)),
    }


def arguments(problem: Problem) -> dict[str, Any]:
    """The op's keyword arguments."""
    return window_arguments(problem) | {"groups": problem.groups}


def stages(problem: Problem) -> tuple[Stage, ...]:
    """Column, then row."""
    channels, mid, out_channels = _channels(problem)
    windows = grid(
        problem.technique, problem.size, problem.kernel, problem.stride, problem.padding, problem.dilation, problem.padding_mode
    )
    down, across = _column_and_row(windows)
    column = grid_stage(
        problem, channels, mid, problem.groups, "column", biases=0,
        kernel=(problem.kernel[0], 1), stride=down.stride, padding=down.pads, dilation=down.dilation,
    )  # fmt: skip
    row = grid_stage(
        problem, mid, out_channels, problem.groups, "row",
        size=column.out, kernel=(1, problem.kernel[1]), stride=across.stride, padding=across.pads, dilation=across.dilation,
    )  # fmt: skip
    return column, row


def problem(rank: int, arguments: Arguments) -> Problem:
    """Returns the Problem of a call."""
    column, row = arguments["weight_column"], arguments["weight_row"]
    return call_problem(
        "separable", rank, arguments, row.shape[0], kernel=(column.shape[2], row.shape[3]), groups=arguments.get("groups", 1),
        multiplier=None if column.shape[0] == row.shape[0] else column.shape[0],
    )  # fmt: skip


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem."""
    channels, mid, out_channels = _channels(problem)
    return SeparableConv2d(channels, out_channels, problem.kernel, mid_channels=mid, **arguments(problem))


def variant(base: Problem) -> Problem:
    """The same layer, its window factorised."""
    return base


def _plain_torch(
    input: Tensor,
    weight_column: Tensor,
    weight_row: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    activation: str | None = None,
    padding_mode: str = "zeros",
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    column, row = _windows("torch", input, weight_column, weight_row, stride, padding, dilation, padding_mode)
    return activate(convolve(input, weight_column, weight_row, bias, column, row, groups), activation)


TECHNIQUE = Technique(
    name="separable",
    title="Separable (spatially)",
    summary="a column of taps, then a row of taps: 2/K of the MACs at equal channels",
    sampling="grid, one axis at a time",
    mixing="all channels or groups",
    weights="factorised: column ∘ row",
    formula="y = b + W_row ∗ (W_col ∗ x);  one kernel: k(y,x) = k_y(y)·k_x(x)",
    when="Large windows (7×7 and more), image filters (Gaussian, Sobel), low-rank factorisation of trained layers.",
    traps=(
        "Only kernels of rank 1 separate exactly; the rest of the singular values is the error.",
        "For 3×3 the gain is 2/3 of the MACs at best, and a second pass over memory eats it.",
        "Not the same as depthwise-separable: here both axes may mix channels, there space and channels are split.",
    ),
    paper="Rigamonti et al. 2013; Jaderberg et al. 2014, arXiv:1405.3866",
    ops={2: separable_conv2d},
    modules={2: SeparableConv2d},
    reference=reference,
    composite=convolve,
    takes=TAKES | {"out_channels", "groups", "multiplier"},
    operands=operands,
    arguments=arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    problem=problem,
    stage_arguments=(StageArguments("weight_column", None, None), StageArguments("weight_row")),
    peers=(Peer("torch", _plain_torch),),
)
