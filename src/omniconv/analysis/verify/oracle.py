"""Counting without a formula: what is one everywhere sums to the number of its multiply-accumulates.

With weights = 1, input = 1, no bias and float64, every product of a linear convolution is 1, so that the sum of its result *is*
the number of products: those on real inputs where the padding is zeros, all of them where it is ones. Sums below 2⁵³ are exact.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniconv.problem import Problem
from omniconv.techniques import Stage, Technique

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SPREAD: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

FEW = 2**30  # multiply-accumulates that are counted one by one: about a second of one core in float64


def counted(stage: Stage, *, real: bool) -> int:
    """The multiply-accumulates of one sample of a stage, by torch's convolution of ones with ones.

    Beyond 2³⁰ one channel of each group stands for all of them, which are alike.

    Args:
        stage: What to count; only its shapes and windows are read, none of its formulas.
        real: Count the taps that meet a real input and a kept output, rather than all.

    >>> from omniconv.techniques import parse
    >>> technique, problem = parse("standard2d c2-3 i4 k3 p1")
    >>> [counted(stage, real=real) for stage in technique.stages(problem) for real in (False, True)]
    [864, 600]
    """
    alike = 1
    if stage.macs_dense > FEW:
        alike = (stage.in_channels // stage.groups) * (stage.out_channels // stage.groups) * stage.groups
        stage = replace(stage, in_channels=1, out_channels=1, groups=1)
    real = real and stage.padding_mode == "zeros"
    return alike * (_spread(stage, real) if stage.transposed else _convolved(stage, real))


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _convolved(stage: Stage, real: bool) -> int:
    """Over an input whose padding is zeros, or as real as the rest of it."""
    weight = _ones(stage.out_channels, stage.in_channels // stage.groups, *stage.kernel)
    flat = [p for pair in reversed(stage.pads) for p in pair]
    x = F.pad(_ones(1, stage.in_channels, *stage.size), flat, value=0.0 if real else 1.0)
    return int(_CONVOLVE[len(stage.size)](x, weight, None, stage.stride, 0, stage.dilation, stage.groups).sum())


def _spread(stage: Stage, real: bool) -> int:
    """Over all outputs, or those that are kept: what is cropped is never computed."""
    weight = _ones(stage.in_channels, stage.out_channels // stage.groups, *stage.kernel)
    x = _ones(1, stage.in_channels, *stage.size)
    y = _SPREAD[len(stage.size)](x, weight, None, stage.stride, 0, 0, stage.groups, stage.dilation)
    if real:
        for axis, ((before, _), out) in enumerate(zip(stage.pads, stage.out, strict=True), start=2):
            y = y.narrow(axis, before, max(min(out, y.shape[axis] - before), 0))
    return int(y.sum())


def ones_of(technique: Technique, problem: Problem) -> dict[str, Tensor]:
    """Operands of the op that are 1 everywhere, in float64: no bias, and offsets of 0, which sample the grid itself."""
    operands = technique.operands(problem).items()
    return {name: _ones(*o.shape) * (0 if o.fill == "offset" else 1) for name, o in operands if name != "bias"}


def summed(technique: Technique, problem: Problem) -> int:
    """What the op itself makes of ones, summed: it does what is counted.

    >>> from omniconv.techniques import parse
    >>> summed(*parse("depthwise1d n2 c3 i5 k3 p1"))
    78
    """
    with torch.no_grad():
        return int(technique.call(problem, ones_of(technique, problem), **technique.linear).sum())


def gradient_sums(technique: Technique, problem: Problem) -> dict[str, int]:
    """The same of the gradient of every factor: the input and the weights, for an incoming gradient of ones.

    Each product of the forward pass is one product of the gradient of either factor, so that each sums to as many.

    >>> from omniconv.techniques import parse
    >>> gradient_sums(*parse("depthwise1d n2 c3 i5 k3 p1"))
    {'input': 78, 'weight': 78}
    """
    operands = {name: x.requires_grad_() for name, x in ones_of(technique, problem).items()}
    with torch.enable_grad():
        y = technique.call(problem, operands, **technique.linear)
    factors = [name for name, operand in technique.operands(problem).items() if operand.fill != "offset" and name in operands]
    found = torch.autograd.grad(y.sum(), [operands[name] for name in factors])
    return {name: int(g.sum()) for name, g in zip(factors, found, strict=True)}


def roomy(problem: Problem, field: tuple[int, ...]) -> Problem:
    """The same windows over an input in which no border cuts the field of the outputs in the middle."""
    size = tuple(2 * f + 3 * s + 4 for f, s in zip(field, problem.stride, strict=True))
    return problem.replace(size=size, batch=1, dtype="f64", channels_last=False)


def reach(technique: Technique, problem: Problem, position: tuple[int, ...]) -> Tensor:
    """Where the gradient of one output is not zero, over the positions of the input."""
    operands = {name: x.requires_grad_(name == "input") for name, x in ones_of(technique, problem).items()}
    with torch.enable_grad():
        y = technique.call(problem, operands, **technique.linear)
    at: Any = (0, 0, *position)
    (support,) = torch.autograd.grad(y[at], operands["input"])
    return support[0].abs().sum(0) != 0


def seen(technique: Technique, problem: Problem, field: tuple[int, ...]) -> tuple[int, ...]:
    """The input positions from the first to the last that a gradient reaches, on every axis, from an output inside a large input.

    Of all phases of a stride the widest counts: neighbouring outputs of a transposed convolution differ in what they see.

    Args:
        technique: Whose op.
        problem: Its windows; size, batch and dtype are set here.
        field: What is expected, so that the input is large enough to hold more.

    >>> from omniconv.techniques import parse
    >>> seen(*parse("dilated1d c1 i9 k3 d2"), field=(5,))
    (5,)
    """
    wide = roomy(problem, field)
    operands = {name: x.requires_grad_(name == "input") for name, x in ones_of(technique, wide).items()}
    with torch.enable_grad():
        y = technique.call(wide, operands, **technique.linear)
    middle = tuple(n // 2 for n in y.shape[2:])
    widest = [0] * wide.rank
    for shift in product(*map(range, wide.stride)):
        at: Any = (0, 0, *(min(i, n - 1) for i, n in zip(map(add, middle, shift), y.shape[2:], strict=True)))
        (support,) = torch.autograd.grad(y[at], operands["input"], retain_graph=True)
        touched = support[0].abs().sum(0).nonzero()
        if len(touched):
            extent = (touched.max(0).values - touched.min(0).values + 1).tolist()
            widest = [max(a, b) for a, b in zip(widest, extent, strict=True)]
    return tuple(widest)
