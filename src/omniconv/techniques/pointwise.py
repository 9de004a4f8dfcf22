"""Pointwise (1×1) convolution: mixes channels at one position and never looks sideways.

    y[n, o, p] = bias[o] + Σ_c weight[o, c] · x[n, c, p·S]

Params  C·O
MACs    N·Out·C·O
Paper   Lin, Chen & Yan 2014, arXiv:1312.4400 (network in network)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.engines.dense import ENGINE, run_pointwise
from omniconv.engines.engine import CallPlan, cache_plan, lookup_plan, plan_key, unfused_reason
from omniconv.geometry import grid, per_axis
from omniconv.ops.activation import activate, check_activation
from omniconv.ops.error_bound import activation_error, linear_error
from omniconv.ops.grid import GridLayer, convolve, convolve_again, grid_operands, grid_stage, settings_of, torch_convolution
from omniconv.ops.layer import Causal, one_position
from omniconv.ops.operator import check_bias, check_weight, fail, finalize_output, per_rank, prepare_operands
from omniconv.ops.reference import with_bias
from omniconv.ops.technique import Operand, Stage, Technique
from omniconv.problem import Problem


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """The definition: a matrix product over the channels of every position kept."""
    rank = input.dim() - 2
    for axis, s in enumerate(per_axis("reference", "stride", stride, rank)):
        input = input.index_select(axis + 2, torch.arange(0, input.shape[axis + 2], s))
    y = torch.einsum("oc,nc...->no...", weight.flatten(1), input)
    return activate(with_bias(y, bias), activation)


def pointwise_conv(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """Mixes the channels of each position, over {over}.

        y[n, o, p] = bias[o] + Σ_c weight[o, c] · input[n, c, p·stride]

    Args:
        input: (N, C, {axes}) or (C, {axes}).
        weight: (O, C, {ones}).
        bias: (O,).
        stride: Input steps between the positions kept: one int, or one per axis.
        activation: None, "relu", "relu6", "silu", "hardswish", "gelu" or "sigmoid", applied to the result.

    Returns:
        (N, O, Out…) with Out = ⌈In / stride⌉; channels-last exactly where the input is and is not also contiguous. Over one axis
        native kernels give a position the same bits whatever positions and samples come with it.

    Raises:
        TypeError: An operand is not a dense floating tensor, or the stride is not made of integers.
        ValueError: Shapes, dtypes or devices do not fit together, or the kernel is not 1 on every axis.

    Example:
        >>> pointwise_conv{n}d(torch.ones(1, 5, {ones}), torch.ones(2, 5, {ones})).flatten().tolist()
        [5.0, 5.0]

    Source: Lin, Chen & Yan 2014, arXiv:1312.4400.
    """
    op = f"pointwise_conv{rank}d"
    key = plan_key(op, input, weight, bias, stride, 0, 1, "zeros", activation)
    if (plan := lookup_plan(key)) is not None:
        return plan.run(plan.plan, activation, input, weight, bias)
    x, weight, bias = prepare_operands(op, rank, input, weight=weight, bias=bias)
    check_weight(op, x, weight, groups=1)
    if any(k != 1 for k in weight.shape[2:]):
        fail(op, "weight must be 1 on every spatial axis", tuple(weight.shape))
    check_bias(op, bias, weight.shape[0])
    check_activation(op, activation)
    windows = grid(op, x.shape[2:], weight.shape[2:], stride)
    if rank == 1 and ENGINE.unsupported_reason(x, weight, bias) is None:
        (step,) = windows.stride
        if input.dim() == 3:
            cache_plan(key, CallPlan(run_pointwise, step))
        y = run_pointwise(step, activation, x, weight, bias)
        return y if input.dim() == 3 else y.squeeze(0)
    if key is not None and input.dim() == rank + 2 and (asked := settings_of(x, windows, 1)) is not None:
        cache_plan(key, CallPlan(convolve_again, asked))
    return finalize_output(input, rank, convolve, (x, weight, bias), windows, 1, activation=activation)


pointwise_conv1d, pointwise_conv2d, pointwise_conv3d = per_rank(pointwise_conv)


class PointwiseConv(GridLayer):
    """A 1×1 layer over {over}; see :func:`omniconv.functional.pointwise_conv{n}d`.

    The state dict equals ``torch.nn.Conv{n}d(C, O, 1)``: weights load both ways.

    Example:
        >>> PointwiseConv{n}d(2, 4)(torch.ones(1, 2, {threes})).shape[1]
        4
    """

    technique = "pointwise"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | Sequence[int] = 1,
        *,
        bias: bool = True,
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self._build(in_channels, out_channels, 1, stride, 0, 1, 1, bias, "zeros", device, dtype, activation)

    def operands(self, input: Tensor) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        return {
            "input": input,
            "weight": self.weight,
            "bias": self.bias,
            "stride": self.stride,
            "activation": self.activation,
        }


class PointwiseConv1d(PointwiseConv, nn.Conv1d):
    rank, op = 1, pointwise_conv1d

    def stream_reads(self) -> Causal:
        """How the layer reads a sequence that comes in chunks."""
        differ = ENGINE.unsupported_reason(one_position(self.weight, self.in_channels), self.weight, self.bias)
        return Causal(0, self.stride[0], ("NCT",), self.in_channels, differ or unfused_reason(self.weight, self.activation))

    def stream_step(self, window: Tensor) -> Tensor:
        """The layer itself, which looks at one position."""
        return self.forward(window)


class PointwiseConv2d(PointwiseConv, nn.Conv2d):
    rank, op = 2, pointwise_conv2d


class PointwiseConv3d(PointwiseConv, nn.Conv3d):
    rank, op = 3, pointwise_conv3d


def bound(
    u: float,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """γ(C + 1)·Σ|w||x|, through the activation."""

    def convolution(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return reference(x, w, b, stride)

    error = linear_error(convolution, u, weight.shape[1] + 1, input, 0.0, weight, bias)
    return activation_error(convolution(input, weight, bias), error, activation, u)


def operands(problem: Problem) -> dict[str, Operand]:
    """Input, weight and bias."""
    return grid_operands(problem, problem.out_channels or problem.channels, 1)


def arguments(problem: Problem) -> dict[str, Any]:
    """The op's keyword arguments."""
    return {"stride": problem.stride}


def stages(problem: Problem) -> tuple[Stage, ...]:
    """One."""
    return (grid_stage(problem, problem.channels, problem.out_channels or problem.channels, 1),)


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem."""
    module: type[PointwiseConv] = TECHNIQUE.modules[problem.rank]  # type: ignore[assignment]
    return module(problem.channels, problem.out_channels or problem.channels, problem.stride)


def variant(base: Problem) -> Problem:
    """The same channels at the same positions, without a window."""
    return Problem(
        base.technique, base.channels, base.size, base.batch, base.out_channels, stride=base.stride, dtype=base.dtype,
        channels_last=base.channels_last,
    )  # fmt: skip


TECHNIQUE = Technique(
    name="pointwise",
    title="Pointwise",
    summary="mixes the channels of one position: a matrix product",
    sampling="one position",
    mixing="all channels",
    weights="free",
    formula="y[n,o,p] = b[o] + Σ_c W[o,c] · x[n,c, p·S]",
    when="To change the number of channels, or to mix them after a depthwise layer; most MACs of a mobile network are here.",
    traps=(
        "It sees one position: alone it cannot find an edge.",
        "With a stride it throws away all but one position in S per axis unseen (the ResNet-B shortcut).",
    ),
    paper="Lin, Chen & Yan 2014, arXiv:1312.4400",
    ops={1: pointwise_conv1d, 2: pointwise_conv2d, 3: pointwise_conv3d},
    modules={1: PointwiseConv1d, 2: PointwiseConv2d, 3: PointwiseConv3d},
    reference=reference,
    composite=convolve,
    takes=frozenset({"out_channels", "stride"}),
    operands=operands,
    arguments=arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    peers=(torch_convolution,),
    engine=ENGINE,
)
