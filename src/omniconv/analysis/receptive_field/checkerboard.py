"""How many taps of a transposed convolution land on each output: even, or a checkerboard."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from omniconv.geometry import Spread, per_axis, spread, taps


@dataclass(frozen=True)
class Overlap:
    """Taps that land on each output position.

    Attributes:
        size: Of the input.
        kernel: Its taps along every axis.
        stride: Output steps between inputs.
        fewest: Taps on the poorest position inside, where no border thins them out.
        most: On the richest.
        even: Whether these are the same: so exactly where S divides K and gcd(D, S) = 1 along every axis.
        counts: Taps on every output position.
    """

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    fewest: int
    most: int
    even: bool
    counts: NDArray[np.int64] = field(metadata={"json": False}, repr=False, compare=False)


def overlap(
    size: int | Sequence[int],
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    rank: int = 2,
) -> Overlap:
    """Counts the taps of a transposed convolution that land on each output, from the windows of its adjoint.

    Args:
        size: Of the input: an int for all axes, or one per axis, and so the others.
        kernel: Taps.
        stride: Output steps between inputs.
        padding: As for :func:`omniconv.functional.conv_transpose2d`.
        output_padding: Likewise.
        dilation: Output steps between taps.
        rank: How many axes there are.

    Raises:
        ValueError: A setting is out of range.

    Example:
        >>> overlap(4, 3, stride=2, rank=1).counts.tolist(), overlap(4, 4, stride=2, padding=1, rank=1).counts.tolist()
        ([1, 1, 2, 1, 2, 1, 2, 1, 1], [1, 2, 2, 2, 2, 2, 2, 1])

    Source: Odena, Dumoulin, Olah 2016, Distill, doi:10.23915/distill.00003.
    """
    op = "overlap"
    sizes, kernels = per_axis(op, "size", size, rank), per_axis(op, "kernel", kernel, rank)
    windows = spread(op, sizes, kernels, stride, padding, output_padding, dilation)
    lines = [_line(sizes[a], kernels[a], windows, a) for a in range(rank)]
    inside = [_inside(kernels[a], windows.stride[a], windows.dilation[a]) for a in range(rank)]
    fewest, most = (int(np.prod([pick(line) for line in inside])) for pick in (min, max))
    counts = reduce(np.multiply.outer, lines)
    return Overlap(sizes, kernels, windows.stride, fewest, most, fewest == most, counts)


def _line(size: int, kernel: int, windows: Spread, axis: int) -> NDArray[np.int64]:
    """Taps on the outputs of one axis: those that the adjoint grid convolution reads from there."""
    crops, step, dilation = windows.crops[axis], windows.stride[axis], windows.dilation[axis]
    outputs = windows.output_size((size,) * len(windows.stride), (kernel,) * len(windows.stride))[axis]
    counts = np.zeros(outputs, np.int64)
    for reads in taps(outputs, kernel, step, crops, dilation)[:size]:
        for place in reads:
            if place is not None:
                counts[place] += 1
    return counts


def _inside(kernel: int, stride: int, dilation: int) -> list[int]:
    """Taps on the positions of one period, far from any border: one entry per phase."""
    phases = [t * dilation % stride for t in range(kernel)]
    return [phases.count(phase) for phase in range(stride)]
