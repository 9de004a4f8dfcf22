"""The graphs of one network at several sizes of its input: which axes grow, and how fast."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from omniconv.analysis.receptive_field.graph import Graph, Inputs, Value, record

FACTORS = (65, 17, 5, 3, 2)  # how much larger the input is made to find the field that no border cuts

_SMALL = (3, 2)


class Traced:
    """Graphs of one network at several sizes of its input."""

    def __init__(self, module: Callable[..., Any], inputs: Inputs, of: int | str, wrt: int, axes: Sequence[int] | None) -> None:
        self.module, self.inputs, self.of = module, inputs, of
        tensors = [x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor)]
        if not tensors:
            raise ValueError("receptive_field: an example input must be a tensor, got none")
        self.examples, self.wrt = tensors, wrt % max(len(tensors), 1)
        self.shapes = [tuple(x.shape) for x in tensors]
        if not -len(tensors) <= wrt < len(tensors):
            raise ValueError(f"receptive_field: wrt must name one of {len(tensors)} input tensors, got {wrt}")
        shape = self.shapes[wrt]
        space = tuple(range(2 if len(shape) > 2 else 1, len(shape)))
        self.axes = space if axes is None else tuple(a % len(shape) for a in axes)
        self.real = False
        self.notes: list[str] = []
        self.base = self._first()
        self.failure = ""
        self._single: list[Graph | None] = []
        self.factor, self.larger = self.enlarged(self.axes)

    def _first(self) -> Graph:
        try:
            return record(self.module, self.inputs, self.of, self.shapes, real=False)
        except ValueError as error:
            if str(error).startswith("receptive_field:"):
                raise
            failure: Exception = error
        except Exception as error:  # whatever a network raises on tensors without data
            failure = error
        self.real = True
        self.notes.append(f"run with data: on tensors without it raises {_one_line(failure)}")
        return record(self.module, self.inputs, self.of, self.shapes, real=True)

    def enlarged(self, axes: Sequence[int], factors: Sequence[int] = FACTORS) -> tuple[int, Graph | None]:
        """The graph of an input whose axes are longer, by the first factor that the network takes; or why there is none."""
        for factor in factors:
            if self.real and factor > 3:
                continue
            shapes = [self._scaled(shape, axes, factor) for shape in self.shapes]
            try:
                graph = record(self.module, self.inputs, self.of, shapes, self.real)
            except Exception as error:  # a network may refuse other sizes, with any exception
                self.failure = f"it raises {_one_line(error)}"
                continue
            if [n.op for n in graph.nodes] == [n.op for n in self.base.nodes]:
                return factor, graph
            self.failure = "it runs other ops"
        return 1, None

    def _scaled(self, shape: tuple[int, ...], axes: Sequence[int], factor: int) -> tuple[int, ...]:
        given = self.shapes[self.wrt]
        if len(shape) != len(given) or any(shape[a] != given[a] for a in axes):
            return shape
        return tuple(n * factor if a in axes else n for a, n in enumerate(shape))

    def grown(self, value: Value) -> list[int]:
        """The axes of a value, of whichever graph, that are longer in a larger input."""
        return [] if self.larger is None else self._longer(value, self.larger)

    def _longer(self, value: Value, larger: Graph) -> list[int]:
        sizes = self.base.values[value.number].shape, larger.values[value.number].shape
        return [a for a, (n, m) in enumerate(zip(*sizes, strict=True)) if n != m]

    def grows_along(self, value: Value, axes: Sequence[int]) -> list[int]:
        """Which axes of the input (by their place among those of space) any of these axes of a value grows with."""
        grown = self.grown(value)
        hit = [a for a in axes if a in grown]
        if len(grown) == len(self.axes) or not hit:
            return [grown.index(a) for a in hit]
        if not self._single:  # one axis of the input at a time
            self._single = [self.enlarged((a,), _SMALL)[1] for a in self.axes]
        return [i for i, graph in enumerate(self._single) if graph is None or set(self._longer(value, graph)) & set(hit)]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
