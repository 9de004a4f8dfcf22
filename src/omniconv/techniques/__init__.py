"""The techniques, each a vertical slice of its own file, and the one list of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from omniconv.ops.technique import Cost, Operand, Peer, Stage, Technique
from omniconv.problem import Problem
from omniconv.techniques import (
    causal,
    deformable,
    depthwise,
    depthwise_separable,
    dilated,
    dynamic,
    grouped,
    lightweight,
    pointwise,
    separable,
    standard,
    transposed,
)

TECHNIQUES: tuple[Technique, ...] = (
    standard.TECHNIQUE,
    dilated.TECHNIQUE,
    transposed.TECHNIQUE,
    separable.TECHNIQUE,
    depthwise.TECHNIQUE,
    pointwise.TECHNIQUE,
    depthwise_separable.TECHNIQUE,
    grouped.TECHNIQUE,
    deformable.TECHNIQUE,
    lightweight.TECHNIQUE,
    dynamic.TECHNIQUE,
)

# not techniques: depthwise convolutions whose arguments have other names, for the cost of their calls
_STATEFUL_OPS: tuple[Callable[..., Any], ...] = (causal.causal_conv1d_fn, causal.causal_conv1d_update)
_STATEFUL = tuple(replace(depthwise.TECHNIQUE, ops={1: op}, problem=causal.problem) for op in _STATEFUL_OPS)

__all__ = ["TECHNIQUES", "Cost", "Operand", "Peer", "Stage", "Technique", "find", "find_convolution", "find_op", "parse"]


def find(name: str) -> Technique:
    """The technique of that name.

    Raises:
        ValueError: There is none.
    """
    for technique in TECHNIQUES:
        if technique.name == name:
            return technique
    raise ValueError(f"technique: the name must be one of {', '.join(t.name for t in TECHNIQUES)}, got {name!r}")


def find_op(op: Callable[..., Any]) -> tuple[Technique, int]:
    """Returns the record of an op and the number of its axes: the first in the list where techniques share one.

    >>> from omniconv.functional import grouped_conv2d
    >>> technique, rank = find_op(grouped_conv2d)
    >>> technique.name, rank
    ('standard', 2)

    Raises:
        ValueError: It is no op of :mod:`omniconv.functional`.
    """
    for technique in (*TECHNIQUES, *_STATEFUL):
        for rank, known in technique.ops.items():
            if known is op:
                return technique, rank
    raise ValueError(f"technique: the op must be one of omniconv.functional, got {op!r}")


def find_convolution(stage: Stage) -> Technique:
    """Returns the technique by whose name a plain convolution goes.

    >>> find_convolution(Stage("", 8, 8, (5,), (3,), (3,), (1,), ((0, 0),), (1,), groups=8)).name
    'depthwise'
    """
    return next(technique for technique in TECHNIQUES if technique.names_convolution(stage))


def parse(text: str) -> tuple[Technique, Problem]:
    """The technique and the problem that a line of text describes, checked against each other.

    Raises:
        ValueError: The text is malformed, names no technique, or asks for what the technique does not take.

    >>> technique, problem = parse("depthwise2d c32 i112 k3 psame")
    >>> technique.output_shape(problem)
    (1, 32, 112, 112)
    """
    problem = Problem.parse(text)
    technique = find(problem.technique)
    return technique, technique.check(problem)
