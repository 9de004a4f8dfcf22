"""Rules of the ops that move elements without changing them: views, permutations, slices, joins, indexing."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from omniconv.analysis.receptive_field.graph import Node, Value, evaluated
from omniconv.analysis.receptive_field.rules import Parts, Walk, axis_of, narrowed, rule, sized
from omniconv.analysis.receptive_field.seen import Seen, TooLargeError

_MOST_NUMBERED = 2**21  # elements of a tensor that are numbered one by one


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "flatten", "view_copy",
      "unflatten", "_reshape_copy", "squeeze_copy", "unsqueeze_copy", "ravel")  # fmt: skip
def reshaping(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """The same elements in the same order."""
    x, shape = sized(node)
    yield x, up.reshaped(shape)


@rule("permute", "permute_copy")
def permute(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """Axis a of the result is axis dims[a] of the input."""
    x, shape = sized(node)
    dims = [axis_of(d, len(shape)) for d in node["dims"]]
    yield x, up.permuted([dims.index(a) for a in range(len(dims))])


@rule("transpose", "transpose_", "t", "t_", "transpose_copy", "t_copy", "swapaxes")
def transpose(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """Two axes change places."""
    x, shape = sized(node)
    order = list(range(len(shape)))
    one, two = (0, len(shape) - 1) if node["dim0"] is None else (axis_of(node[d], len(shape)) for d in ("dim0", "dim1"))
    order[one], order[two] = two, one
    yield x, up.permuted(order)


@rule("expand", "expand_copy", "expand_as", "broadcast_to")
def expand(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """A broadcast."""
    x, shape = sized(node)
    yield x, narrowed(up, shape)


@rule("slice", "slice_copy")
def slicing(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """From start, every step-th."""
    x, shape = sized(node)
    axis = axis_of(node["dim"], len(shape))
    start = node["start"] or 0
    start = max(0, min(start + shape[axis] if start < 0 else start, shape[axis]))
    yield x, up.moved(axis, start, shape[axis], node["step"])[0]


@rule("narrow", "narrow_copy")
def narrow(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """From start on."""
    x, shape = sized(node)
    axis = axis_of(node["dim"], len(shape))
    yield x, up.moved(axis, axis_of(int(node["start"]), shape[axis]), shape[axis])[0]


@rule("select", "select_copy")
def select(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """One element of an axis."""
    x, shape = sized(node)
    axis = axis_of(node["dim"], len(shape))
    yield x, up.inserted(axis).reads(axis, shape[axis], np.array([[axis_of(node["index"], shape[axis])]]))


@rule("unbind", "unbind_copy")
def unbind(node: Node, slot: int, up: Seen, _walk: Walk) -> Parts:
    """Every element of an axis on its own."""
    x, shape = sized(node)
    axis = axis_of(node["dim"], len(shape))
    yield x, up.inserted(axis).reads(axis, shape[axis], np.array([[slot]]))


@rule("split", "split_with_sizes", "split_copy", "split_with_sizes_copy", "unsafe_split", "unsafe_split_with_sizes", "chunk",
      "unsafe_chunk", "tensor_split")  # fmt: skip
def split(node: Node, slot: int, up: Seen, _walk: Walk) -> Parts:
    """Parts of an axis, one after another."""
    x, shape = sized(node)
    axis = axis_of(node["dim"], len(shape))
    before = sum(v.shape[axis] for v in node.outputs[:slot] if v is not None)
    yield x, up.moved(axis, before, shape[axis])[0]


@rule("cat", "concat")
def cat(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """Parts of an axis, one after another."""
    parts = [v for v in node["tensors"] if v.shape != (0,)]
    axis, first = axis_of(node["dim"], len(up.shape)), 0
    for value in parts:
        last = first + value.shape[axis]
        part = up.part(axis, first, last) if value.depends else None
        if part is not None:
            yield value, part
        first = last


@rule("stack")
def stack(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """Tensors along a new axis."""
    axis = axis_of(node["dim"], len(up.shape))
    for index, value in enumerate(node["tensors"]):
        part = up.taken(axis, index) if value.depends else None
        if part is not None:
            yield value, part


@rule("repeat")
def repeat(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """The whole, several times along each axis."""
    x, shape = sized(node)
    repeats = node["repeats"]
    wide = (*[1] * (len(repeats) - len(shape)), *shape)
    apart = up.reshaped([n for r, s in zip(repeats, wide, strict=True) for n in (r, s)])
    once = apart.averaged(range(0, 2 * len(repeats), 2), [1] * len(repeats))
    yield x, once.reshaped(shape)


@rule("roll")
def roll(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """Around the border."""
    x, given = sized(node)
    shape = given if node["dims"] else (math.prod(given),)  # without axes, that of all elements in a row
    up = up.reshaped(shape)
    for shift, dim in zip(node["shifts"], node["dims"] or [0], strict=True):
        axis = axis_of(dim, len(shape))
        if up.constant[axis]:
            continue
        table = (np.arange(up.start[axis], up.stop(axis)) - shift)[:, None]
        if table.size and (table.min() < 0 or table.max() >= shape[axis]):
            walk.left(node, axis)
        up = up.reads(axis, shape[axis], table % shape[axis])
    yield x, up.reshaped(given)


@rule("flip")
def flip(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """Backwards along some axes."""
    x, shape = sized(node)
    for dim in node["dims"]:
        axis = axis_of(dim, len(shape))
        if not up.constant[axis]:
            up = up.reads(axis, shape[axis], shape[axis] - 1 - np.arange(up.start[axis], up.stop(axis))[:, None])
    yield x, up


@rule("pixel_shuffle")
def pixel_shuffle(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """(…, C·r², H, W) to (…, C, H·r, W·r)."""
    x, shape = sized(node)
    r, lead, n = node["upscale_factor"], shape[:-3], len(shape) - 3
    apart = up.reshaped((*lead, shape[-3] // r**2, shape[-2], r, shape[-1], r))
    yield x, apart.permuted([*range(n), n, n + 2, n + 4, n + 1, n + 3]).reshaped(shape)


@rule("pixel_unshuffle")
def pixel_unshuffle(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """(…, C, H·r, W·r) to (…, C·r², H, W)."""
    x, shape = sized(node)
    r, lead, n = node["downscale_factor"], shape[:-3], len(shape) - 3
    apart = up.reshaped((*lead, shape[-3], r, r, shape[-2] // r, shape[-1] // r))
    yield x, apart.permuted([*range(n), n, n + 3, n + 1, n + 4, n + 2]).reshaped(shape)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """Channel g·(C/G) + i goes to i·G + g."""
    x, shape = sized(node)
    groups = node["groups"]
    apart = up.reshaped((shape[0], shape[1] // groups, groups, *shape[2:]))
    yield x, apart.permuted([0, 2, 1, *range(3, len(shape) + 1)]).reshaped(shape)


@rule("index_select", "index", "gather", "_unsafe_index", "take_along_dim", "as_strided", "diagonal")
def indexing(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """By numbers: those of the elements that are read, where the index does not depend on the input."""
    x, shape = sized(node)
    if any(v.depends for v in node.values() if v is not x):
        walk.not_understood(node, "its index depends on the input")
        return
    if node.op == "aten::as_strided" and not (x.tensor.is_contiguous() and x.tensor.storage_offset() == 0):
        walk.not_understood(node, "its input does not lie in memory in order")
        return
    if node.op == "aten::index_select" and not node["index"].depends:
        index, axis = evaluated(node["index"]), axis_of(node["dim"], len(shape))
        if index is not None and up.constant[axis] and index.unique().numel() == shape[axis]:
            up = up.boxed(axis)
        if index is not None and not up.constant[axis]:
            yield x, up.reads(axis, shape[axis], index.numpy()[up.start[axis] : up.stop(axis), None])
            return
    if math.prod(shape) > _MOST_NUMBERED:
        raise TooLargeError(f"{node.op}: the elements of a tensor of shape {shape} are too many to number")
    numbers = _numbers(node, shape)
    if numbers is None:
        walk.not_understood(node, "its index is not known without running it")
        return
    counts = np.zeros(math.prod(shape))
    np.add.at(counts, numbers.numpy().reshape(-1), up.dense().reshape(-1))
    yield x, Seen.of(shape, [0] * len(shape), [False] * len(shape), counts.reshape(shape), up.exponent).trimmed()


def _numbers(node: Node, shape: Sequence[int]) -> Any:
    """What the op makes of the numbers of its input's elements: which it reads."""
    known: dict[str, Any] = {"self": torch.arange(math.prod(shape)).reshape(tuple(shape))}
    for name, argument in node.arguments.items():
        if name == "self":
            continue
        leaves = argument if isinstance(argument, (list, tuple)) else [argument]
        made = [evaluated(leaf) if isinstance(leaf, Value) else leaf for leaf in leaves]
        if any(isinstance(leaf, Value) and m is None for leaf, m in zip(leaves, made, strict=True)):
            return None
        known[name] = made if isinstance(argument, (list, tuple)) else made[0]
    return node.again(known)


@rule("overwrite")
def overwrite(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """A tensor whose memory was written through another: each element is of the one or of the other."""
    old, new = node["old"], node["new"]
    place = _places(new)
    counts, own = up.dense(), _places(old)
    order = np.argsort(place.reshape(-1), kind="stable")
    ranked = place.reshape(-1)[order]
    at = np.minimum(np.searchsorted(ranked, own), max(len(ranked) - 1, 0))
    written = ranked[at] == own if ranked.size else np.zeros(own.shape, bool)
    fresh = np.zeros(math.prod(new.shape))
    np.add.at(fresh, order[at[written]], counts[written])
    if new.depends:
        yield (
            new,
            Seen.of(new.shape, [0] * len(new.shape), [False] * len(new.shape), fresh.reshape(new.shape), up.exponent).trimmed(),
        )
    if old.depends:
        kept = np.where(written, 0.0, counts)
        yield old, Seen.of(old.shape, [0] * len(old.shape), [False] * len(old.shape), kept, up.exponent).trimmed()


def _places(value: Value) -> Any:
    """Where in memory each element of a tensor lies."""
    if math.prod(value.shape) > _MOST_NUMBERED:
        raise TooLargeError(f"the places of a tensor of shape {value.shape} are too many to number")
    tensor, places = value.tensor, np.zeros(value.shape, np.int64) + int(value.tensor.storage_offset())
    for axis, (n, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        places += (np.arange(int(n)) * int(stride)).reshape([-1 if a == axis else 1 for a in range(tensor.dim())])
    return places
