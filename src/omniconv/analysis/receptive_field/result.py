"""What is found out about a receptive field."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """An op on the way: its name, the module that ran it, and what about it."""

    op: str
    module: str
    what: str


@dataclass(frozen=True)
class Phase:
    """The field along one axis of every period-th output: ``size`` positions from output·jump + ``offset`` on."""

    size: int
    offset: float


@dataclass(frozen=True)
class Window:
    """The field of one output in an input of the given size: positions ``start`` to ``stop`` (not included) of every axis."""

    position: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    coverage: float
    mask: NDArray[np.bool_] = field(metadata={"json": False}, repr=False, compare=False)


@dataclass(frozen=True)
class ReceptiveField:
    """The receptive field of one output.

    Attributes:
        of: The output's name.
        input: Shape of the input.
        output: Shape of the output.
        axes: The axes of the input that count as space.
        size: Positions from the first to the last that is seen, along every axis, in an input so large that no border cuts the
            field (of the widest phase, or of that of the position asked for); None where it grows with the input.
        jump: How far the field moves from one output to the next; below 1 where the output is finer than the input. None where
            output axes are not the input's, or the fields of outputs are not each other's shifted.
        offset: Where the field of output 0 begins: output p sees ``size`` positions from p·jump + offset on.
        centre: Its middle, p·jump + centre.
        phases: Along every axis, the field of each output of one period: more than one after upsampling.
        coverage: Share of the box's positions that are seen: 1 without holes.
        gridding: 1 − coverage: the share of holes.
        unevenness: Σ|n(p) − n(p + 1)| / Σ(n(p) + n(p + 1)) over all neighbours of the box, along every axis, n the paths of a
            position: 0 if all are seen equally often, 1 if no two neighbours are seen both.
        window: The field as it is in the input of this size, at the position asked for.
        sees_everything: The ops by which the field grows with the input.
        not_understood: Ops without a rule that lie on a path from input to output, or with more paths than are known.
        status: "exact", or "lower_bound" where there are such ops.
        notes: Sentences for people.
        mask: The positions of the box that are seen.
        paths: How many ways lead from each to the output: taps multiply; what is mixed as a whole (channels, a mean) counts once.
    """

    of: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    axes: tuple[int, ...]
    size: tuple[int | None, ...]
    jump: tuple[float | None, ...]
    offset: tuple[float | None, ...]
    centre: tuple[float | None, ...]
    phases: tuple[tuple[Phase, ...], ...]
    coverage: float
    gridding: float
    unevenness: float
    window: Window
    sees_everything: tuple[Part, ...]
    not_understood: tuple[Part, ...]
    status: str
    notes: tuple[str, ...]
    mask: NDArray[np.bool_] = field(metadata={"json": False}, repr=False, compare=False)
    paths: NDArray[np.float64] = field(metadata={"json": False}, repr=False, compare=False)
