"""Lightweight convolution: a depthwise convolution along a sequence whose kernel is shared per head and normalised.

    w̃ = softmax(weight, over the taps)
    y[n, c, t] = bias[c] + Σ_i w̃[c // (C/H), i] · x[n, c, t + i·D − before]

Params  H·K             H = heads, K = taps
MACs    N·T·C·K
Paper   Wu et al. 2019, arXiv:1901.10430
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.engines.engine import CallPlan, cache_plan, lookup_plan, plan_key, unfused_reason
from omniconv.engines.sequence import LightweightEngine, plan_of
from omniconv.geometry import Grid, Padding
from omniconv.ops.grid import grid_stage
from omniconv.ops.layer import one_position
from omniconv.ops.operator import accumulated_in, intercepted, interceptors, is_intercepted, prepare_operands
from omniconv.ops.sequence import (
    LAYOUTS,
    TAKES,
    Axes,
    SequenceLayer,
    arguments,
    axes_of,
    check_axes,
    check_heads,
    definition,
    heads_of,
    kernel_bound,
    make_windows,
    masked,
    normalised,
    of_channels,
    pad_axis,
    run,
    shift_and_add,
    variant,
)
from omniconv.ops.sequence_peers import LIGHTWEIGHT_PEERS
from omniconv.ops.technique import Operand, Stage, Technique
from omniconv.problem import Problem


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Padding = "same",
    *,
    dilation: int | Sequence[int] = 1,
    softmax: bool = True,
    layout: str = "NCT",
    padding_mode: str = "zeros",
    padding_mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    training: bool = False,
    activation: str | None = None,
) -> Tensor:
    """The definition: the normalised kernel of the head that each channel belongs to."""
    weights = F.dropout(weight.softmax(1) if softmax else weight, weight_dropout, training)
    kernels = of_channels(weights, 0, input.shape[LAYOUTS[layout].channel])
    return definition(
        input, kernels[None, :, :, None], bias, padding=padding, dilation=dilation, layout=layout, padding_mode=padding_mode,
        padding_mask=padding_mask, activation=activation,
    )  # fmt: skip


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, axes: Axes, windows: Grid, mask: Tensor | None, softmax: bool, dropout: float
) -> Tensor:
    """Shift and add in the layout of ``x``, with a number per channel and tap."""
    (heads, kernel), channels = weight.shape, x.shape[axes.channel]
    x = pad_axis(masked(x, mask, axes), axes.time, windows)
    per_head = normalised(weight, 1, softmax, dropout).t()
    per_channel = per_head.unsqueeze(2).expand(kernel, heads, channels // heads).flatten(1)
    if axes.time > axes.channel:
        per_channel, bias = per_channel.unsqueeze(2), None if bias is None else bias.unsqueeze(1)
    return shift_and_add(x, per_channel.unbind(0), bias, axes.time, windows.dilation[0])


def lightweight_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Padding = "same",
    *,
    dilation: int | Sequence[int] = 1,
    softmax: bool = True,
    layout: str = "NCT",
    padding_mode: str = "zeros",
    padding_mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    training: bool = False,
    activation: str | None = None,
) -> Tensor:
    """Convolves each channel along time with the normalised kernel of its head.

        w̃ = softmax(weight, over the taps)
        y[n, c, t] = bias[c] + Σ_i w̃[c // (C/H), i] · input[n, c, t + i·dilation − before]

    Half types are normalised and accumulated in float32 and rounded once.

    Args:
        input: (N, C, T), (N, T, C) or (T, N, C), as ``layout`` says; without the batch (C, T) or (T, C).
        weight: (H, K); C/H consecutive channels share a head.
        bias: (C,).
        padding: Positions added per side: an int, one (before, after) pair as ``((1, 2),)``, "valid", "same", "same_minimal" (the
            same as "same" here) or "causal".
        dilation: Input steps between taps; 1 is dense.
        softmax: Whether the kernel is normalised; without it the operator is linear in ``weight``.
        layout: "NCT", "NTC" or "TNC".
        padding_mode: What lies outside: "zeros", "reflect", "replicate" or "circular".
        padding_mask: (N, T) of bools, (T,) without the batch; the input counts as zero where it is True.
        weight_dropout: Rate at which single weights of the normalised kernel are dropped, and the rest scaled up, in training.
        training: Whether ``weight_dropout`` acts.
        activation: None, "relu", "relu6", "silu", "hardswish", "gelu" or "sigmoid", applied to the result.

    Returns:
        In the layout of the input, T + before + after − dilation·(K − 1) positions long; contiguous.

    Raises:
        TypeError: An operand is not a dense floating tensor, the mask is not bool, or a setting is of the wrong kind.
        ValueError: Shapes, dtypes, devices or settings do not fit together.

    Example:
        >>> lightweight_conv1d(torch.arange(1.0, 6.0).view(1, 1, 5), torch.zeros(1, 3), padding="valid").flatten().tolist()
        [2.0, 3.0, 4.0]

    Source: Wu et al. 2019, arXiv:1901.10430.
    """
    if interceptors and is_intercepted():
        return intercepted(lightweight_conv1d, locals())
    op = "lightweight_conv1d"
    key: Hashable = None
    if padding_mask is None and type(softmax) is bool and type(weight_dropout) is float and weight_dropout == 0.0:
        key = plan_key(op, input, weight, bias, layout, padding, dilation, padding_mode, activation, softmax)
        if (plan := lookup_plan(key)) is not None:
            return plan.run(plan.plan, activation, input, weight, bias)
    x, weight, bias = prepare_operands(op, 1, input, weight=weight, bias=bias)
    axes = axes_of(op, layout, input.dim() == 3)
    check_axes(op, "weight", "(H, K)", weight, 2)
    check_heads(op, "weight", "(H, K)", weight.shape, weight.shape[0], x.shape[axes.channel])
    windows = make_windows(op, x.shape[axes.time], weight.shape[1], padding, dilation, padding_mode)
    y = run(
        op, convolve, input, x, weight, bias, axes, windows, softmax=softmax, padding_mask=padding_mask,
        weight_dropout=weight_dropout, training=training, activation=activation, native=_native,
    )  # fmt: skip
    if key is not None and input.dim() == 3 and ENGINE.unsupported_reason(input, weight, bias, windows) is None:
        cache_plan(key, CallPlan(ENGINE.run, plan_of(axes, windows, softmax)))
    return y


def _native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axes: Axes,
    windows: Grid,
    mask: Tensor | None,
    softmax: bool,
    dropout: float,
    activation: str | None,
) -> Tensor | None:
    """Returns a checked call by the engine, or None where it does not support it."""
    if ENGINE.unsupported_reason(x, weight, bias, windows) is not None:
        return None
    if dropout:  # of H·K numbers, by torch, in the type of the sums: the composite path draws the same
        weight, softmax = normalised(weight.to(accumulated_in(weight)), 1, softmax, dropout), False
    mask = None if mask is None else mask.contiguous()
    return ENGINE.run(plan_of(axes, windows, softmax), activation, x, weight, bias, mask)


ENGINE = LightweightEngine(convolve)


class LightweightConv1d(SequenceLayer):
    """A layer whose kernel is shared per head and normalised; see :func:`omniconv.functional.lightweight_conv1d`.

    The state dict holds ``weight`` (H, K) and, with ``bias=True``, ``bias`` (C,). The weight is filled as in fairseq: Glorot's
    uniform distribution for the shape (H, 1, K); the bias with zeros. :func:`omniconv.convert.from_fairseq` loads fairseq's.

    Example:
        >>> LightweightConv1d(6, 3, heads=3)(torch.ones(1, 6, 5)).shape
        torch.Size([1, 6, 5])
    """

    technique, rank, op = "lightweight", 1, lightweight_conv1d

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int],
        heads: int,
        padding: Padding = "same",
        *,
        bias: bool = False,
        weight_dropout: float = 0.0,
        softmax: bool = True,
        layout: str = "NCT",
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            channels, kernel_size, heads, padding, bias=bias, weight_dropout=weight_dropout, softmax=softmax, layout=layout,
            dilation=dilation, padding_mode=padding_mode, activation=activation, device=device, dtype=dtype,
        )  # fmt: skip
        self.weight = nn.Parameter(torch.empty(heads, *self.kernel_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the weight as fairseq does, the bias with zeros."""
        limit = math.sqrt(6 / (self.weight.shape[1] + self.weight.numel()))
        nn.init.uniform_(self.weight, -limit, limit)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def operands(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        self.axes(input)
        tensors = {"input": input, "weight": self.weight, "bias": self.bias, "padding_mask": padding_mask}
        return tensors | self.settings()

    def chunks_differ(self) -> str | None:
        """Why the bits of an output may depend on the chunk that it comes in; None where they do not."""
        if TECHNIQUE.engine is None:
            return super().chunks_differ()
        windows = Grid((1,), ((0, 0),), self.dilation)
        reason = ENGINE.unsupported_reason(one_position(self.weight, self.channels), self.weight, self.bias, windows)
        return reason or unfused_reason(self.weight, self.activation)

    def stream_step(self, window: Tensor) -> Tensor:
        """The op without pads."""
        return lightweight_conv1d(**self.operands(window) | {"padding": "valid"})


def bound(
    u: float,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Padding = "same",
    *,
    softmax: bool = True,
    activation: str | None = None,
    **settings: Any,
) -> Tensor:
    """The error of the softmax through Σ w̃·x, and γ(K + 1)·Σ|w̃||x|."""
    return kernel_bound(
        reference, u, input, weight, bias, 1, padding=padding, softmax=softmax, activation=activation, **settings
    )  # fmt: skip


def operands(problem: Problem) -> dict[str, Operand]:
    """Input, weight and bias."""
    return {
        "input": Operand((problem.batch, problem.channels, *problem.size)),
        "weight": Operand((heads_of(problem), *problem.kernel)),
        "bias": Operand((problem.channels,)),
    }


def stages(problem: Problem) -> tuple[Stage, ...]:
    """One, depthwise, with a kernel per head; the softmax costs 4 a logit, once for the batch."""
    channels, logits = problem.channels, heads_of(problem) * math.prod(problem.kernel)
    return (grid_stage(problem, channels, channels, channels, weights=logits, batch_flops=4 * logits),)


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem."""
    return LightweightConv1d(problem.channels, problem.kernel, heads_of(problem), bias=True, **arguments(problem))


TECHNIQUE = Technique(
    name="lightweight",
    title="Lightweight",
    summary="a depthwise kernel along a sequence, shared per head and normalised: H·K parameters",
    sampling="grid",
    mixing="one channel",
    weights="shared per head, softmax",
    formula="y[n,c,t] = b[c] + Σ_i softmax(W[c // (C/H)])[i] · x[n,c, t + i·D − P]",
    when="Sequences (translation, speech, summaries) where self-attention is too dear: linear in length, hardly any parameters.",
    traps=(
        "The softmax makes every kernel an average: it cannot sharpen or subtract, that is left to the layers around it.",
        "fairseq has two head orders: c // (C/H) in its T×B×C layer, c % H in its B×C×T layer; only the first is this one.",
        "Published for sequences: the paper has no result on images.",
    ),
    paper="Wu et al. 2019, arXiv:1901.10430",
    ops={1: lightweight_conv1d},
    modules={1: LightweightConv1d},
    reference=reference,
    composite=convolve,
    takes=TAKES,
    operands=operands,
    arguments=arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    peers=LIGHTWEIGHT_PEERS,
    engine=ENGINE,
    linear={"softmax": False},
)
