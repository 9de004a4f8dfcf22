"""Calls that one convolution of torch serves whole, told by the cheapest look that can tell them.

What torch refuses, it is asked again by the checked path, whose errors have names. A drop-in so costs little more than torch's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omniconv.engines.engine import CallPlan, is_transformed
from omniconv.geometry import LARGEST, Grid
from omniconv.layout import arrange, is_channels_last_quickly
from omniconv.ops.activation import activate
from omniconv.ops.grid import convolve
from omniconv.ops.operator import finalize_output

_PLAIN = frozenset((Tensor, torch.nn.Parameter))  # subclasses have ways of their own
_SERVED = frozenset((torch.float32, torch.float64))
_INTS = {rank: [int] * rank for rank in (1, 2, 3)}  # 1 is equal to True and 1.0, which are refused
_CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


def run_aten(function: Callable[..., Tensor], rank: int, input: Any, weight: Any, bias: Any, *settings: Any) -> Tensor | None:
    """Returns ``function(input, weight, bias, *settings)`` where that is all of a call, or None where more must be looked at.

    Settings are ints, or tuples with one for each axis.
    """
    for value in settings:
        if type(value) is tuple and [*map(type, value)] == _INTS[rank]:
            value = max(value)
        if type(value) is not int or value > LARGEST:
            return None
    return run_aten_checked(function, rank, input, weight, bias, *settings)


def run_aten_checked(
    function: Callable[..., Tensor], rank: int, input: Any, weight: Any, bias: Any, *settings: Any
) -> Tensor | None:
    """Returns what :func:`run_aten` does, for settings that a layer has checked when it was made."""
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()  # sizes would be tensors
        or type(input) not in _PLAIN
        or type(weight) not in _PLAIN
        or input.dtype not in _SERVED
        or not (input.is_cpu and weight.is_cpu)
        or not (input.layout is weight.layout is torch.strided)
        or not (bias is None or (type(bias) in _PLAIN and bias.is_cpu))
        or torch._C._is_any_autocast_enabled()  # of one device it takes three times as long to ask
        or is_transformed()
    ):
        return None
    try:
        shape, contiguous = input.shape, input.is_contiguous()
        axes = len(shape)
        if axes != rank + 2 and (axes != rank + 1 or not contiguous):
            return None
        if 0 in shape or (shape[-1 - rank] == 1 and 1 in (input.stride(-1 - rank), *weight.stride()[:2])):
            return None  # one channel in strides that could be channels-last, for some of which torch is silently wrong
        y = function(input, weight, bias, *settings)
    except (RuntimeError, TypeError, ValueError):
        return None
    if contiguous:
        return y.contiguous()
    last = is_channels_last_quickly(input)
    return y if last and is_channels_last_quickly(y) else arrange(y, last)


def plan_convolution(x: Tensor, windows: Grid, groups: int) -> CallPlan:
    """Returns the plan of a call with a batch axis that passed its checks and ends in torch's convolution."""
    even = all(before == after for before, after in windows.pads)
    if x.dtype not in _SERVED or x.shape[1] == 1 or windows.mode != "zeros" or not even:
        return CallPlan(_run_composite, (windows, groups))
    return CallPlan(_run_whole, (windows.stride, tuple(before for before, _ in windows.pads), windows.dilation, groups))


def _run_whole(settings: Any, activation: str | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    last = is_channels_last_quickly(x)
    y = activate(_CONVOLUTIONS[x.dim() - 2](x, weight, bias, *settings), activation)
    return y if last and is_channels_last_quickly(y) else arrange(y, last)


def _run_composite(settings: tuple[Grid, int], activation: str | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return finalize_output(x, x.dim() - 2, convolve, (x, weight, bias), *settings, activation=activation)


def run_aten_convolution(
    rank: int, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any, checked: bool = False
) -> Tensor | None:
    """Returns the convolution by :func:`run_aten`, or None, as with a group for each channel, which torch is slow at."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or type(groups) is not int:  # a tracer's sizes are tensors
        return None
    if groups != 1 and (type(weight) not in _PLAIN or weight.dim() != rank + 2 or weight.size(1) == 1):
        return None
    if type(padding) is str:
        padding = _even_pads(padding, rank, weight, dilation)
        if padding is None:
            return None
    run = run_aten_checked if checked else run_aten
    return run(_CONVOLUTIONS[rank], rank, input, weight, bias, stride, padding, dilation, groups)


def _even_pads(padding: str, rank: int, weight: Any, dilation: Any) -> Any:
    """Returns the pads of "same" and "valid" where both sides have as many, else None."""
    if padding == "valid":
        return 0
    steps = dilation if type(dilation) is tuple else (dilation,) * rank
    if padding != "same" or [*map(type, steps)] != _INTS[rank] or type(weight) not in _PLAIN or weight.dim() != rank + 2:
        return None
    pads = [d * (k - 1) for k, d in zip(weight.shape[2:], steps, strict=True)]
    return None if any(pad % 2 for pad in pads) else tuple(pad // 2 for pad in pads)


def run_aten_pointwise(rank: int, input: Any, weight: Any, bias: Any, stride: Any, checked: bool = False) -> Tensor | None:
    """Returns the pointwise convolution by :func:`run_aten`, or None, as where the kernel is not 1 on every axis."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or type(weight) not in _PLAIN or weight.dim() != rank + 2:
        return None
    if weight.numel() != weight.size(0) * weight.size(1):
        return None
    return (run_aten_checked if checked else run_aten)(_CONVOLUTIONS[rank], rank, input, weight, bias, stride)
