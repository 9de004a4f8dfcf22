"""Parts of networks, and networks, built from the techniques. Re-exports only; each family has its own file."""

from omniconv.models.light_conv import DynamicConvBlock, LightConvBlock

__all__ = ["DynamicConvBlock", "LightConvBlock"]
