"""torchvision's layer, written down by its documented attributes: torchvision need not be installed."""

import pytest
import torch
from torch import nn

from omniconv.convert import from_torchvision
from omniconv.functional import deform_conv2d


class TorchvisionDeformConv2d(nn.Module):
    """What torchvision.ops.DeformConv2d stores, under its names."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=True):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = (
            (kernel_size,) * 2,
            (stride,) * 2,
            (padding,) * 2,
            (dilation,) * 2,
        )
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.randn(out_channels)) if bias else None


@pytest.mark.parametrize("bias", [True, False])
def test_same_settings_and_weights_both_ways(bias):
    theirs = TorchvisionDeformConv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, bias=bias).eval()
    ours = from_torchvision(theirs)
    assert not ours.training
    x = torch.randn(1, 4, 9, 9)
    offset, mask = torch.randn(1, 36, 4, 4), torch.rand(1, 18, 4, 4)
    expected = deform_conv2d(x, offset, theirs.weight, theirs.bias, theirs.stride, theirs.padding, theirs.dilation, mask)
    assert torch.equal(ours(x, offset, mask), expected)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_dtype_is_kept():
    theirs = TorchvisionDeformConv2d(1, 1, 3, 1, 1, 1, 1).double()
    assert from_torchvision(theirs).weight.dtype == torch.float64


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Conv2d(2, 2, 3)])
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=r"from_torchvision: the module must be a torchvision.ops.DeformConv2d, got \w+"):
        from_torchvision(module)
