"""Small networks of every topology, for receptive fields: (factory, shape of the input) by name.

Sizes are odd where nothing forbids it, channels few; what is asked of them is where they look.
"""

import torch
import torch.nn.functional as F
from torch import nn

from omniconv import nn as house


def chain(*layers):
    """A network of layers in a row; each is a factory."""
    return lambda: nn.Sequential(*[layer() for layer in layers])


def conv(i, o, k=3, s=1, p=None, d=1, g=1, rank=2):
    pad = d * (k - 1) // 2 if p is None else p
    return lambda: getattr(nn, f"Conv{rank}d")(i, o, k, s, pad, d, g, False)


def up(i, o, k, s, p=0, op=0, d=1, rank=2):
    return lambda: getattr(nn, f"ConvTranspose{rank}d")(i, o, k, s, p, op, dilation=d)


def pool(k=2, s=None, p=0, ceil=False):
    return lambda: nn.MaxPool2d(k, s, p, ceil_mode=ceil)


def resize(**settings):
    return lambda: nn.Upsample(**settings)


def unit(i, o, k=3, s=1, d=1, g=1):
    return nn.Sequential(nn.Conv2d(i, o, k, s, d * (k - 1) // 2, d, g, False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """x + body(x), or skip(x) + body(x); in place, as torchvision's."""

    def __init__(self, body, skip=None):
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x):
        y = self.body(x)
        y += x if self.skip is None else self.skip(x)
        return y


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels):
        super().__init__()
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 2, 1), nn.ReLU(), nn.Conv2d(2, channels, 1))

    def forward(self, x):
        return x * self.squeeze(x)


class Split(nn.Module):
    """ShuffleNetV2's unit: half the channels pass, then they are shuffled."""

    def __init__(self, channels, k=3):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(unit(half, half, 1), nn.Conv2d(half, half, k, 1, k // 2, groups=half), unit(half, half, 1))

    def forward(self, x):
        passing, worked = x.chunk(2, 1)
        y = torch.cat([passing, self.branch(worked)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Down(nn.Module):
    """ShuffleNetV2's unit with stride: two branches, shuffled."""

    def __init__(self, i, o):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(i, i, 3, 2, 1, groups=i), unit(i, o // 2, 1))
        self.two = nn.Sequential(unit(i, o // 2, 1), nn.Conv2d(o // 2, o // 2, 3, 2, 1, groups=o // 2))
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x):
        return self.shuffle(torch.cat([self.one(x), self.two(x)], 1))


class Dense(nn.Module):
    """DenseNet's block: every layer sees all before it."""

    def __init__(self, channels, growth, layers):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(channels + i * growth), nn.ReLU(), unit(channels + i * growth, 4, 1), unit(4, growth))
            for i in range(layers)
        )

    def forward(self, x):
        parts = [x]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return torch.cat(parts, 1)


class Branches(nn.Module):
    """Inception: branches side by side."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class Next(nn.Module):
    """ConvNeXt's block: depthwise 7×7, then normalised and mixed along channels, in channels-last order."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.mix = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 8), nn.GELU(), nn.Linear(8, channels))
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return x + (self.mix(self.depthwise(x).permute(0, 2, 3, 1)) * self.scale).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Down, up, and across; ``up`` makes the way up."""

    def __init__(self, up, depth=2):
        super().__init__()
        self.down = nn.ModuleList([unit(1 if i == 0 else 2, 2) for i in range(depth)])
        self.pool, self.floor = nn.MaxPool2d(2), unit(2, 2)
        self.ups = nn.ModuleList([up() for _ in range(depth)])
        self.out = nn.ModuleList([unit(4, 2) for _ in range(depth)])

    def forward(self, x):
        across = []
        for down in self.down:
            x = down(x)
            across.append(x)
            x = self.pool(x)
        x = self.floor(x)
        for up, out in zip(self.ups, self.out, strict=True):
            x = out(torch.cat([across.pop(), up(x)], 1))
        return x


class Pyramid(nn.Module):
    """A feature pyramid: coarse levels resized and added to finer ones; the finest or the coarsest comes out."""

    def __init__(self, finest=True):
        super().__init__()
        self.stages = nn.ModuleList([unit(1, 2, s=2), unit(2, 2, s=2), unit(2, 2, s=2)])
        self.lateral = nn.ModuleList([nn.Conv2d(2, 2, 1) for _ in range(3)])
        self.smooth, self.finest = nn.Conv2d(2, 2, 3, padding=1), finest

    def forward(self, x):
        levels = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        top = levels.pop()
        while self.finest and levels:
            finer = levels.pop()
            top = finer + F.interpolate(top, size=finer.shape[-2:], mode="nearest")
        return self.smooth(top)


class Spatial(nn.Module):
    """Atrous spatial pyramid pooling, with or without the branch that sees everything."""

    def __init__(self, image=False):
        super().__init__()
        self.branches = nn.ModuleList([unit(2, 2, 1), unit(2, 2, d=2), unit(2, 2, d=4)])
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1)) if image else None
        self.project = nn.Conv2d(8 if image else 6, 2, 1)

    def forward(self, x):
        parts = [branch(x) for branch in self.branches]
        if self.image is not None:
            parts.append(F.interpolate(self.image(x), size=x.shape[-2:], mode="bilinear"))
        return self.project(torch.cat(parts, 1))


class WaveNet(nn.Module):
    """Causal, gated, with skips that are added up."""

    def __init__(self, layers=4):
        super().__init__()
        self.filters = nn.ModuleList([nn.Conv1d(2, 4, 2, dilation=2**i) for i in range(layers)])
        self.skips = nn.ModuleList([nn.Conv1d(2, 2, 1) for _ in range(layers)])

    def forward(self, x):
        total = 0
        for i, (both, skip) in enumerate(zip(self.filters, self.skips, strict=True)):
            one, two = both(F.pad(x, (2**i, 0))).split(2, 1)
            y = one * two
            total = total + skip(y)
            x = x + y
        return total


class Shuffled(nn.Module):
    """Sub-pixel convolution by hand: view and permute."""

    def __init__(self, r=2):
        super().__init__()
        self.conv, self.r, self.out = nn.Conv2d(1, r * r, 3, padding=1), r, nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        n, _, h, w = y.shape
        y = y.view(n, 1, self.r, self.r, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, 1, h * self.r, w * self.r)
        return self.out(y)


class Windows(nn.Module):
    """Attention inside windows of 4×4, as Swin's, between convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1)
        self.qkv = nn.Linear(2, 6)

    def forward(self, x):
        x = self.first(x)
        n, c, h, w = x.shape
        t = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        q, k, v = self.qkv(t).chunk(3, -1)
        t = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        t = t.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        return self.last(t)


class Tokens(nn.Module):
    """Positions in a row and back, mixed along channels between."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.mix = nn.Conv2d(1, 4, 3, 2, 1), nn.LayerNorm(4), nn.Linear(4, 4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        tokens = self.mix(self.norm(x.flatten(2).transpose(1, 2)))
        return self.depthwise(tokens.transpose(1, 2).reshape(n, c, h, w))


class Merged(nn.Module):
    """Swin's patch merging by strided slices, and a roll."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(4, 2, 1)
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        parts = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.conv(torch.roll(self.mix(torch.cat(parts, 1)), (1, -1), (2, 3)))


class Written(nn.Module):
    """Results are written into parts of a tensor, in place."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 5, padding=2)
        self.out = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        y = x.new_zeros(x.shape[0], 4, *x.shape[2:])
        y[:, :2] = self.one(x)
        y[:, 2:, ::2] = self.two(x)[:, :, ::2]
        y[:, :1].mul_(2.0)
        return self.out(y)


class Overwritten(nn.Module):
    """Every second column of a wide result is replaced by a narrow one."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(1, 1, 7, padding=3), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        y = self.wide(x)
        y[..., ::2] = self.narrow(x)[..., ::2]
        return y


class Apart(nn.Module):
    """Wide and narrow results, shuffled, each through its own group; only the narrow ones come out."""

    def __init__(self, shuffle):
        super().__init__()
        self.wide, self.narrow, self.shuffle = nn.Conv2d(1, 2, 9, padding=4), nn.Conv2d(1, 2, 3, padding=1), shuffle
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=4 if shuffle else 2)

    def forward(self, x):
        y = torch.cat([self.wide(x), self.narrow(x)], 1)
        if not self.shuffle:
            return self.grouped(y)[:, 2:]
        n, c, h, w = y.shape
        return self.grouped(y.view(n, 2, 2, h, w).transpose(1, 2).reshape(n, c, h, w))[:, 1::2]


class Swapped(nn.Module):
    """Rows and columns change places between two convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 1, (1, 5), padding=(0, 2)), nn.Conv2d(1, 1, (1, 3), padding=(0, 1))

    def forward(self, x):
        return self.two(self.one(x).transpose(2, 3))


class Unfolded(nn.Module):
    """A convolution by im2col, and its transpose."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(9, 9))

    def forward(self, x):
        columns = F.unfold(x, 3, padding=1, stride=2)
        return F.fold(self.weight @ columns, x.shape[-2:], 3, padding=1, stride=2)


class Cross(nn.Module):
    """A row and a column, side by side: a field that is no product of its axes."""

    def __init__(self):
        super().__init__()
        self.row, self.column = nn.Conv2d(1, 1, (1, 5), padding=(0, 2)), nn.Conv2d(1, 1, (7, 1), padding=(3, 0))

    def forward(self, x):
        return self.row(x) + self.column(x)


class Generated(nn.Module):
    """A convolution whose weights are made of the whole input."""

    def __init__(self):
        super().__init__()
        self.make = nn.Linear(2, 2 * 2 * 9)

    def forward(self, x):
        return F.conv2d(x, self.make(x.mean((2, 3))).view(2, 2, 3, 3), padding=1)


class Refusing(nn.Module):
    """Raises, in two lines."""

    def forward(self, x):
        raise RuntimeError("no way\nat all")


class Unruled(nn.Module):
    """An op that no rule is known for."""

    def forward(self, x):
        return x.tril()


class Modes(nn.Module):
    """Pads that read the input."""

    def __init__(self, mode):
        super().__init__()
        self.mode, self.conv = mode, nn.Conv2d(1, 2, 5)

    def forward(self, x):
        return self.conv(F.pad(x, (2, 2, 2, 2), mode=self.mode))


def bottleneck(i, o, s=1, d=1, g=1, at_first=False):
    """ResNet's; ``at_first`` puts the stride where the first version has it."""
    m = o // 2
    one, two = (s, 1) if at_first else (1, s)
    skip = unit(i, o, 1, s)[:2] if s > 1 or i != o else None
    return lambda: Residual(nn.Sequential(unit(i, m, 1, one), unit(m, m, 3, two, d, g), unit(m, o, 1)[:2]), skip)


def inverted(i, o, s=1, e=2, k=3, gate=False):
    """MobileNetV2's, or with a gate V3's and EfficientNet's."""

    def build():
        m = i * e
        body = nn.Sequential(
            unit(i, m, 1), unit(m, m, k, s, g=m), Gated(m) if gate else nn.Identity(), nn.Conv2d(m, o, 1), nn.BatchNorm2d(o)
        )
        return Residual(body) if s == 1 and i == o else body

    return build


def u_net(*up_layers, depth=2):
    return lambda: UNet(lambda: nn.Sequential(*[layer() for layer in up_layers]), depth)


def small():
    """A network of two layers."""
    return nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.ConvTranspose2d(2, 1, 4, 2))


def layers(**named):
    return {f"house {name}": made for name, made in named.items()}


TORCH = {
    "vgg": (chain(conv(1, 2), nn.ReLU, conv(2, 2), pool(), conv(2, 4), nn.ReLU, pool(), conv(4, 4)), (1, 1, 32, 32)),
    "alexnet stem": (chain(conv(3, 2, 11, 4, 2), nn.ReLU, pool(3, 2), conv(2, 2, 5), pool(3, 2)), (1, 3, 95, 63)),
    "resnet": (
        chain(conv(1, 4, 7, 2), pool(3, 2, 1), bottleneck(4, 4), bottleneck(4, 8, 2), bottleneck(8, 8)),
        (2, 1, 61, 64),
    ),
    "resnet, first version": (chain(conv(1, 4, 3, 2), bottleneck(4, 8, 2, at_first=True), bottleneck(8, 8)), (1, 1, 41, 40)),
    "resnext": (chain(conv(1, 8), bottleneck(8, 8, g=2), bottleneck(8, 16, 2, g=4), bottleneck(16, 16, g=4)), (1, 1, 32, 32)),
    "preactivated": (
        chain(conv(1, 4), *[lambda: Residual(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4)(), conv(4, 4)()))] * 2),
        (1, 1, 20, 20),
    ),
    "mobilenet v1": (chain(conv(1, 4, s=2), conv(4, 4, g=4), conv(4, 8, 1), conv(8, 8, s=2, g=8), conv(8, 8, 1)), (1, 1, 33, 33)),
    "mobilenet v2": (chain(conv(1, 4, s=2), inverted(4, 4), inverted(4, 8, 2), inverted(8, 8)), (1, 1, 40, 40)),
    "mobilenet v3": (chain(conv(1, 4, s=2), inverted(4, 4, gate=True), inverted(4, 8, 2, k=5)), (1, 1, 32, 32)),
    "efficientnet": (chain(conv(1, 4, s=2), inverted(4, 4, k=5, gate=True), inverted(4, 4, k=3, gate=True)), (1, 1, 24, 24)),
    "mnasnet": (chain(conv(1, 4, s=2), conv(4, 4, g=4), inverted(4, 8, 2, 3), inverted(8, 8, 1, 3, 5)), (1, 1, 33, 33)),
    "regnet": (chain(conv(1, 4, s=2), bottleneck(4, 8, 2, g=2), bottleneck(8, 8, g=2)), (1, 1, 32, 32)),
    "densenet": (chain(conv(1, 4, s=2), lambda: Dense(4, 2, 3), lambda: nn.AvgPool2d(2), lambda: Dense(10, 2, 2)), (1, 1, 40, 40)),
    "googlenet": (
        chain(
            conv(1, 2, 7, 2),
            pool(3, 2, ceil=True),
            lambda: Branches(unit(2, 2, 1), unit(2, 2), unit(2, 2, 5), nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(2, 2, 1))),
            pool(3, 2, ceil=True),
        ),
        (1, 1, 46, 46),
    ),
    "inception v3": (
        chain(
            lambda: Branches(
                nn.Conv2d(1, 1, (1, 7), padding=(0, 3)), nn.Conv2d(1, 1, (7, 1), padding=(3, 0)), nn.AvgPool2d(3, 1, 1)
            ),
            lambda: Branches(unit(3, 1, 3, 2), nn.Conv2d(3, 1, (3, 1), 2, (1, 0))),
        ),
        (1, 1, 25, 25),
    ),
    "squeezenet": (
        chain(conv(1, 2, 3, 2), pool(3, 2, ceil=True), conv(2, 2, 1), lambda: Branches(unit(2, 2, 1), unit(2, 2))),
        (1, 1, 33, 33),
    ),
    "shufflenet v1": (
        chain(conv(1, 4), conv(4, 8, 1, g=2), lambda: nn.ChannelShuffle(2), conv(8, 8, g=8), conv(8, 8, 1, g=2)), (1, 1, 20, 20),
    ),
    "shufflenet v2": (
        chain(conv(1, 8, s=2), lambda: Split(8), lambda: Down(8, 8), lambda: Split(8), lambda: Split(8, 5)),
        (1, 1, 48, 48),
    ),
    "half the channels": (lambda: Split(4), (1, 4, 9, 9)),
    "groups that never meet": (
        chain(conv(4, 4, g=2), conv(4, 8, 5, g=4), lambda: nn.ChannelShuffle(2), conv(8, 4, 1, g=2)),
        (1, 4, 13, 13),
    ),
    "convnext": (chain(conv(1, 4, 4, 4, 0), lambda: Next(4), conv(4, 4, 2, 2, 0), lambda: Next(4)), (1, 1, 64, 64)),
    "drn a": (chain(conv(1, 2, 3, 2), conv(2, 2, d=2), conv(2, 2, d=2), conv(2, 2, d=4), conv(2, 2, d=4)), (1, 1, 64, 64)),
    "drn c": (
        chain(conv(1, 2, 3, 2), *[lambda d=d: Residual(unit(2, 2, d=d)) for d in (1, 2, 4)], conv(2, 2, d=2), conv(2, 2)),
        (1, 1, 48, 48),
    ),
    "dilated 2 2 2": (chain(*[conv(1, 1, d=2)] * 3), (1, 1, 24, 24)),
    "hybrid 1 2 5": (chain(*[conv(1, 1, d=d) for d in (1, 2, 5)]), (1, 1, 24, 24)),
    # every setting another on either axis, so that no two of them can be swapped
    "uneven convolution": (chain(lambda: nn.Conv2d(1, 2, (3, 2), (2, 1), (0, 1), (1, 3), bias=False), conv(2, 1)), (1, 1, 31, 19)),
    "uneven transposed": (
        chain(lambda: nn.ConvTranspose2d(1, 2, (2, 3), (1, 2), (1, 0), (0, 1), dilation=(3, 1)), conv(2, 1)),
        (1, 1, 13, 11),
    ),
    "deeplab": (chain(conv(1, 2, s=2), lambda: Spatial()), (1, 1, 32, 32)),
    "deeplab, image level": (chain(conv(1, 2, s=2), lambda: Spatial(image=True)), (1, 1, 24, 24)),
    "fcn": (chain(conv(1, 2, s=2), conv(2, 2, s=2), conv(2, 1, 1), resize(scale_factor=4, mode="bilinear")), (1, 1, 32, 32)),
    "u-net, transposed": (u_net(up(2, 2, 2, 2)), (1, 1, 32, 32)),
    "u-net, nearest": (u_net(resize(scale_factor=2), conv(2, 2)), (1, 1, 32, 32)),
    "u-net, bilinear": (u_net(resize(scale_factor=2, mode="bilinear"), depth=1), (1, 1, 24, 24)),
    "u-net, corners": (u_net(resize(scale_factor=2, mode="bilinear", align_corners=True), depth=1), (1, 1, 20, 20)),
    "pyramid, finest": (Pyramid, (1, 1, 48, 48)),
    "pyramid, coarsest": (lambda: Pyramid(finest=False), (1, 1, 32, 32)),
    "transposed k4 s2 p1": (chain(conv(1, 2, s=2), up(2, 2, 4, 2, 1), up(2, 1, 4, 2, 1)), (1, 1, 16, 16)),
    "transposed k3 s2 op1": (chain(conv(1, 2), up(2, 2, 3, 2, 1, 1), up(2, 1, 3, 2, 1, 1)), (1, 1, 12, 12)),
    "transposed k2 s2": (chain(conv(1, 2), up(2, 2, 2, 2), conv(2, 1)), (1, 1, 12, 12)),
    "transposed k5 s3": (chain(up(1, 2, 5, 3, 1), conv(2, 1)), (1, 1, 12, 12)),
    "transposed with holes": (chain(up(1, 2, 2, 3, 0), up(2, 1, 3, 2, 2, 1, 2)), (1, 1, 12, 12)),
    "pixel shuffle": (chain(conv(1, 8), lambda: nn.PixelShuffle(2), conv(2, 1)), (1, 1, 12, 12)),
    "pixel shuffle by hand": (Shuffled, (1, 1, 12, 12)),
    "pixel unshuffle": (
        chain(lambda: nn.PixelUnshuffle(2), conv(4, 2), lambda: nn.PixelUnshuffle(2), conv(8, 2, g=2)),
        (1, 1, 32, 32),
    ),
    "bicubic": (chain(conv(1, 1), resize(scale_factor=3, mode="bicubic")), (1, 1, 12, 12)),
    "bicubic, corners": (resize(scale_factor=2, mode="bicubic", align_corners=True), (1, 1, 12, 12)),
    "nearest, uneven": (chain(resize(scale_factor=1.5), conv(1, 1)), (1, 1, 14, 14)),
    "nearest, exact": (chain(resize(scale_factor=0.75, mode="nearest-exact"), conv(1, 1)), (1, 1, 16, 16)),
    "bilinear, uneven": (chain(resize(scale_factor=1.25, mode="bilinear"), conv(1, 1)), (1, 1, 16, 16)),
    "bilinear, shrinking": (chain(conv(1, 1), resize(scale_factor=0.25, mode="bilinear")), (1, 1, 32, 32)),
    "wavenet": (WaveNet, (2, 2, 40)),
    "1-d encoder": (
        chain(conv(1, 2, 8, 4, 2, rank=1), lambda: nn.MaxPool1d(2), up(2, 1, 4, 2, 1, rank=1), resize(scale_factor=2)),
        (1, 1, 96),
    ),
    "3-d": (
        chain(conv(1, 2, rank=3), conv(2, 2, s=2, rank=3), lambda: nn.MaxPool3d(2, 1), up(2, 1, 2, 2, rank=3)),
        (1, 1, 14, 12, 13),
    ),
    "pads beyond the kernel": (chain(conv(1, 2, s=2, p=5), conv(2, 2, 1, p=3), conv(2, 1, (5, 1), 3, p=6)), (1, 1, 23, 19)),
    "cross": (Cross, (1, 1, 15, 15)),
    "windows": (Windows, (1, 1, 24, 24)),
    "tokens": (Tokens, (1, 1, 20, 20)),
    "merged": (Merged, (1, 1, 20, 20)),
    "written in place": (Written, (1, 1, 12, 12)),
    "overwritten": (Overwritten, (1, 1, 14, 14)),
    "one group alone": (lambda: Apart(shuffle=False), (1, 1, 15, 15)),
    "one group alone, shuffled": (lambda: Apart(shuffle=True), (1, 1, 15, 15)),
    "axes swapped": (Swapped, (1, 1, 13, 11)),
    "bilinear, corners": (lambda: nn.Upsample(size=(9, 13), mode="bilinear", align_corners=True), (1, 1, 5, 7)),
    "unfolded": (Unfolded, (1, 1, 17, 17)),
    "generated weights": (Generated, (1, 2, 9, 9)),
    "reflected": (lambda: Modes("reflect"), (1, 1, 9, 9)),
    "replicated": (lambda: Modes("replicate"), (1, 1, 9, 9)),
    "circular": (lambda: Modes("circular"), (1, 1, 9, 9)),
    "instance norm": (chain(conv(1, 2), lambda: nn.InstanceNorm2d(2, affine=True), conv(2, 2)), (2, 1, 11, 11)),
    "layer norm over space": (lambda: nn.Sequential(conv(1, 2)(), nn.LayerNorm([2, 9, 9])), (1, 1, 9, 9)),
    "group norm": (chain(conv(1, 4), lambda: nn.GroupNorm(2, 4)), (1, 1, 9, 9)),
    "local response": (chain(conv(1, 4), lambda: nn.LocalResponseNorm(3)), (1, 1, 11, 11)),
    "classifier": (chain(conv(1, 2, s=2), lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(2, 3)), (1, 1, 16, 16)),
    "flattened": (chain(conv(1, 2, s=2), nn.Flatten, lambda: nn.Linear(128, 3)), (1, 1, 16, 16)),
}  # fmt: skip

HOUSE = layers(
    standard=(
        chain(lambda: house.Conv2d(1, 2, 3, 2, ((0, 1), (1, 0))), lambda: house.Conv2d(2, 1, 3, padding="same")),
        (1, 1, 20, 20),
    ),
    same_minimal=(lambda: house.Conv2d(1, 2, 3, 2, "same_minimal"), (1, 1, 20, 20)),
    circular=(lambda: house.Conv2d(1, 1, 3, padding="same", padding_mode="circular"), (1, 1, 9, 9)),
    dilated=(lambda: house.DilatedConv2d(1, 2, 3, 3), (1, 1, 17, 17)),
    transposed=(lambda: house.ConvTranspose2d(1, 2, 5, 2, "same"), (1, 1, 11, 11)),
    separable=(lambda: house.SeparableConv2d(1, 2, 5, 2, 2), (1, 1, 19, 19)),
    depthwise=(lambda: house.DepthwiseConv2d(2, 3, 2, 1, multiplier=2), (1, 2, 13, 13)),
    depthwise_causal=(lambda: house.DepthwiseConv1d(2, 4, padding="causal", dilation=2), (1, 2, 30)),
    pointwise=(lambda: house.PointwiseConv2d(2, 3, 2), (1, 2, 12, 12)),
    depthwise_separable=(lambda: house.DepthwiseSeparableConv3d(1, 2, 3, padding=1), (1, 1, 7, 7, 7)),
    grouped=(lambda: house.GroupedConv2d(4, 8, 3, 2, padding=1, shuffle=True), (1, 4, 9, 9)),
    lightweight=(lambda: house.LightweightConv1d(4, 5, 2), (1, 4, 20)),
    dynamic=(lambda: house.DynamicConv1d(4, 5, 2, padding="causal"), (1, 4, 20)),
    dynamic_mean=(lambda: house.DynamicConv1d(4, 5, 2, context="mean"), (1, 4, 20)),
)  # fmt: skip

NETWORKS = TORCH | HOUSE
