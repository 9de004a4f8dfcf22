"""The techniques, each a vertical slice of its own file, and the one list of them."""

from omniconv.ops.technique import Cost, Operand, Peer, Stage, Technique
from omniconv.problem import Problem
from omniconv.techniques import (
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

__all__ = ["TECHNIQUES", "Cost", "Operand", "Peer", "Stage", "Technique", "find", "parse"]


def find(name: str) -> Technique:
    """The technique of that name.

    Raises:
        ValueError: There is none.
    """
    for technique in TECHNIQUES:
        if technique.name == name:
            return technique
    raise ValueError(f"technique: the name must be one of {', '.join(t.name for t in TECHNIQUES)}, got {name!r}")


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
