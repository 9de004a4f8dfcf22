"""The native pointwise engine: which calls it takes, its raw op as torch sees it, and its gradient.

The arithmetic, a matrix product whose columns do not know of each other, is in ``csrc/kernels/gemm.kernel.cpp``.
"""

from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from omniconv import _native, settings
from omniconv.engines.depthwise import ACTIVATION_CODES, fused_activation, is_transformed, wants_gradient
from omniconv.engines.plan_cache import Calls
from omniconv.ops.activation import activate
from omniconv.ops.operator import accumulated_in
from omniconv.ops.technique import Engine

Shape = Sequence[int]

# in order; the first that holds sends a call to the composite path
REFUSALS: tuple[tuple[str, Callable[[Tensor], bool]], ...] = (
    ("the native library is not there", lambda x: not _native.AVAILABLE),
    ("composite paths were asked for", lambda x: settings.is_composite_only()),
    ("the tensors are not on the CPU", lambda x: x.device.type != "cpu"),
    ("there are no channels or no samples", lambda x: x.shape[1] == 0 or x.shape[0] == 0),
    ("a torch.func transform or forward-mode differentiation is active", lambda x: is_transformed()),
)

ENGINE = Engine("pointwise", "there is one spatial axis", tuple(reason for reason, _ in REFUSALS))


def refusal(x: Tensor) -> str | None:
    """Why the engine does not take a call over one axis; None where it does."""
    for reason, holds in REFUSALS:
        if holds(x):
            return reason
    return None


_steps = Calls[int]()


def known_step(key: Hashable) -> int | None:
    """The stride of a call that :func:`remember_step` was told of; None for any other."""
    return _steps.find(key)


def remember_step(key: Hashable, x: Tensor, step: int) -> None:
    """Notes a call that passed its checks and that the engine takes; ``key`` is its ``call_key``, if it has one."""
    if key is None or x.dim() != 3:
        return
    _steps.note(key, step)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, step: int = 1) -> Tensor:
    """activation(bias[o] + Σ_c weight[o, c, 0] · x[n, c, t·step]), checked and not refused, as a contiguous (N, O, T).

    ``x`` may have any strides and is not copied. A position has the same bits whatever comes with it.
    """
    x = x if step == 1 else x[:, :, ::step]
    if wants_gradient(x, weight, bias):
        return activate(_Pointwise.apply(x, weight, bias, not settings.is_precise()), activation)
    fused = fused_activation(x, activation)
    y = _FORWARD(x, weight, bias, ACTIVATION_CODES[fused], not settings.is_precise())
    return y if fused is activation else activate(y, activation)


class _Pointwise(torch.autograd.Function):
    """The raw op under autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, flush: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.flush = flush
        return _FORWARD(x, weight, bias, 0, flush)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_y = grad_y.contiguous()  # of a sum it is one number in all strides, which are slow to read
        product = _differentiable if torch.is_grad_enabled() else _FORWARD  # enabled: the gradient of this gradient is wanted
        grad_x = product(grad_y, weight.transpose(0, 1), None, 0, ctx.flush) if of_x else None
        grad_weight = None
        if of_weight:
            # over samples and positions in a row: (O, N·T) and (C, N·T), copied where there are several samples
            outer, inner = (t.transpose(0, 1).reshape(t.shape[1], -1) for t in (grad_y, x))
            grad_weight = product(inner.t().unsqueeze(0), outer.unsqueeze(2), None, 0, ctx.flush).squeeze(0).unsqueeze(2)
        grad_bias = grad_y.sum((0, 2), dtype=accumulated_in(x)).to(x.dtype) if of_bias else None
        return grad_x, grad_weight, grad_bias, None


def _differentiable(x: Tensor, weight: Tensor, bias: None, activation: int, flush: bool) -> Tensor:
    """The raw op without bias or activation, as torch's own product."""
    wide = accumulated_in(x)
    return torch.matmul(weight.squeeze(2).to(wide), x.to(wide)).to(x.dtype)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, flush: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], x.shape[2]))


if _native.AVAILABLE:
    torch.library.register_fake("omniconv::pointwise", _fake_forward)
    _FORWARD = torch.ops.omniconv.pointwise.default  # bound once: to look an op up costs a microsecond

    @register_flop_formula(torch.ops.omniconv.pointwise)
    def _forward_flops(x: Shape, weight: Shape, *settings: Any, out_shape: Shape, **_: Any) -> int:
        return 2 * prod(out_shape) * weight[1]
