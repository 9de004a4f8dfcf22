"""Depthwise-separable convolution: filter every channel by itself, then mix the channels.

    z[n, c·M + m, p] = f(depthwise_bias[c·M + m] + Σ_t depthwise_weight[c·M + m, 0, t] · x[n, c, p·S − P + t·D])
    y[n, o, p]       = pointwise_bias[o] + Σ_i pointwise_weight[o, i] · z[n, i, p]

Params  C·M·k + C·M·O
MACs    N·Out·(C·M·k + C·M·O)       1/O + 1/k of a standard convolution (M = 1): 0.1121 for O = 1024, 3×3
Paper   Chollet 2017, arXiv:1610.02357 (Xception); Howard et al. 2017, arXiv:1704.04861 (MobileNet)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from omniconv.engines.dense import ENGINE as POINTWISE
from omniconv.engines.dense import run_pointwise
from omniconv.engines.depthwise import ENGINE, stage_depthwise
from omniconv.engines.engine import unfused_reason
from omniconv.geometry import Grid, Padding, grid
from omniconv.ops.activation import activate, check_activation, followed_apart
from omniconv.ops.error_bound import activation_error, linear_error
from omniconv.ops.grid import TAKES, check_channels, grid_stage, normalized, window_arguments
from omniconv.ops.grid import convolve as convolve_on_grid
from omniconv.ops.layer import Causal, Layer
from omniconv.ops.operator import check_bias, check_weight, fail, finalize_output, per_rank, prepare_operands
from omniconv.ops.reference import grid_convolution, with_bias
from omniconv.ops.technique import Operand, Peer, Stage, Technique
from omniconv.problem import Problem
from omniconv.techniques.depthwise import DepthwiseConv, DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from omniconv.techniques.pointwise import PointwiseConv, PointwiseConv1d, PointwiseConv2d, PointwiseConv3d
from omniconv.techniques.pointwise import reference as pointwise_reference


def reference(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    padding_mode: str = "zeros",
    depthwise_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """The definition: as many groups as channels, then a matrix product at every position."""
    windows = grid("reference", input.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation, padding_mode)
    z = activate(grid_convolution(input, depthwise_weight, depthwise_bias, windows, input.shape[1]), depthwise_activation)
    return pointwise_reference(z, pointwise_weight, pointwise_bias, activation=activation)


def convolve(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    windows: Grid,
    depthwise_activation: str | None,
    activation: str | None = None,
) -> Tensor:
    """Two convolutions, the activations after them."""
    z = stage_depthwise(x, depthwise_weight, depthwise_bias, windows, depthwise_activation)
    if z.dim() == 3 and POINTWISE.unsupported_reason(z, pointwise_weight, pointwise_bias) is None:
        return run_pointwise(1, activation, z, pointwise_weight, pointwise_bias)
    ones = (1,) * len(windows.stride)
    return activate(convolve_on_grid(z, pointwise_weight, pointwise_bias, Grid(ones, ((0, 0),) * len(ones), ones)), activation)


def depthwise_separable_conv(
    rank: int,
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    padding_mode: str = "zeros",
    depthwise_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Filters every channel over {over}, then mixes the channels at every position.

        z[n, i, p] = f(depthwise_bias[i] + Σ_t depthwise_weight[i, 0, t] · input[n, i // M, p·stride − before + t·dilation])
        y[n, o, p] = pointwise_bias[o] + Σ_i pointwise_weight[o, i] · z[n, i, p]

    Half types accumulate in float32 and round once, after both stages.

    Args:
        input: (N, C, {axes}) or (C, {axes}).
        depthwise_weight: (C·M, 1, K…); the multiplier M is read from it.
        pointwise_weight: (O, C·M, {ones}).
        depthwise_bias: (C·M,).
        pointwise_bias: (O,).
        stride: Input steps between windows: one int, or one per axis.
        padding: As for :func:`conv{n}d`.
        dilation: Input steps between taps; 1 is dense.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        depthwise_activation: f, between the two stages: None, "relu", "relu6", "silu", "hardswish", "gelu" or "sigmoid".
        activation: The same, applied to the result.

    Returns:
        (N, O, Out…); channels-last exactly where the input is and is not also contiguous.

    Raises:
        TypeError: An operand is not a dense floating tensor, or a setting is not made of integers.
        ValueError: Shapes, dtypes, devices or settings do not fit together.

    Example:
        >>> x, depthwise, pointwise = torch.ones(1, 2, {threes}), torch.ones(2, 1, {threes}), torch.ones(1, 2, {ones})
        >>> depthwise_separable_conv{n}d(x, depthwise, pointwise).item()
        {twice}.0

    Source: Chollet 2017, arXiv:1610.02357; Howard et al. 2017, arXiv:1704.04861.
    """
    op = f"depthwise_separable_conv{rank}d"
    x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias = prepare_operands(
        op,
        rank,
        input,
        depthwise_weight=depthwise_weight,
        pointwise_weight=pointwise_weight,
        depthwise_bias=depthwise_bias,
        pointwise_bias=pointwise_bias,
    )
    check_weight(op, x, depthwise_weight, max(x.shape[1], 1), "depthwise_weight")
    check_bias(op, depthwise_bias, depthwise_weight.shape[0], "depthwise_bias")
    between = depthwise_weight.shape[0]
    if pointwise_weight.dim() != rank + 2 or pointwise_weight.shape[1:] != (between, *(1,) * rank):
        fail(op, f"pointwise_weight must be (O, {between}, {', '.join('1' * rank)})", tuple(pointwise_weight.shape))
    if pointwise_weight.shape[0] < 1:
        fail(op, "pointwise_weight must have at least one output channel", tuple(pointwise_weight.shape))
    check_bias(op, pointwise_bias, pointwise_weight.shape[0], "pointwise_bias")
    check_activation(op, depthwise_activation, "depthwise_activation")
    check_activation(op, activation)
    windows = grid(op, x.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation, padding_mode)
    operands = (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    return finalize_output(input, rank, convolve, operands, windows, depthwise_activation, activation)


depthwise_separable_conv1d, depthwise_separable_conv2d, depthwise_separable_conv3d = per_rank(depthwise_separable_conv)


class DepthwiseSeparableConv(Layer):
    """A depthwise layer and a pointwise layer run as one; see :func:`omniconv.functional.depthwise_separable_conv{n}d`.

    The state dict holds ``depthwise.*`` and ``pointwise.*``, as in the hand-written blocks it replaces. ``norm`` makes a
    normalisation from a number of channels (such as ``torch.nn.BatchNorm{n}d``) and puts one after either stage, before its
    activation, as ``depthwise_norm.*`` and ``pointwise_norm.*``: the MobileNet block.

    Example:
        >>> DepthwiseSeparableConv{n}d(2, 4, 3, padding=1)(torch.ones(1, 2, {threes})).shape[1]
        4
    """

    technique = "depthwise_separable"
    parts: tuple[type[DepthwiseConv], type[PointwiseConv]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        *,
        multiplier: int = 1,
        norm: Callable[[int], nn.Module] | None = None,
        depthwise_activation: str | None = None,
        activation: str | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_activation(name, depthwise_activation, "depthwise_activation")
        check_activation(name, activation)
        normalized(name, self.rank, kernel_size, stride, padding, dilation, padding_mode)
        check_channels(name, groups=1, in_channels=in_channels, out_channels=out_channels, multiplier=multiplier)
        depthwise, pointwise = self.parts
        made = {"bias": bias, "device": device, "dtype": dtype}
        self.depthwise = depthwise(
            in_channels, kernel_size, stride, padding, dilation, multiplier=multiplier, padding_mode=padding_mode, **made
        )
        between = self.depthwise.out_channels
        self.pointwise = pointwise(between, out_channels, **made)
        self.depthwise_norm = None if norm is None else norm(between).to(device=device, dtype=dtype)
        self.pointwise_norm = None if norm is None else norm(out_channels).to(device=device, dtype=dtype)
        self.depthwise_activation, self.activation = depthwise_activation, activation

    def operands(self, input: Tensor) -> dict[str, Any]:
        """The keyword arguments of the one op that the two convolutions are, where no normalisation stands between them."""
        return {
            "input": input,
            "depthwise_weight": self.depthwise.weight,
            "pointwise_weight": self.pointwise.weight,
            "depthwise_bias": self.depthwise.bias,
            "pointwise_bias": self.pointwise.bias,
            "stride": self.depthwise.stride,
            "padding": self.depthwise.padding,
            "dilation": self.depthwise.dilation,
            "padding_mode": self.depthwise.padding_mode,
            "depthwise_activation": self.depthwise_activation,
            "activation": self.activation,
        }

    def forward(self, input: Tensor) -> Tensor:
        """The one op; with normalisation, stage by stage."""
        if self.depthwise_norm is None or self.pointwise_norm is None:
            return type(self).op(**self.operands(input))
        z = activate(self.depthwise_norm(self.depthwise(input)), self.depthwise_activation)
        return activate(self.pointwise_norm(self.pointwise(z)), self.activation)

    def extra_repr(self) -> str:
        """The activations; the rest is in the parts."""
        return f"depthwise_activation={self.depthwise_activation!r}, activation={self.activation!r}"


class DepthwiseSeparableConv1d(DepthwiseSeparableConv):
    rank, op, parts = 1, depthwise_separable_conv1d, (DepthwiseConv1d, PointwiseConv1d)

    depthwise: DepthwiseConv1d
    pointwise: PointwiseConv1d

    def stream_reads(self) -> Causal | None:
        """How the layer reads a sequence that comes in chunks: with normalisation, its parts do."""
        if self.depthwise_norm is not None:
            return None
        filters, mixing = self.depthwise.stream_reads(), self.pointwise.stream_reads()
        differ = unfused_reason(self.depthwise.weight, self.depthwise_activation, self.activation)
        return replace(filters, inexact=filters.inexact or mixing.inexact or differ)

    def stream_step(self, window: Tensor) -> Tensor:
        """The op without pads."""
        return depthwise_separable_conv1d(**self.operands(window) | {"padding": 0})

    @property
    def stream_exact(self) -> bool:
        """Whether the activations after the normalisations leave the bits alone."""
        return not (followed_apart(self.depthwise_activation) or followed_apart(self.activation))

    def stream(self, input: Tensor, step: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """The stages, with normalisation, over the next chunk."""
        assert self.depthwise_norm is not None
        assert self.pointwise_norm is not None
        z = activate(step(self.depthwise_norm, step(self.depthwise, input)), self.depthwise_activation)
        return activate(step(self.pointwise_norm, step(self.pointwise, z)), self.activation)


class DepthwiseSeparableConv2d(DepthwiseSeparableConv):
    rank, op, parts = 2, depthwise_separable_conv2d, (DepthwiseConv2d, PointwiseConv2d)


class DepthwiseSeparableConv3d(DepthwiseSeparableConv):
    rank, op, parts = 3, depthwise_separable_conv3d, (DepthwiseConv3d, PointwiseConv3d)


def bound(
    u: float,
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    *,
    depthwise_activation: str | None = None,
    activation: str | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """The depthwise γ(k + 1)·Σ|w||x| carried through the activation and the mixing, which adds its own γ(C·M + 1)."""
    windows = grid("bound", input.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation, padding_mode)

    def filtered(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return grid_convolution(x, w, b, windows, x.shape[1])

    def mix(z: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return with_bias(pointwise_reference(z, w), b)

    z = filtered(input, depthwise_weight, depthwise_bias)
    z_error = linear_error(filtered, u, depthwise_weight[0].numel() + 1, input, 0.0, depthwise_weight, depthwise_bias)
    z_error = activation_error(z, z_error, depthwise_activation, u)
    z = activate(z, depthwise_activation)
    error = linear_error(mix, u, pointwise_weight.shape[1] + 1, z, z_error, pointwise_weight, pointwise_bias)
    return activation_error(mix(z, pointwise_weight, pointwise_bias), error, activation, u)


def operands(problem: Problem) -> dict[str, Operand]:
    """Input, the two weights and the two biases."""
    between = problem.channels * (problem.multiplier or 1)
    out_channels = problem.out_channels or problem.channels
    return {
        "input": Operand((problem.batch, problem.channels, *problem.size)),
        "depthwise_weight": Operand((between, 1, *problem.kernel)),
        "pointwise_weight": Operand((out_channels, between, *(1,) * problem.rank)),
        "depthwise_bias": Operand((between,)),
        "pointwise_bias": Operand((out_channels,)),
    }


def stages(problem: Problem) -> tuple[Stage, ...]:
    """Depthwise, then pointwise."""
    between = problem.channels * (problem.multiplier or 1)
    ones = (1,) * problem.rank
    depthwise = grid_stage(problem, problem.channels, between, problem.channels, "depthwise")
    pointwise = grid_stage(
        problem, between, problem.out_channels or problem.channels, 1, "pointwise",
        size=depthwise.out, kernel=ones, stride=ones, padding=0, dilation=ones,
    )  # fmt: skip
    return depthwise, pointwise


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem."""
    module: type[DepthwiseSeparableConv] = TECHNIQUE.modules[problem.rank]  # type: ignore[assignment]
    out_channels = problem.out_channels or problem.channels
    return module(problem.channels, out_channels, problem.kernel, multiplier=problem.multiplier or 1, **window_arguments(problem))


def variant(base: Problem) -> Problem:
    """The same layer, space and channels split."""
    return base.replace(groups=1)


def _plain_torch(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    padding_mode: str = "zeros",
    depthwise_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    windows = grid("torch", input.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation, padding_mode)
    z = activate(convolve_on_grid(input, depthwise_weight, depthwise_bias, windows, input.shape[1]), depthwise_activation)
    ones = (1,) * len(windows.stride)
    return activate(convolve_on_grid(z, pointwise_weight, pointwise_bias, Grid(ones, ((0, 0),) * len(ones), ones)), activation)


TECHNIQUE = Technique(
    name="depthwise_separable",
    title="Depthwise-separable",
    summary="filter every channel by itself, then mix: 1/O + 1/k of the MACs",
    sampling="grid",
    mixing="one channel, then all",
    weights="factorised: depthwise ∘ pointwise",
    formula="y[n,o,p] = b[o] + Σ_i P[o,i] · f(d[i] + Σ_t D[i,t] · x[n, i/M, p·S − P + t·D])",
    when="The default of mobile networks (MobileNet, Xception, EfficientNet): 8 to 9 times fewer MACs at 3×3.",
    traps=(
        "9 times fewer MACs are not 9 times less time: the depthwise half is bound by memory.",
        "An activation between the halves is a choice, not a rule: MobileNet has one, Xception found none to be better.",
        "Keras pads 'same' by the input size and has no normalisation in between: port its weights with 'same_minimal'.",
    ),
    paper="Chollet 2017, arXiv:1610.02357; Howard et al. 2017, arXiv:1704.04861",
    ops={1: depthwise_separable_conv1d, 2: depthwise_separable_conv2d, 3: depthwise_separable_conv3d},
    modules={1: DepthwiseSeparableConv1d, 2: DepthwiseSeparableConv2d, 3: DepthwiseSeparableConv3d},
    reference=reference,
    composite=convolve,
    takes=TAKES | {"out_channels", "multiplier"},
    operands=operands,
    arguments=window_arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    peers=(Peer("torch", _plain_torch),),
    engine=ENGINE,
)
