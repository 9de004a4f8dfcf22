"""A module with the past that it has seen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.geometry import is_integer
from omniconv.ops.layer import SHORT
from omniconv.ops.operator import FLOATS, check_dense, fail
from omniconv.ops.sequence import LAYOUTS
from omniconv.streaming._places import Chain, Declared, Layout, Looking, Place, label_of, place_of, refuse

Rows = Sequence[int] | Tensor
_Fixed = tuple[int, torch.dtype, torch.device]  # by the first chunk: rows of the batch, and what the chunks are


@dataclass(frozen=True)
class _Held:
    """What one layer remembers: its latest inputs, and how many inputs into a stride it is. Replaced, never written to.

    The inputs of (N, C, T) lie as (N, T, C), which is how a short chunk is put behind them: by whole vectors of channels.
    """

    past: Tensor
    phase: int


class Stream:
    """A causal module that remembers what came before; made by :func:`omniconv.streaming`."""

    def __init__(self, module: nn.Module, layout: str | None) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"streaming: module must be a torch.nn.Module, got {type(module).__name__}")
        if layout is not None and layout not in LAYOUTS:
            fail("streaming", f"layout must be None or one of {', '.join(LAYOUTS)}", repr(layout))
        agreed = Layout(tuple(LAYOUTS) if layout is None else (layout,), "the argument layout")
        self._root = place_of("", module, agreed)
        self._axes = agreed.axes
        self.layout = agreed.allowed[0]
        self._parts = tuple(self._root.parts())
        self._stateful = {p.name: p for p in self._parts if isinstance(p, Looking) and p.has_state}
        self._watched = [(name, m, tuple(m._modules.values())) for name, m in module.named_modules()]
        self._held: dict[str, _Held] = {}
        self._fixed: _Fixed | None = None

    def __call__(self, chunk: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """The next chunk of the sequence, of any length, none included.

        Args:
            chunk: (N, C, T), (N, T, C) or (T, N, C), as :attr:`layout` says. The first chunk fixes N, dtype and device.
            padding_mask: None; a mask would speak of the whole sequence.

        Returns:
            The outputs that the chunk completes, in the same layout; no gradient flows through them.

        Raises:
            TypeError: The chunk is not a floating tensor.
            ValueError: It does not fit what came before, or the module has changed; the state is then as it was.
        """
        if padding_mask is not None:
            refuse(self._root.label, "padding_mask must be None", "a mask, which speaks of the whole sequence")
        self._check_module()
        self._check_chunk(chunk)
        held: dict[str, _Held] = {}
        with torch.no_grad():
            y = self._run(self._root, chunk, held)
        for name, place in self._stateful.items():
            if name not in held:
                refuse(place.label, "every layer that looks back must be stepped once a chunk", "none")
        self._held = held
        self._fixed = (chunk.shape[self._axes.batch], chunk.dtype, chunk.device)
        return y

    def __repr__(self) -> str:
        rows = "no chunk yet" if self._fixed is None else f"{self._fixed[0]} rows"
        return f"Stream({type(self._root.module).__name__}, layout={self.layout!r}, exact={self.exact}, {rows})"

    @property
    def exact(self) -> bool:
        """Whether chunks give the bits of the whole sequence here and now; otherwise they are equal under the error bound."""
        return not self.inexact

    @property
    def inexact(self) -> dict[str, str]:
        """The parts that may give other bits in chunks, by qualified name, each with the reason."""
        return {p.name: reason for p in self._parts if (reason := p.inexact()) is not None}

    def reset(self) -> None:
        """Forgets everything: the next chunk is the first of a sequence, of any batch size and dtype."""
        self._held, self._fixed = {}, None

    def state(self, rows: Rows | None = None) -> dict[str, Any]:
        """All that it remembers, copied: a dictionary of tensors and plain values, for ``copy.deepcopy`` and ``torch.save``.

        ``torch.load`` takes it with ``weights_only=True``.

        Args:
            rows: Of these rows of the batch only, in this order; None: of all.

        Returns:
            ``layout``; ``rows``, how many there are, None before the first chunk; ``dtype`` of the chunks; ``past``, by qualified
            name of a layer, its latest inputs in its layout; ``phase``, by the same, how many inputs into its stride it is.

        Raises:
            TypeError: ``rows`` are not whole numbers.
            ValueError: A row does not exist.
        """
        held, count = self._held, None if self._fixed is None else self._fixed[0]
        if rows is not None:
            index = self._index("rows", rows)
            held, count = self._selected(index), len(index)
        return {
            "layout": self.layout,
            "rows": count,
            "dtype": None if self._fixed is None else self._fixed[1],
            "past": {name: self._turned(name, h.past).clone(memory_format=torch.contiguous_format) for name, h in held.items()},
            "phase": {name: h.phase for name, h in held.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from where a state was taken, of this module or one built alike; the state is copied.

        Raises:
            TypeError: It is not what :meth:`state` returns.
            ValueError: It is of another module, layout or dtype than this one can have; nothing is then changed.
        """
        fixed, held = self._checked("load_state", state)
        self._fixed, self._held = fixed, held

    def reorder(self, rows: Rows) -> None:
        """Makes row i of the batch what row ``rows[i]`` was: beam search. There may be more rows or fewer than before.

        Args:
            rows: (M,) whole numbers below N, any as often as you like; M is the new batch size.

        Raises:
            TypeError: They are not whole numbers.
            ValueError: A row does not exist, or no chunk has been seen.
        """
        index = self._index("rows", rows)
        self._held = self._selected(index)
        assert self._fixed is not None
        self._fixed = (len(index), *self._fixed[1:])

    def reset_rows(self, rows: Rows) -> None:
        """Begins a new sequence in some rows of the batch, while the others go on.

        Args:
            rows: The rows.

        Raises:
            TypeError: They are not whole numbers.
            ValueError: A row does not exist, or a layer with a stride is between two outputs, where rows must stay in step.
        """
        index = self._index("rows", rows)
        for name, h in self._held.items():
            self._check_phase("reset_rows", name, h.phase, 0)
        self._held = {
            name: _Held(h.past.index_fill(self._batch(name), index.to(h.past.device), 0), h.phase) for name, h in self._held.items()
        }

    def replace_rows(self, rows: Rows, state: Mapping[str, Any]) -> None:
        """Puts the rows of a state in the place of some rows of the batch, while the others go on.

        Args:
            rows: (M,) distinct rows; row i of the state comes to ``rows[i]``.
            state: What :meth:`state` returned, with M rows.

        Raises:
            TypeError: The rows are not whole numbers, or the state is not what :meth:`state` returns.
            ValueError: A row does not exist or comes twice, or the state does not fit; nothing is then changed.
        """
        op, index = "replace_rows", self._index("rows", rows)
        assert self._fixed is not None
        if len(set(index.tolist())) < len(index):
            fail(f"streaming.{op}", "rows must be distinct", index.tolist())
        fixed, held = self._checked(op, state)
        expected = (len(index), *self._fixed[1:])
        if fixed != expected:
            fail(f"streaming.{op}", f"the state must have (rows, dtype, device) {expected}", fixed)
        for name, h in self._held.items():
            self._check_phase(op, name, held[name].phase, h.phase)
            if not _fits(held[name].past, h.past.shape[-1], h.past):
                fail(f"streaming.{op}", f"the past of {self._stateful[name].label} must be {_kind(h.past)}", _kind(held[name].past))
        self._held = {
            name: _Held(h.past.index_copy(self._batch(name), index.to(h.past.device), held[name].past), h.phase)
            for name, h in self._held.items()
        }

    # running

    def _run(self, place: Place, x: Tensor, held: dict[str, _Held]) -> Tensor:
        module = place.module
        if isinstance(place, Looking):
            return _hooked(module, x, lambda x: self._look(place, x, held))
        if isinstance(place, Declared):
            step = self._step(place, held)
            return _hooked(module, x, lambda x: place.module.stream(x, step))
        if isinstance(place, Chain):
            return _hooked(module, x, lambda x: self._follow(place, x, held))
        if x.shape[place.layout.axes.time] == 0:
            return _nothing(place, x, 1, module.forward)
        return module(x)

    def _follow(self, place: Chain, x: Tensor, held: dict[str, _Held]) -> Tensor:
        for child in place.children:
            x = self._run(child, x, held)
        return x

    def _step(self, place: Declared, held: dict[str, _Held]) -> Callable[[nn.Module, Tensor], Tensor]:
        def step(module: nn.Module, x: Tensor) -> Tensor:
            child = place.by_module.get(id(module))
            if child is None:
                refuse(place.label, "stream() must step modules that are its children", type(module).__name__)
            return self._run(child, x, held)

        return step

    def _look(self, place: Looking, x: Tensor, held: dict[str, _Held]) -> Tensor:
        """The outputs that ``x`` completes, by the layer's own step over ``x`` behind its past."""
        reads, module, time = place.reads, place.module, place.layout.axes.time
        steps = x.shape[time]
        if not place.has_state:
            return module.stream_step(x) if steps else _nothing(place, x, 1, module.stream_step)
        if place.name in held:
            refuse(place.label, "every layer that looks back must be stepped once a chunk", "twice")
        axes = place.layout.axes
        before = self._held.get(place.name)
        if before is None:
            size = (x.shape[axes.batch], reads.past, x.shape[axes.channel])
            before = _Held(x.new_zeros(size if time else (size[1], size[0], size[2])), 0)
        elif not _fits(x, x.shape[axes.channel], before.past) or x.shape[axes.batch] != before.past.shape[axes.batch]:
            refuse(place.label, f"the input must be as its past, {_kind(before.past)}", _kind(x))
        if steps == 0:
            held[place.name] = before
            return _nothing(place, x, reads.past + 1, module.stream_step)
        window, past = _behind(before.past, x, time)
        held[place.name] = _Held(past, (before.phase + steps) % reads.stride)
        ahead = -before.phase % reads.stride  # inputs before the next output
        if ahead >= steps:
            return _nothing(place, x, reads.past + 1, module.stream_step)
        return module.stream_step(window.narrow(time, ahead, reads.past + steps - ahead) if ahead else window)

    # checks

    def _check_module(self) -> None:
        for name, module, children in self._watched:
            if module.training:
                refuse(label_of(name, module), "the module must be in evaluation mode", "training mode")
            if tuple(module._modules.values()) != children:
                refuse(label_of(name, module), "its children must be those that it had when streaming() was called", "others")

    def _check_chunk(self, chunk: Any) -> None:
        check_dense("streaming", "the chunk", chunk)
        if chunk.dtype not in FLOATS:
            raise TypeError(f"streaming: the chunk must be float32, float64, bfloat16 or float16, got {chunk.dtype}")
        if chunk.dim() != 3:
            fail("streaming", f"the chunk must have 3 axes, {', '.join(self.layout)}", f"shape {tuple(chunk.shape)}")
        if self._fixed is None:
            return
        given = (chunk.shape[self._axes.batch], chunk.dtype, chunk.device)
        for what, is_, was in zip(("rows", "dtype", "device"), given, self._fixed, strict=True):
            if is_ != was:
                fail("streaming", f"the chunk must have the {what} of the first, {was}; reset() begins anew", is_)

    def _check_phase(self, op: str, name: str, phase: int, wanted: int) -> None:
        if phase != wanted:
            stride = self._stateful[name].reads.stride
            must = f"the rows must be in step: {wanted} inputs into the stride of {stride} of {self._stateful[name].label}"
            fail(f"streaming.{op}", must, phase)

    def _turned(self, name: str, past: Tensor) -> Tensor:
        """From the layer's layout to the order it is held in, or back."""
        return past.transpose(1, 2) if self._stateful[name].layout.axes.time == 2 else past

    def _batch(self, name: str) -> int:
        return self._stateful[name].layout.axes.batch

    def _index(self, name: str, rows: Rows) -> Tensor:
        """Rows of the batch, checked."""
        if self._fixed is None:
            raise ValueError("streaming: there must be rows to choose from, got none before the first chunk")
        if isinstance(rows, Tensor):
            if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"streaming: {name} must be (M,) of int32 or int64, got {rows.dtype} of shape {tuple(rows.shape)}")
            rows = rows.tolist()
        elif not isinstance(rows, Sequence) or not all(is_integer(row) for row in rows):
            raise TypeError(f"streaming: {name} must be a sequence of ints, got {rows!r}")
        for row in rows:
            if not 0 <= row < self._fixed[0]:
                fail("streaming", f"{name} must be at least 0 and below {self._fixed[0]}", row)
        return torch.tensor([int(row) for row in rows], dtype=torch.int64, device="cpu")

    def _selected(self, index: Tensor) -> dict[str, _Held]:
        return {
            name: _Held(h.past.index_select(self._batch(name), index.to(h.past.device)), h.phase) for name, h in self._held.items()
        }

    def _checked(self, op: str, state: Any) -> tuple[_Fixed | None, dict[str, _Held]]:
        """A state as this stream would hold it, copied."""
        op = f"streaming.{op}"
        keys = ("layout", "rows", "dtype", "past", "phase")
        if not isinstance(state, Mapping) or set(state) != set(keys):
            raise TypeError(f"{op}: state must be what state() returns, with {', '.join(keys)}, got {_described(state)}")
        if state["layout"] != self.layout:
            fail(op, f"the layout must be {self.layout!r}", repr(state["layout"]))
        past, phase, rows = state["past"], state["phase"], state["rows"]
        expected = () if rows is None else tuple(self._stateful)
        if rows is not None and (not is_integer(rows) or state["dtype"] not in FLOATS):
            raise TypeError(f"{op}: rows must be an int and dtype one of torch's floating ones, got {rows!r}, {state['dtype']!r}")
        if set(past) != set(expected) or set(phase) != set(expected):
            fail(op, f"the state must be of {', '.join(map(repr, expected)) or 'no layer'}", ", ".join(map(repr, past)) or "none")
        if rows is None:
            return None, {}
        held = {name: self._restored(op, name, past[name], phase[name], rows) for name in expected}
        device = next((h.past.device for h in held.values()), self._device())
        return (rows, state["dtype"], device), held

    def _restored(self, op: str, name: str, past: Any, phase: Any, rows: int) -> _Held:
        place = self._stateful[name]
        reads, axes = place.reads, place.layout.axes
        if not isinstance(past, Tensor) or past.dtype not in FLOATS or not is_integer(phase):
            raise TypeError(f"{op}: {place.label} must have a floating past and a whole phase, got {_described(past)}, {phase!r}")
        size = {axes.batch: rows, axes.time: reads.past}
        if reads.channels is not None:
            size[axes.channel] = reads.channels
        if past.dim() != 3 or any(past.shape[axis] != n for axis, n in size.items()):
            fail(op, f"the past of {place.label} must have the sizes {size} by axis", tuple(past.shape))
        if not 0 <= phase < reads.stride:
            fail(op, f"the phase of {place.label} must be at least 0 and below {reads.stride}", phase)
        return _Held(self._turned(name, past.detach()).clone(memory_format=torch.contiguous_format), int(phase))

    def _device(self) -> torch.device:
        tensors = (*self._root.module.parameters(), *self._root.module.buffers())
        return tensors[0].device if tensors else torch.device("cpu")


def _described(value: Any) -> str:
    return f"{type(value).__name__}" + (f" of {', '.join(map(repr, value))}" if isinstance(value, Mapping) else "")


def _kind(x: Tensor) -> str:
    return f"{x.dtype} on {x.device} of shape {tuple(x.shape)}"


def _fits(x: Tensor, channels: int, past: Tensor) -> bool:
    """Whether ``x``, or another past, can follow a past."""
    return x.dim() == 3 and x.dtype is past.dtype and x.device == past.device and channels == past.shape[2]


def _behind(past: Tensor, x: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """``x`` behind its past, as a layer's layout has it, and the past of what comes next, in memory of its own."""
    axis, steps, reach = min(time, 1), x.shape[time], past.shape[min(time, 1)]
    if time == 2 and steps > SHORT:
        window = torch.cat([past.transpose(1, 2), x], 2) if reach else x
        latest = window.narrow(2, steps, reach).transpose(1, 2)
    else:
        x = x.transpose(1, 2) if time == 2 else x
        whole = torch.cat([past, x], axis) if reach else x
        window = whole.transpose(1, 2) if time == 2 else whole
        latest = whole.narrow(axis, steps, reach)
    return window, latest.clone(memory_format=torch.contiguous_format)


def _nothing(place: Place, x: Tensor, positions: int, step: Callable[[Tensor], Tensor]) -> Tensor:
    """No position of what the step makes of ``x``: made of zeros and cut, for its channels and dtype."""
    time = place.layout.axes.time
    size = list(x.shape)
    size[time] = positions
    return step(x.new_zeros(size)).narrow(time, 0, 0)


def _hooked(module: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """``run`` between the hooks of the module, as ``module(x)`` has ``forward`` between them."""
    if not module._forward_pre_hooks and not module._forward_hooks:
        return run(x)
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, (x,), {})
            changed = None if changed is None else changed[0]
        else:
            changed = hook(module, (x,))
        if changed is not None:
            (x,) = changed if isinstance(changed, tuple) else (changed,)
    y = run(x)
    for key, hook in module._forward_hooks.items():
        changed = hook(module, (x,), {}, y) if key in module._forward_hooks_with_kwargs else hook(module, (x,), y)
        y = y if changed is None else changed
    return y
