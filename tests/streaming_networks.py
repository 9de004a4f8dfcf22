"""Modules that stream, and a stream beside the whole sequence."""

import torch
import torch.nn.functional as F
from torch import nn

import omniconv
from omniconv.streaming import Causal

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHANNELS = 18
TIME = {"NCT": 2, "NTC": 1, "TNC": 0}


class Residual(nn.Module):
    """x + body(x)."""

    stream_exact = True

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)

    def stream(self, x, step):
        return x + step(self.body, x)


class Gated(nn.Module):
    """A list of children, one left out, and another layout for one of them."""

    stream_exact = True
    stream_children = ("paths",)

    def __init__(self, *paths):
        super().__init__()
        self.paths = nn.ModuleList(paths)
        self.loss_head = nn.LSTM(2, 2)

    def forward(self, x):
        return self.paths[0](x) * self.paths[1](x)

    def stream(self, x, step):
        return step(self.paths[0], x) * step(self.paths[1], x)


class Inside(nn.Module):
    """An (N, T, C) layer inside a stack of (N, C, T)."""

    stream_exact = True

    def __init__(self, body):
        super().__init__()
        self.body, self.stream_layouts = body, {"body": "NTC"}

    def forward(self, x):
        return self.body(x.transpose(1, 2)).transpose(1, 2)

    def stream(self, x, step):
        return step(self.body, x.transpose(1, 2)).transpose(1, 2)


class Difference(nn.Module):
    """y[t] = x[t] − x[t − 2], a layer of the user's own."""

    def forward(self, x):
        return x - F.pad(x, (2, 0))[..., :-2]

    def stream_reads(self):
        return Causal(past=2, layouts=("NCT",))

    def stream_step(self, window):
        return window[..., 2:] - window[..., :-2]


def filled(module, dtype=torch.float32):
    """In evaluation mode, with parameters that are not zero."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.to(dtype).eval()


def whole(module, x):
    with torch.no_grad():
        return module(x)


def pieces(x, axis, rng, sizes=(0, 1, 1, 2, 3, 5, 16, 17, 40)):
    """``x`` cut along the axis at random, empty pieces included."""
    at = 0
    while at < x.shape[axis]:
        size = min(rng.choice(sizes), x.shape[axis] - at)
        yield x.narrow(axis, at, size)
        at += size


def streamed(s, x, rng, sizes=(0, 1, 1, 2, 3, 5, 16, 17, 40)):
    axis = TIME[s.layout]
    return torch.cat([s(piece) for piece in pieces(x, axis, rng, sizes)], axis)


def assert_streams(module, x, rng, exact=True):
    s = omniconv.streaming(module)
    assert s.exact is exact, s.inexact
    y, expected = streamed(s, x, rng), whole(module, x)
    assert y.dtype == expected.dtype
    assert not y.requires_grad
    if exact:
        assert torch.equal(y, expected)
    else:
        torch.testing.assert_close(y, expected)
    return s


def sequence(layout, batch, steps, dtype=torch.float32, channels=CHANNELS):
    size = {"N": batch, "C": channels, "T": steps}
    return torch.randn([size[axis] for axis in layout]).to(dtype)
