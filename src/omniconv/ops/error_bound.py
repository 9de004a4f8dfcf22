"""Pieces of the derived error bounds that the technique records carry.

    |y − y64| ≤ γ(t)·Σ|w̃||x| + …,   γ(t) = t·u / (1 − t·u)

t terms are summed with unit roundoff u (Higham 2002, "Accuracy and Stability of Numerical Algorithms", ch. 3–4). A technique's
``bound(u, operands, arguments)`` returns the part that comes before the result is rounded to its own dtype.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from omniconv.ops.activation import ACTIVATIONS


def gamma(terms: int, u: float) -> float:
    """Relative error of a sum of ``terms`` products, in any order of summation.

    >>> round(gamma(10, 2.0**-24) * 2**24, 3)
    10.0
    """
    return terms * u / (1 - terms * u)


def magnitude(value: Tensor | None) -> Tensor | None:
    """|value|, None for None."""
    return None if value is None else value.abs()


def linear_error(
    convolve: Callable[..., Tensor], u: float, terms: int, x: Tensor, x_error: Tensor | float, *weights: Tensor | None
) -> Tensor:
    """Error of ``convolve(x, *weights)``, linear in x and in the weights, given the error that x comes with.

    ``convolve(e, |weight|, None)`` propagates; γ·``convolve(|x| + e, |weight|, |bias|)`` is made here.
    """
    absolute = [magnitude(w) for w in weights]
    made = gamma(terms, u) * convolve(x.abs() + x_error, *absolute)
    if not isinstance(x_error, Tensor):
        return made
    return made + convolve(x_error, absolute[0], *(None for _ in absolute[1:]))


def activation_error(y: Tensor, error: Tensor, activation: str | None, u: float) -> Tensor:
    """Error of ``activation(y)`` given that of y, the value before it."""
    if activation is None:
        return error
    known = ACTIVATIONS[activation]
    return known.slope * error + known.ulps * u * torch.clamp(y.abs(), min=1.0)
