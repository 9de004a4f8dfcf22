"""What becomes of every layer of a network, followed through a run of it: the layers with windows as wholes, the rest op by op."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from omniconv.geometry import normal_padding, pads_of
from omniconv.nn import DepthwiseSeparableConv1d, DepthwiseSeparableConv2d, DepthwiseSeparableConv3d, SeparableConv2d
from omniconv.ops.grid import GridLayer
from omniconv.ops.operator import fail
from omniconv.surgery._positions import CALLER, POOLS_MORE, Axis, Lost, Place, Places, Recorder, dense
from omniconv.surgery._windows import Dense, Extension, Window

CONV = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
SEPARABLE = (DepthwiseSeparableConv1d, DepthwiseSeparableConv2d, DepthwiseSeparableConv3d)
_MAX = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
MAX_POOLS: tuple[type[Any], ...] = tuple(_MAX)
_AVERAGE = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_AVERAGE_POOLS: tuple[type[Any], ...] = tuple(_AVERAGE)
_ADAPTIVE = {
    nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3,
    nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3,
}  # fmt: skip
_OTHER_POOLS = (nn.modules.pooling._LPPoolNd, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.modules.pooling._MaxUnpoolNd)
_PADS = (nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
         nn.modules.padding._CircularPadNd)  # fmt: skip
_STATISTICS = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_WHOLE = (CONV, *SEPARABLE, SeparableConv2d, *_MAX, *_AVERAGE, *_ADAPTIVE, *_OTHER_POOLS, *_PADS, *_STATISTICS, nn.Upsample)
FORWARDS = {c.forward for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d, GridLayer, *SEPARABLE, SeparableConv2d)}


@dataclass(frozen=True)
class Outcome:
    """What a layer becomes: a window per axis; or, of a padding layer, the rate of each axis."""

    kind: str
    axes: tuple[Dense, ...] = ()
    rates: tuple[int, ...] = ()


class Walk:
    """Keeps the names of what is called, and follows layers with windows as a whole."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.recorder = Recorder(limit)
        self.outcomes: dict[str, Outcome | None] = {}
        self.seen: list[tuple[str, Places | None, tuple[int, ...]]] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every module, removed at the end. Those of a layer stand inside the model's own, whose ops are followed."""
        handles = []
        for name, module in model.named_modules():
            enter, leave = self._names(name)
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            if isinstance(module, _WHOLE) or type(module).forward is nn.Linear.forward:
                begin, end = self._layers(name)
                handles.append(module.register_forward_pre_hook(begin))
                handles.append(module.register_forward_hook(end, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _names(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        recorder = self.recorder

        def enter(module: nn.Module, args: Any) -> None:
            recorder.stack.append(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    self.seen.append((name, None if recorder.inside else recorder.places(tensor), tuple(tensor.shape)))
            recorder.stack.pop()

        return enter, leave

    def _layers(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        recorder = self.recorder

        def begin(module: nn.Module, args: Any) -> None:
            recorder.inside += 1

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            recorder.inside -= 1
            if not recorder.inside:
                x = args[0] if args else next(iter(kwargs.values()))
                first = output[0] if isinstance(output, tuple) else output
                places, outcome = self._layer(name, module, x, recorder.places(x), first)
                if name in self.outcomes and self.outcomes[name] != outcome:
                    fail(CALLER, f"{called(module, name)} must be called at one stride", "calls at several")
                self.outcomes[name] = outcome
                for tensor in output if isinstance(output, tuple) else (output,):
                    recorder.put(tensor, places)

        return begin, end

    def compare(self, dilated: nn.Module, run: Callable[[], Any]) -> None:
        """Raises unless all of the dilated network gives as many positions as it should.

        A number in a forward shows only there: a crop to what was the whole map, a gate spread to its size.
        """
        wanted = iter(self.seen)

        def check(name: str, module: nn.Module, args: Any, output: Any) -> None:
            who = called(module, name) if name else "the model"
            for tensor in (t for t in tree_leaves(output) if isinstance(t, Tensor)):
                before, places, shape = next(wanted, ("", None, ()))
                grown = before == name and (places is None or all(map(_grown, places, shape, tensor.shape)))
                if not grown:
                    fail(CALLER, f"what {who} gives must grow with the map", f"{tuple(tensor.shape)} from {shape}")

        handles = [module.register_forward_hook(partial(check, name)) for name, module in dilated.named_modules()]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()

    def _layer(self, name: str, module: nn.Module, x: Tensor, places: Places, y: Tensor) -> tuple[Places, Outcome | None]:
        """Where the output of a layer lies, and what the layer becomes."""
        who = called(module, name)
        if isinstance(module, nn.Linear):
            if dense(places[-1]):
                fail(CALLER, f"what {who} reads must be channels, not positions", "a map that grows")
            return (*places[:-1], None), None
        if isinstance(module, _STATISTICS):
            if any(map(dense, places)):
                self.recorder.notes.append(f"{who} normalises by more positions than before: what it gives differs")
            return places, None
        if isinstance(module, tuple(_ADAPTIVE)):
            return self._adaptive(who, module, places), None
        if isinstance(module, _PADS):
            return self._pads(who, module, places)
        if isinstance(module, (_TRANSPOSED, nn.Upsample, *_OTHER_POOLS)):
            return self._resized(who, module, x, places, y), None
        return self._windows(who, module, x, places, y)

    def _adaptive(self, who: str, module: Any, places: Places) -> Places:
        axes = _rank(module)
        if any(map(dense, places[-axes:])):
            self.recorder.notes.append(f"{who} {POOLS_MORE}")
        return places[:-axes] + (None,) * axes

    def _pads(self, who: str, module: Any, places: Places) -> tuple[Places, Outcome | None]:
        axes = len(module.padding) // 2
        rates = tuple(p.rate if isinstance(p, Axis) else 1 for p in places[-axes:])
        if all(r == 1 for r in rates):
            return places, None
        if not isinstance(module, nn.modules.padding._ConstantPadNd):
            self.recorder.notes.append(f"{who} pads by its map: at the end of an axis values may differ")
        elif module.value != 0:
            self.recorder.notes.append(f"{who} pads by {module.value}")
        return places, Outcome("pads", rates=rates)

    def _resized(self, who: str, module: Any, x: Tensor, places: Places, y: Tensor) -> Places:
        if any(map(dense, places)):
            fail(CALLER, f"{who} must not come behind a stride that is taken out", "a map that grows")
        found: list[Place] = []
        for place, old, new in zip(places, x.shape, y.shape, strict=True):
            if isinstance(place, Axis):
                place = Axis(place.stride * Fraction(old, new), place.kept * Fraction(old, new))
            found.append(place)
        found[1] = None
        return tuple(found)

    def _windows(self, who: str, module: Any, x: Tensor, places: Places, y: Tensor) -> tuple[Places, Outcome | None]:
        rank = _rank(module)
        if x.dim() != rank + 2:
            fail(CALLER, f"what {who} reads must have a batch axis, channels and {rank} more", f"shape {tuple(x.shape)}")
        pooling = isinstance(module, (*_MAX, *_AVERAGE))
        here = places[-rank:]
        rest = places[:-rank] if pooling else (*places[: x.dim() - rank - 1], None)
        if all(place is None for place in here):
            return places, None
        kernel, stride = _tuple(settings_of(module).kernel_size, rank), _strides(module, rank)
        if pooling and max(y.shape[-rank:]) == 1 and not any(map(dense, here)):
            return (*rest, *(None,) * rank), None  # over the whole map: no shrinking but the end of it
        left: list[int] = []
        out: list[Place] = []
        for place, s in zip(here, stride, strict=True):
            if isinstance(place, Axis):
                sigma = max(d for d in range(1, s + 1) if s % d == 0 and (d == 1 or place.kept * d <= self.limit))
                out.append(Axis(place.stride * s, place.kept * sigma))
                left.append(sigma)
                continue
            if isinstance(place, Lost) and s > 1:
                fail(CALLER, f"the stride of the map before {who} must be known", f"one that was lost by {place.op}")
            out.append(place)
            left.append(s)
        rates = [place.rate if isinstance(place, Axis) else 1 for place in here]
        if left == list(stride) and max(rates) == 1:
            return (*rest, *out), None
        axes = tuple(Dense(w, r, s) for w, r, s in zip(_read(who, module, rank), rates, left, strict=True))
        if all(a.stride == a.window.stride and (a.rate == 1 or a.window.is_point) for a in axes):
            return (*rest, *out), None
        _check(who, module, axes)
        if getattr(settings_of(module), "padding_mode", "zeros") != "zeros" and max(rates) > 1 and max(kernel) > 1:
            self.recorder.notes.append(f"{who} pads by {settings_of(module).padding_mode}: at the end of an axis values may differ")
        return (*rest, *out), Outcome("average" if isinstance(module, _AVERAGE_POOLS) else "window", axes)


def _grown(place: Place, old: int, new: int) -> bool:
    rate = place.rate if isinstance(place, Axis) else 1
    return rate * (old - 1) < new <= rate * old


def called(module: nn.Module, name: str) -> str:
    return f"{type(module).__name__} {name!r}"


def settings_of(module: Any) -> Any:
    """What holds the settings of a layer: itself, or its depthwise part."""
    return module.depthwise if isinstance(module, SEPARABLE) else module


def _rank(module: Any) -> int:
    for kinds in (_MAX, _AVERAGE, _ADAPTIVE):
        for kind, rank in kinds.items():
            if isinstance(module, kind):
                return rank
    return len(settings_of(module).kernel_size)


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _strides(module: Any, rank: int) -> tuple[int, ...]:
    settings = settings_of(module)
    return _tuple(settings.kernel_size if settings.stride is None else settings.stride, rank)


def _read(who: str, module: Any, rank: int) -> tuple[Window, ...]:
    """The windows of a layer that is to change."""
    settings = settings_of(module)
    kernel, stride = _tuple(settings.kernel_size, rank), _strides(module, rank)
    dilation = _tuple(getattr(settings, "dilation", 1), rank)
    padding = settings.padding
    if padding == "same_minimal":
        if max(stride) > 1:
            fail(CALLER, f"the padding of {who} must not depend on the size of the map", repr(padding))
        padding = "same"
    pads = pads_of(normal_padding(CALLER, padding, rank), (), kernel, stride, dilation)
    ceil = getattr(module, "ceil_mode", False)
    return tuple(Window(k, s, b, a, d, ceil) for k, s, (b, a), d in zip(kernel, stride, pads, dilation, strict=True))


def _check(who: str, module: Any, axes: tuple[Dense, ...]) -> None:
    """Raises where torch or a class of its own has no such layer."""
    kind: Any = type(module)
    forward = kind.forward
    for base in (*MAX_POOLS, *_AVERAGE_POOLS):
        if isinstance(module, base) and forward is not base.forward:
            fail(CALLER, f"{who} must pool as torch.nn.{base.__name__} does", f"a forward of its own in {kind.__name__}")
    if any(isinstance(hook, Extension) for hook in module._forward_pre_hooks.values()):
        fail(CALLER, f"{who} must come from the network as it was before any surgery", "a map that is lengthened already")
    if getattr(module, "return_indices", False):
        fail(CALLER, f"{who} must not give the indices of positions", "return_indices=True")
    for axis in axes:
        shrinks = axis.window.stride > 1
        if shrinks and axis.window.slack < 0:
            fail(CALLER, f"the pads of {who} must not be wider than its window, where its stride is taken out", axis.window.before)
        if not axis.fits and getattr(settings_of(module), "padding_mode", "zeros") != "zeros":
            fail(CALLER, f"{who} must pad by zeros, as its pads do not keep the size of the map", settings_of(module).padding_mode)
        ours = forward in FORWARDS and forward not in {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
        if axis.window.before != axis.window.after and not ours:
            fail(CALLER, f"the pads of {who} must be alike on both sides", f"{axis.window.before} and {axis.window.after}")
