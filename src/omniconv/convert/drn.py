"""Checkpoints of fyu/drn as state dicts of our networks. Names and shapes are the same; what is around them differs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def state_from_drn(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in a checkpoint of fyu/drn, for a strict ``load_state_dict`` of ``omniconv.models.drn_*`` or DRNSegmentation.

    Takes what its scripts save and publish: a bare state dict; one in a training checkpoint, beside its epoch and architecture; one
    with "module." before every name (DataParallel). Files from before norms counted their batches need nothing more: torch starts
    the count at 0. A torchvision ResNet-50 is a ``drn_a_50`` as it is.

    Args:
        checkpoint: What ``torch.load(path)`` gives.

    Returns:
        The tensors under the names of our networks.

    Raises:
        TypeError: It is no mapping, or holds something else than tensors.
        ValueError: There are no tensors in it, or two of one name.

    Example:
        >>> saved = {"epoch": 3, "arch": "drn_d_22", "state_dict": {"module.fc.bias": torch.zeros(2)}}
        >>> list(state_from_drn(saved))
        ['fc.bias']
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"state_from_drn: checkpoint must be a mapping, as torch.load gives it, got {type(checkpoint).__name__}")
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping):
        raise TypeError(f"state_from_drn: the checkpoint's state_dict must be a mapping, got {type(state).__name__}")
    if not state:
        raise ValueError("state_from_drn: checkpoint must hold tensors, got none")
    for key, value in state.items():
        if not isinstance(value, Tensor) or not isinstance(key, str):
            raise TypeError(f"state_from_drn: every entry must be a Tensor by name, got {type(value).__name__} for {key!r}")
    found = {key.removeprefix("module."): value for key, value in state.items()}
    if len(found) < len(state):
        raise ValueError('state_from_drn: no name may stand there with and without "module.", got one that does')
    return found
