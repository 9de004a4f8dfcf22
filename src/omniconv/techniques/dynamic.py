"""Dynamic convolution: a lightweight convolution whose kernels are made from the input, one per head and position.

    w[n, h, :, t] = softmax((projection · x[n, :, t] + b)[h], over the taps)
    y[n, c, t]    = bias[c] + Σ_i w[n, c // (C/H), i, t] · x[n, c, t + i·D − before]

Params  C·H·K (+ H·K)                   H = heads, K = taps
MACs    N·(T·C·H·K + T·C·K)             with one kernel per sample, of the mean over time: N·(C·H·K + T·C·K)
Paper   Wu et al. 2019, arXiv:1901.10430
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.engines.dense import ENGINE as POINTWISE
from omniconv.engines.engine import CallPlan, cache_plan, lookup_plan, plan_key, unfused_reason
from omniconv.engines.sequence import DynamicEngine, plan_of
from omniconv.geometry import Grid, Padding, pads_of
from omniconv.ops.grid import grid_stage
from omniconv.ops.layer import Causal, Layer, one_position
from omniconv.ops.operator import accumulated_in, fail, intercepted, interceptors, is_intercepted, prepare_operands
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
    received_mask,
    run,
    shift_and_add,
    variant,
)
from omniconv.ops.sequence_peers import DYNAMIC_PEERS
from omniconv.ops.technique import Operand, Stage, Technique
from omniconv.problem import Problem
from omniconv.techniques.pointwise import pointwise_conv1d

CONTEXTS = ("position", "mean")


def reference(
    input: Tensor,
    kernels: Tensor,
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
    """The definition: the normalised kernels of the head that each channel belongs to, position by position."""
    weights = F.dropout(kernels.softmax(2) if softmax else kernels, weight_dropout, training)
    return definition(
        input, of_channels(weights, 1, input.shape[LAYOUTS[layout].channel]), bias, padding=padding, dilation=dilation,
        layout=layout, padding_mode=padding_mode, padding_mask=padding_mask, activation=activation,
    )  # fmt: skip


def convolve(
    x: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, windows: Grid, mask: Tensor | None, softmax: bool, dropout: float
) -> Tensor:
    """Shift and add in the layout of ``x``, its channels split by head."""
    heads, channels = kernels.shape[1], x.shape[axes.channel]
    split = (heads, channels // heads)
    x = pad_axis(masked(x, mask, axes), axes.time, windows).unflatten(axes.channel, split)
    last = axes.time > axes.channel
    # (N, H, T) of one tap in the layout, with an axis of size 1 for the channels of a head
    taps = [axes.of(w).unsqueeze(axes.channel + 1) for w in normalised(kernels, 2, softmax, dropout).unbind(2)]
    if bias is not None:
        bias = bias.unflatten(0, split).unsqueeze(2) if last else bias.unflatten(0, split)
    y = shift_and_add(x, taps, bias, axes.time + last, windows.dilation[0])
    # merging all that follows the batch, not two axes of it, asks nothing of a symbolic length in export
    y = y.flatten(axes.channel)
    return y.unflatten(1, (channels, -1)) if last else y


def dynamic_conv1d(
    input: Tensor,
    kernels: Tensor,
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
    """Convolves each channel along time with the normalised kernel of its head at each position.

        w = softmax(kernels, over the taps)
        y[n, c, t] = bias[c] + Σ_i w[n, c // (C/H), i, t] · input[n, c, t + i·dilation − before]

    Half types are normalised and accumulated in float32 and rounded once.

    Args:
        input: (N, C, T), (N, T, C) or (T, N, C), as ``layout`` says; without the batch (C, T) or (T, C).
        kernels: (N, H, K, Out) in every layout, Out the length of the result, or (N, H, K, 1): one kernel for the whole sequence;
            without the batch (H, K, Out) or (H, K, 1). C/H consecutive channels share a head.
        bias: (C,).
        padding: Positions added per side: an int, one (before, after) pair as ``((1, 2),)``, "valid", "same", "same_minimal" (the
            same as "same" here) or "causal".
        dilation: Input steps between taps; 1 is dense.
        softmax: Whether the kernels are normalised; without it the operator is linear in ``kernels``.
        layout: "NCT", "NTC" or "TNC".
        padding_mode: What lies outside: "zeros", "reflect", "replicate" or "circular".
        padding_mask: (N, T) of bools, (T,) without the batch; the input counts as zero where it is True.
        weight_dropout: Rate at which single weights of the normalised kernels are dropped, and the rest scaled up, in training.
        training: Whether ``weight_dropout`` acts.
        activation: None, "relu", "relu6", "silu", "hardswish", "gelu" or "sigmoid", applied to the result.

    Returns:
        In the layout of the input, Out = T + before + after − dilation·(K − 1) positions long; contiguous.

    Raises:
        TypeError: An operand is not a dense floating tensor, the mask is not bool, or a setting is of the wrong kind.
        ValueError: Shapes, dtypes, devices or settings do not fit together.

    Example:
        >>> kernels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 2)  # the first position looks back, the second does not
        >>> dynamic_conv1d(torch.tensor([[[3.0, 5.0]]]), kernels, padding="causal", softmax=False).tolist()
        [[[0.0, 5.0]]]

    Source: Wu et al. 2019, arXiv:1901.10430.
    """
    if interceptors and is_intercepted():
        return intercepted(dynamic_conv1d, locals())
    op = "dynamic_conv1d"
    key = None
    if padding_mask is None and type(weight_dropout) is float and not (training and weight_dropout):
        more = (layout, softmax is True, weight_dropout)
        key = plan_key(op, input, kernels, bias, 1, padding, dilation, padding_mode, activation, more)
        if (plan := lookup_plan(key)) is not None:
            return plan.run(plan.plan, activation, input, kernels, bias)
    x, kernels, bias = prepare_operands(op, 1, input, kernels=kernels, bias=bias)
    batched = input.dim() == 3
    axes = axes_of(op, layout, batched)
    check_axes(op, "kernels", "(N, H, K, Out)" if batched else "(H, K, Out)", kernels, input.dim() + 1)
    kernels = kernels if batched else kernels.unsqueeze(0)
    check_heads(op, "kernels", "(N, H, K, Out)", kernels.shape, kernels.shape[1], x.shape[axes.channel])
    windows = make_windows(op, x.shape[axes.time], kernels.shape[2], padding, dilation, padding_mode)
    (outputs,) = windows.output_size((x.shape[axes.time],), (kernels.shape[2],))
    if kernels.shape[0] != x.shape[axes.batch]:
        fail(op, f"kernels must have the input's {x.shape[axes.batch]} samples in axis 0", f"shape {tuple(kernels.shape)}")
    if kernels.shape[3] != 1 and kernels.shape[3] != outputs:
        fail(
            op, f"kernels must have {outputs} positions, as the result has, or 1, in the last axis", f"shape {tuple(kernels.shape)}"
        )
    y = run(
        op, convolve, input, x, kernels, bias, axes, windows, softmax=softmax, padding_mask=padding_mask,
        weight_dropout=weight_dropout, training=training, activation=activation, native=_native,
    )  # fmt: skip
    if key is not None and batched and ENGINE.unsupported_reason(x, kernels, bias, windows) is None:
        cache_plan(key, CallPlan(ENGINE.run, plan_of(axes, windows, softmax)))
    return y


def _native(
    x: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    axes: Axes,
    windows: Grid,
    mask: Tensor | None,
    softmax: bool,
    dropout: float,
    activation: str | None,
) -> Tensor | None:
    """Returns a checked call by the engine, or None where it does not support it."""
    if ENGINE.unsupported_reason(x, kernels, bias, windows) is not None:
        return None
    dropped = round(dropout * 2**32)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) if dropped else None
    mask = None if mask is None else mask.contiguous()
    return ENGINE.run(plan_of(axes, windows, softmax, dropped), activation, x, kernels, bias, mask, seed)


ENGINE = DynamicEngine(convolve)


class Projection(Layer, nn.Linear):
    """The linear map from C channels to H·K logits, applied at every position of (N, C, T) or (C, T): a pointwise convolution.

    Parameters, their names and their filling are ``torch.nn.Linear``'s.

    Example:
        >>> Projection(4, 6)(torch.ones(2, 4, 5)).shape
        torch.Size([2, 6, 5])
    """

    technique, rank, op = "pointwise", 1, pointwise_conv1d
    activation = None

    def operands(self, input: Tensor) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        return {"input": input, "weight": self.weight.unsqueeze(2), "bias": self.bias}


class DynamicConv1d(SequenceLayer):
    """A layer that makes its kernels from its input; see :func:`omniconv.functional.dynamic_conv1d`.

    With ``context="position"`` the input at position t makes the kernel of output t, so the result must be as long as the input:
    pads of dilation·(K − 1) in all, as "same" and "causal" have. With ``context="mean"`` the mean over time, of the positions
    that ``padding_mask`` leaves, makes one kernel per sample, for any padding. Masked positions count as zeros before
    everything else. ``projection_bias`` is the bias of the projection, ``bias`` that of the result.

    The state dict holds ``projection.weight`` (H·K, C), ``projection.bias`` (H·K,) and, with ``bias=True``, ``bias`` (C,). The
    projection is filled as ``torch.nn.Linear`` is. :func:`omniconv.convert.from_fairseq` loads fairseq's.

    Example:
        >>> DynamicConv1d(6, 3, heads=3, padding="causal")(torch.ones(1, 6, 5)).shape
        torch.Size([1, 6, 5])
    """

    technique, rank, op = "dynamic", 1, dynamic_conv1d

    def __init__(
        self,
        channels: int,
        kernel_size: int | Sequence[int],
        heads: int,
        padding: Padding = "same",
        *,
        context: str = "position",
        bias: bool = False,
        projection_bias: bool = True,
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
        name = type(self).__name__
        if not isinstance(context, str) or context not in CONTEXTS:
            fail(name, f"context must be one of {', '.join(CONTEXTS)}", repr(context))
        reach = self.dilation[0] * (self.kernel_size[0] - 1)
        if context == "position" and self.padding != "same_minimal":
            ((before, after),) = pads_of(self.padding, (), self.kernel_size, (1,), self.dilation)
            if before + after != reach:
                fail(name, f"context 'position' needs pads of dilation·(kernel_size − 1) = {reach} in all", repr(padding))
        self.context = context
        logits = heads * self.kernel_size[0]
        self.projection = Projection(channels, logits, bias=projection_bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the projection as torch.nn.Linear, the bias with zeros."""
        self.projection.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def operands(self, input: Tensor, padding_mask: Tensor | None = None) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op; the input is masked already, since it makes the kernels."""
        axes, batched = self.axes(input), input.dim() == 3
        x = input if batched else input.unsqueeze(0)
        mask = received_mask(type(self).__name__, padding_mask, x, axes, batched)
        x = masked(x, mask, axes)
        seen = axes.channel_first(x)
        if self.context == "mean":
            seen = _mean(seen, mask)
        kernels = self.projection(seen).unflatten(1, (self.heads, *self.kernel_size))
        if not batched:
            x, kernels = x.squeeze(0), kernels.squeeze(0)
        return {"input": x, "kernels": kernels, "bias": self.bias} | self.settings()

    def stream_reads(self) -> Causal:
        """How the layer reads a sequence that comes in chunks: the position at hand makes the kernel."""
        if self.context != "position":
            raise ValueError(f"context must be 'position', got {self.context!r}, which is over the whole sequence")
        return super().stream_reads()

    def chunks_differ(self) -> str | None:
        """Why the bits of an output may depend on the chunk that it comes in; None where they do not."""
        weight = self.projection.weight
        x, kernels = one_position(weight, self.channels), weight.new_empty(1).expand(1, self.heads, *self.kernel_size, 1)
        windows = Grid((1,), ((0, 0),), self.dilation)
        reason = POINTWISE.unsupported_reason(x, weight, None) or ENGINE.unsupported_reason(x, kernels, self.bias, windows)
        return reason or unfused_reason(weight, self.activation)

    def stream_step(self, window: Tensor) -> Tensor:
        """The op without pads; the kernels are made of the positions behind the past."""
        axes = self.axes(window)
        past = self.dilation[0] * (self.kernel_size[0] - 1)
        seen = axes.channel_first(window.narrow(axes.time, past, window.shape[axes.time] - past))
        kernels = self.projection(seen).unflatten(1, (self.heads, *self.kernel_size))
        return dynamic_conv1d(**{"input": window, "kernels": kernels, "bias": self.bias} | self.settings() | {"padding": "valid"})

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{super().extra_repr()}, context={self.context!r}"


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over time of (N, C, T) as (N, C, 1), zeros where all is masked: summed and rounded as the operators do."""
    total = x.sum(2, keepdim=True, dtype=accumulated_in(x))
    count = x.shape[2] if mask is None else mask.logical_not().sum(1).clamp(min=1)[:, None, None]
    return (total / count).to(x.dtype)


def bound(
    u: float,
    input: Tensor,
    kernels: Tensor,
    bias: Tensor | None = None,
    padding: Padding = "same",
    *,
    softmax: bool = True,
    activation: str | None = None,
    **settings: Any,
) -> Tensor:
    """The error of the softmax through Σ w̃·x, and γ(K + 1)·Σ|w̃||x|."""
    return kernel_bound(
        reference, u, input, kernels, bias, 2, padding=padding, softmax=softmax, activation=activation, **settings
    )  # fmt: skip


def operands(problem: Problem) -> dict[str, Operand]:
    """Input, a kernel for every position, and bias."""
    application = stages(problem)[-1]
    return {
        "input": Operand((problem.batch, problem.channels, *problem.size)),
        "kernels": Operand((problem.batch, heads_of(problem), *problem.kernel, *application.out)),
        "bias": Operand((problem.channels,)),
    }


def _context(problem: Problem) -> str:
    """Of a layer: "position", or "mean" where the result is not as long as the input."""
    windows = make_windows(problem.technique, problem.size[0], problem.kernel[0], problem.padding, problem.dilation, "zeros")
    return "position" if windows.output_size(problem.size, problem.kernel) == problem.size else "mean"


def stages(problem: Problem, context: str | None = None) -> tuple[Stage, ...]:
    """The projection, beside the path, then the application; ``context`` as the layer's.

    The softmax costs 4 a logit, the mean an addition per input.
    """
    context = context or _context(problem)
    if context not in CONTEXTS:
        fail("dynamic", f"context must be one of {', '.join(CONTEXTS)}", repr(context))
    channels, logits = problem.channels, heads_of(problem) * math.prod(problem.kernel)
    places = problem.size if context == "position" else (1,)
    projection = grid_stage(
        problem, channels, logits, 1, "projection", size=places, kernel=(1,), stride=(1,), padding=0, dilation=(1,),
        side=True, flops=0 if context == "position" else channels * problem.size[0],
    )  # fmt: skip
    flops = 4 * logits * places[0]
    return projection, grid_stage(problem, channels, channels, channels, "application", weights=0, flops=flops)


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem."""
    return DynamicConv1d(
        problem.channels, problem.kernel, heads_of(problem), context=_context(problem), bias=True, **arguments(problem)
    )


TECHNIQUE = Technique(
    name="dynamic",
    title="Dynamic",
    summary="a lightweight kernel that the input itself makes, anew at every position",
    sampling="grid",
    mixing="one channel",
    weights="shared per head, softmax, generated per position",
    formula="y[n,c,t] = b[c] + Σ_i softmax((P·x[n,:,t] + q)[c // (C/H)])[i] · x[n,c, t + i·D − before]",
    when="Sequences where one fixed kernel is too rigid: weights that follow the content, as in attention, at linear cost.",
    traps=(
        "The projection is the dear part: C·H·K parameters, C times those of lightweight, and T·C·H·K MACs.",
        "The kernel sees its own position alone (or the mean): unlike attention it does not compare positions with each other.",
        "Kernels of another channel than the head's multiply silently where shapes happen to broadcast: index them by head.",
    ),
    paper="Wu et al. 2019, arXiv:1901.10430",
    ops={1: dynamic_conv1d},
    modules={1: DynamicConv1d},
    reference=reference,
    composite=convolve,
    takes=TAKES,
    operands=operands,
    arguments=arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    peers=DYNAMIC_PEERS,
    linear={"softmax": False},
    engine=ENGINE,
)
