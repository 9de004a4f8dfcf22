import torch
import torch.nn.functional as F

from omniconv.functional import depthwise_conv1d, depthwise_conv2d
from omniconv.nn import DepthwiseConv2d
from omniconv.techniques import parse
from omniconv.techniques.depthwise import reference


def test_reference_is_torchs_grouped_convolution():
    x, w, b = torch.randn(2, 3, 8, 7).double(), torch.randn(6, 1, 3, 2).double(), torch.randn(6).double()
    expected = F.conv2d(x, w, b, stride=2, padding=1, dilation=2, groups=3)
    torch.testing.assert_close(reference(x, w, b, 2, 1, 2), expected, rtol=1e-12, atol=1e-12)


def test_output_cm_plus_m_reads_channel_c():
    x = torch.tensor([1.0, 10.0]).view(1, 2, 1)
    w = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    assert depthwise_conv1d(x, w).flatten().tolist() == [1, 2, 30, 40]


def test_channels_do_not_mix():
    x = torch.zeros(1, 3, 4, 4)
    x[0, 1] = 1
    y = depthwise_conv2d(x, torch.ones(3, 1, 3, 3), padding=1)
    assert y[0, 0].abs().sum() == 0 == y[0, 2].abs().sum()
    assert y[0, 1].sum() == 100  # (3 + 3 + 2 + 2)² taps that land


def test_state_dict_is_that_of_a_grouped_convolution_both_ways():
    theirs, ours = torch.nn.Conv2d(4, 8, 3, groups=4), DepthwiseConv2d(4, 3, multiplier=2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_needs_one_cth_of_the_standard_layer():
    technique, problem = parse("depthwise2d c64 i56 k3 psame")
    assert technique.cost(problem, bias=False).macs_dense == 64 * 9 * 56 * 56
