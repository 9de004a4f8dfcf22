"""Rules of the ops that look through windows: convolutions, pooling, resizing, padding, unfolding."""

from collections.abc import Callable, Sequence

import numpy as np

from omniconv.analysis.receptive_field.graph import Node, Value
from omniconv.analysis.receptive_field.rules import Parts, Walk, axis_of, rule, sized, spatial
from omniconv.analysis.receptive_field.seen import Reads, Seen
from omniconv.geometry import source

Integers = tuple[int, ...]


def through_windows(
    node: Node, up: Seen, walk: Walk, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], before: Sequence[int],
    dilation: Sequence[int], transposed: bool = False,
) -> Seen:  # fmt: skip
    """Back through the windows of the last axes, one after another."""
    first = len(up.shape) - len(kernel)
    for a in range(len(kernel)):
        back = up.spread if transposed else up.windows
        up, outside = back(first + a, size[a], kernel[a], stride[a], before[a], dilation[a])
        if outside:
            walk.left(node, first + a)
    return up


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def convolution(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """The windows of the input; a weight that is made of the input is seen whole by the outputs that it serves."""
    x, shape = sized(node)
    weight: Value = node["weight"]
    rank, groups = len(weight.shape) - 2, int(node["groups"])
    stride, padding, dilation = (spatial(node[name], rank, d) for name, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    transposed = bool(node["transposed"])
    channel = len(shape) - rank - 1
    if weight.depends:
        yield weight, _of_filters(per_channel(up, channel), weight.shape, groups, transposed)
    bias = node["bias"]
    if bias is not None and bias.depends:
        yield bias, per_channel(up, channel)
    if not x.depends:
        return
    mixed = mixed_channels(up, channel, shape[channel], groups)
    kernel = weight.shape[2:]
    yield x, through_windows(node, mixed, walk, shape[channel + 1 :], kernel, stride, padding, dilation, transposed)


def per_channel(up: Seen, channel: int) -> Seen:
    """Counts of the channels alone."""
    others = [a for a in range(len(up.shape)) if a != channel]
    return up.averaged(others, [1] * len(others)).reshaped((up.shape[channel],))


def mixed_channels(up: Seen, channel: int, channels: int, groups: int) -> Seen:
    """Every channel of a group counts as the mean of the outputs of its group."""
    if up.constant[channel] or groups == 1:
        return up.averaged([channel], [channels])
    outputs = up.shape[channel]
    apart = up.filled(channel).reshaped((*up.shape[:channel], groups, outputs // groups, *up.shape[channel + 1 :]))
    mixed = apart.averaged([channel + 1], [channels // groups])
    return mixed.reshaped((*up.shape[:channel], channels, *up.shape[channel + 1 :]))


def _of_filters(filters: Seen, shape: Sequence[int], groups: int, transposed: bool) -> Seen:
    """Counts (O,) of the outputs as counts of a weight (O, C/G, K…), or transposed (C, O/G, K…)."""
    if not transposed:
        for axis, size in enumerate(shape[1:], start=1):
            filters = filters.inserted(axis, size)
        return filters
    per_group = filters.reshaped((groups, shape[1])).inserted(1, shape[0] // groups).reshaped((shape[0], shape[1]))
    for axis, size in enumerate(shape[2:], start=2):
        per_group = per_group.inserted(axis, size)
    return per_group


def _pool_windows(node: Node, rank: int) -> tuple[Integers, Integers, Integers, Integers]:
    kernel = spatial(node["kernel_size"], rank)
    stride = spatial(node["stride"], rank) if node["stride"] else kernel
    return kernel, stride, spatial(node["padding"], rank, 0), spatial(node["dilation"], rank)


def _pool(rank: int) -> Callable[[Node, int, Seen, Walk], Parts]:
    def pool(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
        x, shape = sized(node)
        yield x, through_windows(node, up, walk, shape[len(shape) - rank :], *_pool_windows(node, rank))

    return pool


for _rank in (1, 2, 3):
    for _name in ("max_pool{}d_with_indices", "max_pool{}d", "avg_pool{}d", "mkldnn_max_pool{}d", "quantized_max_pool{}d"):
        rule(_name.format(_rank))(_pool(_rank))


def _adaptive(rank: int) -> Callable[[Node, int, Seen, Walk], Parts]:
    def adaptive(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
        """Output o of Out reads the inputs from ⌊o·In/Out⌋ to ⌈(o + 1)·In/Out⌉."""
        x, shape = sized(node)
        first = len(shape) - rank
        for axis in range(first, len(shape)):
            size, outputs = shape[axis], up.shape[axis]
            if size == outputs:
                continue
            if outputs == 1:
                up = up.averaged([axis], [size])
                walk.mixed(node, x, [axis])
                continue
            walk.mixed(node, x, [axis])
            up = up.boxed(axis)
            places = np.arange(up.start[axis], up.stop(axis))[:, None]
            begin, end = places * size // outputs, -(-(places + 1) * size // outputs)
            table = begin + np.arange((end - begin).max(initial=0))
            up = up.reads(axis, size, np.where(table < end, table, -1))
        yield x, up

    return adaptive


for _rank in (1, 2, 3):
    for _name in ("_adaptive_avg_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d", "mkldnn_adaptive_avg_pool{}d"):
        rule(_name.format(_rank))(_adaptive(_rank))


def _scales(node: Node, rank: int) -> list[float | None]:
    """Factors that the caller gave, one per axis."""
    if node["scale_factors"]:
        return list(node["scale_factors"])
    names = {1: ("scales",), 2: ("scales_h", "scales_w"), 3: ("scales_d", "scales_h", "scales_w")}[rank]
    return [node[name] for name in names]


def _step(size: int, outputs: int, factor: float | None, corners: bool) -> float:
    if corners:
        return (size - 1) / (outputs - 1) if outputs > 1 else 0.0
    return 1.0 / factor if factor else size / outputs


def _nearest(places: Reads, size: int, step: float, _corners: bool, exact: bool = False) -> Reads:
    return np.minimum(np.floor((places + (0.5 if exact else 0.0)) * step).astype(np.int64), size - 1)[:, None]


def _linear(places: Reads, size: int, step: float, corners: bool) -> Reads:
    """The two neighbours; one alone where the other has no weight."""
    real = places * step if corners else np.maximum(step * (places + 0.5) - 0.5, 0.0)
    low = np.minimum(np.floor(real).astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)
    return np.stack([low, np.where(real > low, high, -1)], 1)


def _cubic(places: Reads, size: int, step: float, corners: bool) -> Reads:
    """Four neighbours, clamped; one alone at a whole position."""
    real = places * step if corners else step * (places + 0.5) - 0.5
    low = np.floor(real).astype(np.int64)
    table = np.clip(low[:, None] + np.arange(-1, 3), 0, size - 1)
    whole = (real == low)[:, None] & (np.arange(4) != 1)
    return np.where(whole, -1, table)


def _antialiased(support: float) -> Callable[[Reads, int, float, bool], Reads]:
    def table(places: Reads, size: int, step: float, corners: bool) -> Reads:
        """Everything within the filter, which is as wide as the step where it shrinks."""
        reach = support * max(step, 1.0)
        centre = step * (places + (0.0 if corners else 0.5)) + (0.5 if corners else 0.0)
        begin = np.maximum((centre - reach + 0.5).astype(np.int64), 0)[:, None]
        end = np.minimum((centre + reach + 0.5).astype(np.int64), size)[:, None]
        reads = begin + np.arange((end - begin).max(initial=0))
        away = np.abs(reads - centre[:, None] + 0.5) / max(step, 1.0)
        seen = (reads < end) & (away < support)
        if support == 2.0:
            seen &= away != 1.0
        return np.where(seen, reads, -1)

    return table


def _resize(rank: int, table: Callable[[Reads, int, float, bool], Reads]) -> Callable[[Node, int, Seen, Walk], Parts]:
    def resize(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
        x, shape = sized(node)
        corners, factors = bool(node["align_corners"]), _scales(node, rank)
        for a, axis in enumerate(range(len(shape) - rank, len(shape))):
            size, outputs = shape[axis], up.shape[axis]
            step = _step(size, outputs, factors[a], corners)
            if size == outputs and step == 1.0:
                continue
            up = up.boxed(axis)
            if not up.constant[axis]:
                up = up.reads(axis, size, table(np.arange(up.start[axis], up.stop(axis)), size, step, corners))
            else:
                up = up.reads(axis, size, table(np.arange(1), size, step, corners))
        yield x, up

    return resize


def _exactly_nearest(places: Reads, size: int, step: float, corners: bool) -> Reads:
    return _nearest(places, size, step, corners, exact=True)


for _rank in (1, 2, 3):
    rule(f"upsample_nearest{_rank}d")(_resize(_rank, _nearest))
    rule(f"_upsample_nearest_exact{_rank}d")(_resize(_rank, _exactly_nearest))
rule("upsample_linear1d")(_resize(1, _linear))
rule("upsample_bilinear2d")(_resize(2, _linear))
rule("upsample_trilinear3d")(_resize(3, _linear))
rule("upsample_bicubic2d")(_resize(2, _cubic))
rule("_upsample_bilinear2d_aa")(_resize(2, _antialiased(1.0)))
rule("_upsample_bicubic2d_aa")(_resize(2, _antialiased(2.0)))


@rule("constant_pad_nd")
def constant_pad(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """Outputs in the pads see nothing."""
    x, shape = sized(node)
    pads = node["pad"]
    for i in range(len(pads) // 2):
        axis = len(shape) - 1 - i
        if pads[2 * i] or pads[2 * i + 1]:
            up, outside = up.moved(axis, -pads[2 * i], shape[axis])
            if outside:
                walk.left(node, axis)
    yield x, up


def _mode_pad(mode: str) -> Callable[[Node, int, Seen, Walk], Parts]:
    def pad(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
        """Outputs in the pads see what the mode puts there."""
        x, shape = sized(node)
        pads = node["padding"] if node["padding"] is not None else node["pad"]
        for i in range(len(pads) // 2):
            axis, before = len(shape) - 1 - i, pads[2 * i]
            if not before and not pads[2 * i + 1]:
                continue
            up = up.boxed(axis)
            places = np.arange(up.start[axis], up.stop(axis)) - before
            if places.size and (places[0] < 0 or places[-1] >= shape[axis]):
                walk.left(node, axis)
            table = np.array([source(int(p), shape[axis], mode) for p in places], np.int64)[:, None]
            up = up.reads(axis, shape[axis], table)
        yield x, up

    return pad


for _rank in (1, 2, 3):
    rule(f"reflection_pad{_rank}d")(_mode_pad("reflect"))
    rule(f"replication_pad{_rank}d")(_mode_pad("replicate"))


@rule("im2col")
def im2col(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """(N, C·Kh·Kw, Oh·Ow): each row of the result is one tap of every window."""
    x, shape = sized(node)
    kernel, stride, padding, dilation = (spatial(node[n], 2) for n in ("kernel_size", "stride", "padding", "dilation"))
    outputs = [(shape[2 + a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in (0, 1)]
    apart = up.reshaped((shape[0], shape[1], *kernel, *outputs))
    yield from _per_tap(node, x, apart, walk, kernel, stride, padding, dilation, False)


@rule("col2im")
def col2im(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """The transpose of im2col: windows are added up where they overlap."""
    x, shape = sized(node)
    kernel, stride, padding, dilation = (spatial(node[n], 2) for n in ("kernel_size", "stride", "padding", "dilation"))
    size = node["output_size"]
    inputs = [(size[a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in (0, 1)]
    total: Seen | None = None
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            part = up
            for axis, k in ((2, ky), (3, kx)):
                a = axis - 2
                part, _ = part.spread(axis, inputs[a], 1, stride[a], padding[a] - k * dilation[a], 1)
            part = _placed(part, kernel, ky, kx)
            total = part if total is None else total.plus(part)
    assert total is not None
    yield x, total.reshaped(shape)


def _placed(part: Seen, kernel: Sequence[int], ky: int, kx: int) -> Seen:
    """(N, C, h, w) as the tap (ky, kx) of (N, C, Kh, Kw, h, w)."""
    made = part.inserted(2).inserted(3)
    made = made.reads(2, kernel[0], np.array([[ky]]))
    return made.reads(3, kernel[1], np.array([[kx]]))


def _per_tap(
    node: Node, x: Value, apart: Seen, walk: Walk, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool,
) -> Parts:  # fmt: skip
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            part = apart.taken(2, ky)
            part = None if part is None else part.taken(2, kx)
            if part is None:
                continue
            before = [padding[0] - ky * dilation[0], padding[1] - kx * dilation[1]]
            yield x, through_windows(node, part, walk, x.shape[2:], (1, 1), stride, before, (1, 1), transposed)


@rule("unfold")
def unfold(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """``Tensor.unfold``: windows of one axis, their elements along a new last axis."""
    x, shape = sized(node)
    axis, step = axis_of(node["dimension"], len(shape)), node["step"]
    last = len(up.shape) - 1
    for k in range(node["size"]):
        part = up.taken(last, k)
        if part is not None:
            yield x, part.windows(axis, shape[axis], 1, step, -k, 1)[0]
