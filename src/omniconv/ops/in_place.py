"""Checks of operands that an operator writes."""

import torch
from torch import Tensor

from omniconv.ops.operator import fail


def check_writable(op: str, name: str, written: Tensor) -> None:
    """Raises ValueError unless every number of a tensor can be written where it lies."""
    if written.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} must not require a gradient, since it is written in place, got one that does")
    if _is_overlapping(written):
        fail(
            op,
            f"{name} must have a place in memory for every number, since it is written in place",
            f"shape {tuple(written.shape)} with strides {written.stride()}",
        )
    if torch.compiler.is_compiling():
        return
    if written.is_neg() or written.is_conj():
        fail(op, f"{name} must hold its numbers as they are, since it is written in place", "a negative or conjugate view")
    if written.is_inference() and not torch.is_inference_mode_enabled():
        must = "must not be an inference tensor outside inference mode, since it is written in place"
        fail(op, f"{name} {must}", "one")


def _is_overlapping(x: Tensor) -> bool:
    """Whether two numbers of a tensor have the same place in memory; of a traced one, whether an axis is expanded."""
    axes = [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    if any(stride == 0 for stride, _ in axes):
        return True
    if torch.compiler.is_compiling():  # to compare strides would pin the sizes that are being traced
        return False
    reach, nested = 0, True
    for stride, size in sorted(axes):
        nested = nested and stride > reach
        reach += stride * (size - 1)
    if nested or x.numel() == 0:  # a step along an axis passes over all that the faster axes reach
        return False
    if x.numel() > reach + 1:
        return True
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in axes:
        places = (places.unsqueeze(1) + stride * torch.arange(size, device="cpu")).flatten()
    return places.unique().numel() < places.numel()
