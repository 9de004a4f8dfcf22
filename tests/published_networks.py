"""Networks as their papers describe them, of the library's layers, to be counted."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from omniconv.models import drn
from omniconv.nn import Conv2d, DepthwiseConv2d, DepthwiseSeparableConv2d, GroupedConv2d, PointwiseConv2d


class Residual(nn.Module):
    """What a path makes, plus its input or a shortcut's result."""

    def __init__(self, path: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.path, self.shortcut = path, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.path(x) + self.shortcut(x)


def normed(layer: nn.Module, channels: int, activation: type[nn.Module] | None = nn.ReLU) -> nn.Sequential:
    """A layer, a normalisation, an activation."""
    return nn.Sequential(layer, nn.BatchNorm2d(channels), *([activation()] if activation else []))


def head(channels: int) -> nn.Sequential:
    """Mean over the map and a classifier of a thousand classes."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def mobilenet_v1() -> nn.Module:
    """Howard et al. 2017, arXiv:1704.04861, table 1."""
    blocks = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
    layers: list[nn.Module] = [normed(Conv2d(3, 32, 3, 2, 1, bias=False), 32)]
    channels = 32
    for width, stride in blocks:
        settings = {"norm": nn.BatchNorm2d, "depthwise_activation": "relu", "activation": "relu", "bias": False}
        layers.append(DepthwiseSeparableConv2d(channels, width, 3, stride, 1, **settings))
        channels = width
    return nn.Sequential(*layers, head(channels))


def inverted(channels: int, width: int, kernel: int, stride: int, expansion: int, squeeze: bool = False) -> nn.Module:
    """Widen, filter, weigh the channels where asked, narrow; a residual where the shape is kept."""
    inner, activation = channels * expansion, nn.SiLU if squeeze else nn.ReLU6
    path = [normed(PointwiseConv2d(channels, inner, bias=False), inner, activation)] if expansion > 1 else []
    path.append(normed(DepthwiseConv2d(inner, kernel, stride, kernel // 2, bias=False), inner, activation))
    if squeeze:
        path.append(Squeeze(inner, channels // 4))
    whole = nn.Sequential(*path, normed(PointwiseConv2d(inner, width, bias=False), width, None))
    return Residual(whole) if stride == 1 and channels == width else whole


class Squeeze(nn.Module):
    """Weighs the channels by two layers of their means (Hu et al. 2018)."""

    def __init__(self, channels: int, few: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), PointwiseConv2d(channels, few), nn.SiLU(), PointwiseConv2d(few, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x)


def mobilenet_v2() -> nn.Module:
    """Sandler et al. 2018, arXiv:1801.04381, table 2."""
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    layers: list[nn.Module] = [normed(Conv2d(3, 32, 3, 2, 1, bias=False), 32, nn.ReLU6)]
    channels = 32
    for expansion, width, repeats, stride in table:
        for i in range(repeats):
            layers.append(inverted(channels, width, 3, stride if i == 0 else 1, expansion))
            channels = width
    return nn.Sequential(*layers, normed(PointwiseConv2d(320, 1280, bias=False), 1280, nn.ReLU6), head(1280))


def efficientnet_b0() -> nn.Module:
    """Tan & Le 2019, arXiv:1905.11946, table 1."""
    table = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    )  # fmt: skip
    layers: list[nn.Module] = [normed(Conv2d(3, 32, 3, 2, 1, bias=False), 32, nn.SiLU)]
    channels = 32
    for expansion, width, repeats, stride, kernel in table:
        for i in range(repeats):
            layers.append(inverted(channels, width, kernel, stride if i == 0 else 1, expansion, squeeze=True))
            channels = width
    return nn.Sequential(*layers, normed(PointwiseConv2d(320, 1280, bias=False), 1280, nn.SiLU), head(1280))


def bottlenecks(inner_of: Callable[[int], int], groups: int) -> nn.Module:
    """ResNet-50 and ResNeXt-50: four stages of bottlenecks, the stride in the 3×3."""
    layers: list[nn.Module] = [normed(Conv2d(3, 64, 7, 2, 3, bias=False), 64), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, repeats, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(repeats):
            inner, out, stride = inner_of(width), 4 * width, first if i == 0 else 1
            path = nn.Sequential(
                normed(PointwiseConv2d(channels, inner, bias=False), inner),
                normed(GroupedConv2d(inner, inner, 3, groups, stride, 1, bias=False), inner),
                normed(PointwiseConv2d(inner, out, bias=False), out, None),
            )
            shortcut = normed(PointwiseConv2d(channels, out, stride, bias=False), out, None) if i == 0 else None
            layers += [Residual(path, shortcut), nn.ReLU()]
            channels = out
    return nn.Sequential(*layers, head(channels))


def resnet50() -> nn.Module:
    """He et al. 2016, arXiv:1512.03385."""
    return bottlenecks(lambda width: width, 1)


def resnext50() -> nn.Module:
    """Xie et al. 2017, arXiv:1611.05431: 32 groups of 4."""
    return bottlenecks(lambda width: 2 * width, 32)


def xception() -> nn.Module:
    """Chollet 2017, arXiv:1610.02357, figure 5."""

    def separable(channels: int, width: int) -> nn.Sequential:
        return normed(DepthwiseSeparableConv2d(channels, width, 3, 1, 1, bias=False), width, None)

    def block(channels: int, *widths: int, relu_first: bool = True) -> nn.Module:
        path: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise((channels, *widths))):
            path += ([nn.ReLU()] if relu_first or i else []) + [separable(a, b)]
        shortcut = normed(PointwiseConv2d(channels, widths[-1], 2, bias=False), widths[-1], None)
        return Residual(nn.Sequential(*path, nn.MaxPool2d(3, 2, 1)), shortcut)

    middle = [Residual(nn.Sequential(*(layer for _ in range(3) for layer in (nn.ReLU(), separable(728, 728))))) for _ in range(8)]
    return nn.Sequential(
        normed(Conv2d(3, 32, 3, 2, bias=False), 32), normed(Conv2d(32, 64, 3, bias=False), 64),
        block(64, 128, 128, relu_first=False), block(128, 256, 256), block(256, 728, 728), *middle, block(728, 728, 1024),
        separable(1024, 1536), nn.ReLU(), separable(1536, 2048), nn.ReLU(), head(2048),
    )  # fmt: skip


class Shuffle(nn.Module):
    """One unit of ShuffleNetV2: half of the channels pass, or with a stride both halves are made anew; then they are dealt out."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        half, self.stride = width // 2, stride
        start = channels if stride == 2 else half
        self.right = nn.Sequential(
            normed(PointwiseConv2d(start, half, bias=False), half),
            normed(DepthwiseConv2d(half, 3, stride, 1, bias=False), half, None),
            normed(PointwiseConv2d(half, half, bias=False), half),
        )
        self.left: nn.Module = nn.Identity()
        if stride == 2:
            self.left = nn.Sequential(
                normed(DepthwiseConv2d(channels, 3, 2, 1, bias=False), channels, None),
                normed(PointwiseConv2d(channels, half, bias=False), half),
            )

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride == 2 else x.chunk(2, 1)
        joined = torch.cat([self.left(left), self.right(right)], 1)
        return joined.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def shufflenet_v2() -> nn.Module:
    """Ma et al. 2018, arXiv:1807.11164, table 5, 1×."""
    layers: list[nn.Module] = [normed(Conv2d(3, 24, 3, 2, 1, bias=False), 24), nn.MaxPool2d(3, 2, 1)]
    channels = 24
    for width, repeats in ((116, 4), (232, 8), (464, 4)):
        for i in range(repeats):
            layers.append(Shuffle(channels, width, 2 if i == 0 else 1))
            channels = width
    return nn.Sequential(*layers, normed(PointwiseConv2d(464, 1024, bias=False), 1024), head(1024))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV1": mobilenet_v1,
    "MobileNetV2": mobilenet_v2,
    "EfficientNet-B0": efficientnet_b0,
    "ResNet-50": resnet50,
    "ResNeXt-50 32x4d": resnext50,
    "Xception": xception,
    "ShuffleNetV2 1x": shufflenet_v2,
    **{f"DRN-{name.upper().replace('_', '-')}": getattr(drn, f"drn_{name}") for name in (
        "a_50", "c_26", "c_42", "c_58", "d_22", "d_38", "d_54", "d_105",
    )},
}  # fmt: skip
