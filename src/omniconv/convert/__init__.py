"""Weights of other libraries' layers as ours, and back. Re-exports only; each library has its own file."""

from omniconv.convert.drn import state_from_drn
from omniconv.convert.fairseq import (
    InterleavedLightweightConv1d,
    block_state_from_fairseq,
    block_state_to_fairseq,
    from_fairseq,
    state_from_fairseq,
    state_to_fairseq,
)
from omniconv.convert.torchvision import from_torchvision

__all__ = [
    "InterleavedLightweightConv1d",
    "block_state_from_fairseq",
    "block_state_to_fairseq",
    "from_fairseq",
    "from_torchvision",
    "state_from_drn",
    "state_from_fairseq",
    "state_to_fairseq",
]
