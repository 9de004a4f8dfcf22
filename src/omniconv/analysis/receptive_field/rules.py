"""How each op carries back what is seen: from counts of its result to counts of its operands.

A rule is given the node, the counts of one of its outputs and the walk, and yields (operand, counts). An op without a rule is
elementwise where torch says so (its tag ``pointwise``); any other is reported by name and carries nothing back.

Counts are paths: each tap of a window is one; what is mixed as a whole (channels of a convolution, a normalisation, a
softmax, a mean) counts as the average over the outputs that it takes part in, so that channels do not multiply them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from omniconv.analysis.receptive_field.graph import Node, Value
from omniconv.analysis.receptive_field.seen import Seen

Parts = Iterator[tuple[Value, Seen]]


class Walk(Protocol):
    """What a rule tells while the counts are carried back."""

    def left(self, node: Node, axis: int) -> None:
        """Windows reach beyond the border along an axis of their input."""

    def mixed(self, node: Node, value: Value, axes: Sequence[int]) -> None:
        """Every element along these axes of an operand is seen as soon as one is."""

    def not_understood(self, node: Node, why: str) -> None:
        """The op's operands may be seen, by more than it carries back."""

    def lower_bound(self, node: Node, why: str) -> None:
        """What is carried back is the least that may be seen."""


Rule = Callable[[Node, int, Seen, Walk], Parts]
RULES: dict[str, Rule] = {}
NOTHING = {  # ops whose results hold none of the numbers of their operands
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones",
    "new_empty", "new_full", "new_empty_strided", "bernoulli_", "zero_", "fill_", "normal_", "uniform_",
}  # fmt: skip
POINTWISE = {  # elementwise, though torch does not tag them so
    "alias", "detach", "lift_fresh_copy", "lift_fresh", "_to_copy", "copy_", "copy", "native_dropout", "hardtanh_", "hardswish_",
    "hardsigmoid_", "leaky_relu_", "silu_", "elu_", "relu_", "celu_", "mish_", "masked_fill_", "rrelu_with_noise", "bernoulli",
    "log_sigmoid_forward", "fake_quantize_per_tensor_affine_cachemask", "_prelu_kernel", "threshold_",
}  # fmt: skip


NORMALISATIONS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_batch_norm_with_update",
    "cudnn_batch_norm", "native_layer_norm", "native_group_norm", "_fused_rms_norm",
}  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the names of aten's ops."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def sized(node: Node, name: str = "input") -> tuple[Value, tuple[int, ...]]:
    """An operand and its shape."""
    value = node[name] if node[name] is not None else node["self"]
    return value, value.shape


def spatial(value: Any, rank: int, default: int = 1) -> tuple[int, ...]:
    """One integer per axis from the argument of an op; empty means the default."""
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(int(v) for v in value or (default,))
    return values * rank if len(values) == 1 else values


def axis_of(value: int, rank: int) -> int:
    """A negative axis counted from the front."""
    return value + rank if value < 0 else value


def elementwise(node: Node, _slot: int, up: Seen, _walk: Walk) -> Parts:
    """Each element of the result is made of one of each operand; operands are broadcast."""
    for value in node.values():
        overwritten = node.op == "aten::copy_" and value is node["self"]
        if value.depends and not overwritten:
            yield value, narrowed(up, value.shape)


def narrowed(up: Seen, shape: Sequence[int]) -> Seen:
    """Back through a broadcast."""
    ahead = len(up.shape) - len(shape)
    axes = [a for a in range(len(up.shape)) if a < ahead or (shape[a - ahead] == 1 and up.shape[a] != 1)]
    return up.averaged(axes, [1] * len(axes)).reshaped(shape)


def carried_back(node: Node, slot: int, up: Seen, walk: Walk) -> Parts:
    """The counts of the operands of a node, by its rule."""
    name = node.op.removeprefix("aten::")
    known = RULES.get(name) if node.op.startswith("aten::") else RULES.get(node.op)
    if known is None and name.endswith("_") and node.op.startswith("aten::"):
        known = RULES.get(name[:-1])
    if name in NOTHING:
        return
    if known is not None:
        yield from known(node, slot, up, walk)
    elif node.pointwise or name in POINTWISE:
        yield from elementwise(node, slot, up, walk)
    else:
        walk.not_understood(node, "no rule for it")
