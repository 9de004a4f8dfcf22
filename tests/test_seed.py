"""Every example of the text that the library grew from, corrected where it was loose.

The example of dynamic convolution, silently wrong as written, is in techniques/test_dynamic.py.
"""

import pytest
import torch
from torch import nn

import omniconv.nn as onn
from omniconv.techniques import find, parse


def conv3x3(layers, channels, out_channels, stride=1, dilation=1):
    return layers.Conv2d(channels, out_channels, kernel_size=3, stride=stride, padding=dilation, dilation=dilation, bias=False)


class BasicBlock(nn.Module):
    """The text's dilated residual block, with torch's layers or ours."""

    def __init__(self, layers, channels, out_channels, stride=1, dilation=1, downsample=None):
        super().__init__()
        self.conv1 = conv3x3(layers, channels, out_channels, stride, dilation)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(layers, out_channels, out_channels, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample:
            identity = self.downsample(x)
        return self.relu(out + identity)


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_dilated_residual_block(dilation):
    theirs, ours = BasicBlock(nn, 8, 8, dilation=dilation), BasicBlock(onn, 8, 8, dilation=dilation)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 8, 14, 14)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("Conv2d", {"in_channels": 3, "out_channels": 64, "kernel_size": 3, "padding": 1}, 12),
        ("Conv2d", {"in_channels": 64, "out_channels": 64, "kernel_size": 3, "padding": 2, "dilation": 2}, 12),
        ("ConvTranspose2d", {"in_channels": 128, "out_channels": 64, "kernel_size": 4, "stride": 2, "padding": 1}, 24),
        ("Conv2d", {"in_channels": 128, "out_channels": 128, "kernel_size": 3, "groups": 128, "padding": 1}, 12),
        ("Conv2d", {"in_channels": 128, "out_channels": 256, "kernel_size": 1}, 12),
        ("Conv2d", {"in_channels": 64, "out_channels": 64, "kernel_size": 3, "groups": 4, "padding": 1}, 12),
    ],
)
def test_layer_examples(name, arguments, size):
    theirs, ours = getattr(nn, name)(**arguments), getattr(onn, name)(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, arguments["in_channels"], 12, 12)
    y = ours(x)
    assert y.shape == (1, arguments["out_channels"], size, size)
    torch.testing.assert_close(y, theirs(x))


def test_depthwise_separable_example():
    layer = onn.DepthwiseSeparableConv2d(64, 128, kernel_size=3, padding=1)
    assert layer(torch.randn(1, 64, 8, 8)).shape == (1, 128, 8, 8)
    technique, problem = parse("depthwise_separable2d c64-128 i8 k3 p1")
    standard = find("standard").cost(problem.replace(technique="standard"), bias=False).macs_dense
    ratio = standard / technique.cost(problem, bias=False).macs_dense
    assert 8 < ratio < 9  # "about 8 to 9 times"


def test_deformable_example():
    """``DeformConv2d(64, 128, 3, padding=1)`` alone lacks its offsets in torchvision; ours makes them."""
    layer = onn.DeformConv2d(64, 128, kernel_size=3, padding=1)
    assert layer(torch.randn(1, 64, 8, 8)).shape == (1, 128, 8, 8)


def test_lightweight_example():
    """The text's ``grouped_conv1d`` is undefined and its weight uninitialised; channels 6 in 3 groups share kernels by pairs."""
    layer = onn.LightweightConv1d(channels=6, kernel_size=3, heads=3)
    assert layer(torch.randn(1, 6, 10)).shape == (1, 6, 10)
    assert layer.weight.shape == (3, 3)  # H·k numbers, not d·H


def test_transposed_costs_by_its_input():
    """The text multiplies by the output size, stride² times too high."""
    technique, problem = parse("transposed2d c128-64 i12 k4 s2 p1")
    assert technique.cost(problem).macs_dense == 12 * 12 * 128 * 64 * 4 * 4


def test_dynamic_has_c_times_the_parameters_of_lightweight():
    """Not "slightly more"."""
    lightweight = find("lightweight").cost(parse("lightweight1d c64 i100 k5 h8")[1], bias=False)
    dynamic = find("dynamic").cost(parse("dynamic1d c64 i100 k5 h8")[1], bias=False)
    assert dynamic.params == 64 * lightweight.params
