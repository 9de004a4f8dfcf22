"""The operators: every convolution as a function. Re-exports only; each lives in the file of its technique."""

from omniconv.techniques.causal import causal_conv1d_fn, causal_conv1d_update
from omniconv.techniques.deformable import deform_conv2d
from omniconv.techniques.depthwise import depthwise_conv1d, depthwise_conv2d, depthwise_conv3d
from omniconv.techniques.depthwise_separable import (
    depthwise_separable_conv1d,
    depthwise_separable_conv2d,
    depthwise_separable_conv3d,
)
from omniconv.techniques.dilated import dilated_conv1d, dilated_conv2d, dilated_conv3d
from omniconv.techniques.dynamic import dynamic_conv1d
from omniconv.techniques.grouped import grouped_conv1d, grouped_conv2d, grouped_conv3d
from omniconv.techniques.lightweight import lightweight_conv1d
from omniconv.techniques.pointwise import pointwise_conv1d, pointwise_conv2d, pointwise_conv3d
from omniconv.techniques.separable import separable_conv2d
from omniconv.techniques.standard import conv1d, conv2d, conv3d
from omniconv.techniques.transposed import conv_transpose1d, conv_transpose2d, conv_transpose3d

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "deform_conv2d",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_conv3d",
    "depthwise_separable_conv1d",
    "depthwise_separable_conv2d",
    "depthwise_separable_conv3d",
    "dilated_conv1d",
    "dilated_conv2d",
    "dilated_conv3d",
    "dynamic_conv1d",
    "grouped_conv1d",
    "grouped_conv2d",
    "grouped_conv3d",
    "lightweight_conv1d",
    "pointwise_conv1d",
    "pointwise_conv2d",
    "pointwise_conv3d",
    "separable_conv2d",
]
