"""Inputs, derived error bounds and the check against the reference, for tests, benchmarks and the command line alike."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omniconv.problem import Problem
from omniconv.techniques import Operand, Technique

_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24}


def _filled(operand: Operand, fill: str, generator: torch.Generator) -> Tensor:
    shape = operand.shape
    if fill == "integers":
        low, high = {"normal": (-3, 3), "unit": (0, 1), "offset": (-2, 2)}[operand.fill]
        return torch.randint(low, high + 1, shape, generator=generator).double()
    if operand.fill == "unit":
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * (2 if operand.fill == "offset" else 1)


def make_inputs(technique: Technique, problem: Problem, *, fill: str = "normal", seed: int = 0) -> dict[str, Tensor]:
    """Operands of a problem in its dtype and memory format, the same for the same seed.

    Args:
        technique: Whose op they are for.
        problem: What they are for.
        fill: "normal", or "integers": small whole numbers whose sums every dtype of 24 bits or more holds exactly.
        seed: Of the random numbers.

    >>> from omniconv.techniques import parse
    >>> {name: tuple(x.shape) for name, x in make_inputs(*parse("depthwise1d c2 i5 k3")).items()}
    {'input': (1, 2, 5), 'weight': (2, 1, 3), 'bias': (2,)}
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: _filled(o, fill, generator).to(problem.torch_dtype) for name, o in technique.operands(problem).items()}
    if problem.channels_last and problem.rank > 1:
        form = torch.channels_last if problem.rank == 2 else torch.channels_last_3d
        inputs["input"] = inputs["input"].to(memory_format=form)
    return inputs


def widened(operands: Mapping[str, Any]) -> dict[str, Any]:
    """The same operands with every floating tensor in float64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in operands.items()}


def error_bound(technique: Technique, operands: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The float64 reference and how far an operator's result in ``dtype`` may lie from it, element by element.

    The technique's own bound (sums in float32 for half types), plus one rounding to ``dtype``, plus one smallest normal number per
    term. float64 is compared with twice the bound, since the reference errs too.

    Args:
        technique: Whose op.
        operands: Its keyword arguments, tensors and settings.
        dtype: Of the result.
    """
    wide = widened(operands)
    expected = technique.reference(**wide)
    made = technique.bound(_ROUNDOFF[dtype], **wide)
    kind = torch.finfo(dtype)
    accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    terms = max(v[0].numel() for v in wide.values() if isinstance(v, Tensor) and v.dim() and len(v)) + 1
    allowed = made + kind.eps * expected.abs() + terms * accumulator.tiny + kind.tiny * kind.eps
    return expected, 2 * allowed if dtype == torch.float64 else allowed


def assert_within_bound(technique: Technique, operands: Mapping[str, Any], y: Tensor) -> float:
    """Checks a result against the reference; returns the largest error as a share of the bound.

    Raises:
        AssertionError: A number lies outside the bound; the message names the worst position.
    """
    expected, allowed = error_bound(technique, operands, y.dtype)
    if y.shape != expected.shape:
        raise AssertionError(f"{technique.name}: the shape must be {tuple(expected.shape)}, got {tuple(y.shape)}")
    if y.numel() == 0:
        return 0.0
    largest = torch.finfo(y.dtype).max
    overflow = (expected.abs() + allowed > largest) & y.isinf() & (y.double().sign() == expected.sign())
    share = ((y.double() - expected).abs() / allowed).masked_fill(overflow, 0.0)
    worst = int(share.nan_to_num(nan=math.inf).argmax())
    if not share.flatten()[worst] <= 1:
        raise AssertionError(
            f"{technique.name}: every error must stay under its bound, got {share.flatten()[worst]:.3g} of it at index {worst}: "
            f"{y.flatten()[worst].item()!r} for {expected.flatten()[worst].item()!r}"
        )
    return float(share.flatten()[worst])


def assert_matches_reference(technique: Technique, problem: Problem, operands: Mapping[str, Tensor]) -> float:
    """Runs the op on the operands and checks the result; returns the largest error as a share of the bound.

    Raises:
        AssertionError: The op is outside its bound.

    >>> from omniconv.techniques import parse
    >>> technique, problem = parse("standard2d c4-8 i6 k3 psame")
    >>> assert_matches_reference(technique, problem, make_inputs(technique, problem)) < 1
    True
    """
    y = technique.call(problem, operands)
    return assert_within_bound(technique, {**operands, **technique.arguments(problem)}, y)
