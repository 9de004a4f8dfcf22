"""Parts of networks, and networks, built from the techniques. Re-exports only; each family has its own file."""

from omniconv.models.drn import (
    DRNSegmentation,
    drn_a_50,
    drn_c_26,
    drn_c_42,
    drn_c_58,
    drn_d_22,
    drn_d_24,
    drn_d_38,
    drn_d_40,
    drn_d_54,
    drn_d_56,
    drn_d_105,
)
from omniconv.models.light_conv import DynamicConvBlock, LightConvBlock

__all__ = [  # noqa: RUF022  # as sorted() has it
    "DRNSegmentation",
    "DynamicConvBlock",
    "LightConvBlock",
    "drn_a_50",
    "drn_c_26",
    "drn_c_42",
    "drn_c_58",
    "drn_d_105",
    "drn_d_22",
    "drn_d_24",
    "drn_d_38",
    "drn_d_40",
    "drn_d_54",
    "drn_d_56",
]
