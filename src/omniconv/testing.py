"""Inputs, derived error bounds and the check against the reference, for tests, benchmarks and the command line alike."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.ops.layer import Layer
from omniconv.problem import Problem
from omniconv.techniques import Operand, Technique, find

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


@dataclass(frozen=True)
class LayerCall:
    """One call of an omniconv layer: the operands that it gave to its op, and what came out."""

    layer: Layer
    operands: dict[str, Any]
    y: Tensor

    @property
    def technique(self) -> Technique:
        """The technique whose op it called."""
        return find(self.layer.technique)


def layer_calls(module: nn.Module, *inputs: Tensor) -> tuple[LayerCall, ...]:
    """Runs a module without gradients and records the call of every omniconv layer in it, the module itself included."""
    calls: list[LayerCall] = []
    asking = False  # a layer that owns another runs it to know its operands

    def record(layer: nn.Module, seen: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal asking
        if asking or not isinstance(layer, Layer):
            return
        asking = True
        try:
            calls.append(LayerCall(layer, layer.operands(*seen), y))
        finally:
            asking = False

    hooks = [m.register_forward_hook(record) for m in module.modules() if isinstance(m, Layer)]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(calls)


def verify_layer(module: nn.Module, *inputs: Tensor) -> float:
    """Checks what every omniconv layer in a module makes of these inputs; returns the largest error as a share of its bound.

    For layers that do no more than their op, in evaluation mode: a shuffle or a normalisation is not in the reference.

    Raises:
        AssertionError: A layer is outside its bound, or there is none.

    >>> from omniconv.nn import Conv2d
    >>> verify_layer(Conv2d(2, 4, 3), torch.ones(1, 2, 5, 5)) < 1
    True
    """
    calls = layer_calls(module, *inputs)
    if not calls:
        raise AssertionError(f"{type(module).__name__}: the module must hold an omniconv layer, got none")
    with torch.no_grad():
        return max(assert_within_bound(call.technique, call.operands, call.y) for call in calls)


def _gradients(op: Any, operands: Mapping[str, Any], grad_y: Tensor) -> dict[str, Tensor]:
    """The gradient of every floating operand that the result depends on."""
    operands = {k: v.detach().requires_grad_() if _is_floating(v) else v for k, v in operands.items()}
    leaves = {k: v for k, v in operands.items() if _is_floating(v)}
    with torch.enable_grad():
        y = op(**operands)
    found = torch.autograd.grad(y, list(leaves.values()), grad_y.to(y.dtype), allow_unused=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


_NUDGE = 2.0**-20


def _movements(op: Any, operands: Mapping[str, Any], grad_y: Tensor, expected: Mapping[str, Tensor]) -> dict[str, float]:
    """κ of each gradient: how far it moves, in the 1-norm and per relative change, summed over what can change.

    Every number of one operand, or of the incoming gradient, grows or shrinks by the same small share of itself, at random.
    """
    generator = torch.Generator().manual_seed(0)

    def nudged(x: Tensor) -> Tensor:
        return x * (1 + _NUDGE * (2 * torch.randint(0, 2, x.shape, generator=generator) - 1))

    changes = [({**operands, k: nudged(v)}, grad_y) for k, v in operands.items() if _is_floating(v)]
    totals = dict.fromkeys(expected, 0.0)
    for changed, incoming in [*changes, (dict(operands), nudged(grad_y))]:
        for name, g in _gradients(op, changed, incoming).items():
            totals[name] += float((g - expected[name]).abs().sum()) / _NUDGE
    return totals


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def verify_gradients(
    module: nn.Module, *inputs: Tensor, seed: int = 0, references: Mapping[str, Callable[..., Tensor]] | None = None
) -> float:
    """Checks the gradients of every omniconv layer's op against those of its reference in float64; returns the largest share.

    The measure is the 1-norm over a whole gradient, which one position on a kink (offsets that land on a whole number) cannot move:

        ‖g − g64‖₁ ≤ (4·√t·u + eps(dtype)) · max(‖g64‖₁, κ)        t = numbers in the largest of the operands and the result

    where 4·√t·u is the probabilistic growth of rounding errors in sums of t terms (Higham & Mary 2019), eps the rounding to the
    dtype, and κ how far the exact gradient moves per relative change of what it is made of: a gradient that is the small
    difference of large numbers, as that of a softmax can be, is no better determined. The gradient that comes in is between 0.5
    and 1.5, so that sums over it do not cancel.

    Args:
        module: A layer, or what holds some.
        inputs: What it is called with.
        seed: Of the gradient that comes in.
        references: By technique, what to compare with in place of its reference, whose gradients are slow to come by.

    Raises:
        AssertionError: A gradient is outside, missing or of another shape.
    """
    worst = 0.0
    for call in layer_calls(module, *inputs):
        generator = torch.Generator().manual_seed(seed)
        grad_y = (torch.rand(call.y.shape, generator=generator, dtype=torch.float64) + 0.5).to(call.y.dtype)
        made = _gradients(type(call.layer).op, call.operands, grad_y)
        wide = widened(call.operands)
        reference = (references or {}).get(call.technique.name, call.technique.reference)
        expected = _gradients(reference, wide, grad_y.double())
        if made.keys() != expected.keys():
            raise AssertionError(
                f"{call.technique.name}: gradients must reach {', '.join(expected)}, got {', '.join(made) or 'none'}"
            )
        movements = _movements(reference, wide, grad_y.double(), expected)
        terms = max([call.y.numel(), *(g.numel() for g in expected.values())])
        allowed = 4 * math.sqrt(terms) * _ROUNDOFF[call.y.dtype] + torch.finfo(call.y.dtype).eps
        for name, g in expected.items():
            norm = max(float(g.abs().sum()), movements[name])
            error = float((made[name].double() - g).abs().sum())
            share = error / (allowed * norm) if norm else math.inf if error else 0.0
            if not share <= 1:
                raise AssertionError(
                    f"{call.technique.name}: the gradient of {name} must stay under its bound, got {share:.3g} of it"
                )
            worst = max(worst, share)
    return worst
