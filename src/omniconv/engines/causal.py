"""The native causal filter with a state: which calls it takes, and its raw operators as torch sees them.

The filter over a whole sequence is the depthwise engine's. The arithmetic is in ``csrc/kernels/causal.kernel.cpp``.
"""

import torch
from torch import Tensor

from omniconv import settings
from omniconv.engines.depthwise import ENGINE
from omniconv.engines.engine import ACTIVATION_CODES, fused_activation, raw_op, wants_gradient
from omniconv.geometry import Grid
from omniconv.ops.activation import activate
from omniconv.ops.operator import accumulated_in

_ONE_POSITION = Grid((1,), ((0, 0),), (1,))


def is_native(x: Tensor, weight: Tensor, bias: Tensor | None, differentiable: bool) -> bool:
    """Returns whether the native kernels take a causal filter of ``x``; only some of their operators have a gradient."""
    kept = (x.dtype, accumulated_in(x))
    if weight.dtype not in kept or (bias is not None and bias.dtype not in kept):
        return False
    if ENGINE.unsupported_reason(x, weight, bias, _ONE_POSITION) is not None:
        return False
    return differentiable or not wants_gradient(x, weight, bias)


def fixup_boundaries(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: str | None
) -> Tensor | None:
    """Returns ``y`` after making again, in place, what reaches into another sequence; None where torch's activation must follow."""
    fused = fused_activation(x, activation)
    if fused != activation:
        return None
    operands = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    _FIXUP(y, *operands, seq_idx.long().contiguous(), ACTIVATION_CODES[fused], not settings.is_precise())
    return y


def update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, activation: str | None
) -> Tensor:
    """Returns the next positions of the filter; the state is written in place, which counts as a write."""
    fused = fused_activation(x, activation)
    operands = x.contiguous(), conv_state, weight.contiguous(), None if bias is None else bias.contiguous()
    rows = None if rows is None else rows.long().contiguous()
    y: Tensor = _UPDATE(*operands, rows, ACTIVATION_CODES[fused], not settings.is_precise())
    if not torch.compiler.is_compiling():  # a compiled graph is functional and writes the state back by a copy_
        torch.autograd.graph.increment_version(conv_state)
    if fused == activation:
        return y
    y = activate(y, activation)
    return y if rows is None else y.masked_fill((rows < 0).unsqueeze(1).unsqueeze(2), 0)


_UPDATE = raw_op("causal_update", lambda a: a.x.new_empty(a.x.shape))
_FIXUP = raw_op("causal_fixup_boundaries", lambda a: None)
