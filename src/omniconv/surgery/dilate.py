"""Strides turned into dilation: a network keeps its weights and answers at more positions."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from omniconv.geometry import is_integer
from omniconv.nn import SeparableConv2d
from omniconv.ops.operator import fail
from omniconv.surgery._layers import CONV, FORWARDS, MAX_POOLS, SEPARABLE, Outcome, Walk, called, settings_of
from omniconv.surgery._positions import CALLER, Axis
from omniconv.surgery._windows import Dense, DilatedAvgPool, Extension


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

    The network is followed in evaluation, by two runs without data, its own hooks included. What a forward makes of the size of a
    map as a number (a sum over positions divided by their count) cannot be seen there, and differs.

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
    changed = model if inplace else _copied(model)
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


def _followed(model: nn.Module, output_stride: int, example_input: Any) -> tuple[dict[str, Outcome | None], list[str]]:
    """A run on fake tensors of a fake copy; what every layer that was called becomes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{CALLER}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not is_integer(output_stride):
        raise TypeError(f"{CALLER}: output_stride must be an int, got {output_stride!r}")
    if output_stride < 1:
        fail(CALLER, "output_stride must be at least 1", output_stride)
    inputs = _inputs(model, example_input)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _copied(model, mode.from_tensor, (*model.parameters(), *model.buffers())).eval()  # copies no weight
    walk = Walk(output_stride)
    arguments = tuple(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs)
    for x in arguments:
        if isinstance(x, Tensor) and x.dim() > 2:
            walk.recorder.put(x, (None, None) + (Axis(Fraction(1), Fraction(1)),) * (x.dim() - 2))
    with mode, torch.no_grad(), _said("the model must run on example_input"), walk.watching(twin), walk.recorder:
        twin(*arguments)
    _try_out(model, walk.outcomes)
    if any(walk.outcomes.values()):
        with mode, torch.no_grad(), _said("the dilated model must run on example_input"):
            for name, outcome in walk.outcomes.items():
                if outcome is not None:
                    twin = _apply(twin, name, outcome)
            walk.compare(twin, lambda: twin(*arguments))
        walk.recorder.notes += _idle(model, walk.outcomes)
    return walk.outcomes, walk.recorder.notes


def _idle(model: nn.Module, reached: Iterable[str]) -> list[str]:
    """A note on the convolutions that nothing is known of: heads of training alone, say."""
    names = set(reached)
    idle = [
        name for name, module in model.named_modules()
        if isinstance(module, CONV) and name not in names and name.rpartition(".")[0] not in names
    ]  # fmt: skip
    return [f"not called in evaluation, and left as they are: {', '.join(idle)}"] if idle else []


@contextmanager
def _said(must: str) -> Iterator[None]:
    """What a model's own code raises, in one line."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(CALLER):
            raise
        said = (str(error).splitlines() or [""])[0]
        fail(CALLER, must, f"{type(error).__name__}: {said}")


def _copied(model: nn.Module, of: Callable[[Tensor], Tensor] = torch.clone, tensors: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy, with ``of`` these tensors and of those that a layer computes before it runs (old weight norm, pruning)."""
    with _said("the model must be one that copy.deepcopy can copy, with all its parameters made"):
        computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
        return copy.deepcopy(model, {id(t): of(t) for t in tensors} | {id(t): of(t.detach()) for t in computed})


def _inputs(model: nn.Module, example_input: Any) -> tuple[Any, ...]:
    if isinstance(example_input, Tensor):
        return (example_input,)
    if example_input is not None:
        if not isinstance(example_input, (tuple, list)):
            raise TypeError(f"{CALLER}: example_input must be a Tensor or a tuple, got {type(example_input).__name__}")
        return tuple(example_input)
    first = next((m for m in model.modules() if isinstance(m, CONV)), None)
    if first is None:
        fail(CALLER, "example_input must be given for a model without convolution layers", None)
    like = first.weight
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    return (torch.empty((2, first.in_channels, *(224,) * (len(first.kernel_size))), dtype=dtype, device=like.device),)


def _described(model: nn.Module, name: str, outcome: Outcome) -> DilationChange:
    module: Any = model.get_submodule(name)
    if outcome.kind == "pads":
        before = tuple(module.padding[::2][::-1])
        after = tuple(p * r for p, r in zip(before, outcome.rates, strict=True))
        ones = (1,) * len(outcome.rates)
        return DilationChange(name, type(module).__name__, (ones, ones), (ones, ones), (before, after))
    axes = outcome.axes
    path = f"{name}.depthwise" if isinstance(module, SEPARABLE) else name
    return DilationChange(
        path, type(settings_of(module)).__name__,
        (tuple(a.window.stride for a in axes), tuple(a.stride for a in axes)),
        (tuple(a.window.dilation for a in axes), tuple(_dilation(a) for a in axes)),
        (tuple(a.window.before for a in axes), tuple(a.rate * a.window.before for a in axes)),
        outcome.kind == "window" and (not all(a.fits for a in axes) or (isinstance(module, MAX_POOLS) and _wide(axes))),
    )  # fmt: skip


def _wide(axes: tuple[Dense, ...]) -> bool:
    """Whether torch's max pooling would refuse the pads."""
    return any(a.rate * a.window.before > a.window.kernel // 2 for a in axes)


def _dilation(axis: Dense) -> int:
    return axis.window.dilation * (axis.rate if axis.window.kernel > 1 else 1)


def _apply(model: nn.Module, name: str, outcome: Outcome) -> nn.Module:
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
        for owner in list(model.modules()):
            for child, found in list(owner._modules.items()):  # a layer may have several names
                if found is module:
                    setattr(owner, child, pool)
        return model if name else pool
    settings = settings_of(module)
    settings.stride = tuple(a.stride for a in axes)
    settings.dilation = tuple(_dilation(a) for a in axes)
    pads = tuple((a.rate * a.window.before, a.rate * a.window.after) for a in axes)
    settings.padding = pads if any(b != a for b, a in pads) or isinstance(module, SeparableConv2d) else tuple(b for b, _ in pads)
    if hasattr(settings, "_reversed_padding_repeated_twice"):
        settings._reversed_padding_repeated_twice = [p for pair in reversed(pads) for p in pair]
    if not isinstance(module, MAX_POOLS):
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


def _try_out(model: nn.Module, outcomes: dict[str, Outcome | None]) -> None:
    """Raises unless every layer of a class that is not torch's or ours follows its settings: tried on a small map."""
    for name, outcome in outcomes.items():
        module = model.get_submodule(name)
        if outcome is None or not isinstance(module, CONV) or type(module).forward in FORWARDS or module.weight.is_meta:
            continue
        old = _copied(module).double()
        new: Any = _apply(_copied(module).double(), "", outcome)
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
                fail(CALLER, f"{called(module, name)} must follow its stride, padding and dilation", "other values where tried")
