"""Dilated (atrous) convolution: a standard convolution whose taps stand ``dilation`` input steps apart.

    y[n, o, p] = bias[o] + Σ_c Σ_t weight[o, c, t] · x[n, c, p·S − P + t·D]

Params  C·O·k           as without dilation
MACs    N·Out·C·O·k     as without dilation
Field   D(K − 1) + 1    per axis: 5 for K = 3, D = 2; 9 for D = 4
Paper   Yu & Koltun 2016, arXiv:1511.07122; Holschneider et al. 1990 (algorithme à trous)

``dilated_conv{1,2,3}d`` is ``conv{1,2,3}d`` under the name people look for.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from omniconv.engines.depthwise import ENGINE
from omniconv.geometry import Padding
from omniconv.ops.grid import convolve, torch_convolution
from omniconv.ops.technique import Stage, Technique
from omniconv.problem import Problem
from omniconv.techniques.standard import TECHNIQUE as STANDARD
from omniconv.techniques.standard import ConvLayer, arguments, bound, conv1d, conv2d, conv3d, operands, problem, reference, stages

dilated_conv1d, dilated_conv2d, dilated_conv3d = conv1d, conv2d, conv3d


class DilatedConv(ConvLayer):
    """A ``torch.nn.Conv{n}d`` that dilates and keeps the size by default; see :func:`omniconv.functional.conv{n}d`.

    The state dict is that of ``torch.nn.Conv{n}d``. One 3-wide kernel with dilation 2 covers 5 positions per axis.

    Example:
        >>> DilatedConv{n}d(1, 1, 3, dilation=2)(torch.ones(1, 1, {threes})).shape[2:].numel()
        {taps}
    """

    technique = "dilated"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 2,
        stride: int | Sequence[int] = 1,
        padding: Padding = "same",
        groups: int = 1,
        *,
        bias: bool = True,
        padding_mode: str = "zeros",
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self._build(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            activation,
        )


class DilatedConv1d(DilatedConv, nn.Conv1d):
    rank, op = 1, dilated_conv1d


class DilatedConv2d(DilatedConv, nn.Conv2d):
    rank, op = 2, dilated_conv2d


class DilatedConv3d(DilatedConv, nn.Conv3d):
    rank, op = 3, dilated_conv3d


def names_convolution(stage: Stage) -> bool:
    """Whether it is not transposed, has one group, and taps apart along some axis."""
    apart = any(d > 1 and k > 1 for d, k in zip(stage.dilation, stage.kernel, strict=True))
    return not stage.transposed and stage.groups == 1 and apart


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem."""
    module: type[DilatedConv] = TECHNIQUE.modules[problem.rank]  # type: ignore[assignment]
    return module(problem.channels, problem.out_channels or problem.channels, problem.kernel, **arguments(problem))


def variant(base: Problem) -> Problem:
    """The same layer with taps two steps apart, padded to the same size."""
    return base.replace(dilation=tuple(2 * d for d in base.dilation), padding="same")


TECHNIQUE = Technique(
    name="dilated",
    title="Dilated",
    summary="taps stand apart: a wider view for the same parameters and MACs",
    sampling="grid, step d",
    mixing="all channels",
    weights="free",
    formula="y[n,o,p] = b[o] + Σ_c Σ_t W[o,c,t] · x[n,c, p·S − P + t·D]",
    when="Dense prediction (segmentation, audio) that needs context without losing resolution to strides and pooling.",
    traps=(
        "One 3×3 layer with dilation 2 covers 5×5 and with 4 covers 9×9; 7×7 and 15×15 are the stacks 1,2 and 1,2,4.",
        "Stacks of one dilation leave holes (gridding): three 3×3 layers with d = 2,2,2 touch 49 of 169 positions.",
    ),
    paper="Yu & Koltun 2016, arXiv:1511.07122; Yu, Koltun & Funkhouser 2017, arXiv:1705.09914",
    ops={1: dilated_conv1d, 2: dilated_conv2d, 3: dilated_conv3d},
    modules={1: DilatedConv1d, 2: DilatedConv2d, 3: DilatedConv3d},
    reference=reference,
    composite=convolve,
    takes=STANDARD.takes,
    operands=operands,
    arguments=arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    problem=partial(problem, name="dilated"),
    names_convolution=names_convolution,
    peers=(torch_convolution,),
    engine=ENGINE,
)
