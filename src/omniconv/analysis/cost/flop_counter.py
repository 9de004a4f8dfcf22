"""Formulas for torch's own counter, torch.utils.flop_counter, where its are wrong or missing."""

from collections.abc import Callable
from typing import Any

import torch

from omniconv.analysis.cost.calls import FORMULAS, Call

_OPS = ("aten::convolution_backward", "torchvision::deform_conv2d", "torchvision::_deform_conv2d_backward")


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """What to give to ``FlopCounterMode(custom_mapping=…)``: right gradients of grouped convolutions, and deformable ones.

    torch counts the weight gradient of a convolution in g groups g times; with these it is 2·MACs of one forward, as the input
    gradient is. torchvision's deformable convolution, of which torch knows nothing, is there where torchvision is loaded. The
    library's native ops are in torch's table already. Nothing of torch is changed.

    Example:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> layer, x = torch.nn.Conv2d(8, 8, 3, groups=8), torch.ones(1, 8, 5, 5, requires_grad=True)
        >>> with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        ...     layer(x).sum().backward()
        >>> counter.get_total_flops() == 3 * 2 * 9 * 8 * 9
        True
    """
    return {packet: _formula(op) for op in _OPS if (packet := _packet(op)) is not None}


def _packet(op: str) -> Any:
    """The op as torch.ops has it; None where it is not loaded."""
    namespace, name = op.split("::")
    return getattr(getattr(torch.ops, namespace), name, None)


def _formula(op: str) -> Callable[..., int]:
    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * FORMULAS[op](Call(op, (*args, *kwargs.values()), out_val)).macs_dense

    flops._get_raw = True  # type: ignore[attr-defined]  # torch's sign for: tensors, not shapes
    return flops
