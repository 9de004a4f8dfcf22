"""The ops that a network really runs, recorded at the dispatcher on tensors without data."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from omniconv import settings
from omniconv.analysis.untouched import untouched
from omniconv.ops.operator import intercept_ops

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Value:
    """A tensor as it was between two ops; ``depends`` where the network's input had a part in it."""

    __slots__ = ("depends", "node", "number", "shape", "slot", "tensor")

    def __init__(self, number: int, tensor: Tensor, node: "Node | None", slot: int, depends: bool) -> None:
        self.number, self.tensor, self.node, self.slot, self.depends = number, tensor, node, slot, depends
        self.shape = tuple(int(n) for n in tensor.shape)

    def __repr__(self) -> str:
        return f"%{self.number}{list(self.shape)}"


@dataclass(eq=False)
class Node:
    """One op: its name, its arguments by name with values in place of tensors, and the module that called it."""

    op: str
    arguments: dict[str, Any]
    module: str
    pointwise: bool
    call: Any  # torch's OpOverload
    outputs: tuple[Value | None, ...] = ()
    overload: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def again(self, arguments: dict[str, Any]) -> Any:
        """The op called with other arguments of the same names."""
        named = dict(arguments)
        positional = [named.pop(a.name) for a in self.call._schema.arguments if not a.kwarg_only and a.name in named]
        return self.call(*positional, **named)

    def values(self) -> Iterator[Value]:
        """The tensors that the op was given."""
        for argument in self.arguments.values():
            for leaf in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(leaf, Value):
                    yield leaf


@dataclass
class Graph:
    """The ops in order, the values that the inputs are, what each module first returned, and the value whose field is asked."""

    nodes: list[Node] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    returned: dict[str, Value] = field(default_factory=dict)
    target: Value | None = None


class _ReachedError(Exception):
    """The module that was asked for has returned: the rest of the network need not run."""


_NO_OPS = ("prim", "profiler")  # namespaces: questions and marks


class Recorder(TorchDispatchMode):
    """Writes every op down, with values for tensors; in-place ops make new values of all that shares their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self.modules: list[str] = []
        self._known: dict[int, Value] = {}
        self._sharing: dict[int, list[Tensor]] = {}
        self._alive: list[Tensor] = []
        self._muted = False

    def value_of(self, tensor: Tensor) -> Value:
        """The value that a tensor holds now."""
        found = self._known.get(id(tensor))
        return found if found is not None else self._new(tensor, None, 0, False)

    def _new(self, tensor: Tensor, node: Node | None, slot: int, depends: bool) -> Value:
        value = Value(len(self.graph.values), tensor, node, slot, depends)
        self.graph.values.append(value)
        if id(tensor) not in self._known:
            self._alive.append(tensor)  # an id is a tensor's own while it lives
            self._sharing.setdefault(_memory(tensor), []).append(tensor)
        self._known[id(tensor)] = value
        return value

    def give(self, tensor: Tensor) -> None:
        """An input of the network."""
        self.graph.inputs.append(self._new(tensor, None, 0, True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._muted or func.namespace in _NO_OPS:
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # as it comes under torch.inference_mode
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def intercept(self, op: Callable[..., Any], given: Mapping[str, Any]) -> Any:
        """A deformable convolution is one node: the ops that it is made of look where numbers say that are not there."""
        if op.__name__ != "deform_conv2d":
            with intercept_ops(None):
                return op(**given)
        before, self._muted = self._muted, True
        try:
            with intercept_ops(None):
                result = op(**given)
        finally:
            self._muted = before
        arguments = {name: self.value_of(leaf) if isinstance(leaf, Tensor) else leaf for name, leaf in given.items()}
        bound = inspect.signature(op).bind(**arguments)
        bound.apply_defaults()
        node = Node("omniconv::deform_conv2d", dict(bound.arguments), self.modules[-1] if self.modules else "", False, op)
        node.outputs = (self._new(result, node, 0, any(value.depends for value in node.values())),)
        self.graph.nodes.append(node)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        schema = func._schema
        given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        given |= dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        arguments = {
            name: tree_map(lambda leaf: self.value_of(leaf) if isinstance(leaf, Tensor) else leaf, value)
            for name, value in given.items()
        }
        name = schema.name
        node = Node(
            name, arguments, self.modules[-1] if self.modules else "", torch.Tag.pointwise in func.tags, func,
            overload=schema.overload_name,
        )  # fmt: skip
        depends = any(value.depends for value in node.values())
        leaves = result if isinstance(result, (tuple, list)) else (result,)
        before = {id(given[w]): self.value_of(given[w]) for w in written if isinstance(given[w], Tensor)}
        node.outputs = tuple(
            self._new(leaf, node, slot, depends) if isinstance(leaf, Tensor) else None for slot, leaf in enumerate(leaves)
        )
        self.graph.nodes.append(node)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and id(leaf) in before:
                self._overwritten(leaf)

    def _overwritten(self, written: Tensor) -> None:
        """Whatever shares the memory of what was written in place holds something new."""
        now = self.value_of(written)
        for other in self._sharing[_memory(written)]:
            before = self._known[id(other)]
            if other is written or not (now.depends or before.depends):
                continue
            node = Node("overwrite", {"old": before, "new": now}, self.modules[-1] if self.modules else "", False, _nothing)
            node.outputs = (self._new(other, node, 0, True),)
            self.graph.nodes.append(node)


def _nothing() -> None:
    """An overwriting is no op of its own."""


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and the like have no storage
        return -id(tensor)


@contextmanager
def _watched(module: nn.Module, recorder: Recorder, stop: str | None) -> Iterator[None]:
    """Hooks that say which module runs, and end the run where the wanted one has returned."""

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            recorder.modules.append(name)

        return hook

    def leave(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            recorder.modules.pop()
            first = next((leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)), None)
            if first is not None:
                recorder.graph.returned.setdefault(name, recorder.value_of(first))
            if name == stop:
                recorder.graph.target = _tensor_of(output, 0, name, recorder)
                raise _ReachedError

        return hook

    with ExitStack() as stack:
        for name, child in module.named_modules():
            for handle in (child.register_forward_pre_hook(enter(name)), child.register_forward_hook(leave(name))):
                stack.callback(handle.remove)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs a traceback where an op refuses its sizes, which is an answer here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _tensor_of(output: Any, index: int, what: str, recorder: Recorder) -> Value:
    tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
    if not -len(tensors) <= index < len(tensors):
        raise ValueError(
            f"receptive_field: the output must have tensor {index}, got {len(tensors)} tensors from {what or 'the module'}"
        )
    return recorder.value_of(tensors[index])


def record(module: Callable[..., Any], inputs: Inputs, of: int | str, shapes: Sequence[Sequence[int]], real: bool) -> Graph:
    """The graph of one call on tensors of these shapes, up to the output or the module that ``of`` names.

    Args:
        module: What is called; any callable.
        inputs: What it is called with, positional and by name, for dtypes and whatever is no tensor.
        of: Index of a tensor of the output, or the dotted name of a module inside.
        shapes: Of the tensors of ``inputs``, in order.
        real: Compute with data; else on tensors without.
    """
    recorder = Recorder()
    stop = of if isinstance(of, str) else None
    with ExitStack() as stack:
        # a buffer of one number, such as a counter of batches, is computed even where tensors have no data
        stack.enter_context(untouched(module if isinstance(module, nn.Module) else None, weights=real))
        if isinstance(module, nn.Module):
            stack.enter_context(_watched(module, recorder, stop))
        stack.enter_context(torch.no_grad())
        stack.enter_context(settings.composite_only())
        stack.enter_context(intercept_ops(recorder.intercept))
        if not real:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_quiet())
        made = iter(shapes)
        given, named = tree_map(lambda x: _like(x, next(made)) if isinstance(x, Tensor) else x, inputs)
        for tensor in tree_flatten((given, named))[0]:
            if isinstance(tensor, Tensor):
                recorder.give(tensor)
        stack.enter_context(recorder)
        try:
            output = module(*given, **named)
        except _ReachedError:
            return recorder.graph
    if stop is not None:
        raise ValueError(f"receptive_field: the module {stop!r} must run in the forward pass, got a pass without it")
    recorder.graph.target = _tensor_of(output, int(of), "", recorder)
    return recorder.graph


def _like(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.zeros(tuple(shape), dtype=x.dtype, device=x.device)


def evaluated(value: Value, budget: int = 2**24) -> Tensor | None:
    """The data of a value that does not depend on the input, such as an index made by ``arange``; None where there is none."""
    known: dict[int, Any] = {}

    def data(v: Value) -> Tensor:
        if v.number in known:
            return known[v.number]
        if v.depends or math.prod(v.shape) > budget:
            raise _UnknownError
        if v.node is None:
            if type(v.tensor) not in (Tensor, nn.Parameter):
                raise _UnknownError
            made = v.tensor.detach()
        else:
            made = _run(v)
        known[v.number] = made
        return made

    def _run(v: Value) -> Tensor:
        assert v.node is not None
        if v.node.op == "overwrite" or v.node.op.endswith("_"):
            raise _UnknownError
        arguments = {
            name: tree_map(lambda leaf: data(leaf) if isinstance(leaf, Value) else leaf, argument)
            for name, argument in v.node.arguments.items()
        }
        result = v.node.again(arguments)
        return result[v.slot] if isinstance(result, (tuple, list)) else result

    try:
        with torch.no_grad():
            return data(value)
    except _UnknownError:
        return None


class _UnknownError(Exception):
    pass
