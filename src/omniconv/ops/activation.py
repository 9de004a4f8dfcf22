"""The activations an operator can apply to its result, with what the error bound needs to know of each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """A function of one number, and what an error bound needs of it.

    ``slope`` bounds |f(a) − f(b)| / |a − b|; ``ulps`` bounds the own error of f, in units of roundoff of max(|a|, 1).
    """

    function: Callable[[Tensor], Tensor]
    slope: float
    ulps: float


ACTIVATIONS = {
    "relu": Activation(F.relu, 1.0, 0.0),
    "relu6": Activation(F.relu6, 1.0, 0.0),
    "silu": Activation(F.silu, 1.1, 8.0),
    "hardswish": Activation(F.hardswish, 1.5, 8.0),
    "gelu": Activation(F.gelu, 1.13, 8.0),
    "sigmoid": Activation(F.sigmoid, 0.25, 8.0),
}


def check_activation(op: str, name: str | None, argument: str = "activation") -> None:
    """Raises ValueError unless ``name`` is None or a known activation."""
    if name is not None and (not isinstance(name, str) or name not in ACTIVATIONS):
        raise ValueError(f"{op}: {argument} must be None or one of {', '.join(ACTIVATIONS)}, got {name!r}")


def activate(x: Tensor, name: str | None) -> Tensor:
    """The activation of that name applied to ``x``; ``x`` itself for None."""
    return x if name is None else ACTIVATIONS[name].function(x)


# sums, products and comparisons, whose bits are the same in a vector and beside it; torch's other functions have two codes
_STEADY = (None, "relu", "relu6", "hardswish")


def followed_apart(name: str | None) -> str | None:
    """Why the bits of torch's activation of one number depend on those around it; None where they do not."""
    return None if name in _STEADY else f"the activation {name!r} is torch's, whose bits depend on the length"
