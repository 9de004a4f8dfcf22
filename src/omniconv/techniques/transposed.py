"""Transposed convolution: the adjoint of a strided convolution, an upsampling with learned weights.

    y[n, o, q] = bias[o] + Σ_c Σ_{(p, t): p·S − before + t·D = q} weight[c, o, t] · x[n, c, p]

Params  C·O·k/G
MACs    N·In·C·O·k/G            In = input positions: S² times less than "output size × kernel" in two axes
Size    (In − 1)·S − before − after + D(K − 1) + 1 + output_padding
Paper   Zeiler et al. 2010 (deconvolutional networks); Dumoulin & Visin 2016, arXiv:1603.07285; checkerboards: Odena et al. 2016

It is not an inverse: ⟨conv(x), y⟩ = ⟨x, conv_transpose(y)⟩, with the same weight, is all that it shares with the convolution.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.engines.aten import TRANSPOSED, run_aten, run_aten_checked
from omniconv.geometry import Padding, Spread, normal_padding, per_axis, spread
from omniconv.ops.activation import activate, check_activation
from omniconv.ops.error_bound import activation_error, linear_error
from omniconv.ops.grid import call_problem, check_channels
from omniconv.ops.layer import Layer
from omniconv.ops.operator import (
    check_bias,
    check_flags,
    check_weight,
    fail,
    finalize_output,
    interceptors,
    per_rank,
    prepare_operands,
)
from omniconv.ops.reference import spread_convolution
from omniconv.ops.technique import Arguments, Operand, Peer, Stage, Technique
from omniconv.ops.tracing import call_with_number_sizes, is_traced, with_recorded_sizes
from omniconv.problem import Problem

_CONVOLUTIONS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    output_size: int | Sequence[int] | None = None,
    activation: str | None = None,
) -> Tensor:
    """The definition: every input position adds its taps where they fall."""
    windows = spread("reference", input.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation, output_size)
    return activate(spread_convolution(input, weight, bias, windows, groups), activation)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Spread, groups: int = 1) -> Tensor:
    """torch's transposed convolution; crops that differ between the sides are cut from a larger result."""
    convolution = _CONVOLUTIONS[x.dim() - 2]
    common = tuple(min(before, after) for before, after in windows.crops)
    if all(before == after for before, after in windows.crops):
        return convolution(x, weight, bias, windows.stride, common, windows.output_padding, groups, windows.dilation)
    # what is cut after the end takes from the output padding first
    rest = [after - both - e for both, (_, after), e in zip(common, windows.crops, windows.output_padding, strict=True)]
    extra = tuple(max(-r, 0) for r in rest)
    y = convolution(x, weight, bias, windows.stride, common, extra, groups, windows.dilation)
    for axis, size in enumerate(windows.output_size(x.shape[2:], weight.shape[2:])):
        y = y.narrow(axis + 2, windows.crops[axis][0] - common[axis], size)
    return y


def conv_transpose(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    output_size: int | Sequence[int] | None = None,
    activation: str | None = None,
) -> Tensor:
    """Transposed convolution over {over}: the adjoint of :func:`conv{n}d` of the same geometry.

        y[n, o, p·stride − before + t·dilation] += weight[c, o, t] · input[n, c, p], summed over c, p and t, plus bias[o]

    Arguments mean what they mean in ``torch.nn.functional.conv_transpose{n}d``; what is added is keyword-only, besides the further
    forms of ``padding``. Complex and integer tensors are handed to torch as they are; half types accumulate in float32 and round
    once.

    Args:
        input: (N, C, {axes}) or (C, {axes}).
        weight: (C, O/G, K…).
        bias: (O,).
        stride: Output steps between the windows of neighbouring inputs: one int, or one per axis.
        padding: Output positions cropped per side: an int, one int per axis, one (before, after) pair per axis, "valid" (none),
            "same" (Out = In·stride, the surplus cropped evenly, the odd one after) or, over one axis, "causal" (all of it after).
        output_padding: Positions added after the end, below the stride or the dilation.
        groups: Parts into which the channels are split.
        dilation: Output steps between taps.
        output_size: The spatial size wanted, instead of ``output_padding``.
        activation: None, "relu", "relu6", "silu", "hardswish", "gelu" or "sigmoid", applied to the result.

    Returns:
        (N, O, Out…) with Out = (In − 1)·stride − before − after + dilation·(K − 1) + 1 + output_padding; channels-last exactly
        where the input is and is not also contiguous.

    Raises:
        TypeError: An operand is not a dense tensor, or a setting is not made of integers.
        ValueError: Shapes, dtypes, devices or settings do not fit together.

    Example:
        >>> conv_transpose{n}d(torch.ones(1, 1, {ones}), torch.ones(1, 1, {twos}), stride=2).sum().item()
        {doubled}.0

    Source: Zeiler et al. 2010; Dumoulin & Visin 2016, arXiv:1603.07285.
    """
    op = _NAMES[rank]
    if activation is None and output_size is None:
        y = run_aten(TRANSPOSED[rank], rank, input, weight, bias, stride, padding, output_padding, groups, dilation)
        if y is not None:
            return y
    if is_traced():
        return call_with_number_sizes(conv_transpose, locals())
    x, weight, bias = prepare_operands(op, rank, input, any_dtype=True, weight=weight, bias=bias)
    check_weight(op, x, weight, groups, in_axis=0)
    check_bias(op, bias, weight.shape[1] * groups)
    check_activation(op, activation)
    if activation is not None and not x.is_floating_point():
        fail(op, f"activation must be None for an input of {x.dtype}", repr(activation))
    windows = spread(op, x.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation, output_size)
    return finalize_output(input, rank, with_recorded_sizes(convolve), (x, weight, bias), windows, groups, activation=activation)


_NAMES = {rank: f"conv_transpose{rank}d" for rank in (1, 2, 3)}
conv_transpose1d, conv_transpose2d, conv_transpose3d = per_rank(conv_transpose)


class ConvTranspose(Layer, nn.modules.conv._ConvTransposeNd):
    """``torch.nn.ConvTranspose{n}d`` with further paddings, half types and activations; see
    :func:`omniconv.functional.conv_transpose{n}d`.

    Constructor and state dict are torch.nn's, so weights load both ways; it is an instance of ``torch.nn.ConvTranspose{n}d``.

    Example:
        >>> ConvTranspose{n}d(2, 1, 4, stride=2, padding="same")(torch.ones(1, 2, {ones})).shape[2:].numel()
        {doubled}
    """

    technique = "transposed"
    padding: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        name = type(self).__name__
        kernel = per_axis(name, "kernel_size", kernel_size, self.rank)
        strides = per_axis(name, "stride", stride, self.rank)
        dilations = per_axis(name, "dilation", dilation, self.rank)
        extra = per_axis(name, "output_padding", output_padding, self.rank, minimum=0)
        normal = normal_padding(name, padding, self.rank)
        if padding_mode != "zeros":
            fail(name, "padding_mode must be 'zeros' for a transposed convolution", repr(padding_mode))
        check_channels(name, groups=groups, in_channels=in_channels, out_channels=out_channels)
        check_flags(name, bias=bias)
        check_activation(name, activation)
        spread(name, (2,) * self.rank, kernel, strides, "valid", extra, dilations)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            strides,
            0,
            extra,
            groups,
            bias,
            dilations,
            "zeros",
            device,
            dtype,
        )
        self.padding = normal if isinstance(normal, str) or any(b != a for b, a in normal) else tuple(b for b, _ in normal)
        self.activation = activation

    def operands(self, input: Tensor, output_size: Sequence[int] | None = None) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        sized: dict[str, Any] = {}
        if output_size is not None:
            whole = isinstance(output_size, (tuple, list, torch.Size)) and len(output_size) == input.dim()
            sized["output_size"] = output_size[-self.rank :] if whole else output_size
        return {
            "input": input,
            "weight": self.weight,
            "bias": self.bias,
            "stride": self.stride,
            "padding": self.padding,
            "output_padding": 0 if sized else self.output_padding,
            "groups": self.groups,
            "dilation": self.dilation,
            "activation": self.activation,
        } | sized

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The op on the input; ``output_size``, spatial or whole as in torch, takes the place of the output padding."""
        if output_size is None and self.activation is None and type(self.padding) is tuple and not interceptors:
            settings = self.stride, self.padding, self.output_padding, self.groups, self.dilation
            y = run_aten_checked(TRANSPOSED[self.rank], self.rank, input, self.weight, self.bias, *settings)
            if y is not None:
                return y
        return type(self).op(**self.operands(input, output_size))

    def extra_repr(self) -> str:
        """torch.nn's line, and the activation."""
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class ConvTranspose1d(ConvTranspose, nn.ConvTranspose1d):
    rank, op = 1, conv_transpose1d


class ConvTranspose2d(ConvTranspose, nn.ConvTranspose2d):
    rank, op = 2, conv_transpose2d


class ConvTranspose3d(ConvTranspose, nn.ConvTranspose3d):
    rank, op = 3, conv_transpose3d


def bound(
    u: float,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    activation: str | None = None,
    **windows: Any,
) -> Tensor:
    """γ(C/G·k + 1)·Σ|w||x|, through the activation."""

    def convolution(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return reference(x, w, b, groups=groups, **windows)

    terms = weight[:, 0].numel() // groups + 1
    error = linear_error(convolution, u, terms, input, 0.0, weight, bias)
    return activation_error(convolution(input, weight, bias), error, activation, u)


def operands(problem: Problem) -> dict[str, Operand]:
    """Input, weight (C, O/G, K…) and bias."""
    out_channels = problem.out_channels or problem.channels
    return {
        "input": Operand((problem.batch, problem.channels, *problem.size)),
        "weight": Operand((problem.channels, out_channels // problem.groups, *problem.kernel)),
        "bias": Operand((out_channels,)),
    }


def arguments(problem: Problem) -> dict[str, Any]:
    """The op's keyword arguments."""
    return {
        "stride": problem.stride,
        "padding": problem.padding,
        "output_padding": problem.output_padding,
        "groups": problem.groups,
        "dilation": problem.dilation,
    }


def stages(problem: Problem) -> tuple[Stage, ...]:
    """One."""
    out_channels = problem.out_channels or problem.channels
    windows = spread(
        problem.technique, problem.size, problem.kernel, problem.stride, problem.padding, problem.output_padding, problem.dilation
    )
    return (
        Stage(
            name="main",
            in_channels=problem.channels,
            out_channels=out_channels,
            size=problem.size,
            out=windows.output_size(problem.size, problem.kernel),
            kernel=problem.kernel,
            stride=windows.stride,
            pads=windows.crops,
            dilation=windows.dilation,
            groups=problem.groups,
            transposed=True,
            biases=out_channels,
        ),
    )


def problem(rank: int, arguments: Arguments) -> Problem:
    """Returns the Problem of a call; a size that it asks for becomes the output padding that makes it."""
    weight, groups = arguments["weight"], arguments.get("groups", 1)
    made = call_problem("transposed", rank, arguments, weight.shape[1] * groups, kernel=tuple(weight.shape[2:]), groups=groups)
    windows = spread(
        made.technique, made.size, made.kernel, made.stride, made.padding, arguments.get("output_padding", 0), made.dilation,
        arguments.get("output_size"),
    )  # fmt: skip
    if isinstance(made.padding, str) and made.padding != "valid":
        return made
    return made.replace(output_padding=windows.output_padding)


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem."""
    module: type[ConvTranspose] = TECHNIQUE.modules[problem.rank]  # type: ignore[assignment]
    return module(problem.channels, problem.out_channels or problem.channels, problem.kernel, **arguments(problem))


def variant(base: Problem) -> Problem:
    """Upsampling by 2 of the map of half the size, with an even kernel, so that all outputs get equally many taps."""
    kernel = tuple(k + k % 2 for k in base.kernel)
    return base.replace(
        size=tuple(max(i // 2, 1) for i in base.size),
        kernel=kernel,
        stride=(2,) * base.rank,
        padding=tuple(((k - 2) // 2,) * 2 for k in kernel),
        dilation=(1,) * base.rank,
    )


def _plain_torch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    activation: str | None = None,
    output_size: int | Sequence[int] | None = None,
    **windows: Any,
) -> Tensor:
    normalized = spread("torch", input.shape[2:], weight.shape[2:], output_size=output_size, **windows)
    return activate(convolve(input, weight, bias, normalized, groups), activation)


TECHNIQUE = Technique(
    name="transposed",
    title="Transposed",
    summary="the adjoint of a strided convolution: learned upsampling",
    sampling="fractional stride",
    mixing="all channels or groups",
    weights="free",
    formula="y[n,o, p·S − P + t·D] += W[c,o,t] · x[n,c,p], summed over c, p, t; plus b[o]",
    when="Decoders that learn to upsample: U-Net, DCGAN, HiFi-GAN; wherever the exact adjoint of a convolution is wanted.",
    traps=(
        "Checkerboards: all outputs get equally many taps only where the stride divides the kernel "
        "(and gcd(dilation, stride) = 1): k4 s2, not k3 s2.",
        "It costs In·C·O·k MACs, not Out·C·O·k: counters that multiply by the output size are stride² too high.",
        "The output is stride times the input only if D(K − 1) + 1 − 2P + output_padding = stride; padding='same' sees to it.",
        "Not the inverse of a convolution, though called deconvolution.",
    ),
    paper="Zeiler et al. 2010; Dumoulin & Visin 2016, arXiv:1603.07285; Odena et al. 2016 (checkerboards)",
    ops={1: conv_transpose1d, 2: conv_transpose2d, 3: conv_transpose3d},
    modules={1: ConvTranspose1d, 2: ConvTranspose2d, 3: ConvTranspose3d},
    reference=reference,
    composite=convolve,
    takes=frozenset({"kernel", "stride", "padding", "output_padding", "dilation", "out_channels", "groups"}),
    operands=operands,
    arguments=arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    problem=problem,
    names_convolution=lambda stage: stage.transposed,
    peers=(Peer("torch", _plain_torch),),
)
