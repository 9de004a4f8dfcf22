"""Integer arithmetic of convolution windows: no tensors, no torch.

One axis of a grid convolution has a size In, a kernel of K taps, a stride S, a dilation D and pads (before, after):

    position(o, t) = o·S − before + t·D                                  where tap t of output o looks
    span           = D(K − 1) + 1                                        what one window covers
    Out            = ⌊(In + before + after − span) / S⌋ + 1              (transposed: (In − 1)·S − before − after + span + op)

Sizes and pads may be symbolic integers of a traced graph; kernels, strides and dilations are plain integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

Pair = tuple[int, int]
Pairs = tuple[Pair, ...]
Padding = int | str | Sequence[int] | Sequence[Sequence[int]]

PADDING_NAMES = ("valid", "same", "same_minimal", "causal")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


LARGEST = 2**31 - 1  # of a setting: beyond it positions would not fit the integers that kernels count in


def is_integer(value: Any) -> bool:
    """True for ints, numpy's too, and symbolic ints (known by their node); not for bools, floats and tensors."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, Integral)) or hasattr(value, "node")


def _is_symbolic(value: object) -> bool:
    return not isinstance(value, int)


def per_axis(op: str, name: str, value: int | Sequence[int], rank: int, minimum: int = 1) -> tuple[int, ...]:
    """One integer per axis from an int or a sequence of them (a sequence of one serves every axis, as in torch).

    Args:
        op: The name that opens error messages.
        name: What the value is, for error messages.
        value: An int, or ``rank`` ints.
        rank: How many spatial axes there are.
        minimum: The smallest value allowed.

    Raises:
        TypeError: The value is not made of integers.
        ValueError: The count is wrong, or a value is below ``minimum``.

    >>> per_axis("conv2d", "stride", 2, rank=2)
    (2, 2)
    """
    if type(value) is int and minimum <= value <= LARGEST:
        return (value,) * rank
    values: Any = (value,) * rank if is_integer(value) else value
    if not isinstance(values, (tuple, list)) or not all(is_integer(v) for v in values):
        raise TypeError(f"{op}: {name} must be an int or a tuple of {rank} ints, got {value!r}")
    if len(values) == 1:
        values = tuple(values) * rank
    if len(values) != rank:
        raise ValueError(f"{op}: {name} must have {rank} values, one per spatial axis, got {value!r}")
    values = tuple(int(v) if isinstance(v, Integral) else v for v in values)
    if any(v < minimum for v in values):
        raise ValueError(f"{op}: {name} must be at least {minimum} on every axis, got {value!r}")
    if any(isinstance(v, int) and v > LARGEST for v in values):
        raise ValueError(f"{op}: {name} must be at most {LARGEST} on every axis, got {value!r}")
    return values


def span(kernel: int, dilation: int) -> int:
    """Input steps that one window covers: D(K − 1) + 1."""
    return dilation * (kernel - 1) + 1


def normal_padding(op: str, padding: Padding, rank: int) -> str | Pairs:
    """Padding in one of its two forms: a name, or one (before, after) pair per axis.

    >>> normal_padding("conv2d", (1, 2), rank=2)
    ((1, 1), (2, 2))
    >>> normal_padding("conv1d", ((3, 0),), rank=1)
    ((3, 0),)
    """
    if isinstance(padding, str):
        if padding not in PADDING_NAMES:
            raise ValueError(f"{op}: padding must be one of {', '.join(PADDING_NAMES)} or numbers, got {padding!r}")
        if padding == "causal" and rank != 1:
            raise ValueError(f"{op}: padding 'causal' is defined for one spatial axis, got {rank}")
        return padding
    if isinstance(padding, (tuple, list)) and padding and all(isinstance(p, (tuple, list)) for p in padding):
        if len(padding) != rank:
            raise ValueError(f"{op}: padding must have {rank} (before, after) pairs, got {padding!r}")
        return tuple(_side_pair(op, padding, pair) for pair in padding)
    return tuple((p, p) for p in per_axis(op, "padding", padding, rank, minimum=0))  # type: ignore[arg-type]


def _side_pair(op: str, padding: Padding, pair: Any) -> Pair:
    if len(pair) != 2 or not all(is_integer(p) for p in pair):
        raise TypeError(f"{op}: a padding pair must be two ints (before, after), got {pair!r} in {padding!r}")
    before, after = (int(p) if isinstance(p, Integral) else p for p in pair)
    if before < 0 or after < 0:
        raise ValueError(f"{op}: padding must be at least 0 on every side, got {padding!r}")
    if any(isinstance(p, int) and p > LARGEST for p in (before, after)):
        raise ValueError(f"{op}: padding must be at most {LARGEST} on every side, got {padding!r}")
    return before, after


def _halves(total: int) -> Pair:
    """The smaller half before, the rest after: torch's and TensorFlow's split."""
    return total // 2, total - total // 2


def _minimal(size: int, kernel: int, stride: int, dilation: int) -> int:
    """max((⌈In/S⌉ − 1)·S + span − In, 0) without a comparison, so that it traces with a symbolic In."""
    window = span(kernel, dilation)
    missing = ((size + stride - 1) // stride - 1) * stride + window - size
    if window >= stride:  # then nothing can be negative
        return missing
    return missing * (1 + missing // stride)  # −S < missing < S: the factor is 0 below zero and 1 above


def pads_of(
    padding: str | Pairs, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Pairs:
    """The (before, after) pads of every axis of a grid convolution, from either form of :func:`normal_padding`.

    ``"same"`` pads D(K − 1) in all and ``"same_minimal"`` (TensorFlow's SAME_UPPER) what Out = ⌈In/S⌉ needs; both put the
    odd one after. ``"causal"`` pads D(K − 1) before.

    >>> pads_of("same_minimal", (5,), (3,), (2,), (1,))
    ((1, 1),)
    """
    if not isinstance(padding, str):
        return padding
    axes = range(len(kernel))
    if padding == "valid":
        return tuple((0, 0) for _ in axes)
    if padding == "causal":
        return tuple((dilation[a] * (kernel[a] - 1), 0) for a in axes)
    if padding == "same":
        return tuple(_halves(dilation[a] * (kernel[a] - 1)) for a in axes)
    return tuple(_halves(_minimal(size[a], kernel[a], stride[a], dilation[a])) for a in axes)


@dataclass(frozen=True)
class Grid:
    """The windows of a grid convolution, normalized: one stride, dilation and (before, after) pad per axis, and the mode."""

    stride: tuple[int, ...]
    pads: Pairs
    dilation: tuple[int, ...]
    mode: str = "zeros"
    fitted: bool = False  # the pads were computed from the size: under tracing they may be symbolic

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Positions of the output on every axis.

        >>> Grid((2,), ((1, 1),), (1,)).output_size((5,), (3,))
        (3,)
        """
        return tuple(
            (i + before + after - span(k, d)) // s + 1
            for i, k, s, (before, after), d in zip(size, kernel, self.stride, self.pads, self.dilation, strict=True)
        )


def grid(
    op: str,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    mode: str = "zeros",
) -> Grid:
    """Settles and checks the window arguments of a grid convolution.

    Raises:
        TypeError: An argument is not made of integers.
        ValueError: An argument is out of range, a window does not fit the padded input, or a pad is too large for its mode.

    >>> grid("conv2d", (8, 8), (3, 3), padding="same").pads
    ((1, 1), (1, 1))
    """
    rank = len(kernel)
    strides, dilations = per_axis(op, "stride", stride, rank), per_axis(op, "dilation", dilation, rank)
    if mode not in PADDING_MODES:
        raise ValueError(f"{op}: padding_mode must be one of {', '.join(PADDING_MODES)}, got {mode!r}")
    if any(i < 1 for i in size):
        raise ValueError(f"{op}: every spatial size must be at least 1, got {tuple(size)}")
    if any(k < 1 for k in kernel):
        raise ValueError(f"{op}: every kernel size must be at least 1, got {tuple(kernel)}")
    normal = normal_padding(op, padding, rank)
    pads = pads_of(normal, size, kernel, strides, dilations)
    fitted = normal == "same_minimal" and any(s > 1 for s in strides)
    for i, k, d, (before, after) in zip(size, kernel, dilations, pads, strict=True):
        if fitted and _is_symbolic(before):
            continue  # to compare would pin the size that is being traced
        if not fitted and i + before + after < span(k, d):
            raise ValueError(
                f"{op}: the padded input must hold one window, got size {i} + padding ({before}, {after}) "
                f"for kernel {k} with dilation {d} (window {span(k, d)})"
            )
        if mode == "reflect" and (before >= i or after >= i):
            raise ValueError(f"{op}: padding_mode 'reflect' needs pads below the size {i}, got ({before}, {after})")
        if mode == "circular" and (before > i or after > i):
            raise ValueError(f"{op}: padding_mode 'circular' needs pads of at most the size {i}, got ({before}, {after})")
    return Grid(strides, pads, dilations, mode, fitted)


@dataclass(frozen=True)
class Spread:
    """The windows of a transposed convolution, normalized: input i and tap t meet output i·S − before + t·D.

    ``crops`` are cut from the full output, ``output_padding`` is added after.
    """

    stride: tuple[int, ...]
    crops: Pairs
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Positions of the output on every axis.

        >>> Spread((2,), ((1, 1),), (0,), (1,)).output_size((4,), (4,))
        (8,)
        """
        return tuple(
            (i - 1) * s - before - after + span(k, d) + extra
            for i, k, s, (before, after), extra, d in zip(
                size, kernel, self.stride, self.crops, self.output_padding, self.dilation, strict=True
            )
        )


def _spread_crops(op: str, padding: str | Pairs, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Pairs:
    """Crops of a transposed convolution; a negative one after asks for output padding."""
    if padding == "same_minimal":
        raise ValueError(f"{op}: padding 'same_minimal' is not defined for a transposed convolution; use 'same'")
    if not isinstance(padding, str):
        return padding
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    surplus = [span(k, d) - s for k, s, d in zip(kernel, stride, dilation, strict=True)]
    if padding == "causal":
        return tuple((0, extra) for extra in surplus)
    return tuple(_halves(extra) if extra > 0 else (0, extra) for extra in surplus)


def spread(
    op: str,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    output_size: int | Sequence[int] | None = None,
) -> Spread:
    """Settles and checks the window arguments of a transposed convolution.

    ``"same"`` gives Out = In·S: the surplus D(K − 1) + 1 − S is cropped, its smaller half before; where it is negative it is
    output padding. ``"causal"`` crops it all after. ``output_size`` picks the output padding, as in torch.

    Raises:
        TypeError: An argument is not made of integers.
        ValueError: An argument is out of range, or no output is left.

    >>> spread("conv_transpose2d", (4, 4), (3, 3), stride=2, padding=1, output_size=(8, 8)).output_padding
    (1, 1)
    """
    rank = len(kernel)
    strides, dilations = per_axis(op, "stride", stride, rank), per_axis(op, "dilation", dilation, rank)
    extra = per_axis(op, "output_padding", output_padding, rank, minimum=0)
    if any(i < 1 for i in size):
        raise ValueError(f"{op}: every spatial size must be at least 1, got {tuple(size)}")
    if any(k < 1 for k in kernel):
        raise ValueError(f"{op}: every kernel size must be at least 1, got {tuple(kernel)}")
    normal = normal_padding(op, padding, rank)
    crops = _spread_crops(op, normal, kernel, strides, dilations)
    if isinstance(normal, str) and normal != "valid":
        if any(extra):
            raise ValueError(f"{op}: output_padding must be 0 with padding {padding!r}, got {output_padding!r}")
        extra = tuple(max(-after, 0) for _, after in crops)
        crops = tuple((before, max(after, 0)) for before, after in crops)
    if output_size is not None:
        if any(per_axis(op, "output_padding", output_padding, rank, minimum=0)):
            raise ValueError(f"{op}: give output_size or output_padding, got {output_size!r} and {output_padding!r}")
        extra = _output_padding_for(op, output_size, size, kernel, Spread(strides, crops, extra, dilations))
    for e, s, d in zip(extra, strides, dilations, strict=True):
        if normal not in ("same", "causal") and e >= max(s, d) and e > 0:
            raise ValueError(
                f"{op}: output_padding must be below the stride or the dilation, got {extra} "
                f"with stride {strides}, dilation {dilations}"
            )
    normalized = Spread(strides, crops, extra, dilations)
    if any(o < 1 for o in normalized.output_size(size, kernel)):
        raise ValueError(f"{op}: the output must have at least one position per axis, got {normalized.output_size(size, kernel)}")
    return normalized


def _output_padding_for(
    op: str, output_size: int | Sequence[int], size: Sequence[int], kernel: Sequence[int], base: Spread
) -> tuple[int, ...]:
    rank = len(kernel)
    wanted = per_axis(op, "output_size", output_size, rank)
    least = Spread(base.stride, base.crops, (0,) * rank, base.dilation).output_size(size, kernel)
    extra = tuple(w - low for w, low in zip(wanted, least, strict=True))
    if any(e < 0 or e >= s for e, s in zip(extra, base.stride, strict=True)):
        most = tuple(low + s - 1 for low, s in zip(least, base.stride, strict=True))
        raise ValueError(f"{op}: output_size must lie between {least} and {most}, got {output_size!r}")
    return extra


def adjoint(size: Sequence[int], kernel: Sequence[int], windows: Grid) -> Spread:
    """The transposed convolution that maps gradients of the output back to an input of exactly ``size``.

    >>> adjoint((6,), (3,), Grid((2,), ((1, 1),), (1,))).output_size((3,), (3,))
    (6,)
    """
    extra = tuple(
        (i + before + after - span(k, d)) % s
        for i, k, s, (before, after), d in zip(size, kernel, windows.stride, windows.pads, windows.dilation, strict=True)
    )
    return Spread(windows.stride, windows.pads, extra, windows.dilation)


def source(position: int, size: int, mode: str = "zeros") -> int | None:
    """The input index that a position outside or inside [0, size) reads, or None where it reads a zero.

    >>> [source(p, 4, "reflect") for p in (-2, -1, 0, 3, 4)]
    [2, 1, 0, 3, 2]
    """
    if 0 <= position < size:
        return position
    if mode == "zeros":
        return None
    if mode == "replicate":
        return min(max(position, 0), size - 1)
    if mode == "circular":
        return position % size
    return -position if position < 0 else 2 * (size - 1) - position


def taps(
    size: int, kernel: int, stride: int = 1, pads: Pair = (0, 0), dilation: int = 1, mode: str = "zeros"
) -> list[list[int | None]]:
    """For every output of one axis, the input index that each tap reads (None: a padded zero).

    >>> taps(3, 3, pads=(1, 1))
    [[None, 0, 1], [0, 1, 2], [1, 2, None]]
    """
    outputs = (size + sum(pads) - span(kernel, dilation)) // stride + 1
    return [[source(o * stride - pads[0] + t * dilation, size, mode) for t in range(kernel)] for o in range(outputs)]


def landings(size: int, kernel: int, stride: int, before: int, dilation: int, outputs: int) -> int:
    """How many of the outputs·K (output, tap) pairs of one axis read a real input: O(K), not O(outputs·K).

    For a transposed convolution exchange the parts: ``size`` its outputs, ``outputs`` its inputs.

    >>> landings(size=3, kernel=3, stride=1, before=1, dilation=1, outputs=3)
    7
    """
    total = 0
    for t in range(kernel):
        shift = before - t * dilation  # output o reads o·S − shift
        first = max(0, -(-shift // stride))
        last = min(outputs - 1, (size - 1 + shift) // stride)
        total += max(0, last - first + 1)
    return total


def receptive_field(kernel: int, dilation: int) -> int:
    """Input positions from the first to the last that one output of a grid convolution can see, on one axis."""
    return span(kernel, dilation)


def transposed_receptive_field(kernel: int, stride: int, dilation: int) -> int:
    """The same for a transposed convolution: the widest phase counts.

    >>> transposed_receptive_field(kernel=4, stride=2, dilation=1)
    2
    """
    phases: dict[int, list[int]] = {}
    for t in range(kernel):
        phases.setdefault(t * dilation % stride, []).append(t * dilation)
    return max((max(offsets) - min(offsets)) // stride + 1 for offsets in phases.values())
