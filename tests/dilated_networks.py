"""Residual networks as they are published, narrow, for surgery: their strides and pooling are what is turned into dilation."""

import torch
import torch.nn.functional as F
from torch import nn


def unit(into, out, kernel=3, stride=1, groups=1, dilation=1, act=True):
    layers = [
        nn.Conv2d(into, out, kernel, stride, (kernel - 1) // 2 * dilation, dilation, groups, bias=False), nn.BatchNorm2d(out)
    ]  # fmt: skip
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


class Residual(nn.Module):
    """Convolutions beside a shortcut, which is 1×1 where channels or stride change; "D" pools before it."""

    def __init__(self, body, into, out, stride, pooled=False):
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity()
        if pooled and stride > 1:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
            self.shortcut = nn.Sequential(pool, unit(into, out, 1, act=False))
        elif stride > 1 or into != out:
            self.shortcut = unit(into, out, 1, stride, act=False)

    def forward(self, x):
        y = self.body(x)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


def basic(into, width, stride, **_):
    return nn.Sequential(unit(into, width, 3, stride), unit(width, width, act=False)), width


def wide(into, width, stride, groups=1):
    body = unit(into, width, 1), unit(width, width, 3, stride, groups), unit(width, 2 * width, 1, act=False)
    return nn.Sequential(*body), 2 * width


def resnet(kind, repeats, *, groups=1, pooled=False, width=8, first=1):
    """The topology of He et al. 2016, with few channels; with ``first`` = 2 that of RegNet: no pooling, every stage shrinks."""
    layers = [unit(3, width, 3 if first == 2 else 7, 2)]
    if first == 1:
        layers.append(nn.MaxPool2d(3, 2, 1))
    into = width
    for i, times in enumerate(repeats):
        for j in range(times):
            stride = (first if i == 0 else 2) if j == 0 else 1
            body, out = kind(into, width * 2 ** min(i, 2), stride, groups=groups)
            layers.append(Residual(body, into, out, stride, pooled))
            into = out
    return nn.Sequential(*layers)


class Inverted(nn.Module):
    def __init__(self, into, out, stride, expand):
        super().__init__()
        hidden = into * expand
        self.body = nn.Sequential(
            *([unit(into, hidden, 1)] if expand > 1 else []),
            unit(hidden, hidden, 3, stride, hidden),
            unit(hidden, out, 1, act=False),
        )
        self.same = stride == 1 and into == out

    def forward(self, x):
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_v2():
    """Sandler et al. 2018, table 2, an eighth of the channels."""
    layers, into = [unit(3, 4, 3, 2)], 4
    rows = (1, 2, 1, 1), (6, 3, 2, 2), (6, 4, 3, 2), (6, 8, 4, 2), (6, 12, 3, 1), (6, 20, 3, 2), (6, 40, 1, 1)
    for expand, out, times, stride in rows:
        for j in range(times):
            layers.append(Inverted(into, out, stride if j == 0 else 1, expand))
            into = out
    return nn.Sequential(*layers, unit(into, 160, 1))


class Own(nn.Module):
    """A stem whose stride is taken out, and a function of what comes from it."""

    def __init__(self, function, **modules):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, self.stem(x))


class Standardised(nn.Conv2d):
    """A class of its own that follows its settings."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PadsItself(nn.Conv2d):
    """TensorFlow's SAME: the pads depend on the size."""

    def forward(self, x):
        pads = []
        for n in reversed(x.shape[2:]):
            need = max((-(-n // self.stride[0]) - 1) * self.stride[0] + (self.kernel_size[0] - 1) * self.dilation[0] + 1 - n, 0)
            pads += [need // 2, need - need // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


NETWORKS = {
    "resnet18": lambda: resnet(basic, (2, 2, 2, 2)),
    "resnet34": lambda: resnet(basic, (3, 4, 6, 3)),
    "resnet50": lambda: resnet(wide, (3, 4, 6, 3)),
    "resnext50": lambda: resnet(wide, (3, 4, 6, 3), groups=4),
    "resnet50d": lambda: resnet(wide, (3, 4, 6, 3), pooled=True),
    "regnet": lambda: resnet(wide, (1, 2, 4, 2), groups=2, first=2),
    "mobilenet_v2": mobilenet_v2,
}


def exact_(net):
    """Weights with which every number is an integer (over a power of two), so that no order of summing can round."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            weight = torch.zeros_like(module.weight)
            for row in weight.flatten(1):
                row[torch.randint(row.numel(), ())] = (-1) ** int(torch.randint(2, ()))
            module.weight.data = weight
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            module.bias.data = torch.randint(-2, 3, module.bias.shape).to(module.bias)
    return net


def random_(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def made(name, dense=False):
    torch.manual_seed(0)
    net = NETWORKS[name]().double().eval()
    return random_(net) if dense else exact_(net)


def taken(y, grows):
    return y[(..., *(slice(None, None, g) for g in ((grows,) * (y.dim() - 2) if isinstance(grows, int) else grows)))]


def eighth(size, s=8):
    return -(-size // s)
