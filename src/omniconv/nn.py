"""The layers: every convolution as a module. Re-exports only; each lives in the file of its technique."""

from omniconv.techniques.deformable import DeformConv2d
from omniconv.techniques.depthwise import DepthwiseConv1d, DepthwiseConv2d, DepthwiseConv3d
from omniconv.techniques.depthwise_separable import DepthwiseSeparableConv1d, DepthwiseSeparableConv2d, DepthwiseSeparableConv3d
from omniconv.techniques.dilated import DilatedConv1d, DilatedConv2d, DilatedConv3d
from omniconv.techniques.dynamic import DynamicConv1d
from omniconv.techniques.grouped import GroupedConv1d, GroupedConv2d, GroupedConv3d
from omniconv.techniques.lightweight import LightweightConv1d
from omniconv.techniques.pointwise import PointwiseConv1d, PointwiseConv2d, PointwiseConv3d
from omniconv.techniques.separable import SeparableConv2d
from omniconv.techniques.standard import Conv1d, Conv2d, Conv3d
from omniconv.techniques.transposed import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "DeformConv2d",
    "DepthwiseConv1d",
    "DepthwiseConv2d",
    "DepthwiseConv3d",
    "DepthwiseSeparableConv1d",
    "DepthwiseSeparableConv2d",
    "DepthwiseSeparableConv3d",
    "DilatedConv1d",
    "DilatedConv2d",
    "DilatedConv3d",
    "DynamicConv1d",
    "GroupedConv1d",
    "GroupedConv2d",
    "GroupedConv3d",
    "LightweightConv1d",
    "PointwiseConv1d",
    "PointwiseConv2d",
    "PointwiseConv3d",
    "SeparableConv2d",
]
