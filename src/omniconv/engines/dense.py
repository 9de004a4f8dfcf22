"""The native dense engine: products over the channels of one position, its raw operator as torch sees it, and its gradient.

The arithmetic, a matrix product whose columns do not know of each other, is in ``csrc/kernels/gemm.kernel.cpp``.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omniconv.engines.engine import Engine, raw_op
from omniconv.ops.operator import accumulated_in
from omniconv.ops.reference import with_bias


class _Plan(NamedTuple):
    mode: int = 0


class _PointwiseEngine(Engine):
    def forward(self, plan: _Plan, activation: int, flush: bool, *operands: Any) -> Tensor:
        x, weight, bias = operands
        y: Tensor = _FORWARD(x, weight, bias, activation, flush)
        return y

    def gradients(
        self, plan: _Plan, flush: bool, grad_y: Tensor, needed: Sequence[bool], *operands: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, _ = operands
        of_x, of_weight, of_bias = needed
        grad_y = grad_y.contiguous()  # of a sum it is one number in all strides, which are slow to read
        grad_x = _FORWARD(grad_y, weight.transpose(0, 1), None, 0, flush) if of_x else None
        grad_weight = None
        if of_weight:
            # over samples and positions in a row: (O, N·T) and (C, N·T), copied where there are several samples
            outer, inner = (t.transpose(0, 1).reshape(t.shape[1], -1) for t in (grad_y, x))
            grad_weight = _FORWARD(inner.t().unsqueeze(0), outer.unsqueeze(2), None, 0, flush).squeeze(0).unsqueeze(2)
        grad_bias = grad_y.sum((0, 2), dtype=accumulated_in(x)).to(x.dtype) if of_bias else None
        return grad_x, grad_weight, grad_bias

    def composite(self, plan: _Plan, *operands: Any) -> Tensor:
        x, weight, bias = operands
        return with_bias(torch.matmul(weight.squeeze(2), x), bias)


ENGINE = _PointwiseEngine("pointwise", "there is one spatial axis", padded=False)


def run_pointwise(step: int, activation: str | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns activation(bias[o] + Σ_c weight[o, c, 0] · x[n, c, t·step]), checked and supported, as a contiguous (N, O, T).

    ``x`` may have any strides and is not copied. A position has the same bits whatever comes with it.
    """
    return ENGINE.run_native(_Plan(), activation, x if step == 1 else x[:, :, ::step], weight, bias)


_FORWARD = raw_op(
    "pointwise",
    lambda a: a.x.new_empty((a.x.shape[0], a.weight.shape[0], a.x.shape[2])),
    lambda a, y: 2 * prod(y) * a.weight[1],
)
