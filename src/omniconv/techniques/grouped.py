"""Grouped convolution: the channels are split into G parts that never meet.

    y[n, o, p] = bias[o] + Σ_{c ∈ group(o)} Σ_t weight[o, c, t] · x[n, c, p·S − P + t·D]

Params  C·O·k/G
MACs    N·Out·C·O·k/G
Paper   Krizhevsky et al. 2012 (AlexNet); Xie et al. 2017, arXiv:1611.05431 (ResNeXt); Zhang et al. 2018, arXiv:1707.01083 (shuffle)

``grouped_conv{1,2,3}d`` is ``conv{1,2,3}d`` under the name people look for.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from omniconv.engines.depthwise import ENGINE
from omniconv.geometry import Padding
from omniconv.ops.grid import convolve, torch_convolution
from omniconv.ops.operator import check_flags
from omniconv.ops.technique import Technique
from omniconv.problem import Problem
from omniconv.techniques.standard import TECHNIQUE as STANDARD
from omniconv.techniques.standard import ConvLayer, arguments, bound, conv1d, conv2d, conv3d, operands, problem, reference, stages

grouped_conv1d, grouped_conv2d, grouped_conv3d = conv1d, conv2d, conv3d


class GroupedConv(ConvLayer):
    """A ``torch.nn.Conv{n}d`` with groups, and a channel shuffle after it if asked; see :func:`omniconv.functional.conv{n}d`.

    The state dict is that of ``torch.nn.Conv{n}d``. ``shuffle`` deals the output channels round the groups (output g·O/G + i goes
    to i·G + g), so that the next grouped layer sees every group.

    Example:
        >>> GroupedConv{n}d(4, 4, 3, groups=2, shuffle=True)(torch.ones(1, 4, {threes})).shape[1]
        4
    """

    technique = "grouped"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        groups: int,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        *,
        shuffle: bool = False,
        bias: bool = True,
        padding_mode: str = "zeros",
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_flags(type(self).__name__, shuffle=shuffle)
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
        self.shuffle = shuffle

    def forward(self, input: Tensor) -> Tensor:
        """The op on the input, then the shuffle."""
        y = super().forward(input)
        if not self.shuffle:
            return y
        axis = y.dim() - self.rank - 1
        return y.reshape(*y.shape[:axis], self.groups, -1, *y.shape[axis + 1 :]).transpose(axis, axis + 1).flatten(axis, axis + 1)

    def extra_repr(self) -> str:
        """torch.nn's line, and the shuffle."""
        return super().extra_repr() + (", shuffle=True" if self.shuffle else "")


class GroupedConv1d(GroupedConv, nn.Conv1d):
    rank, op = 1, grouped_conv1d


class GroupedConv2d(GroupedConv, nn.Conv2d):
    rank, op = 2, grouped_conv2d


class GroupedConv3d(GroupedConv, nn.Conv3d):
    rank, op = 3, grouped_conv3d


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem."""
    module: type[GroupedConv] = TECHNIQUE.modules[problem.rank]  # type: ignore[assignment]
    return module(problem.channels, problem.out_channels or problem.channels, problem.kernel, **arguments(problem))


def variant(base: Problem) -> Problem:
    """The same layer in the most of 8, 4 or 2 groups that divide its channels."""
    out_channels = base.out_channels or base.channels
    return base.replace(groups=next((g for g in (8, 4, 2) if base.channels % g == 0 and out_channels % g == 0), 1))


TECHNIQUE = Technique(
    name="grouped",
    title="Grouped",
    summary="channels split into G parts that never meet: 1/G of the parameters and MACs",
    sampling="grid",
    mixing="within groups",
    weights="free",
    formula="y[n,o,p] = b[o] + Σ_{c ∈ group(o)} Σ_t W[o,c,t] · x[n,c, p·S − P + t·D]",
    when="Wide layers on a budget (ResNeXt), or with a shuffle between grouped layers (ShuffleNet).",
    traps=(
        "1/G of the MACs is not 1/G of the time: few channels per group leave little to reuse, and libraries loop over groups.",
        "Without a shuffle or a pointwise layer after it, the groups never exchange anything.",
    ),
    paper="Krizhevsky et al. 2012; Xie et al. 2017, arXiv:1611.05431; Zhang et al. 2018, arXiv:1707.01083",
    ops={1: grouped_conv1d, 2: grouped_conv2d, 3: grouped_conv3d},
    modules={1: GroupedConv1d, 2: GroupedConv2d, 3: GroupedConv3d},
    reference=reference,
    composite=convolve,
    takes=STANDARD.takes,
    operands=operands,
    arguments=arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    problem=partial(problem, name="grouped"),
    names_convolution=lambda stage: not stage.transposed and 1 < stage.groups != stage.in_channels,
    peers=(torch_convolution,),
    engine=ENGINE,
)
