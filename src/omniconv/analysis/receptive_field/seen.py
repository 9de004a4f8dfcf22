"""How often each element of a tensor is seen by the output in question: a box of counts, walked back through the axes of an op.

An axis is either *constant* (all its elements are seen alike: stored once) or *boxed* (counts of the elements from ``start`` on;
those outside are not seen). So the work grows with the field, not with the tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

Counts = NDArray[np.float64]
Reads = NDArray[np.int64]

LARGEST = 2**27  # counts of one tensor, 1 GiB: more than that is refused
_HIGH, _LOW = 2.0**600, 2.0**-900  # counts are scaled down above the one, and held above the other lest a seen element be lost


class TooLargeError(ValueError):
    """A tensor's counts would not fit into memory."""


@dataclass(frozen=True)
class Seen:
    """Counts of a tensor of some shape, times 2^exponent; ``start`` of a constant axis is 0 and its counts have length 1."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    constant: tuple[bool, ...]
    counts: Counts
    exponent: int = 0

    @staticmethod
    def of(shape: Sequence[int], start: Sequence[int], constant: Sequence[bool], counts: Counts, exponent: int = 0) -> "Seen":
        """In normal form: axes of one element are constant, counts are not too large to multiply."""
        whole = tuple(c or n == 1 for c, n in zip(constant, shape, strict=True))
        begin = tuple(0 if c else s for c, s in zip(whole, start, strict=True))
        high = float(counts.max(initial=0.0))
        if high > _HIGH:
            shift = int(np.frexp(high)[1])
            counts, exponent = _held(np.ldexp(counts, -shift), counts), exponent + shift
        return Seen(tuple(shape), begin, whole, counts, exponent)

    @staticmethod
    def at(shape: Sequence[int], position: Sequence[int | None]) -> "Seen":
        """One element seen once; None takes a whole axis."""
        whole = [p is None for p in position]
        return Seen.of(shape, [p or 0 for p in position], whole, np.ones((1,) * len(shape)))

    @property
    def empty(self) -> bool:
        """Nothing is seen."""
        return self.counts.size == 0 or not self.counts.any()

    def stop(self, axis: int) -> int:
        """One past the last element of the box."""
        return self.shape[axis] if self.constant[axis] else self.start[axis] + self.counts.shape[axis]

    def _with(self, axis: int, counts: Counts, start: int, size: int, constant: bool = False) -> "Seen":
        shape, begin, whole = list(self.shape), list(self.start), list(self.constant)
        shape[axis], begin[axis], whole[axis] = size, start, constant
        return Seen.of(shape, begin, whole, counts, self.exponent)

    def boxed(self, *axes: int) -> "Seen":
        """The same with these axes written out, where they were constant."""
        counts = self.counts
        for axis in axes:
            if self.constant[axis] and self.shape[axis] != 1:
                if counts.size * self.shape[axis] > LARGEST:
                    raise TooLargeError(f"the counts of a tensor of shape {self.shape} do not fit into memory")
                counts = np.repeat(counts, self.shape[axis], axis)
        whole = tuple(c and (a not in axes or n == 1) for a, (c, n) in enumerate(zip(self.constant, self.shape, strict=True)))
        return Seen(self.shape, self.start, whole, counts, self.exponent)

    def filled(self, *axes: int) -> "Seen":
        """The same with these axes written out from their first element to their last."""
        made = self.boxed(*axes)
        margins = [
            (made.start[a], n - made.stop(a)) if a in axes and not made.constant[a] else (0, 0) for a, n in enumerate(self.shape)
        ]
        if any(before or after for before, after in margins):
            size = prod(c + before + after for c, (before, after) in zip(made.counts.shape, margins, strict=True))
            if size > LARGEST:
                raise TooLargeError(f"the counts of a tensor of shape {self.shape} do not fit into memory")
            start = tuple(0 if a in axes else s for a, s in enumerate(made.start))
            made = Seen(made.shape, start, made.constant, np.pad(made.counts, margins), made.exponent)
        return made

    def dense(self) -> Counts:
        """The counts of every element, without the exponent."""
        return self.filled(*range(len(self.shape))).counts

    def trimmed(self) -> "Seen":
        """The same in the smallest box."""
        counts, start = self.counts, list(self.start)
        for axis, whole in enumerate(self.constant):
            if whole or counts.size == 0:
                continue
            hit = np.flatnonzero(counts.any(axis=tuple(a for a in range(counts.ndim) if a != axis)))
            first, last = (int(hit[0]), int(hit[-1]) + 1) if hit.size else (0, 0)
            counts = counts.take(range(first, last), axis) if last - first != counts.shape[axis] else counts
            start[axis] += first
        return Seen(self.shape, tuple(start), self.constant, counts, self.exponent)

    def plus(self, other: "Seen") -> "Seen":
        """Both together."""
        mixed = [a for a in range(len(self.shape)) if self.constant[a] != other.constant[a]]
        one, two = self.boxed(*mixed), other.boxed(*mixed)
        start = [min(a, b) for a, b in zip(one.start, two.start, strict=True)]
        stop = [max(one.stop(a), two.stop(a)) for a in range(len(start))]
        size = [1 if c else e - s for s, e, c in zip(start, stop, one.constant, strict=True)]
        exponent = max(one.exponent, two.exponent)
        total = self._zeros(size)
        for part in (one, two):
            place = tuple(
                slice(0, 1) if c else slice(b - s, b - s + n)
                for b, s, n, c in zip(part.start, start, part.counts.shape, part.constant, strict=True)
            )
            total[place] += part.counts if part.exponent == exponent else part._scaled(exponent)
        return Seen.of(self.shape, start, one.constant, total, exponent)

    def _zeros(self, size: Sequence[int]) -> Counts:
        if prod(size) > LARGEST:
            raise TooLargeError(f"the counts of a tensor of shape {self.shape} do not fit into memory")
        return np.zeros(tuple(size))

    def _scaled(self, exponent: int) -> Counts:
        return _held(np.ldexp(self.counts, max(self.exponent - exponent, -2000)), self.counts)

    def averaged(self, axes: Sequence[int], sizes: Sequence[int] | None = None) -> "Seen":
        """Every element along the axes counts as the mean of them: what an op that mixes them makes of its result.

        ``sizes`` are those of the axes of the operand, where they differ from the result's.
        """
        made, sizes = self, sizes or [self.shape[a] for a in axes]
        for axis, size in zip(axes, sizes, strict=True):
            counts = made.counts if made.constant[axis] else made.counts.sum(axis, keepdims=True) / made.shape[axis]
            made = made._with(axis, counts, 0, size, constant=True)
        return made

    def windows(self, axis: int, size: int, kernel: int, stride: int, before: int, dilation: int) -> tuple["Seen", bool]:
        """Back through the windows of a grid op, o·S − before + t·D; whether any of them left the input."""
        if kernel == stride == 1 and before == 0 and self.shape[axis] == size:
            return self, False
        made = self.boxed(axis)
        up = np.moveaxis(made.counts, axis, 0)
        length = (len(up) - 1) * stride + 1
        down = made._zeros((length + (kernel - 1) * dilation, *up.shape[1:]))
        for t in range(kernel):
            down[t * dilation : t * dilation + length : stride] += up
        return made._cropped(axis, np.moveaxis(down, 0, axis), made.start[axis] * stride - before, size)

    def spread(self, axis: int, size: int, kernel: int, stride: int, before: int, dilation: int) -> tuple["Seen", bool]:
        """Back through a transposed convolution, whose input i and tap t meet output i·S − before + t·D."""
        if kernel == stride == 1 and before == 0 and self.shape[axis] == size:
            return self, False
        made = self.boxed(axis)
        up = np.moveaxis(made.counts, axis, 0)
        begin, end = made.start[axis] + before, made.stop(axis) + before  # in positions of the uncropped output
        first, last = -(-(begin - (kernel - 1) * dilation) // stride), (end - 1) // stride
        down = made._zeros((max(last - first + 1, 0), *up.shape[1:]))
        for t in range(kernel):
            low = max(first, -(-(begin - t * dilation) // stride))
            high = min(last, (end - 1 - t * dilation) // stride)
            if low <= high:
                source = low * stride + t * dilation - begin
                down[low - first : high - first + 1] += up[source : source + (high - low) * stride + 1 : stride]
        return made._cropped(axis, np.moveaxis(down, 0, axis), first, size)

    def _cropped(self, axis: int, counts: Counts, start: int, size: int) -> tuple["Seen", bool]:
        stop = start + counts.shape[axis]
        low, high = min(max(start, 0), stop), max(min(stop, size), start)  # all may lie on one side
        kept = counts.take(range(low - start, max(high, low) - start), axis)
        outside = kept.shape[axis] != counts.shape[axis] and bool(
            counts.take(range(low - start), axis).any() or counts.take(range(high - start, counts.shape[axis]), axis).any()
        )
        return self._with(axis, kept, min(max(low, 0), size), size), outside

    def reads(self, axis: int, size: int, table: Reads) -> "Seen":
        """Back through an op whose output o reads the inputs ``table[o − start]`` along the axis; −1 reads nothing."""
        made = self.boxed(axis)
        up = np.moveaxis(made.counts, axis, 0)
        inside = table >= 0
        if not inside.any():
            return made._with(axis, made.counts.take(range(0), axis), 0, size)
        first, last = int(table[inside].min()), int(table[inside].max())
        down = made._zeros((last - first + 1, *up.shape[1:]))
        for column, valid in zip(table.T, inside.T, strict=True):
            np.add.at(down, column[valid] - first, up[valid])
        return made._with(axis, np.moveaxis(down, 0, axis), first, size)

    def moved(self, axis: int, by: int, size: int, step: int = 1) -> tuple["Seen", bool]:
        """Back through a slice or a pad: output o is input o·step + by."""
        return self.windows(axis, size, 1, step, -by, 1)

    def permuted(self, order: Sequence[int]) -> "Seen":
        """Axis a of the result is axis order[a] of this."""

        def pick(values: Sequence[T]) -> tuple[T, ...]:
            return tuple(values[a] for a in order)

        return Seen(pick(self.shape), pick(self.start), pick(self.constant), self.counts.transpose(order), self.exponent)

    def inserted(self, axis: int, size: int = 1) -> "Seen":
        """With a constant axis more."""
        return Seen(
            (*self.shape[:axis], size, *self.shape[axis:]), (*self.start[:axis], 0, *self.start[axis:]),
            (*self.constant[:axis], True, *self.constant[axis:]), np.expand_dims(self.counts, axis), self.exponent,
        )  # fmt: skip

    def taken(self, axis: int, index: int) -> "Seen | None":
        """One element of an axis, which goes; None where it is not seen."""
        place = 0 if self.constant[axis] else index - self.start[axis]
        if not 0 <= place < self.counts.shape[axis]:
            return None
        kept = [a for a in range(len(self.shape)) if a != axis]
        shape, start, whole = ([values[a] for a in kept] for values in (self.shape, self.start, self.constant))
        return Seen.of(shape, start, [bool(w) for w in whole], self.counts.take([place], axis).squeeze(axis), self.exponent)

    def part(self, axis: int, first: int, last: int) -> "Seen | None":
        """The elements from first to last of an axis, as a tensor of their own; None where none is seen."""
        if self.constant[axis]:
            return self._with(axis, self.counts, 0, last - first, constant=True)
        low, high = max(self.start[axis], first), min(self.stop(axis), last)
        if low >= high:
            return None
        counts = self.counts.take(range(low - self.start[axis], high - self.start[axis]), axis)
        return self._with(axis, counts, low - first, last - first)

    def reshaped(self, shape: Sequence[int]) -> "Seen":
        """As another shape of as many elements; axes that stay apart are not written out."""
        made, at = self, 0
        for old, new in _groups(self.shape, shape):
            if old != new:
                made = made._regrouped(at, len(old), new)
            at += len(new)
        return made

    def _regrouped(self, at: int, count: int, new: tuple[int, ...]) -> "Seen":
        axes = range(at, at + count)
        shape = (*self.shape[:at], *new, *self.shape[at + count :])
        if all(self.constant[a] for a in axes):

            def fit(values: Sequence[T], fill: T) -> tuple[T, ...]:
                return (*values[:at], *[fill] * len(new), *values[at + count :])

            counts = self.counts.reshape(fit(self.counts.shape, 1))
            return Seen(shape, fit(self.start, 0), fit(self.constant, True), counts, self.exponent)
        lead = next(a for a in axes if self.shape[a] != 1)  # the outermost keeps its box, the others are written out
        made = self.boxed(lead).filled(*[a for a in axes if a > lead])
        inner = prod(self.shape[a] for a in axes if a > lead)
        start, stop = made.start[lead] * inner, made.stop(lead) * inner
        ahead = next((i for i, n in enumerate(new) if n != 1), len(new) - 1)
        tail = prod(new[ahead + 1 :])
        first, last = start // tail, -(-stop // tail)
        flat = made.counts.reshape(*made.counts.shape[:at], stop - start, *made.counts.shape[at + count :])
        margins = [(0, 0)] * flat.ndim
        margins[at] = (start - first * tail, last * tail - stop)
        sizes = (*[1] * ahead, last - first, *new[ahead + 1 :])
        counts = np.pad(flat, margins).reshape(*flat.shape[:at], *sizes, *flat.shape[at + 1 :])
        begin = (*self.start[:at], *[first if i == ahead else 0 for i in range(len(new))], *self.start[at + count :])
        whole = (*self.constant[:at], *[False] * len(new), *self.constant[at + count :])
        return Seen.of(shape, begin, whole, counts, self.exponent).trimmed()


def _held(scaled: Counts, before: Counts) -> Counts:
    """What was seen stays seen, however small."""
    return np.where(before > 0, np.maximum(scaled, _LOW), 0.0)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The finest cut of two shapes of as many elements into runs of axes with equal products, (old, new) each."""
    if 0 in old:
        return [(tuple(old), tuple(new))]
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        from_i, from_j = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := prod(old[from_i:i])) != (b := prod(new[from_j:j])):
            i, j = (i + 1, j) if a < b else (i, j + 1)
        found.append((tuple(old[from_i:i]), tuple(new[from_j:j])))
    return found
