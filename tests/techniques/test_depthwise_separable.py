import pytest
import torch
from torch import nn

from omniconv.functional import conv2d, depthwise_separable_conv2d
from omniconv.nn import DepthwiseSeparableConv1d, DepthwiseSeparableConv2d
from omniconv.techniques import find, parse


class ByHand(nn.Module):
    """The block as everyone writes it."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, groups=channels, padding=1)
        self.pointwise = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x):
        return self.pointwise(self.depthwise(x))


def test_loads_the_hand_written_block_both_ways():
    theirs, ours = ByHand(4, 6), DepthwiseSeparableConv2d(4, 6, 3, padding=1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_is_a_convolution_with_a_factorised_weight():
    """Without an activation between, weight[o, c] = Σ_m pointwise[o, c·M + m]·depthwise[c·M + m]."""
    x, d, p = (torch.randn(s, dtype=torch.float64) for s in ((1, 3, 6, 6), (6, 1, 3, 3), (5, 6, 1, 1)))
    whole = (p[..., 0, 0, None, None] * d[:, 0]).view(5, 3, 2, 3, 3).sum(2)
    torch.testing.assert_close(depthwise_separable_conv2d(x, d, p, padding=1), conv2d(x, whole, padding=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("train", [True, False])
def test_norm_makes_the_mobilenet_block(train):
    ours = DepthwiseSeparableConv2d(
        4, 6, 3, stride=2, padding=1, norm=nn.BatchNorm2d, depthwise_activation="relu6", activation="relu6", bias=False
    )
    first, second = nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False), nn.Conv2d(4, 6, 1, bias=False)
    theirs = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU6(), second, nn.BatchNorm2d(6), nn.ReLU6())
    names = {"0": "depthwise", "1": "depthwise_norm", "3": "pointwise", "4": "pointwise_norm"}
    ours.load_state_dict({names[k.split(".")[0]] + k[1:]: v for k, v in theirs.state_dict().items()}, strict=True)
    x = torch.randn(3, 4, 7, 7)
    torch.testing.assert_close(ours.train(train)(x), theirs.train(train)(x))


def test_half_types_round_once_across_both_stages():
    """1/2 of 257 is lost if the first stage rounds to bfloat16 (8 bits)."""
    x = torch.ones(1, 257, 1, dtype=torch.bfloat16)
    layer = DepthwiseSeparableConv1d(257, 1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.depthwise.weight.fill_(1 + 1 / 128)
        layer.pointwise.weight.fill_(1 / 256 + 1 / 32768)
    wide = DepthwiseSeparableConv1d(257, 1, 1, bias=False).double()
    wide.load_state_dict(layer.state_dict())
    assert layer(x).item() == wide(x.double()).to(torch.bfloat16).item()


def test_ratio_to_standard_is_exact():
    """1/O + 1/k: 0.1121 for O = 1024 and 3×3."""
    base = parse("standard2d c32-1024 i14 k3 psame")[1]
    technique = find("depthwise_separable")
    standard, ours = find("standard").cost(base, bias=False), technique.cost(technique.variant_of(base), bias=False)
    assert ours.macs_dense * 1024 * 9 == standard.macs_dense * (1024 + 9)
    assert ours.params * 1024 * 9 == standard.params * (1024 + 9)
    assert round(ours.macs_dense / standard.macs_dense, 4) == 0.1121
