"""Depthwise convolution: each channel has its own filters and channels never mix.

    y[n, c·M + m, p] = bias[c·M + m] + Σ_t weight[c·M + m, 0, t] · x[n, c, p·S − P + t·D]

Params  C·M·k           M = channel multiplier, k = ∏K taps
MACs    N·Out·C·M·k     1/C of a standard convolution of the same channels
Paper   Sifre 2014 (PhD thesis, ch. 6); Chollet 2017, arXiv:1610.02357
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from omniconv.engines.depthwise import ENGINE, LANES, cache_depthwise, chunks_differ, finalize_depthwise
from omniconv.engines.engine import lookup_plan, plan_key
from omniconv.geometry import Padding, grid
from omniconv.ops.activation import activate, check_activation
from omniconv.ops.error_bound import activation_error, linear_error
from omniconv.ops.grid import (
    TAKES,
    GridLayer,
    check_channels,
    convolve,
    grid_operands,
    grid_stage,
    make_windows,
    torch_convolution,
    window_arguments,
)
from omniconv.ops.layer import SHORT, Causal, causal_past
from omniconv.ops.operator import check_bias, check_weight, per_rank, prepare_operands
from omniconv.ops.reference import grid_convolution
from omniconv.ops.technique import Operand, Stage, Technique
from omniconv.problem import Problem


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Tensor:
    """The definition: as many groups as channels."""
    windows = grid("reference", input.shape[2:], weight.shape[2:], stride, padding, dilation, padding_mode)
    return activate(grid_convolution(input, weight, bias, windows, groups=input.shape[1]), activation)


def depthwise_conv(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Tensor:
    """Convolves each channel with its own filters, over {over}.

        y[n, c·M + m, p] = bias[c·M + m] + Σ_t weight[c·M + m, 0, t] · input[n, c, p·stride − before + t·dilation]

    Args:
        input: (N, C, {axes}) or (C, {axes}).
        weight: (C·M, 1, K…); the multiplier M is read from it.
        bias: (C·M,).
        stride: Input steps between windows: one int, or one per axis.
        padding: As for :func:`conv{n}d`.
        dilation: Input steps between taps; 1 is dense.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        activation: None, "relu", "relu6", "silu", "hardswish", "gelu" or "sigmoid", applied to the result.

    Returns:
        (N, C·M, Out…); channels-last exactly where the input is and is not also contiguous.

    Raises:
        TypeError: An operand is not a dense floating tensor, or a setting is not made of integers.
        ValueError: Shapes, dtypes, devices or settings do not fit together.

    Example:
        >>> depthwise_conv{n}d(torch.ones(1, 2, {threes}), torch.ones(2, 1, {threes})).flatten().tolist()
        [{taps}.0, {taps}.0]

    Source: Sifre 2014 (PhD thesis, ch. 6); Chollet 2017, arXiv:1610.02357.
    """
    op = _NAMES[rank]
    key = plan_key(op, input, weight, bias, stride, padding, dilation, padding_mode, activation)
    if (plan := lookup_plan(key)) is not None:
        return plan.run(plan.plan, activation, input, weight, bias)
    x, weight, bias = prepare_operands(op, rank, input, weight=weight, bias=bias)
    check_weight(op, x, weight, groups=max(x.shape[1], 1))
    check_bias(op, bias, weight.shape[0])
    check_activation(op, activation)
    windows = make_windows(op, x.shape[2:], weight.shape[2:], stride, padding, dilation, padding_mode)
    cache_depthwise(key, input, weight, bias, windows)
    return finalize_depthwise(input, rank, x, weight, bias, windows, activation)


_NAMES = {rank: f"depthwise_conv{rank}d" for rank in (1, 2, 3)}
depthwise_conv1d, depthwise_conv2d, depthwise_conv3d = per_rank(depthwise_conv)


class DepthwiseConv(GridLayer):
    """A depthwise layer over {over}; see :func:`omniconv.functional.depthwise_conv{n}d`.

    The state dict equals ``torch.nn.Conv{n}d(C, C·M, K, groups=C)``: weights load both ways.

    Example:
        >>> DepthwiseConv{n}d(2, 3, multiplier=2)(torch.ones(1, 2, {threes})).shape[1]
        4
    """

    technique = "depthwise"

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        *,
        multiplier: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_channels(type(self).__name__, groups=1, channels=channels, multiplier=multiplier)
        self._build(
            channels,
            channels * multiplier,
            kernel_size,
            stride,
            padding,
            dilation,
            channels,
            bias,
            padding_mode,
            device,
            dtype,
            activation,
        )


class DepthwiseConv1d(DepthwiseConv, nn.Conv1d):
    rank, op = 1, depthwise_conv1d

    def stream_reads(self) -> Causal:
        """How the layer reads a sequence that comes in chunks."""
        past = causal_past(self.padding, self.kernel_size, self.stride, self.dilation, self.padding_mode)
        differ = chunks_differ(self.weight, self.bias, self.stride, self.dilation, self.activation)
        return Causal(past, self.stride[0], ("NCT",), self.in_channels, differ)

    def stream_step(self, window: Tensor) -> Tensor:
        """The op without pads.

        A short window goes through the channels-last kernels, which make the same bits: they take the taps in order too. One
        position of N8 C512 takes 21 µs so with 4 taps and 41 with 31, and 290 and 616 as planes.
        """
        weight, stride, dilation = self.weight, self.stride, self.dilation
        short = window.shape[2] <= SHORT + dilation[0] * (weight.shape[2] - 1)
        if not (short and window.stride(1) == 1 and LANES <= self.in_channels == self.out_channels):
            return depthwise_conv1d(window, weight, self.bias, stride, 0, dilation, activation=self.activation)
        flat = window.unsqueeze(2), weight.unsqueeze(2), self.bias, (1, *stride), 0, (1, *dilation)
        return depthwise_conv2d(*flat, activation=self.activation).squeeze(2).contiguous()


class DepthwiseConv2d(DepthwiseConv, nn.Conv2d):
    rank, op = 2, depthwise_conv2d


class DepthwiseConv3d(DepthwiseConv, nn.Conv3d):
    rank, op = 3, depthwise_conv3d


def bound(
    u: float,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    **windows: Any,
) -> Tensor:
    """γ(k + 1)·Σ|w||x|, through the activation."""

    def convolution(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return reference(x, w, b, **windows)

    error = linear_error(convolution, u, weight[0].numel() + 1, input, 0.0, weight, bias)
    return activation_error(convolution(input, weight, bias), error, activation, u)


def operands(problem: Problem) -> dict[str, Operand]:
    """Input, weight and bias."""
    return grid_operands(problem, problem.channels * (problem.multiplier or 1), problem.channels)


def stages(problem: Problem) -> tuple[Stage, ...]:
    """One."""
    channels = problem.channels
    return (grid_stage(problem, channels, channels * (problem.multiplier or 1), channels),)


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem."""
    module: type[DepthwiseConv] = TECHNIQUE.modules[problem.rank]  # type: ignore[assignment]
    return module(problem.channels, problem.kernel, multiplier=problem.multiplier or 1, **window_arguments(problem))


def variant(base: Problem) -> Problem:
    """The same layer without mixing: as many output channels as the multiplier allows."""
    out_channels = base.out_channels or base.channels
    return base.replace(
        out_channels=None,
        groups=1,
        multiplier=max(out_channels // base.channels, 1) if out_channels > base.channels else None,
    )


TECHNIQUE = Technique(
    name="depthwise",
    title="Depthwise",
    summary="one filter per channel, channels never meet: 1/C of the parameters and MACs",
    sampling="grid",
    mixing="one channel",
    weights="free",
    formula="y[n,c·M+m,p] = b[c·M+m] + Σ_t W[c·M+m,0,t] · x[n,c, p·S − P + t·D]",
    when="The spatial half of MobileNet, EfficientNet and ConvNeXt blocks; short causal filters in Mamba and Conformer.",
    traps=(
        "Bound by memory, not by arithmetic: few MACs per byte, so 1/C of the MACs is far from 1/C of the time.",
        "It mixes nothing: without a pointwise layer beside it every channel stays alone.",
    ),
    paper="Sifre 2014 (PhD thesis, ch. 6); Chollet 2017, arXiv:1610.02357",
    ops={1: depthwise_conv1d, 2: depthwise_conv2d, 3: depthwise_conv3d},
    modules={1: DepthwiseConv1d, 2: DepthwiseConv2d, 3: DepthwiseConv3d},
    reference=reference,
    composite=convolve,
    takes=TAKES | {"multiplier"},
    operands=operands,
    arguments=window_arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    peers=(torch_convolution,),
    engine=ENGINE,
)
