"""Where the positions of every tensor of a network lie on its input, followed op by op through a run without arithmetic.

An axis of a tensor is a row of positions (:class:`Axis`), has none (None: batch, channels, what is pooled), or has some that cannot
be told any more (:class:`Lost`). An axis on which the dilated network has more positions than the network as it is ("dense") may
only meet ops that treat every position alike; an op that does not is refused.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omniconv.ops.operator import fail

CALLER = "stride_to_dilation"
POOLS_MORE = "pools more positions than before: what it gives, and what follows from that, differs"


@dataclass(frozen=True)
class Axis:
    """Input steps between neighbouring positions: ``stride`` in the network as it is, ``kept`` in the dilated one."""

    stride: Fraction
    kept: Fraction

    @property
    def rate(self) -> int:
        """How many positions of the dilated network there are for each of the network as it is."""
        return int(self.stride / self.kept)


@dataclass(frozen=True)
class Lost:
    """An axis whose positions an op made untraceable."""

    op: str


Place = Axis | Lost | None
Places = tuple[Place, ...]


@dataclass
class Call:
    """One op: its arguments by name, where its tensors lie, and what it gave."""

    op: str
    where: str
    limit: int
    named: dict[str, Any]
    places: Callable[[Any], Places]
    outputs: list[Tensor]
    notes: list[str] = field(default_factory=list)

    def of(self, argument: str) -> Places:
        """Where the tensor of an argument lies."""
        return self.places(self.named[argument])

    def tensors(self) -> list[Tensor]:
        """All there are among the arguments."""
        return [leaf for leaf in tree_leaves(list(self.named.values())) if isinstance(leaf, Tensor)]

    def refuse(self, must: str) -> None:
        """Raises ValueError by the op's name and place."""
        fail(CALLER, must, self.text)

    @property
    def text(self) -> str:
        """The op and the module that calls it."""
        return f"{self.op} in {self.where}"


def dense(place: Place) -> bool:
    """Whether the dilated network has more positions on this axis."""
    return isinstance(place, Axis) and place.rate > 1


def _merged(call: Call) -> Places:
    """Of an op that treats every position alike: all its inputs must lie at the same positions."""
    size = call.outputs[0].shape
    found: list[Place] = [None] * len(size)
    for tensor in call.tensors():
        places = call.places(tensor)
        offset = len(size) - tensor.dim()
        for axis, place in enumerate(places):
            at = axis + offset
            if at < 0 or place is None or (tensor.shape[axis] == 1 and size[at] > 1):
                continue
            have = found[at]
            if (isinstance(have, Lost) and dense(place)) or (isinstance(place, Lost) and dense(have)):
                call.refuse("what meets a map that grows must lie at positions that are known")
            if isinstance(have, Axis) and isinstance(place, Axis) and have != place:
                fail(
                    CALLER, f"the maps that meet in {call.text} must lie at the same positions", f"strides {have.stride} and "
                    f"{place.stride}, dilated {have.kept} and {place.kept}",
                )  # fmt: skip
            found[at] = place if not isinstance(have, Axis) else have
    for tensor in call.tensors():  # a table of fixed size beside a map that grows
        offset = len(size) - tensor.dim()
        for axis, place in enumerate(call.places(tensor)):
            fixed = place is None and tensor.shape[axis] > 1 and tensor.stride(axis) > 0  # 0: one number, spread
            if fixed and axis + offset >= 0 and dense(found[axis + offset]):
                call.refuse("what meets a map that grows must grow with it")
    return tuple(found)


def _kept(call: Call) -> Places:
    return call.of("self" if "self" in call.named else "input")


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Runs of axes of a reshaped tensor that hold the same elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        if i < len(before) and j < len(after) and before[i] == after[j]:
            yield [i], [j]
            i, j = i + 1, j + 1
        elif i < len(before) and before[i] == 1:
            yield [i], []
            i += 1
        elif j < len(after) and after[j] == 1:
            yield [], [j]
            j += 1
        else:
            old, new = [i], [j]
            left, right = before[i], after[j]
            while left != right:
                if left < right:
                    i += 1
                    old.append(i)
                    left *= before[i]
                else:
                    j += 1
                    new.append(j)
                    right *= after[j]
            yield old, new
            i, j = i + 1, j + 1


def _reshaped(call: Call) -> Places:
    places, before, after = _kept(call), _tensor(call).shape, call.outputs[0].shape
    found: list[Place] = [None] * len(after)
    for old, new in _groups(before, after):
        if len(old) == len(new) == 1:
            found[new[0]] = places[old[0]]
        elif any(dense(places[i]) for i in old):
            call.refuse("a map that grows must be pooled to one position before it is flattened or cut up")
        elif any(places[i] is not None for i in old):
            for j in new:
                found[j] = Lost(call.text)
    return tuple(found)


def _tensor(call: Call) -> Tensor:
    return call.named["self" if "self" in call.named else "input"]


def _permuted(call: Call) -> Places:
    places = _kept(call)
    return tuple(places[d] for d in call.named["dims"])


def _transposed(call: Call) -> Places:
    places = list(_kept(call))
    a, b = (call.named["dim0"], call.named["dim1"]) if "dim0" in call.named else (0, -1)
    if len(places) > 1:
        places[a], places[b] = places[b], places[a]
    return tuple(places)


def _unsqueezed(call: Call) -> Places:
    places = list(_kept(call))
    places.insert(call.named["dim"] % (len(places) + 1), None)
    return tuple(places)


def _joined(call: Call) -> Places:
    tensors, dim = call.named["tensors"], call.named["dim"]
    dim %= tensors[0].dim()
    if any(dense(call.places(t)[dim]) for t in tensors):
        call.refuse("maps that grow must be joined by their channels")
    inputs = [(t, call.places(t)) for t in tensors]
    rest = [(*p[:dim], None, *p[dim + 1 :]) for _, p in inputs]
    first = next((p for p in rest if any(place is not None for place in p)), rest[0])
    for other in rest:
        for a, b in zip(first, other, strict=True):
            if a != b and (dense(a) or dense(b)):
                call.refuse("maps that are joined must lie at the same positions")
    here: Place = Lost(call.text) if any(p[dim] is not None for _, p in inputs) else None
    return (*first[:dim], here, *first[dim + 1 :])


def _stacked(call: Call) -> Places:
    tensors = call.named["tensors"]
    first = next((p for p in map(call.places, tensors) if any(place is not None for place in p)), call.places(tensors[0]))
    for a, b in ((a, b) for t in tensors for a, b in zip(first, call.places(t), strict=True)):
        if a != b and (dense(a) or dense(b)):
            call.refuse("maps that are joined must lie at the same positions")
    dim = call.named["dim"] % (len(first) + 1)
    return (*first[:dim], None, *first[dim:])


def _sliced(call: Call) -> Places:
    places, dim, step = list(_kept(call)), call.named["dim"], call.named.get("step", 1)
    whole = call.outputs[0].shape == _tensor(call).shape
    place = places[dim]
    if place is None or whole:
        return tuple(places)
    if dense(place):
        call.refuse("a map that grows must not be cropped")
    if isinstance(place, Axis) and step > 1:
        if place.kept * step > call.limit:
            call.refuse("what takes every second position must be a module's stride")
        places[dim] = Axis(place.stride * step, place.kept * step)
    return tuple(places)


def _selected(call: Call) -> Places:
    places, dim = list(_kept(call)), call.named["dim"]
    if dense(places[dim]):
        call.refuse("a map that grows must not be cropped")
    del places[dim]
    return tuple(places)


def _split(call: Call) -> Places:
    places, dim = _kept(call), call.named["dim"]
    if dense(places[dim]):
        call.refuse("a map that grows must be split by its channels")
    if call.op.endswith("unbind"):
        kept = list(places)
        del kept[dim]
        return tuple(kept)
    return places


def _reduced(call: Call) -> Places:
    places = _kept(call)
    dims = call.named.get("dim")
    chosen = range(len(places)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    over = {d % max(len(places), 1) for d in chosen}
    if any(dense(places[d]) for d in over):
        call.notes.append(f"{call.text} {POOLS_MORE}")
    if call.named.get("keepdim", False):
        return tuple(None if d in over else place for d, place in enumerate(places))
    return tuple(place for d, place in enumerate(places) if d not in over)


def _along(call: Call) -> Places:
    places = _kept(call)
    if any(dense(places[d]) for d in call.named.get("dims", (call.named.get("dim", -1),))):
        call.refuse("an op along a map that grows must be one of channels")
    return places


def _layer_norm(call: Call) -> Places:
    places = _kept(call)
    if any(dense(p) for p in places[len(places) - len(call.named["normalized_shape"]) :]):
        call.refuse("a norm of a map that grows must be one of channels")
    return places


def _group_norm(call: Call) -> Places:
    places = _kept(call)
    if any(map(dense, places)):
        call.notes.append(f"{call.text} normalises by more positions than before: what it gives differs")
    return places


def _adaptive(call: Call) -> Places:
    places = _kept(call)
    axes = len(call.named["output_size"])
    if any(map(dense, places[-axes:])):
        call.notes.append(f"{call.text} {POOLS_MORE}")
    return places[:-axes] + (None,) * axes


def _windowed(call: Call) -> Places:
    """A convolution or pooling called as a function, whose stride and dilation are out of reach."""
    places = _kept(call)
    kernel = call.named["weight"].shape[2:] if "weight" in call.named else call.named["kernel_size"]
    axes = len(kernel)
    stride = call.named["stride"] or kernel
    stride = list(stride) * axes if len(stride) == 1 else stride
    if call.named.get("transposed"):
        return _resampled(call)
    found = list(places[:-axes])
    for place, k, s in zip(places[-axes:], kernel, stride, strict=True):
        if dense(place) and (k > 1 or s > 1):
            call.refuse("what looks at neighbours on a map that grows must be a module, whose dilation can be set, not a function")
        if isinstance(place, Axis):
            if place.kept * s > call.limit:
                call.refuse("what shrinks a map must be a module, whose stride can be taken away, not a function")
            place = Axis(place.stride * s, place.kept * s)
        elif isinstance(place, Lost) and s > 1:
            call.refuse(f"the stride of a map must be known where it shrinks (lost by {place.op})")
        found.append(place)
    found[1] = None
    return tuple(found)


def _resampled(call: Call) -> Places:
    """What changes the number of positions by a ratio: enlargement, transposed convolution."""
    places, before, after = _kept(call), _tensor(call).shape, call.outputs[0].shape
    if any(map(dense, places)):
        call.refuse("a map that grows must not be resized")
    found: list[Place] = []
    for place, old, new in zip(places, before, after, strict=True):
        ratio = Fraction(old, new)
        found.append(Axis(place.stride * ratio, place.kept * ratio) if isinstance(place, Axis) else place)
    return tuple(found)


def _padded(call: Call) -> Places:
    places = _kept(call)
    flat = call.named["pad" if "pad" in call.named else "padding"]
    for i in range(len(flat) // 2):
        if (flat[2 * i] or flat[2 * i + 1]) and dense(places[-1 - i]):
            call.refuse("what pads a map that grows must be a module, whose padding can be set, not a function")
    return places


def _other(call: Call) -> Places:
    """An op that is not known: harmless as long as nothing grows."""
    inputs = [(t, call.places(t)) for t in call.tensors()]
    if any(dense(place) for _, places in inputs for place in places):
        call.refuse("an op on a map that grows must be known to treat every position alike")
    for tensor, places in inputs:
        if any(place is not None for place in places) and tensor.shape == call.outputs[0].shape:
            return places
    return tuple(Lost(call.text) for _ in call.outputs[0].shape)


_RULES: dict[str, Callable[[Call], Places]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze", "unflatten"), _reshaped),
    **dict.fromkeys(("clone", "_to_copy", "alias", "detach", "lift_fresh", "native_dropout", "bernoulli_"), _kept),
    "copy_": _merged,
    **dict.fromkeys(
        (
            "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_no_update",
            "_batch_norm_with_update", "cudnn_batch_norm",
        ),
        _kept,
    ),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "prod", "any", "all"), _reduced),
    **dict.fromkeys(("argmax", "argmin", "linalg_vector_norm"), _reduced),
    **dict.fromkeys(("hardswish", "hardswish_", "_prelu_kernel", "log_sigmoid_forward"), _merged),  # these lack torch's tag
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum", "sort", "flip", "glu"), _along),
    **dict.fromkeys(("split", "split_with_sizes", "unbind", "chunk"), _split),
    **dict.fromkeys(
        ("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_avg_pool2d"),
        _adaptive,
    ),
    **dict.fromkeys(
        (
            "convolution", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "avg_pool2d", "avg_pool3d",
            "mkldnn_max_pool2d",
        ),
        _windowed,
    ),
    **{f"upsample_{how}d": _resampled for how in ("nearest1", "nearest2", "nearest3", "linear1", "bilinear2", "bicubic2")},
    "upsample_trilinear3d": _resampled,
    **{f"_upsample_{how}": _resampled for how in ("nearest_exact1d", "nearest_exact2d", "bilinear2d_aa", "bicubic2d_aa")},
    **{f"{how}_pad{rank}d": _padded for how in ("reflection", "replication") for rank in (1, 2, 3)},
    "constant_pad_nd": _padded,
    **dict.fromkeys(tuple(f"{what}_like" for what in ("empty", "zeros", "ones", "full", "rand", "randn")), _kept),
    "permute": _permuted,
    "transpose": _transposed,
    "t": _transposed,
    "unsqueeze": _unsqueezed,
    "expand": _merged,
    "cat": _joined,
    "stack": _stacked,
    "channel_shuffle": _kept,
    "native_channel_shuffle": _kept,
    "rrelu_with_noise": _kept,
    "rrelu_with_noise_functional": _kept,
    "slice": _sliced,
    "select": _selected,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
}  # fmt: skip


def _is_pointwise(func: Any) -> bool:
    """By torch's tag, which ops in place may lack although the op they are named after has it."""
    name = func._overloadpacket.__name__
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if func.namespace == "aten" and name.endswith("_") else None
    same = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return torch.Tag.pointwise in func.tags or any(torch.Tag.pointwise in other.tags for other in same)


class Recorder(TorchDispatchMode):
    """Follows the positions of every tensor through the ops that run under it.

    Attributes:
        stack: Names of the modules that are being called; who calls them keeps it.
        inside: How deep in modules that are followed as a whole; their ops are passed over.
        notes: What changes beside positions.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.stack: list[str] = []
        self.inside = 0
        self.notes: list[str] = []
        self._places: dict[int, Places] = {}
        self._alive: list[Tensor] = []  # an id is a tensor's own as long as the tensor lives

    def places(self, tensor: Any) -> Places:
        """Where a tensor lies; nowhere, if nothing is known of it."""
        return self._places.get(id(tensor), (None,) * tensor.dim())

    def put(self, tensor: Tensor, places: Places) -> None:
        """Says where a tensor lies."""
        self._places[id(tensor)] = places
        self._alive.append(tensor)

    @property
    def where(self) -> str:
        """The module that is being called, for messages."""
        return repr(self.stack[-1]) if self.stack and self.stack[-1] else "the model's own forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op and says where its results lie."""
        results = func(*args, **(kwargs or {}))
        if self.inside:
            return results
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(place is not None for tensor in inputs for place in self.places(tensor)):
            return results
        outputs = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        if not outputs:
            return results
        arguments = func._schema.arguments
        named = {a.name: a.default_value for a in arguments if a.has_default_value()}
        named |= dict(zip((a.name for a in arguments), args, strict=False)) | (kwargs or {})
        name = func._overloadpacket.__name__
        call = Call(f"{func.namespace}::{name}", self.where, self.limit, named, self.places, outputs)
        rule = _RULES.get(name) or (_merged if _is_pointwise(func) else _other)
        places = rule(call)
        self.notes += call.notes
        for output in outputs:
            self.put(output, places if output.dim() == len(places) else (None,) * output.dim())
        return results
