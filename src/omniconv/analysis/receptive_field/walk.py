"""Counts carried from one output of a graph back to an input."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omniconv.analysis.receptive_field import deformable, mixing, moves, windows  # noqa: F401  # importing them registers their rules
from omniconv.analysis.receptive_field.graph import Graph, Node, Value
from omniconv.analysis.receptive_field.rules import NORMALISATIONS, Parts, carried_back
from omniconv.analysis.receptive_field.seen import Seen


class Walk:
    """Counts carried from one output back to the inputs, and what was met on the way."""

    def __init__(self, graph: Graph, grows: Callable[[Value, Sequence[int]], bool] | None = None) -> None:
        self.graph, self.grows = graph, grows
        self.cuts: list[tuple[Value, int]] = []
        self.mixing: list[tuple[Node, Value, tuple[int, ...]]] = []
        self.unknown: list[tuple[Node, str]] = []
        self.least: list[tuple[Node, str]] = []
        self.met: set[int] = set()

    def left(self, node: Node, axis: int) -> None:
        """Windows reach beyond the border along an axis of their input."""
        self.cuts.append((node["input"] or node["self"], axis))

    def mixed(self, node: Node, value: Value, axes: Sequence[int]) -> None:
        """Every element along these axes of an operand is seen as soon as one is."""
        self.mixing.append((node, value, tuple(axes)))

    def not_understood(self, node: Node, why: str) -> None:
        """The op has operands that it may see, and no rule that says what."""
        self.unknown.append((node, why))

    def lower_bound(self, node: Node, why: str) -> None:
        """What the op carries back is the least that it may see."""
        self.least.append((node, why))

    def back(self, seen: Seen, target: Value, source: Value) -> Seen | None:
        """From counts of one value to counts of an input."""
        counts = {target.number: seen}
        for node in reversed(self.graph.nodes):
            for slot, output in enumerate(node.outputs):
                if output is None or output.number not in counts:
                    continue
                up = counts.pop(output.number)
                self.met.add(output.number)
                for operand, part in self._near(node, slot, up):
                    if operand.depends and not part.empty:
                        before = counts.get(operand.number)
                        counts[operand.number] = part if before is None else before.plus(part)
        return counts.get(source.number)

    def _near(self, node: Node, slot: int, up: Seen) -> Parts:
        """What the node's rule carries back; without what mixes all of a growing axis, if the walk is told which those are."""
        before = len(self.mixing)
        for operand, part in carried_back(node, slot, up, self):
            mixes = self.grows is not None and any(self.grows(v, axes) for _, v, axes in self.mixing[before:])
            if not mixes:
                yield operand, part
            elif node.op.removeprefix("aten::") in NORMALISATIONS and operand.shape == up.shape:
                yield operand, up


@dataclass(frozen=True)
class Box:
    """Paths over the spatial axes of the input."""

    start: tuple[int, ...]
    paths: NDArray[np.float64]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The positions with a path."""
        return self.paths > 0


def box_of(seen: Seen | None, axes: Sequence[int], batch: bool) -> Box:
    """Counts of an input over its spatial axes: the mean of its channels, the sum over its batch if axis 0 is one."""
    if seen is None:
        return Box((0,) * len(axes), np.zeros((0,) * len(axes)))
    seen = seen.boxed(*axes).trimmed()
    others = [a for a in range(len(seen.shape)) if a not in axes]
    counts = seen.counts
    for a in others:
        if not seen.constant[a]:
            counts = counts.sum(a, keepdims=True) / (1 if a == 0 and batch else seen.shape[a])
    if seen.exponent:
        counts = np.where(counts > 0, np.maximum(np.ldexp(counts, min(seen.exponent, 400)), 1e-300), 0.0)
    return Box(tuple(seen.start[a] for a in axes), counts.transpose([*axes, *others]).reshape([counts.shape[a] for a in axes]))
