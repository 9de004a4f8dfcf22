"""Strides turned into dilation: a network keeps its weights and answers at more positions."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from omniconv.geometry import is_integer, normal_padding, pads_of
from omniconv.nn import DepthwiseSeparableConv1d, DepthwiseSeparableConv2d, DepthwiseSeparableConv3d, SeparableConv2d
from omniconv.surgery._positions import CALLER, POOLS_MORE, Axis, Lost, Place, Places, Recorder, dense
from omniconv.surgery._windows import Dense, DilatedAvgPool, Extension, Window
from omniconv.techniques._grid import GridLayer
from omniconv.techniques._operator import fail

_CONV = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_SEPARABLE = (DepthwiseSeparableConv1d, DepthwiseSeparableConv2d, DepthwiseSeparableConv3d)
_MAX = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_MAX_POOLS: tuple[type[Any], ...] = tuple(_MAX)
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
_WHOLE = (_CONV, *_SEPARABLE, SeparableConv2d, *_MAX, *_AVERAGE, *_ADAPTIVE, *_OTHER_POOLS, *_PADS, *_STATISTICS, nn.Upsample)
_FORWARDS = {c.forward for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d, GridLayer, *_SEPARABLE, SeparableConv2d)}


@dataclass(frozen=True)
class DilationChange:
    """One layer that becomes another; settings are (before, after), each with one number per axis.

    Attributes:
        module: Its dotted path.
        type: Its class.
        stride: Input steps between windows.
        dilation: Input steps between taps.
        padding: Positions before each axis (after it as many, where the layer's sides are alike).
        extended: Whether a hook lengthens its map, its pads alone not keeping the size, or torch refusing them.

    Example:
        >>> (change,) = dilation_plan(torch.nn.Conv2d(3, 4, 2, 2), 1).changes
        >>> change.stride, change.extended
        (((2, 2), (1, 1)), True)
    """

    module: str
    type: str
    stride: tuple[tuple[int, ...], tuple[int, ...]]
    dilation: tuple[tuple[int, ...], tuple[int, ...]]
    padding: tuple[tuple[int, ...], tuple[int, ...]]
    extended: bool = False


@dataclass(frozen=True)
class DilationPlan:
    """What :func:`stride_to_dilation` does to a network.

    Attributes:
        output_stride: What was asked for.
        changes: The layers that change, in the order in which they are called.
        notes: What differs besides: pooled numbers, norms over positions, borders of padding modes other than zeros.

    Example:
        >>> len(dilation_plan(torch.nn.Conv2d(3, 4, 3, 2, 1), 2).changes)
        0
    """

    output_stride: int
    changes: tuple[DilationChange, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Outcome:
    """What a layer becomes: a window per axis; or, of a padding layer, the rate of each axis."""

    kind: str
    axes: tuple[Dense, ...] = ()
    rates: tuple[int, ...] = ()


def stride_to_dilation(
    model: nn.Module, output_stride: int = 8, *, example_input: Any = None, inplace: bool = False
) -> nn.Module:  # fmt: skip
    """The network with its later strides taken out and everything behind them dilated instead: the same weights, a denser answer.

    A layer that would shrink the map to fewer than one position in ``output_stride`` keeps its positions, and every window behind
    it looks as many times further (the algorithme à trous). Where the network as it was has a position, the new one has the same
    values there; the others lie between. With zero padding that holds to the borders and at every image size:

        new(x)[..., ::ρ, ::ρ] equals old(x)         ρ = the old stride of the map over the new

    What shrinks and what comes behind is read off a run of the network (without arithmetic), so that shortcuts and branches follow
    what they meet. Names, shapes and values of the state dict stay. Convolutions and max pooling get other settings, average
    pooling becomes a layer that dilates; a layer whose pads do not keep the size (2×2 with stride 2, ``ceil_mode``) lengthens its
    map at the end by a hook, so that branches meet at one size. Adaptive and global pooling stay, over more positions: what is
    pooled, and squeeze-and-excitation with it, differs, as do norms over positions; :func:`dilation_plan` names them in its notes.
    Padding modes stay; but for zeros the values at the end of an axis are the old ones only where size and mode happen to fit.

    Args:
        model: Any network of N-dimensional maps: torch.nn's layers, ours, or subclasses that follow their own settings.
        output_stride: Input steps between neighbouring positions, at most; 8 and 16 are usual, any from 1 on will do.
        example_input: A tensor, or a tuple of arguments, that the model takes; by default (2, C, 224, …) with the C of its first
            convolution. Shapes, types and devices count, values do not.
        inplace: Whether the model itself is changed, and not a deep copy.

    Returns:
        The changed copy, or the model; in the mode (training or evaluation) it was in.

    Raises:
        TypeError: ``model`` is no module, or ``output_stride`` no int.
        ValueError: Something behind a stride that is taken out cannot follow: its name and the reason are said, and the model is as
            it was.

    Example:
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.Conv2d(4, 4, 3, 2, 1), torch.nn.Conv2d(4, 4, 3, padding=1)
        ... )
        >>> dense = stride_to_dilation(net, 2)
        >>> dense[1].stride, dense[1].dilation, dense[2].dilation, dense[2].padding
        ((1, 1), (1, 1), (2, 2), (2, 2))
        >>> x = torch.randn(1, 3, 17, 20)
        >>> dense(x).shape, torch.allclose(dense(x)[..., ::2, ::2], net(x), atol=1e-5)
        (torch.Size([1, 4, 9, 10]), True)

    Source: Holschneider et al. 1990 (algorithme à trous); Chen et al. 2015, arXiv:1412.7062; Yu et al. 2017, arXiv:1705.09914.
    """
    outcomes, _ = _followed(model, output_stride, example_input)
    changed = model if inplace else copy.deepcopy(model)
    for name, outcome in outcomes.items():
        if outcome is not None:
            changed = _apply(changed, name, outcome)
    return changed


def dilation_plan(model: nn.Module, output_stride: int = 8, *, example_input: Any = None) -> DilationPlan:
    """What :func:`stride_to_dilation` would do, without doing it.

    Args:
        model: As there.
        output_stride: As there.
        example_input: As there.

    Returns:
        The layers that change, and what differs besides.

    Raises:
        TypeError: As there.
        ValueError: As there.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.MaxPool2d(3, 2, 1), torch.nn.AdaptiveAvgPool2d(1))
        >>> plan = dilation_plan(net, 2)
        >>> [(change.module, change.stride) for change in plan.changes]
        [('1', ((2, 2), (1, 1)))]
        >>> plan.notes
        ("AdaptiveAvgPool2d '2' pools more positions than before: what it gives, and what follows from that, differs",)
    """
    outcomes, notes = _followed(model, output_stride, example_input)
    changes = tuple(
        _described(model, name, outcome) for name, outcome in outcomes.items() if outcome is not None
    )  # fmt: skip
    return DilationPlan(output_stride, changes, tuple(dict.fromkeys(notes)))


def _followed(model: nn.Module, output_stride: int, example_input: Any) -> tuple[dict[str, _Outcome | None], list[str]]:
    """A run on fake tensors of a fake copy; what every layer that was called becomes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{CALLER}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not is_integer(output_stride):
        raise TypeError(f"{CALLER}: output_stride must be an int, got {output_stride!r}")
    if output_stride < 1:
        fail(CALLER, "output_stride must be at least 1", output_stride)
    inputs = _inputs(model, example_input)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = {id(t): mode.from_tensor(t) for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, dict(fakes)).eval()  # copies no weight
    walk = _Walk(output_stride)
    arguments = tuple(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs)
    for x in arguments:
        if isinstance(x, Tensor) and x.dim() > 2:
            walk.recorder.put(x, (None, None) + (Axis(Fraction(1), Fraction(1)),) * (x.dim() - 2))
    with walk.watching(twin), mode, torch.no_grad(), walk.recorder:
        try:
            twin(*arguments)
        except Exception as error:
            if str(error).startswith(CALLER):
                raise
            said = (str(error).splitlines() or [""])[0]
            fail(CALLER, "the model must run on example_input", f"{type(error).__name__}: {said}")
    _try_out(model, walk.outcomes)
    return walk.outcomes, walk.recorder.notes


def _inputs(model: nn.Module, example_input: Any) -> tuple[Any, ...]:
    if isinstance(example_input, Tensor):
        return (example_input,)
    if example_input is not None:
        if not isinstance(example_input, (tuple, list)):
            raise TypeError(f"{CALLER}: example_input must be a Tensor or a tuple, got {type(example_input).__name__}")
        return tuple(example_input)
    first = next((m for m in model.modules() if isinstance(m, _CONV)), None)
    if first is None:
        fail(CALLER, "example_input must be given for a model without convolution layers", None)
    like = first.weight
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return (torch.empty((2, first.in_channels, *(224,) * (len(first.kernel_size))), dtype=dtype, device=like.device),)


class _Walk:
    """Keeps the names of what is called, and follows layers with windows as a whole."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.recorder = Recorder(limit)
        self.outcomes: dict[str, _Outcome | None] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every module, removed at the end."""
        handles = []
        for name, module in model.named_modules():
            whole = isinstance(module, _WHOLE) or type(module).forward is nn.Linear.forward
            enter, leave = self._hooks(name, whole)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str, whole: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        recorder = self.recorder

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            recorder.stack.append(name)
            recorder.inside += whole

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            recorder.inside -= whole
            if whole and not recorder.inside:
                x = args[0] if args else next(iter(kwargs.values()))
                first = output[0] if isinstance(output, tuple) else output
                places, outcome = self._layer(name, module, x, recorder.places(x), first)
                if name in self.outcomes and self.outcomes[name] != outcome:
                    fail(CALLER, f"{_called(module, name)} must be called at one stride", "calls at several")
                self.outcomes[name] = outcome
                for tensor in output if isinstance(output, tuple) else (output,):
                    recorder.put(tensor, places)
            recorder.stack.pop()

        return enter, leave

    def _layer(self, name: str, module: nn.Module, x: Tensor, places: Places, y: Tensor) -> tuple[Places, _Outcome | None]:
        """Where the output of a layer lies, and what the layer becomes."""
        who = _called(module, name)
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

    def _pads(self, who: str, module: Any, places: Places) -> tuple[Places, _Outcome | None]:
        axes = len(module.padding) // 2
        rates = tuple(p.rate if isinstance(p, Axis) else 1 for p in places[-axes:])
        if all(r == 1 for r in rates):
            return places, None
        if not isinstance(module, nn.modules.padding._ConstantPadNd):
            self.recorder.notes.append(f"{who} pads by its map: at the end of an axis values may differ")
        elif module.value != 0:
            self.recorder.notes.append(f"{who} pads by {module.value}")
        return places, _Outcome("pads", rates=rates)

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

    def _windows(self, who: str, module: Any, x: Tensor, places: Places, y: Tensor) -> tuple[Places, _Outcome | None]:
        rank = _rank(module)
        pooling = isinstance(module, (*_MAX, *_AVERAGE))
        here = places[-rank:]
        rest = places[:-rank] if pooling else (*places[: x.dim() - rank - 1], None)
        if all(place is None for place in here):
            return places, None
        kernel, stride = _tuple(_settings(module).kernel_size, rank), _strides(module, rank)
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
        if getattr(_settings(module), "padding_mode", "zeros") != "zeros" and max(rates) > 1 and max(kernel) > 1:
            self.recorder.notes.append(f"{who} pads by {_settings(module).padding_mode}: at the end of an axis values may differ")
        return (*rest, *out), _Outcome("average" if isinstance(module, _AVERAGE_POOLS) else "window", axes)


def _called(module: nn.Module, name: str) -> str:
    return f"{type(module).__name__} {name!r}"


def _settings(module: Any) -> Any:
    """What holds the settings of a layer: itself, or its depthwise part."""
    return module.depthwise if isinstance(module, _SEPARABLE) else module


def _rank(module: Any) -> int:
    for kinds in (_MAX, _AVERAGE, _ADAPTIVE):
        for kind, rank in kinds.items():
            if isinstance(module, kind):
                return rank
    return len(_settings(module).kernel_size)


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _strides(module: Any, rank: int) -> tuple[int, ...]:
    settings = _settings(module)
    return _tuple(settings.kernel_size if settings.stride is None else settings.stride, rank)


def _read(who: str, module: Any, rank: int) -> tuple[Window, ...]:
    """The windows of a layer that is to change."""
    settings = _settings(module)
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
    for base in (*_MAX_POOLS, *_AVERAGE_POOLS):
        if isinstance(module, base) and forward is not base.forward:
            fail(CALLER, f"{who} must pool as torch.nn.{base.__name__} does", f"a forward of its own in {kind.__name__}")
    if getattr(module, "return_indices", False):
        fail(CALLER, f"{who} must not give the indices of positions", "return_indices=True")
    for axis in axes:
        shrinks = axis.window.stride > 1
        if shrinks and axis.window.slack < 0:
            fail(CALLER, f"the pads of {who} must not be wider than its window, where its stride is taken out", axis.window.before)
        if not axis.fits and getattr(_settings(module), "padding_mode", "zeros") != "zeros":
            fail(CALLER, f"{who} must pad by zeros, as its pads do not keep the size of the map", _settings(module).padding_mode)
        ours = forward in _FORWARDS and forward not in {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}
        if axis.window.before != axis.window.after and not ours:
            fail(CALLER, f"the pads of {who} must be alike on both sides", f"{axis.window.before} and {axis.window.after}")


def _described(model: nn.Module, name: str, outcome: _Outcome) -> DilationChange:
    module: Any = model.get_submodule(name)
    if outcome.kind == "pads":
        before = tuple(module.padding[::2][::-1])
        after = tuple(p * r for p, r in zip(before, outcome.rates, strict=True))
        ones = (1,) * len(outcome.rates)
        return DilationChange(name, type(module).__name__, (ones, ones), (ones, ones), (before, after))
    axes = outcome.axes
    path = f"{name}.depthwise" if isinstance(module, _SEPARABLE) else name
    return DilationChange(
        path, type(_settings(module)).__name__,
        (tuple(a.window.stride for a in axes), tuple(a.stride for a in axes)),
        (tuple(a.window.dilation for a in axes), tuple(_dilation(a) for a in axes)),
        (tuple(a.window.before for a in axes), tuple(a.rate * a.window.before for a in axes)),
        outcome.kind == "window" and (not all(a.fits for a in axes) or (isinstance(module, _MAX_POOLS) and _wide(axes))),
    )  # fmt: skip


def _wide(axes: tuple[Dense, ...]) -> bool:
    """Whether torch's max pooling would refuse the pads."""
    return any(a.rate * a.window.before > a.window.kernel // 2 for a in axes)


def _dilation(axis: Dense) -> int:
    return axis.window.dilation * (axis.rate if axis.window.kernel > 1 else 1)


def _apply(model: nn.Module, name: str, outcome: _Outcome) -> nn.Module:
    """Changes one layer, and gives the model (which a layer alone is)."""
    module: Any = model.get_submodule(name)
    if outcome.kind == "pads":
        rates = [r for rate in reversed(outcome.rates) for r in (rate, rate)]
        module.padding = tuple(p * r for p, r in zip(module.padding, rates, strict=True))
        return model
    axes = outcome.axes
    if outcome.kind == "average":
        divisor = getattr(module, "divisor_override", None)
        pool = DilatedAvgPool(axes, module.count_include_pad, divisor).train(module.training)
        if not name:
            return pool
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, pool)
        return model
    settings = _settings(module)
    settings.stride = tuple(a.stride for a in axes)
    settings.dilation = tuple(_dilation(a) for a in axes)
    pads = tuple((a.rate * a.window.before, a.rate * a.window.after) for a in axes)
    settings.padding = pads if any(b != a for b, a in pads) or isinstance(module, SeparableConv2d) else tuple(b for b, _ in pads)
    if hasattr(settings, "_reversed_padding_repeated_twice"):
        settings._reversed_padding_repeated_twice = [p for pair in reversed(pads) for p in pair]
    if not isinstance(module, _MAX_POOLS):
        if not all(a.fits for a in axes):
            module.register_forward_pre_hook(Extension(axes, 0.0))
        return model
    settings.ceil_mode = False
    wide = _wide(axes)
    if wide:
        settings.padding = (0,) * len(axes)
    if wide or not all(a.fits for a in axes):
        module.register_forward_pre_hook(Extension(axes, float("-inf"), wide))
    return model


def _try_out(model: nn.Module, outcomes: dict[str, _Outcome | None]) -> None:
    """Raises unless every layer of a class that is not torch's or ours follows its settings: tried on a small map."""
    for name, outcome in outcomes.items():
        module = model.get_submodule(name)
        if outcome is None or not isinstance(module, _CONV) or type(module).forward in _FORWARDS or module.weight.is_meta:
            continue
        old = copy.deepcopy(module).double()
        new: Any = _apply(copy.deepcopy(module).double(), "", outcome)
        for extra in (4, 5):
            n = [a.window.dilation * (a.window.kernel - 1) + 1 + extra for a in outcome.axes]
            exact = module.padding_mode == "circular"
            m = [a.rate * k if exact else a.rate * (k - 1) + 1 for a, k in zip(outcome.axes, n, strict=True)]
            small = torch.rand(1, module.in_channels, *n, dtype=torch.float64, device=module.weight.device)
            large = torch.rand(1, module.in_channels, *m, dtype=torch.float64, device=module.weight.device)
            every: Any = (..., *(slice(None, None, a.rate) for a in outcome.axes))
            large[every] = small
            every = (..., *(slice(None, None, a.grows) for a in outcome.axes))
            with torch.no_grad():
                expected, got = old(small), new(large)[every]
            if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-9, atol=1e-9):
                fail(CALLER, f"{_called(module, name)} must follow its stride, padding and dilation", "other values where tried")
