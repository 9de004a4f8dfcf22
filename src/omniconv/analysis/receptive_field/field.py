"""What one output of a network can see of its input: over the ops that really run, to the last hole."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from math import isqrt, lcm
from typing import Any

import numpy as np
from torch import nn

from omniconv.analysis.receptive_field.graph import Graph, Node, Value
from omniconv.analysis.receptive_field.result import Part, Phase, ReceptiveField, Window
from omniconv.analysis.receptive_field.seen import Seen, TooLargeError
from omniconv.analysis.receptive_field.trace import FACTORS, Traced
from omniconv.analysis.receptive_field.walk import Box, Walk, box_of

MOST_PHASES = 64  # of a period; longer ones are not walked through
_TRIES = 17


def receptive_field(
    module: Callable[..., Any],
    *inputs: Any,
    of: int | str = 0,
    position: Sequence[int] | None = None,
    wrt: int = 0,
    axes: Sequence[int] | None = None,
    named: Mapping[str, Any] | None = None,
    local: bool = False,
) -> ReceptiveField:
    """What one output can see of the input, over the ops that the network runs.

    The network runs once or a few times on tensors without data (its weights are not read, nothing of it is changed), the ops are
    recorded at the dispatcher, and counts of paths are carried from the output back to the input through each of them. Weights and
    masks count as if no number of theirs were zero: behind a causal mask of attention an output seems to see what comes later too.
    Max-pooling sees its whole window. A normalisation or a mean over space makes every output see everything; ask then for a layer
    before it.

    Args:
        module: A module, or any callable of tensors. Its training mode counts: a batch normalisation in training sees the batch.
        inputs: Example inputs; only shapes and dtypes matter, but for indices.
        of: Index of a tensor of the output, or the dotted name of a module inside, whose (first) result is meant.
        position: Which output, one index for every axis of it that grows with the input; the middle one by default.
        wrt: Which of the tensors of the inputs.
        axes: Of that input, those that count as space: all from the third by default, or the last of a matrix.
        named: Inputs that are given by keyword.
        local: Leave out the paths through ops that mix all of an axis which grows with the input, such as the gates of squeeze
            and excitation; a normalisation then counts as elementwise.

    Raises:
        ValueError: There is no such module, output or position.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 3, padding=2, dilation=2))
        >>> field = receptive_field(net, torch.empty(1, 3, 32, 32))
        >>> field.size, field.jump, int(field.mask.sum()), round(field.gridding, 3)
        ((9, 9), (1.0, 1.0), 25, 0.691)

    Source: Araujo, Norris, Sim 2019, Distill, doi:10.23915/distill.00021; gridding: Yu, Koltun, Funkhouser 2017, arXiv:1705.09914,
    Wang et al. 2018, arXiv:1702.08502.
    """
    return question_of(module, inputs, named, of, position, wrt, axes, local).answer()


def receptive_fields(
    module: nn.Module,
    *inputs: Any,
    layers: Sequence[str] | None = None,
    wrt: int = 0,
    axes: Sequence[int] | None = None,
    named: Mapping[str, Any] | None = None,
    local: bool = False,
) -> tuple[ReceptiveField, ...]:
    """The field of what several modules inside return first, in the order in which they do.

    Args:
        module: The network.
        inputs: As for :func:`receptive_field`, and so ``wrt``, ``axes``, ``named`` and ``local``.
        layers: Dotted names; by default the children of the network.

    Raises:
        ValueError: There is no such module.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.MaxPool2d(2), nn.Conv2d(1, 1, 3))
        >>> [(field.of, field.size[0], field.jump[0]) for field in receptive_fields(net, torch.empty(1, 1, 16, 16))]
        [('0', 3, 1.0), ('1', 4, 2.0), ('2', 8, 2.0)]
    """
    names = [name for name, _ in module.named_children()] if layers is None else list(layers)
    check_names(module, names)
    traced = Traced(module, (inputs, dict(named or {})), 0, wrt, axes)
    returned = traced.base.returned
    if layers is not None and (missing := [name for name in names if name not in returned]):
        raise ValueError(f"receptive_field: the module {missing[0]!r} must run and return a tensor, got a pass without it")
    known = [name for name in returned if name in names]
    if traced.larger is not None:
        return tuple(Question(traced, returned[name], name, None, local).answer() for name in known)
    return tuple(receptive_field(module, *inputs, of=name, wrt=wrt, axes=axes, named=named, local=local) for name in known)


def check_names(module: Callable[..., Any], names: Sequence[str]) -> None:
    """Raises unless the module has modules of these names."""
    if not isinstance(module, nn.Module):
        if names:
            raise ValueError(f"receptive_field: only a module has layers, got {names[0]!r} of a {type(module).__name__}")
        return
    known = dict(module.named_modules())
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f" (near: {near[0]!r})" if near else ""
            raise ValueError(f"receptive_field: the network must have the module asked for, got {name!r}{hint}")


def question_of(
    module: Callable[..., Any],
    inputs: tuple[Any, ...],
    named: Mapping[str, Any] | None,
    of: int | str,
    position: Sequence[int] | None,
    wrt: int,
    axes: Sequence[int] | None,
    local: bool = False,
) -> "Question":
    """One output of a network, traced."""
    check_names(module, [of] if isinstance(of, str) else [])
    traced = Traced(module, (inputs, dict(named or {})), of, wrt, axes)
    assert traced.base.target is not None
    return Question(traced, traced.base.target, of if isinstance(of, str) else f"output {of}", position, local)


class Question:
    """One value of a traced network, and all that is found out about it."""

    def __init__(self, traced: Traced, target: Value, name: str, position: Sequence[int] | None, local: bool) -> None:
        self.traced, self.notes, self.name = traced, list(traced.notes), name
        self.axes, self.input, self.target = traced.axes, traced.base.inputs[traced.wrt], target
        same = len(self.target.shape) == len(self.input.shape)
        grown = tuple(traced.grown(self.target))
        self.places = grown or (self.axes if same else ())
        self.paired = len(grown) == len(self.axes)
        self.fixed, self.local = position is not None, local
        self.position = self._middle() if position is None else self._checked(position)
        self.unknown: list[tuple[Node, str]] = []
        self.uniform = True  # whether all outputs of a phase see the same, moved by the jump

    def _middle(self) -> tuple[int, ...]:
        sizes = [self.target.shape[a] for a in self.places]
        if len(sizes) == len(self.axes):
            return tuple(n // 2 for n in sizes)
        return tuple((n + isqrt(n)) // 2 for n in sizes)  # of rows one after another, the middle one's middle

    def _checked(self, position: Sequence[int]) -> tuple[int, ...]:
        sizes = tuple(self.target.shape[a] for a in self.places)
        found = tuple(int(p) for p in position)
        if len(found) != len(sizes) or not all(0 <= p < n for p, n in zip(found, sizes, strict=True)):
            raise ValueError(f"receptive_field: position must be one index for each of the output's sizes {sizes}, got {found}")
        return found

    def answer(self) -> ReceptiveField:
        """The field in the given input; then, in one that is large enough, that of every phase."""
        walk, inside = self._walk(self.traced.base, self.position)
        everything = self._everything(walk)
        if self.local and everything:
            self.notes.append(f"{len(everything)} ops that see everything are left out")
            everything = []
        grows = {i for axes, _ in everything for i in axes}
        jump = self._jump()
        phases: tuple[tuple[Phase, ...], ...] = ((),) * len(self.axes)
        box, first = inside, self.position
        local = [i for i in range(len(self.axes)) if i not in grows]
        if local and self.traced.larger is not None:
            found = self._unbounded(walk, local, jump)
            if found is not None:
                box, phases, first = found
        elif local:
            self._note_fixed(walk, inside, local)
        if not box.mask.any() and not self.unknown:
            self.notes.append("the output does not depend on the input")
        return self._result(inside, box, phases, jump, first, grows, [node for _, node in everything])

    def _cut(self, walk: Walk, local: Sequence[int]) -> bool:
        """Whether a border cut the field along one of these axes of the input; channels have borders too."""
        if self.traced.larger is None:
            return bool(walk.cuts)
        return any(set(self.traced.grows_along(value, [axis])) & set(local) for value, axis in walk.cuts)

    def _note_fixed(self, walk: Walk, inside: Box, local: Sequence[int]) -> None:
        self.notes.append(f"found in an input of this size alone; in a larger one {self.traced.failure}")
        if self._cut(walk, local) and any(inside.mask.shape[i] < self.input.shape[self.axes[i]] for i in local):
            self.unknown.append((walk.graph.nodes[-1], "the border cuts the field"))

    def _walk(self, graph: Graph, position: Sequence[int]) -> tuple[Walk, Box]:
        walk, target, source = (
            Walk(graph, self._grows if self.local else None),
            graph.values[self.target.number],
            graph.inputs[self.traced.wrt],
        )
        where = self._where(target.shape, position)
        seen = walk.back(Seen.at(target.shape, where), target, source) if target.depends else None
        self.unknown += walk.unknown + walk.least
        return walk, box_of(seen, self.axes, 0 not in self.axes)

    def _where(self, shape: Sequence[int], position: Sequence[int]) -> list[int | None]:
        """Of every axis of the output one index, or None for all: the first of a batch, all channels."""
        where: list[int | None] = [None] * len(shape)
        if where and 0 not in self.axes and shape[0] == self.input.shape[0]:
            where[0] = 0
        for axis, place in zip(self.places, position, strict=True):
            where[axis] = place
        return where

    def index(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """What picks the output that is asked for out of one of this shape."""
        return tuple(slice(None) if w is None else slice(w, w + 1) for w in self._where(shape, self.position))

    def _grows(self, value: Value, axes: Sequence[int]) -> bool:
        """Whether one of the axes of a value grows with the input."""
        return bool(set(axes) & set(self.traced.grown(value)))

    def _everything(self, walk: Walk) -> list[tuple[list[int], Node]]:
        """The ops that mix what grows with the input, and along which of its axes."""
        found = [(self.traced.grows_along(value, mixed), node) for node, value, mixed in walk.mixing]
        return [(axes, node) for axes, node in found if axes]

    def _growth(self, number: int) -> list[int]:
        """By how much the axes of a value that grow have grown, or nothing where they are not the input's."""
        assert self.traced.larger is not None
        value = self.traced.base.values[number]
        grown = self.traced.grown(value)
        larger = self.traced.larger.values[number].shape
        return [larger[a] - value.shape[a] for a in grown] if len(grown) == len(self.axes) else []

    def _jump(self) -> tuple[Fraction | None, ...]:
        if not self.paired:
            return (None,) * len(self.axes)
        inputs, outputs = self._growth(self.input.number), self._growth(self.target.number)
        found = [Fraction(i, o) for i, o in zip(inputs, outputs, strict=True)]
        return tuple(f if f.denominator <= MOST_PHASES else None for f in found)

    def _periods(self, walk: Walk, jump: Sequence[Fraction | None]) -> list[int]:
        """After how many outputs every tensor on the way has moved by whole elements."""
        periods = [1] * len(jump)
        inputs = self._growth(self.input.number)
        for number in walk.met | {self.input.number}:
            for i, grown in enumerate(self._growth(number)):
                step = jump[i]
                if step is not None:
                    ratio = step * grown / inputs[i]
                    periods[i] = lcm(periods[i], ratio.denominator)
        for i, period in enumerate(periods):
            if period > MOST_PHASES:
                self.notes.append(f"axis {self.axes[i]}: of its {period} phases the one of the middle output is shown")
        return [p if p <= MOST_PHASES else 1 for p in periods]

    def _unbounded(
        self, walk: Walk, local: Sequence[int], jump: Sequence[Fraction | None]
    ) -> tuple[Box, tuple[tuple[Phase, ...], ...], tuple[int, ...]] | None:
        periods = self._periods(walk, jump)
        for factor, graph in self._larger_graphs(local):
            try:
                middle, cut = self._uncut(graph, local, periods)
                if cut:  # larger still: only what is seen takes memory
                    factor, wider = self.traced.enlarged([self.axes[i] for i in local], (16 * factor,))
                    graph = graph if wider is None else wider
                    middle, cut = self._uncut(graph, local, periods)
                if cut:
                    self.unknown.append(
                        (walk.graph.nodes[-1], f"the border cuts the field in an input {factor} times as large too")
                    )
                return self._phases(graph, middle, local, jump, periods)
            except TooLargeError as error:
                self.traced.failure = str(error)
        reason = f"the field is cut by the border, and no larger input can be walked through: {self.traced.failure}"
        self.unknown.append((walk.graph.nodes[-1], reason))
        return None

    def _larger_graphs(self, local: Sequence[int]) -> Any:
        """Graphs of larger inputs, the largest first."""
        axes = [self.axes[i] for i in local]
        if len(local) == len(self.axes) and self.traced.larger is not None:
            yield self.traced.factor, self.traced.larger
        for factor in FACTORS:
            if factor < self.traced.factor or len(local) < len(self.axes):
                found, graph = self.traced.enlarged(axes, (factor,))
                if graph is not None:
                    yield found, graph

    def _uncut(self, graph: Graph, local: Sequence[int], periods: Sequence[int]) -> tuple[list[int], bool]:
        """A position far from the borders, of the phase of the one asked for, and whether a border cuts its field all the same."""
        target, middle = graph.values[self.target.number], list(self.position)
        if self.paired:
            for i in local:
                n = target.shape[self.places[i]]
                middle[i] = n // 2 - (n // 2 - self.position[i]) % periods[i]
            return middle, self._cut(self._walk(graph, middle)[0], local)
        sizes = [target.shape[a] for a in self.places]
        tries = [middle] if self.fixed or not self.traced.grown(self.target) else [[(n + isqrt(n)) // 2 for n in sizes]]
        if len(tries[0]) and not self.fixed:  # of merged axes, anywhere
            tries += [[n * k // _TRIES + n // 99 for n in sizes] for k in range(1, _TRIES)]
        for middle in tries:
            cut = self._cut(self._walk(graph, middle)[0], local)
            if not cut:
                break
        return middle, cut

    def _phases(
        self, graph: Graph, middle: list[int], local: Sequence[int], jump: Sequence[Fraction | None], periods: Sequence[int]
    ) -> tuple[Box, tuple[tuple[Phase, ...], ...], tuple[int, ...]]:
        phases: list[tuple[Phase, ...]] = [() for _ in self.axes]
        best = list(middle)
        for i in local if self.paired else ():
            first = middle[i] - middle[i] % periods[i]
            found = []
            for p in range(first, first + periods[i]):
                _, box = self._walk(graph, [p if j == i else m for j, m in enumerate(middle)])
                step = jump[i]
                found.append((box.mask.shape[i], float("nan") if step is None else float(box.start[i] - p * step)))
            phases[i] = tuple(Phase(size, offset) for size, offset in found)
            if not self.fixed:
                best[i] = first + max(range(len(found)), key=lambda k: found[k][0])
        _, box = self._walk(graph, best)
        if self.paired and box.mask.any():
            self._check_shift(graph, best, box, jump, periods, local)
        return box, tuple(phases), tuple(best)

    def _check_shift(
        self,
        graph: Graph,
        best: Sequence[int],
        box: Box,
        jump: Sequence[Fraction | None],
        periods: Sequence[int],
        local: Sequence[int],
    ) -> None:
        """Says so where an output a period on along one axis does not see the same, moved along that axis."""
        for i in local:
            _, moved = self._walk(graph, [b + periods[i] * (k == i) for k, b in enumerate(best)])
            expected = tuple(
                None if step is None else b + step * periods[i] * (k == i)
                for k, (b, step) in enumerate(zip(box.start, jump, strict=True))
            )
            if moved.start != expected or not np.array_equal(box.mask, moved.mask):
                self.uniform = False
        if not self.uniform:
            self.notes.append("the field depends on the position, by more than a shift: it is that of the middle output")

    def _result(
        self, inside: Box, box: Box, phases: tuple[tuple[Phase, ...], ...], jump: Sequence[Fraction | None], first: Sequence[int],
        grows: set[int], everything: Sequence[Node],
    ) -> ReceptiveField:  # fmt: skip
        size = tuple(None if i in grows else n for i, n in enumerate(box.mask.shape))
        offset = tuple(
            None if n is None or step is None or not self.uniform else float(begin - p * step)
            for n, step, begin, p in zip(size, jump, box.start, first if self.paired else [0] * len(size), strict=True)
        )
        unknown = _parts(self.unknown)
        return ReceptiveField(
            of=self.name,
            input=self.input.shape, output=self.target.shape, axes=self.axes, size=size,
            jump=tuple(None if step is None or not self.uniform else float(step) for step in jump),
            offset=offset,
            centre=tuple(None if o is None or n is None else o + (n - 1) / 2 for o, n in zip(offset, size, strict=True)),
            phases=phases, coverage=coverage(box.mask), gridding=1 - coverage(box.mask), unevenness=unevenness(box.paths),
            window=Window(
                self.position, inside.start, tuple(s + n for s, n in zip(inside.start, inside.mask.shape, strict=True)),
                coverage(inside.mask), inside.mask,
            ),
            sees_everything=_parts([(node, "mixes what grows with the input") for node in everything]),
            not_understood=tuple(Part(p.op, p.module, p.what) for p in unknown),
            status="lower_bound" if unknown else "exact", notes=tuple(self.notes), mask=box.mask, paths=box.paths,
        )  # fmt: skip


def coverage(mask: Any) -> float:
    """Share of a box's positions that are seen; 0 of an empty one.

    >>> coverage(np.array([True, False, True]))
    0.6666666666666666
    """
    return float(np.count_nonzero(mask) / mask.size) if mask.size else 0.0


def unevenness(paths: Any) -> float:
    """Σ|n(p) − n(p + 1)| / Σ(n(p) + n(p + 1)) over neighbours p, p + 1 along every axis, n the paths of a position.

    >>> unevenness(np.array([1.0, 0.0, 1.0])), unevenness(np.ones((3, 3)))
    (1.0, 0.0)
    """
    between = total = 0.0
    scaled = paths / paths.max(initial=1.0)
    for axis in range(paths.ndim):
        one, two = (np.moveaxis(scaled, axis, 0)[cut] for cut in (slice(None, -1), slice(1, None)))
        between += float(np.abs(one - two).sum())
        total += float((one + two).sum())
    return between / total if total else 0.0


def _parts(met: Sequence[tuple[Node, str]]) -> tuple[Part, ...]:
    return tuple(Part(*key) for key in dict.fromkeys((node.op, node.module, what) for node, what in met))
