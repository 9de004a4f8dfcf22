"""Standard convolution: every output channel looks at every input channel through a window of its own weights.

    y[n, o, p] = bias[o] + Σ_c Σ_t weight[o, c, t] · x[n, c, p·S − P + t·D]

Params  C·O·k           k = ∏K taps
MACs    N·Out·C·O·k     Out = output positions
Paper   LeCun et al. 1989, "Backpropagation applied to handwritten zip code recognition"; arithmetic of the windows:
        Dumoulin & Visin 2016, arXiv:1603.07285

The functions here serve the dilated and grouped techniques too, which are settings of them.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from omniconv.engines.depthwise import ENGINE, cache_depthwise, finalize_depthwise
from omniconv.engines.engine import CallPlan, cache_plan, lookup_plan, plan_key
from omniconv.geometry import Padding, grid
from omniconv.ops.activation import activate, check_activation
from omniconv.ops.error_bound import activation_error, linear_error
from omniconv.ops.grid import (
    TAKES,
    GridLayer,
    convolve,
    convolve_again,
    grid_operands,
    grid_stage,
    make_windows,
    settings_of,
    torch_convolution,
    window_arguments,
)
from omniconv.ops.operator import check_bias, check_weight, fail, finalize_output, per_rank, prepare_operands
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
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Tensor:
    """The definition, tap by tap."""
    windows = grid("reference", input.shape[2:], weight.shape[2:], stride, padding, dilation, padding_mode)
    return activate(grid_convolution(input, weight, bias, windows, groups), activation)


def conv(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
) -> Tensor:
    """Convolution over {over}: standard, dilated (``dilation > 1``) and grouped (``groups > 1``).

        y[n, o, p] = bias[o] + Σ_{c ∈ group(o)} Σ_t weight[o, c, t] · input[n, c, p·stride − before + t·dilation]

    Arguments mean what they mean in ``torch.nn.functional.conv{n}d``; what is added is keyword-only, besides the further forms of
    ``padding``. Complex and integer tensors are handed to torch as they are; half types accumulate in float32 and round once.

    Args:
        input: (N, C, {axes}) or (C, {axes}).
        weight: (O, C/G, K…).
        bias: (O,).
        stride: Input steps between windows: one int, or one per axis.
        padding: Positions added per side: an int, one int per axis, one (before, after) pair per axis, "valid", "same",
            "same_minimal" (TensorFlow's SAME) or, over one axis, "causal".
        dilation: Input steps between taps; 1 is dense.
        groups: Parts into which the channels are split; part g of the output sees only part g of the input.
        padding_mode: What lies outside: "zeros", "reflect", "replicate" or "circular".
        activation: None, "relu", "relu6", "silu", "hardswish", "gelu" or "sigmoid", applied to the result.

    Returns:
        (N, O, Out…) with Out = ⌊(In + before + after − dilation·(K − 1) − 1) / stride⌋ + 1; channels-last exactly where the
        input is and is not also contiguous.

    Raises:
        TypeError: An operand is not a dense tensor, or a setting is not made of integers.
        ValueError: Shapes, dtypes, devices or settings do not fit together.

    Example:
        >>> conv{n}d(torch.ones(1, 2, {threes}), torch.ones(1, 2, {threes})).flatten().tolist()
        [{twice}.0]

    Source: Dumoulin & Visin 2016, arXiv:1603.07285.
    """
    op, key = _NAMES[rank], None
    if type(groups) is int:
        key = plan_key(op, input, weight, bias, stride, padding, dilation, padding_mode, activation, groups)
        if (plan := lookup_plan(key)) is not None:
            return plan.run(plan.plan, activation, input, weight, bias)
    x, weight, bias = prepare_operands(op, rank, input, any_dtype=True, weight=weight, bias=bias)
    check_weight(op, x, weight, groups)
    check_bias(op, bias, weight.shape[0])
    check_activation(op, activation)
    if activation is not None and not x.is_floating_point():
        fail(op, f"activation must be None for an input of {x.dtype}", repr(activation))
    windows = make_windows(op, x.shape[2:], weight.shape[2:], stride, padding, dilation, padding_mode)
    if groups == x.shape[1] > 1 and x.is_floating_point():
        cache_depthwise(key, input, weight, bias, windows)
        return finalize_depthwise(input, rank, x, weight, bias, windows, activation)
    if key is not None and input.dim() == rank + 2 and (asked := settings_of(x, windows, groups)) is not None:
        cache_plan(key, CallPlan(convolve_again, asked))
    return finalize_output(input, rank, convolve, (x, weight, bias), windows, groups, activation=activation)


_NAMES = {rank: f"conv{rank}d" for rank in (1, 2, 3)}
conv1d, conv2d, conv3d = per_rank(conv)


class Conv(GridLayer):
    """``torch.nn.Conv{n}d`` with further paddings, half types and activations; see :func:`omniconv.functional.conv{n}d`.

    Constructor and state dict are torch.nn's, so weights load both ways; it is an instance of ``torch.nn.Conv{n}d``.

    Example:
        >>> Conv{n}d(2, 4, 3, padding="same_minimal", stride=2)(torch.ones(1, 2, {threes})).shape[2:].numel()
        {doubled}
    """

    technique = "standard"

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
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        self._build(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype, activation
        )  # fmt: skip

    def operands(self, input: Tensor) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        return super().operands(input) | {"groups": self.groups}


class Conv1d(Conv, nn.Conv1d):
    rank, op = 1, conv1d


class Conv2d(Conv, nn.Conv2d):
    rank, op = 2, conv2d


class Conv3d(Conv, nn.Conv3d):
    rank, op = 3, conv3d


def bound(
    u: float,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    **windows: Any,
) -> Tensor:
    """γ(C/G·k + 1)·Σ|w||x|, through the activation. Serves every technique that is a setting of this op."""
    terms = weight[0].numel() + 1

    def convolution(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return reference(x, w, b, **windows)

    error = linear_error(convolution, u, terms, input, 0.0, weight, bias)
    return activation_error(convolution(input, weight, bias), error, activation, u)


def operands(problem: Problem) -> dict[str, Operand]:
    """Input, weight and bias."""
    return grid_operands(problem, problem.out_channels or problem.channels, problem.groups)


def arguments(problem: Problem) -> dict[str, Any]:
    """The op's keyword arguments."""
    return window_arguments(problem) | {"groups": problem.groups}


def stages(problem: Problem) -> tuple[Stage, ...]:
    """One."""
    return (grid_stage(problem, problem.channels, problem.out_channels or problem.channels, problem.groups),)


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem."""
    out_channels = problem.out_channels or problem.channels
    module: type[Conv] = TECHNIQUE.modules[problem.rank]  # type: ignore[assignment]
    return module(problem.channels, out_channels, problem.kernel, **arguments(problem))


TECHNIQUE = Technique(
    name="standard",
    title="Standard",
    summary="every output channel sees every input channel through its own window",
    sampling="dense grid",
    mixing="all channels",
    weights="free",
    formula="y[n,o,p] = b[o] + Σ_c Σ_t W[o,c,t] · x[n,c, p·S − P + t·D]",
    when="The default: mixes space and channels at once, and CPU libraries run it near the peak of the machine.",
    traps=(
        "Parameters and MACs grow with C·O·k: at 256 channels one 3×3 layer holds 590 thousand weights.",
        "torch's 'same' depends on the kernel alone; TensorFlow's also on the input size: ported weights need 'same_minimal'.",
        "On CPUs without AVX-512 torch runs bfloat16 and float16 on its slowest path, tens of times behind float32. Not here.",
    ),
    paper="LeCun et al. 1989; arithmetic of the windows: Dumoulin & Visin 2016, arXiv:1603.07285",
    ops={1: conv1d, 2: conv2d, 3: conv3d},
    modules={1: Conv1d, 2: Conv2d, 3: Conv3d},
    reference=reference,
    composite=convolve,
    takes=TAKES | {"out_channels", "groups"},
    operands=operands,
    arguments=arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=lambda base: base,
    peers=(torch_convolution,),
    engine=ENGINE,
)
