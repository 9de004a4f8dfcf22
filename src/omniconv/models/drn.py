"""Dilated residual networks: residual networks that stop shrinking the map at an eighth of the image and dilate from there on.

    A   ResNet, with dilations 2 and 4 where its last two stages had strides
    C   A without max pooling (strided residual blocks in its place), and behind it two stages that smooth: dilation 2, then 1,
        without residuals
    D   C, with plain convolutions in the place of its first two and last two stages of blocks

Gridding, which C and D are made against: behind dilation 4 neighbouring outputs of A look at positions that hardly meet, and a spot
in the image comes out as a grid. Layers of falling dilation put what lies between back together; they must have no residual path
around them, through which the grid would pass unchanged. Of what one output can see on the map where dilation begins, by
:func:`omniconv.analysis.receptive_field.receptive_field` (unevenness 1: no two neighbours are both seen):

    network, stages                 sees        holes   unevenness
    C-26 or D-22, dilations 2, 4    49 × 49     74 %    1.00        every second position of every second row
    D-22, with both smoothing       55 × 55     0       0.33
    C-26, with both smoothing       61 × 61     0       0.11
    A-50, published                 41 × 41     0       0.08        without holes, as its stages begin with dilation 1: see below

Graphs, names and initial weights are those of the published code (fyu/drn), so that its checkpoints load strictly; see
:func:`omniconv.convert.state_from_drn`. Two particulars of it stay:

- In DRN-A the first block of each dilated stage has dilation 1. The paper, and :func:`omniconv.surgery.stride_to_dilation` of a
  ResNet, give the last stage's first block 2.
- The first smoothing block of DRN-C-58 has a shortcut of its own, whose result the published forward computes and drops. Its
  1,049,600 parameters are here; it is not computed, so that it has no gradient, and its running statistics stand still in training.

Source: Yu, Koltun & Funkhouser 2017, arXiv:1705.09914.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.functional import pointwise_conv2d
from omniconv.geometry import is_integer
from omniconv.nn import Conv2d, ConvTranspose2d, DilatedConv2d, PointwiseConv2d
from omniconv.ops.operator import check_flags, fail

Kind = Literal["basic", "bottleneck", "plain"]
Up = Literal["bilinear", "learned", "interpolate"]


@dataclass(frozen=True)
class Stage:
    """One stage of a network: ``repeats`` blocks or plain convolutions, the first of which has the stride.

    ``first_dilation`` is that of the first block, where it is not the stage's.
    """

    kind: Kind
    channels: int
    repeats: int
    stride: int = 1
    dilation: int = 1
    first_dilation: int | None = None
    residual: bool = True


@dataclass(frozen=True)
class Network:
    """A network as data: its family, the channels of its 7×7 stem, and its stages."""

    name: str
    family: Literal["A", "C", "D"]
    stem: int
    stages: tuple[Stage, ...]


def _family_a(name: str, kind: Kind, *repeats: int) -> Network:
    rows = ((64, 1, 1), (128, 2, 1), (256, 1, 2), (512, 1, 4))
    stages = tuple(Stage(kind, c, n, s, d, first_dilation=1) for (c, s, d), n in zip(rows, repeats, strict=True))
    return Network(name, "A", 64, stages)


def _families_c_and_d(name: str, family: Literal["C", "D"], kind: Kind, *repeats: int) -> Network:
    outer: Kind = "basic" if family == "C" else "plain"
    rows: tuple[tuple[Kind, int, int, int, bool], ...] = (
        (outer, 16, 1, 1, True),
        (outer, 32, 2, 1, True),
        (kind, 64, 2, 1, True),
        (kind, 128, 2, 1, True),
        (kind, 256, 1, 2, True),
        (kind, 512, 1, 4, True),
        (outer, 512, 1, 2, False),
        (outer, 512, 1, 1, False),
    )
    stages = tuple(
        Stage(k, c, n, s, d, residual=residual) for (k, c, s, d, residual), n in zip(rows, repeats, strict=True)
    )  # fmt: skip
    return Network(name, family, 16, stages)


NETWORKS = {
    network.name: network
    for network in (
        _family_a("drn_a_50", "bottleneck", 3, 4, 6, 3),
        _families_c_and_d("drn_c_26", "C", "basic", 1, 1, 2, 2, 2, 2, 1, 1),
        _families_c_and_d("drn_c_42", "C", "basic", 1, 1, 3, 4, 6, 3, 1, 1),
        _families_c_and_d("drn_c_58", "C", "bottleneck", 1, 1, 3, 4, 6, 3, 1, 1),
        _families_c_and_d("drn_d_22", "D", "basic", 1, 1, 2, 2, 2, 2, 1, 1),
        _families_c_and_d("drn_d_24", "D", "basic", 1, 1, 2, 2, 2, 2, 2, 2),
        _families_c_and_d("drn_d_38", "D", "basic", 1, 1, 3, 4, 6, 3, 1, 1),
        _families_c_and_d("drn_d_40", "D", "basic", 1, 1, 3, 4, 6, 3, 2, 2),
        _families_c_and_d("drn_d_54", "D", "bottleneck", 1, 1, 3, 4, 6, 3, 1, 1),
        _families_c_and_d("drn_d_56", "D", "bottleneck", 1, 1, 3, 4, 6, 3, 2, 2),
        _families_c_and_d("drn_d_105", "D", "bottleneck", 1, 1, 3, 4, 23, 3, 1, 1),
    )
}


def _conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int) -> nn.Conv2d:
    if dilation == 1:
        return Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return DilatedConv2d(in_channels, out_channels, 3, dilation, stride, padding=dilation, bias=False)


class _Basic(nn.Module):
    """Two 3×3 convolutions beside a shortcut, or without one."""

    expansion = 1

    def __init__(self, in_channels: int, stage: Stage, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        channels = stage.channels
        self.conv1 = _conv3x3(in_channels, channels, stride, dilation)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(channels, channels, 1, dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample
        self.residual = stage.residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.residual:
            y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class _Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 to four times the channels, beside a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, stage: Stage, stride: int, dilation: int, downsample: nn.Module | None) -> None:
        super().__init__()
        channels = stage.channels
        self.conv1 = PointwiseConv2d(in_channels, channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels, stride, dilation)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = PointwiseConv2d(channels, 4 * channels, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


_BLOCKS: dict[Kind, type[_Basic | _Bottleneck]] = {"basic": _Basic, "bottleneck": _Bottleneck}


def _stage(stage: Stage, in_channels: int) -> tuple[nn.Sequential, int]:
    """The layers of a stage, and how many channels leave it."""
    layers: list[nn.Module] = []
    channels = in_channels
    for i in range(stage.repeats):
        stride = stage.stride if i == 0 else 1
        dilation = stage.dilation if i or stage.first_dilation is None else stage.first_dilation
        if stage.kind == "plain":
            convolution = _conv3x3(channels, stage.channels, stride, dilation)
            layers += [convolution, nn.BatchNorm2d(stage.channels), nn.ReLU(inplace=True)]
            channels = stage.channels
            continue
        block = _BLOCKS[stage.kind]
        made = stage.channels * block.expansion
        downsample = None
        if stride != 1 or channels != made:
            downsample = nn.Sequential(PointwiseConv2d(channels, made, stride, bias=False), nn.BatchNorm2d(made))
        layers.append(block(channels, stage, stride, dilation, downsample))
        channels = made
    return nn.Sequential(*layers), channels


class _Pool(nn.AvgPool2d):
    """torch's, that says by name what is too small for it."""

    def __init__(self, name: str, size: int, stride: int) -> None:
        super().__init__(size, stride)
        self.name, self.size = name, size

    def forward(self, input: Tensor) -> Tensor:
        got = tuple(input.shape[2:])
        if not torch.compiler.is_compiling() and min(got) < self.size:
            fail(self.name, f"the last map must be at least pool_size = {self.size} high and wide", got)
        return super().forward(input)


class _Linear(nn.Linear):
    """DRN-A's head: the weights of a linear layer, at every position of a map."""

    def forward(self, input: Tensor) -> Tensor:
        return pointwise_conv2d(input, self.weight[:, :, None, None], self.bias)


class DRN(nn.Module):
    """A dilated residual network of a :class:`Network`; made by :func:`drn_d_22` and its like, which say what it gives.

    Attributes:
        out_dim: Channels of the last map.
    """

    def __init__(self, network: Network, num_classes: int, out_map: bool, out_middle: bool, pool_size: int) -> None:
        super().__init__()
        name = network.name
        for argument, value, least in (("num_classes", num_classes, 0), ("pool_size", pool_size, 1)):
            if not is_integer(value):
                raise TypeError(f"{name}: {argument} must be an int, got {value!r}")
            if value < least:
                fail(name, f"{argument} must be at least {least}", value)
        check_flags(name, out_map=out_map, out_middle=out_middle)
        self.network, self.out_map, self.out_middle = network, out_map, out_middle
        self.num_classes, self.pool_size = num_classes, pool_size
        channels, shrunk = network.stem, network.family == "A"
        stem = [
            Conv2d(3, channels, 7, 2 if shrunk else 1, padding=3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        ]  # fmt: skip
        if network.family == "D":
            self.layer0 = nn.Sequential(*stem)
        else:
            self.conv1, self.bn1, self.relu = stem
        if shrunk:
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self._levels = [f"layer{i}" for i, _ in enumerate(network.stages, start=1)]
        for level, stage in zip(self._levels, network.stages, strict=True):
            layers, channels = _stage(stage, channels)
            self.add_module(level, layers)
        self.out_dim, self._parts = channels, [name for name, _ in self.named_children()]
        if num_classes:
            self.avgpool = _Pool(name, pool_size, 1 if shrunk else pool_size)
            self.fc: nn.Module = _Linear(channels, num_classes) if shrunk else PointwiseConv2d(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills as the published code: convolutions by He's normal distribution (fan out), norms by ones and zeros."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.weight[0, 0].numel() * module.out_channels)))
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Scores, and the maps of every stage with ``out_middle``; see :func:`drn_d_22`."""
        x, levels = input, []
        for name in self._parts:
            x = getattr(self, name)(x)
            if name in self._levels:
                levels.append(x)
        if self.num_classes:
            x = self.fc(x) if self.out_map else self.fc(self.avgpool(x)).flatten(1)
        return (x, levels) if self.out_middle else x


_HEAD = ("avgpool", "fc")


class _Builder(Protocol):
    __name__: str

    def __call__(
        self, num_classes: int = 1000, *, out_map: bool = False, out_middle: bool = False, pool_size: int = 28
    ) -> DRN: ...  # fmt: skip


_DOC = """{title}: {summary}.

    Names, shapes and initial weights are those of the published checkpoints (fyu/drn), which load strictly:
    ``model.load_state_dict(omniconv.convert.state_from_drn(torch.load(path)))``.

    Args:
        num_classes: Scores for an image; 0 leaves the pooling and the head out, and the model gives its last map.
        out_map: Whether the scores are given at every position of the last map, without pooling.
        out_middle: Whether the maps of all {stages} stages are given too.
        pool_size: Height and width of the window that is averaged: 28 is the whole map of an image of 224.

    Returns:
        A model of (N, 3, H, W). It gives (N, num_classes), from a larger image (N, num_classes·windows) with a score for each
        window of ``pool_size`` on the map (step {step}); (N, num_classes, ⌈H/8⌉, ⌈W/8⌉) with ``out_map``; without classes
        (N, {channels}, ⌈H/8⌉, ⌈W/8⌉). With ``out_middle``, a pair of that and the list of maps, first to last, whose heights are
        ⌈H/s⌉ with s = {levels}.

    Raises:
        TypeError: ``num_classes`` or ``pool_size`` is no int.
        ValueError: One of them is too small; at a call, the image is smaller than the window.

    Example:
        >>> with torch.device("meta"):
        ...     model = {name}(19, out_map=True)
        ...     model(torch.empty(1, 3, 65, 97)).shape
        torch.Size([1, 19, 9, 13])

    Source: Yu, Koltun & Funkhouser 2017, arXiv:1705.09914.
    """
_SUMMARIES = {
    "A": "a ResNet-{depth} that stops shrinking at an eighth of the image, and dilates",
    "C": "a dilated residual network of {depth} layers, degridded by residual blocks without residuals",
    "D": "a dilated residual network of {depth} layers, degridded by plain convolutions",
}


def _builder(name: str) -> _Builder:
    """The public function of a network."""
    network = NETWORKS[name]

    def build(
        num_classes: int = 1000, *, out_map: bool = False, out_middle: bool = False, pool_size: int = 28
    ) -> DRN:  # fmt: skip
        return DRN(network, num_classes, out_map, out_middle, pool_size)

    depth = name.rsplit("_", 1)[1]
    shrunk, last = network.family == "A", network.stages[-1]
    build.__name__ = build.__qualname__ = name
    build.__doc__ = _DOC.format(
        name=name, title=f"DRN-{network.family}-{depth}", summary=_SUMMARIES[network.family].format(depth=depth),
        stages=len(network.stages), step="1" if shrunk else "``pool_size``",
        channels=last.channels * (4 if last.kind == "bottleneck" else 1),
        levels="4, 8, 8, 8" if shrunk else "1, 2, 4, 8, 8, 8, 8, 8",
    )  # fmt: skip
    return build


drn_a_50 = _builder("drn_a_50")
drn_c_26 = _builder("drn_c_26")
drn_c_42 = _builder("drn_c_42")
drn_c_58 = _builder("drn_c_58")
drn_d_22 = _builder("drn_d_22")
drn_d_24 = _builder("drn_d_24")
drn_d_38 = _builder("drn_d_38")
drn_d_40 = _builder("drn_d_40")
drn_d_54 = _builder("drn_d_54")
drn_d_56 = _builder("drn_d_56")
drn_d_105 = _builder("drn_d_105")


class DRNSegmentation(nn.Module):
    """A dilated residual network that labels every pixel: 1×1 scores on its last map, made eight times larger.

    The published DRNSeg, and its state dict: ``base.0`` … for the children of the network before its pooling, ``seg``, and
    ``up.weight``. Training it as published minimises ``F.nll_loss(log_probabilities, labels, ignore_index=255)``.

    Args:
        base: A network of :func:`drn_d_22` and its like, whose layers (but pooling and head) become this module's.
        classes: Labels.
        up: "bilinear": a transposed convolution with fixed weights, as published; "learned": the same, trained from there on;
            "interpolate": torch's bilinear interpolation with corners aligned, without weights (``use_torch_up``).

    Raises:
        TypeError: ``base`` is no such network, or ``classes`` no int.
        ValueError: ``classes`` is less than 1, or ``up`` is none of the three.

    Example:
        >>> model = DRNSegmentation(drn_d_22(0), classes=3)
        >>> log_probabilities, scores = model(torch.ones(1, 3, 17, 16))
        >>> log_probabilities.shape, scores.shape
        (torch.Size([1, 3, 24, 16]), torch.Size([1, 3, 3, 2]))

    Source: Yu, Koltun & Funkhouser 2017, arXiv:1705.09914; the fixed weights: Long et al. 2015, arXiv:1411.4038.
    """

    def __init__(self, base: DRN, classes: int, up: Up = "bilinear") -> None:
        super().__init__()
        if not isinstance(base, DRN):
            raise TypeError(f"DRNSegmentation: base must be one of omniconv.models' drn_*(), got {type(base).__name__}")
        if not is_integer(classes):
            raise TypeError(f"DRNSegmentation: classes must be an int, got {classes!r}")
        if classes < 1:
            fail("DRNSegmentation", "classes must be at least 1", classes)
        if up not in ("bilinear", "learned", "interpolate"):
            fail("DRNSegmentation", "up must be bilinear, learned or interpolate", repr(up))
        self.base = nn.Sequential(*(module for name, module in base.named_children() if name not in _HEAD))
        self.seg = PointwiseConv2d(base.out_dim, classes)
        nn.init.normal_(self.seg.weight, 0, math.sqrt(2 / classes))
        nn.init.zeros_(self.seg.bias)  # type: ignore[arg-type]  # there is one
        self.up: nn.Module
        if up == "interpolate":
            self.up = nn.UpsamplingBilinear2d(scale_factor=8)
            return
        self.up = ConvTranspose2d(classes, classes, 16, 8, padding=4, groups=classes, bias=False)
        tap = 1 - (torch.arange(16) - 7.5).abs() / 8
        with torch.no_grad():
            self.up.weight.copy_((tap[:, None] * tap).expand_as(self.up.weight))
        self.up.weight.requires_grad_(up == "learned")

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Labels at every pixel.

        Args:
            input: (N, 3, H, W).

        Returns:
            Log-probabilities (N, classes, 8·⌈H/8⌉, 8·⌈W/8⌉), of which ``[..., :H, :W]`` belongs to the image where its sides do not
            divide by 8, and the scores they come from, (N, classes, ⌈H/8⌉, ⌈W/8⌉).
        """
        scores = self.seg(self.base(input))
        return F.log_softmax(self.up(scores), 1), scores

    def optim_parameters(self) -> list[nn.Parameter]:
        """What the published training updates: all but fixed weights."""
        return [p for p in self.parameters() if p.requires_grad]
