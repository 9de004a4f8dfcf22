"""Watches a run below autograd and writes a row for everything that works."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from omniconv.analysis.cost import products as products
from omniconv.analysis.cost.calls import Call, base_name, tensors_in
from omniconv.analysis.cost.estimates import work_of
from omniconv.analysis.cost.memory import Memory
from omniconv.analysis.cost.modules import Modules
from omniconv.analysis.cost.omniconv_ops import op_cost
from omniconv.analysis.cost.result import METRICS, Counts, Coverage, Row, Shapes, total_status
from omniconv.analysis.cost.work import Work, bytes_of
from omniconv.geometry import Pairs
from omniconv.ops.operator import intercept_ops
from omniconv.problem import Problem

# what makes no numbers and moves none
_FREE = frozenset(("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"))
# views that torch does not call so, for they may be written to
_FREE |= frozenset(("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"))
# views in place, which torch does not call views
_FREE |= frozenset(("as_strided", "detach", "squeeze", "swapaxes", "swapdims", "t", "transpose", "unsqueeze"))
# what hands a parameter on as it is, in another type or layout
_COPIES = frozenset(("_to_copy", "clone", "contiguous", "copy"))
# what in place leaves every zero zero
_KEEPS_ZEROS = frozenset(("relu", "leaky_relu", "neg", "zero"))


@dataclass
class Line:
    """A Row that is being written."""

    name: str
    type: str
    op: str
    technique: str | None
    problem: Problem | None
    inputs: Shapes
    outputs: Shapes
    calls: int = 0
    params: int = 0
    forward: Counts = field(default_factory=Counts)
    backward: Counts = field(default_factory=Counts)
    seen: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in METRICS})

    def add(self, counts: Counts, work: Work | None, backward: bool) -> None:
        """One more call."""
        known = work is not None
        if backward:
            self.backward += counts
            if known:
                return
        else:
            self.forward += counts
            self.calls += 1
        self.note("macs_dense", "exact" if known else "unknown")
        self.note("macs_valid", work.valid if work is not None else "unknown")
        self.note("flops", work.flops_status if work is not None else "unknown")
        self.note("bytes_min", "exact" if known else "estimate")
        self.note("bytes_impl", "estimate")

    def note(self, metric: str, status: str) -> None:
        """A status that was met."""
        if status not in self.seen[metric]:
            self.seen[metric].append(status)

    def row(self, backward: bool) -> Row:
        """As a result."""
        return Row(
            self.name, self.type, self.op, self.technique, self.problem, self.inputs, self.outputs, self.calls, self.params,
            **vars(self.forward), backward=self.backward if backward else None,
            status={name: total_status(seen or ["exact"]) for name, seen in self.seen.items()},
        )  # fmt: skip


@dataclass
class Origin:
    """Where a node of the graph comes from: the module, the line, and if it is inside an omniconv op, that call."""

    name: str
    line: Line | None
    call: "OpCall | None" = None


@dataclass
class OpCall:
    """A call of an omniconv op: what runs inside it moves bytes, and is not counted otherwise."""

    line: Line
    work: Work
    moved: int  # bytes that its backward pass must move
    inside: int = 0
    reached: bool = False  # by the backward pass


class Recorder(TorchDispatchMode):
    """Writes the rows of a run; see :func:`omniconv.analysis.cost`."""

    def __init__(self, modules: Modules, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.modules = modules
        self.memory = Memory()
        self.lines: dict[Any, Line] = {}
        self.unknown: dict[str, int] = {}
        self.ops = 0
        self.backwards = False  # which pass is running
        self._origins: dict[int, Origin] = {}  # by the number of a node of the graph
        self._inside: OpCall | None = None
        self._pads = WeakIdKeyDictionary()  # storage -> the layout of the tensor that fills it, and the zeros around that, by axis
        self._of = WeakIdKeyDictionary()  # storage -> sizes of the parameters in it, not yet credited, by their place
        self._uncredited: dict[Any, int] = {}
        self._composite: dict[Any, bool] = {}
        self.parameters = 0
        for p in parameters:
            key = (id(p.untyped_storage()), p.storage_offset())
            if key not in self._uncredited:
                self._uncredited[key] = p.numel()
                self.parameters += p.numel()
                self._of.setdefault(p.untyped_storage(), set()).add(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        op = f"{func.namespace}::{func.overloadpacket.__name__}"
        if self._is_composite(func, op):
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        number = torch._C._autograd._get_sequence_nr() - 1
        out = func(*args, **kwargs)
        results = tensors_in(out)
        if not results:
            return out
        self.memory.see(results)
        self._carry(func, op, args, results)
        line = None
        if not (func.is_view or base_name(op) in _FREE):
            line = self._worked(func, op, args, kwargs, out, results)
        self._origins.setdefault(number, Origin(self.modules.name, line, self._inside))
        return out

    def intercept(self, op: Any, given: Mapping[str, Any]) -> Any:
        """A call of an omniconv op, which is one line; what it does inside is not."""
        if torch._C._are_functorch_transforms_active():  # its operands hide axes, which what is inside shows
            with intercept_ops(None):
                return op(**given)
        before = self._inside
        operands = tensors_in(given)
        call = OpCall(Line("", "", "", None, None, (), ()), Work(), 0)
        self._inside = call
        try:
            with intercept_ops(None):
                out = op(**given)
        finally:
            self._inside = before
        results = tensors_in(out)
        work = op_cost(op, given)
        moved = sum(map(bytes_of, operands)) + sum(map(bytes_of, results))
        self.ops += 1
        call.line = self._line_of(self.modules.name, f"omniconv::{op.__name__}", work.forward, operands, results)
        call.work, call.moved = work.backward, moved + sum(bytes_of(x) for x in operands if x.requires_grad)
        counts = Counts(work.forward.macs_dense, work.forward.macs_valid, work.forward.flops, moved, call.inside)
        call.line.add(counts, work.forward, self.backwards)
        if not self.backwards:
            call.line.params += self._credit(operands)
        call.inside = 0
        return out

    def _is_composite(self, func: Any, op: str) -> bool:
        """Whether it reached the dispatcher whole, as all do in inference mode, and is made of others."""
        if func not in self._composite:
            made_of_others = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
            self._composite[func] = made_of_others and not func.is_view
        return self._composite[func]

    def _carry(self, func: Any, op: str, args: tuple[Any, ...], results: list[Tensor]) -> None:
        """What is known of an operand and still holds of the result."""
        name = base_name(op)
        if any(x.layout != torch.strided for x in results):
            return
        if func._schema.is_mutable and name not in _KEEPS_ZEROS:
            for x in results:
                self._pads.pop(x.untyped_storage(), None)
        pads = None
        if name in _COPIES:
            source = args[-1] if name == "copy" else args[0]
            if not isinstance(source, Tensor) or source.layout != torch.strided:
                return
            held = self._of.get(source.untyped_storage())
            if held is not None:
                self._of[results[0].untyped_storage()] = held
            pads = self._pads_around(source) if source.shape == results[0].shape else None
        elif name == "constant_pad_nd":
            pads = _pads_of(args)
        if pads is not None:
            self._pads[results[0].untyped_storage()] = (_layout(results[0]), pads)

    def _pads_around(self, x: Tensor) -> Pairs | None:
        """The zeros that a tensor holds on its sides, as far as is known."""
        if x.layout != torch.strided:
            return None
        layout, pads = self._pads.get(x.untyped_storage(), (None, None))
        return pads if layout == _layout(x) else None

    def _worked(
        self, func: Any, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, results: list[Tensor]
    ) -> Line | None:
        operands = tensors_in([args, kwargs])
        moved = sum(map(bytes_of, operands)) + sum(map(bytes_of, results))
        if self._inside is not None:
            self._inside.inside += moved
            return None
        origin = self._origin()
        if origin is not None and origin.call is not None:
            origin.call.line.add(self._gradients(origin.call, moved), origin.call.work, backward=True)
            return origin.call.line
        call = self._call(func, op, args, kwargs, out, operands)
        work = work_of(call, torch.Tag.pointwise in func.tags)
        self.ops += 1
        if work is None:
            self.unknown[op] = self.unknown.get(op, 0) + 1
        once = moved if work is None or work.bytes_min is None else work.bytes_min
        counts = Counts(bytes_min=once, bytes_impl=once)
        if work is not None:
            counts = Counts(work.macs_dense, work.macs_valid, work.flops, once, once + work.scratch)
        line = origin.line if origin is not None else None
        if line is None:
            line = self._line_of(self.modules.name if origin is None else origin.name, op, work, operands, results)
        line.add(counts, work, self.backwards)
        if not self.backwards and base_name(op) not in _COPIES:
            line.params += self._credit(operands)
        return line

    def _origin(self) -> Origin | None:
        """Of what runs in the backward pass; None in the forward, and where a forward is run again for the sake of its gradient."""
        if not self.backwards or self.modules.running:
            return None
        node = torch._C._current_autograd_node()
        nowhere = Origin("", None)
        return nowhere if node is None else self._origins.get(node._sequence_nr(), nowhere)

    @staticmethod
    def _gradients(call: OpCall, moved: int) -> Counts:
        """The backward work of a call, the first time that a part of it runs; afterwards what it moves."""
        if call.reached:
            return Counts(bytes_impl=moved)
        call.reached = True
        work = call.work
        return Counts(work.macs_dense, work.macs_valid, work.flops, call.moved, moved)

    def _call(self, func: Any, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, operands: list[Tensor]) -> Call:
        given = list(args)
        for argument in func._schema.arguments[len(args) :]:
            given.append(kwargs.get(argument.name, argument.default_value))
        padded = next((t for t in operands if t.dim() > 2), None) if "convolution" in op else None
        if op == "aten::convolution_backward":
            padded = args[1]
        pads = self._pads_around(padded) if padded is not None else None
        shared = any(t.untyped_storage() in self._of for t in operands if t.layout == torch.strided)
        return Call(op, tuple(given), out, pads, shared)

    def _line_of(self, name: str, op: str, work: Work | None, operands: list[Tensor], results: list[Tensor]) -> Line:
        """The line of calls like this one."""
        shapes = tuple(tuple(t.shape) for t in operands), tuple(tuple(t.shape) for t in results)
        technique, problem = (None, None) if work is None else (work.technique, work.problem)
        key = (name, op, technique, problem, shapes)
        if key not in self.lines:
            self.lines[key] = Line(name, self.modules.kind_of(name, op), op, technique, problem, *shapes)
        return self.lines[key]

    def _credit(self, operands: list[Tensor]) -> int:
        """Parameters that these operands hold, the first time that they are asked for."""
        found = 0
        for x in operands:
            if x.layout != torch.strided:
                continue
            for key in self._of.get(x.untyped_storage(), ()):
                found += self._uncredited.pop(key, 0)
        return found

    def unread(self) -> dict[Any, int]:
        """Sizes of the parameters that no op has read."""
        return self._uncredited

    def coverage(self) -> Coverage:
        """How much of what ran is known."""
        names = tuple(sorted(self.unknown.items(), key=lambda item: -item[1]))
        return Coverage(self.ops, self.ops - sum(self.unknown.values()), names)


def _layout(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.stride(), x.storage_offset()


def _pads_of(args: tuple[Any, ...]) -> Pairs | None:
    """The zeros that constant_pad_nd puts around each axis; None where it crops or pads with another number."""
    x, flat = args[:2]
    value = args[2] if len(args) > 2 else 0
    if value != 0 or any(p < 0 for p in flat):
        return None
    last_first = list(zip(flat[::2], flat[1::2], strict=True))
    return ((0, 0),) * (x.dim() - len(last_first)) + tuple(reversed(last_first))
