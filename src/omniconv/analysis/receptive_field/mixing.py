"""Rules of the ops that mix whole axes: products of matrices, reductions, softmax, normalisations, attention."""

import math
from collections.abc import Sequence

import numpy as np

from omniconv.analysis.receptive_field.graph import Node, Value
from omniconv.analysis.receptive_field.rules import Parts, Walk, axis_of, narrowed, rule, sized
from omniconv.analysis.receptive_field.seen import Seen


@rule("mm", "bmm", "matmul", "linear", "dot", "mv", "vdot")
def product(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """(…, M, K)·(…, K, N): rows of the first and columns of the second are seen whole."""
    one, two = node["self"] or node["input"], node["mat2"] or node["vec"] or node["tensor"] or node["other"] or node["vec2"]
    yield from _product(node, one, two, up, walk)


def _product(node: Node, one: Value, two: Value, up: Seen, walk: Walk) -> Parts:
    if len(one.shape) == 1:  # a dot product
        for value in (one, two):
            if value.depends:
                walk.mixed(node, value, [0])
                yield value, up.inserted(0, value.shape[0])
        return
    if len(two.shape) == 1:  # a matrix and a vector
        up = up.inserted(len(up.shape))
    rows, columns = len(up.shape) - 2, len(up.shape) - 1
    if one.depends:
        walk.mixed(node, one, [len(one.shape) - 1])
        yield one, up.averaged([columns], [one.shape[-1]])
    if two.depends:
        walk.mixed(node, two, [max(len(two.shape) - 2, 0)])
        part = up.averaged([rows], [one.shape[-1]])
        yield two, part if len(two.shape) > 1 else part.reshaped(two.shape)


@rule("addmm", "addbmm", "baddbmm", "addmv")
def added_product(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """A product and what is added to it."""
    names = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec")}.get(node.op.removeprefix("aten::"), ("batch1", "batch2"))
    if node["self"].depends:
        yield node["self"], narrowed(up, node["self"].shape)
    if node.op == "aten::addbmm":
        up = up.inserted(0, node["batch1"].shape[0])
    yield from _product(node, node[names[0]], node[names[1]], up, walk)


def _dims(node: Node, rank: int) -> list[int]:
    dims = node["dim"]
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(axis_of(d, rank) for d in (dims if isinstance(dims, (list, tuple)) else [dims]))


@rule("sum", "mean", "amax", "amin", "aminmax", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "logsumexp", "norm",
      "linalg_vector_norm", "nansum", "all", "any", "argmax", "argmin", "median", "nanmedian", "mode", "kthvalue")  # fmt: skip
def reduction(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """Axes become one element, which sees them whole."""
    x, shape = sized(node)
    other = node["other"]
    if isinstance(other, Value):  # max and min of two tensors
        for value in (x, other):
            if value.depends:
                yield value, narrowed(up, value.shape)
        return
    dims = _dims(node, len(shape))
    kept = [1 if a in dims else n for a, n in enumerate(shape)]
    walk.mixed(node, x, dims)
    yield x, up.reshaped(kept).averaged(dims, [shape[a] for a in dims])


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "sort", "argsort", "topk", "renorm")
def along_axis(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """Every element of an axis sees all of it."""
    x, shape = sized(node)
    axis = axis_of(-1 if node["dim"] is None else node["dim"], len(shape))
    walk.mixed(node, x, [axis])
    yield x, up.averaged([axis], [shape[axis]])


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
def cumulative(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """Every element sees those before it."""
    x, shape = sized(node)
    axis = axis_of(node["dim"], len(shape))
    walk.mixed(node, x, [axis])
    yield x, _and_before(up, axis)


def _and_before(up: Seen, axis: int) -> Seen:
    """What sees an element sees all that come before it too."""
    up = up.boxed(axis)
    start = [0 if a == axis else s for a, s in enumerate(up.start)]
    margins = [(up.start[axis], 0) if a == axis else (0, 0) for a in range(len(up.shape))]
    wide = np.flip(np.pad(np.flip(up.counts, axis), [m[::-1] for m in margins]), axis)
    counts = np.flip(np.cumsum(np.flip(wide, axis), axis), axis)
    return Seen.of(up.shape, start, up.constant, np.ascontiguousarray(counts), up.exponent)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm",
      "_native_batch_norm_legit_functional", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")  # fmt: skip
def batch_norm(node: Node, slot: int, up: Seen, walk: Walk) -> Parts:
    """Statistics that were kept see nothing; those of the batch see all of a channel."""
    x, shape = sized(node)
    if slot > 0:
        return
    kept = "_no_" in node.op or (node["training"] is False)
    if not kept:
        axes = [a for a in range(len(shape)) if a != 1]
        walk.mixed(node, x, axes)
        up = up.averaged(axes)
    if x.depends:
        yield x, up
    yield from _affine(node, up, 1)


def _affine(node: Node, up: Seen, axis: int) -> Parts:
    for name in ("weight", "bias"):
        value = node[name]
        if isinstance(value, Value) and value.depends and len(value.shape) == 1:
            yield (
                value,
                up.averaged([a for a in range(len(up.shape)) if a != axis], [1] * (len(up.shape) - 1)).reshaped(value.shape),
            )


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(node: Node, slot: int, up: Seen, walk: Walk) -> Parts:
    """The last axes, whole."""
    x, shape = sized(node)
    if slot > 0:
        return
    axes = list(range(len(shape) - len(node["normalized_shape"]), len(shape)))
    for name in ("weight", "bias"):
        if isinstance(node[name], Value) and node[name].depends:
            yield node[name], narrowed(up, node[name].shape)
    walk.mixed(node, x, axes)
    yield x, up.averaged(axes)


@rule("native_group_norm", "group_norm")
def group_norm(node: Node, slot: int, up: Seen, walk: Walk) -> Parts:
    """A group of channels at all positions."""
    x, shape = sized(node)
    if slot > 0:
        return
    yield from _affine(node, up, 1)
    groups = int(node["group"] or node["num_groups"])
    walk.mixed(node, x, range(1, len(shape)))
    apart = up.reshaped((shape[0], groups, shape[1] // groups, *shape[2:]))
    yield x, apart.averaged(range(2, len(apart.shape))).reshaped(shape)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_fused_attention_overrideable",
      "scaled_dot_product_attention")  # fmt: skip
def attention(node: Node, slot: int, up: Seen, walk: Walk) -> Parts:
    """A query sees all keys and values, or those before it."""
    if slot > 0:
        return
    query, key, value = node["query"], node["key"], node["value"]
    channel, axis = len(query.shape) - 1, len(query.shape) - 2
    bias = node["attn_mask"] if node["attn_mask"] is not None else node["attn_bias"]
    if isinstance(bias, Value) and bias.depends:
        yield bias, narrowed(up.averaged([channel], [key.shape[axis]]), bias.shape)
    for operand in (query, key, value):
        if not operand.depends:
            continue
        if operand is not query:
            walk.mixed(node, operand, [axis])
        shared = _shared_heads(up, operand.shape) if operand is not query else up
        wide = shared.averaged([channel], [operand.shape[channel]])
        if operand is query:
            yield operand, wide
        elif node["is_causal"]:
            yield operand, _and_before(wide, axis)._with(axis, _and_before(wide, axis).counts, 0, operand.shape[axis])
        else:
            yield operand, wide.averaged([axis], [operand.shape[axis]])


def _shared_heads(up: Seen, shape: Sequence[int]) -> Seen:
    """Keys may have fewer heads than queries, each for a run of them."""
    axis = len(shape) - 3
    if axis < 0 or up.shape[axis] == shape[axis]:
        return up
    apart = up.reshaped((*up.shape[:axis], shape[axis], up.shape[axis] // shape[axis], *up.shape[axis + 1 :]))
    return apart.averaged([axis + 1], [1]).reshaped((*up.shape[:axis], shape[axis], *up.shape[axis + 1 :]))


@rule("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
def attention_block(node: Node, slot: int, up: Seen, walk: Walk) -> Parts:
    """(N, T, C): every position sees every other."""
    if slot > 0:
        return
    for operand in node.values():
        if operand.depends and len(operand.shape) == 3:
            walk.mixed(node, operand, [1, 2])
            yield operand, up.averaged([1, 2], operand.shape[1:])


@rule("embedding")
def embedding(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """A row for every index."""
    last = len(up.shape) - 1
    if node["indices"].depends:
        yield node["indices"], up.averaged([last], [1]).reshaped(node["indices"].shape)
    if node["weight"].depends:
        weight = node["weight"]
        flat = up.averaged(range(last)).reshaped((math.prod(up.shape[:-1]), up.shape[-1]))
        yield weight, flat.averaged([0], [weight.shape[0]])


@rule("glu")
def glu(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """One half times the sigmoid of the other."""
    x, shape = sized(node)
    axis = axis_of(node["dim"], len(shape))
    half = shape[axis] // 2
    for first in (0, half):
        yield x, up.moved(axis, first, shape[axis])[0]
