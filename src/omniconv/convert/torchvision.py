"""torchvision's DeformConv2d as our layer, and back.

The state dicts are the same (``weight`` and ``bias``): ours loads theirs, and theirs ours, strictly, wherever ours has
``offset="external"``. torchvision itself is not needed: its module is known by its attributes.
"""

from typing import Any

from torch import nn

from omniconv.techniques.deformable import DeformConv2d

_ATTRIBUTES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "weight")


def from_torchvision(module: nn.Module) -> DeformConv2d:
    """Our layer with the settings, weights, dtype, device and mode of a ``torchvision.ops.DeformConv2d``.

    Args:
        module: The torchvision layer; its ``forward(input, offset, mask=None)`` and ours give the same.

    Returns:
        A layer with ``offset="external"``.

    Raises:
        TypeError: The module is no deformable convolution.

    Example:
        >>> theirs = DeformConv2d(4, 6, 3, padding=1, groups=2, offset="external")  # anything with torchvision's attributes
        >>> from_torchvision(theirs).groups
        2
    """
    missing = [name for name in _ATTRIBUTES if not hasattr(module, name)]
    if missing or isinstance(module, nn.modules.conv._ConvNd):
        raise TypeError(f"from_torchvision: the module must be a torchvision.ops.DeformConv2d, got {type(module).__name__}")
    settings: dict[str, Any] = {name: getattr(module, name) for name in _ATTRIBUTES[:-1]}
    weight: Any = module.weight
    has_bias = getattr(module, "bias", None) is not None
    layer = DeformConv2d(**settings, bias=has_bias, offset="external", device=weight.device, dtype=weight.dtype)
    layer.load_state_dict(module.state_dict(), strict=True)
    return layer.train(module.training)
