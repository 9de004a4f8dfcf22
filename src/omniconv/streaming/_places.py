"""What of a module can be streamed: its parts by name, each with the layout of its input, or the reason why not."""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import Tensor, nn

from omniconv.ops.layer import Causal, Layer
from omniconv.ops.sequence import LAYOUTS, Axes

Step = Callable[[nn.Module, Tensor], Tensor]

_LAST = ("NTC", "TNC")
_TWO_CODES = "torch's bits depend on the length: a vector and what is left over are computed by two codes"
_BLOCKED = "torch's bits depend on the length: sums and products are arranged by size"


class Layout:
    """The layout that the parts of a stack agree on: narrowed by each, named by the first that left no choice."""

    def __init__(self, allowed: tuple[str, ...], decided_by: str) -> None:
        self.allowed, self._decided_by = allowed, decided_by

    def narrow(self, label: str, layouts: tuple[str, ...]) -> None:
        """Leaves the layouts that the part of that name takes too."""
        left = tuple(layout for layout in self.allowed if layout in layouts)
        if not left:
            refuse(label, f"the layout must be {' or '.join(self.allowed)}, as {self._decided_by} has it", " or ".join(layouts))
        if left != self.allowed:
            self.allowed, self._decided_by = left, label

    @property
    def axes(self) -> Axes:
        """The axes of the first layout left."""
        return LAYOUTS[self.allowed[0]]


class Place:
    """A module at a place in the tree; the same module may stand at several, with a past at each."""

    def __init__(self, name: str, module: nn.Module, layout: Layout) -> None:
        self.name, self.module, self.layout = name, module, layout

    @property
    def label(self) -> str:
        """What errors call it."""
        return label_of(self.name, self.module)

    def parts(self) -> Iterator["Place"]:
        """The places in it, itself first."""
        yield self

    def inexact(self) -> str | None:
        """Why its own arithmetic may give other bits in chunks."""
        return None


class Alone(Place):
    """A module of torch.nn that looks at each position by itself."""

    def __init__(self, name: str, module: nn.Module, layout: Layout, reason: str | None) -> None:
        super().__init__(name, module, layout)
        self._reason = reason

    def inexact(self) -> str | None:
        """As the table below has it."""
        return self._reason


class Looking(Place):
    """A layer that looks back."""

    module: Any

    def __init__(self, name: str, module: nn.Module, layout: Layout, reads: Causal) -> None:
        super().__init__(name, module, layout)
        self.reads = reads

    @property
    def has_state(self) -> bool:
        """Whether what comes next depends on what came before."""
        return self.reads.past > 0 or self.reads.stride > 1

    def inexact(self) -> str | None:
        """Asked anew, since switches and devices change."""
        reads: Causal = self.module.stream_reads()
        return reads.inexact


class Chain(Place):
    """nn.Sequential."""

    def __init__(self, name: str, module: nn.Module, layout: Layout, children: list[Place]) -> None:
        super().__init__(name, module, layout)
        self.children = children

    def parts(self) -> Iterator[Place]:
        """The places in it, itself first."""
        yield self
        for child in self.children:
            yield from child.parts()


class Declared(Chain):
    """A module whose method ``stream`` says how its children compose."""

    module: Any

    def __init__(self, name: str, module: nn.Module, layout: Layout, children: list[Place]) -> None:
        super().__init__(name, module, layout, children)
        self.by_module = {id(child.module): child for child in children}
        for child in children:
            if self.by_module[id(child.module)] is not child:
                refuse(self.label, "every child must stand at one place", f"one module at {child.label} and {self._other(child)}")

    def _other(self, child: Place) -> str:
        return self.by_module[id(child.module)].label

    def inexact(self) -> str | None:
        """As it declares."""
        return None if getattr(self.module, "stream_exact", False) else "its stream() is not declared exact (stream_exact = True)"


def label_of(name: str, module: nn.Module) -> str:
    """What errors call a module."""
    return f"{name!r} ({type(module).__name__})" if name else f"the module ({type(module).__name__})"


def refuse(label: str, must: str, got: object, kind: type[Exception] = ValueError) -> NoReturn:
    """Raises in the house's form, by the module's name."""
    raise kind(f"streaming: {label}: {must}, got {got}")


def place_of(name: str, module: nn.Module, layout: Layout) -> Place:
    """The place of a module and all in it, checked.

    Raises:
        TypeError: A module is neither known nor says how it streams.
        ValueError: A module is in training, looks ahead, or has another layout than the rest.
    """
    label = label_of(name, module)
    if module.training:
        refuse(label, "the module must be in evaluation mode", "training mode; call eval() on the whole")
    if _forwards_as(module, "stream_reads"):
        try:
            reads = module.stream_reads()  # type: ignore[operator]  # asked for above; nn.Module says Tensor | Module
        except ValueError as error:
            raise ValueError(f"streaming: {label}: {error}") from None
        if reads is not None:
            layout.narrow(label, reads.layouts)
            return Looking(name, module, layout, reads)
    if _forwards_as(module, "stream"):
        return _declared(name, module, layout)
    if _forwards_as(module, nn.Sequential):
        children = [place_of(_join(name, key), child, layout) for key, child in module._modules.items() if child is not None]
        return Chain(name, module, layout, children)
    for kind, (layouts_of, reason) in _ALONE.items():
        if _forwards_as(module, kind):
            layout.narrow(label, layouts_of(label, module))
            return Alone(name, module, layout, reason)
    return _unknown(label, module)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _forwards_as(module: nn.Module, declaration: str | type[nn.Module]) -> bool:
    """Whether ``forward`` is what the method of that name, or the class, speaks of: not overridden after it."""
    if "forward" in vars(module):
        return False
    classes: tuple[Any, ...] = type(module).__mro__
    forwarding = next(i for i, c in enumerate(classes) if "forward" in vars(c))
    if not isinstance(declaration, str):
        return declaration in classes and classes[forwarding].forward is declaration.forward
    declaring = next((i for i, c in enumerate(classes) if callable(vars(c).get(declaration))), None)
    # a base of the house's layers says why others than those that override it cannot stream, whichever class forwards
    return declaring is not None and (declaring <= forwarding or (classes[declaring] is Layer and _is_ours(classes[forwarding])))


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("omniconv.")


def _declared(name: str, module: Any, layout: Layout) -> Declared:
    label = label_of(name, module)
    own: dict[str, nn.Module] = {key: child for key, child in module._modules.items() if child is not None}
    named = getattr(module, "stream_children", own)
    inside = getattr(module, "stream_layouts", {})
    for key in (*named, *inside):
        if key not in own:
            refuse(label, f"stream_children and stream_layouts must name children, one of {', '.join(own) or 'none'}", repr(key))
    for key, chosen in inside.items():
        if chosen not in LAYOUTS:
            refuse(label, f"the layout of {key!r} in stream_layouts must be one of {', '.join(LAYOUTS)}", repr(chosen))
    children: list[Place] = []
    for key in named:
        within = Layout((inside[key],), f"{label} in stream_layouts") if key in inside else layout
        children += _members(_join(name, key), own[key], within)
    return Declared(name, module, layout, children)


def _members(name: str, module: nn.Module, layout: Layout) -> list[Place]:
    """The place of a child, or those of what a list or dictionary of modules holds."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [place_of(name, module, layout)]
    held = ((_join(name, key), child) for key, child in module._modules.items() if child is not None)
    return [place for key, child in held for place in _members(key, child, layout)]


def _unknown(label: str, module: nn.Module) -> NoReturn:
    if isinstance(module, Layer):
        refuse(label, "the module must have the layer's own forward", "another", TypeError)
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        refuse(label, "the bits of an output must not depend on the length", "a dense convolution of torch, whose kernels' do")
    if isinstance(module, nn.GroupNorm | nn.modules.instancenorm._InstanceNorm):
        refuse(label, "a position must not depend on later ones", "a normalisation over time")
    refuse(label, "the module must be known, or say how it streams by a method stream()", "one that is neither", TypeError)


def _everywhere(label: str, module: nn.Module) -> tuple[str, ...]:
    return tuple(LAYOUTS)


def _channels_last(label: str, module: nn.Module) -> tuple[str, ...]:
    return _LAST


def _of_normalised_shape(label: str, module: Any) -> tuple[str, ...]:
    if len(module.normalized_shape) != 1:
        refuse(label, "normalized_shape must be the channels alone", tuple(module.normalized_shape))
    return _LAST


def _of_batch_norm(label: str, module: Any) -> tuple[str, ...]:
    if module.running_mean is None or module.running_var is None:
        refuse(label, "running statistics must be kept", "none: it normalises over time")
    return ("NCT",)


def _of_prelu(label: str, module: Any) -> tuple[str, ...]:
    return tuple(LAYOUTS) if module.num_parameters == 1 else ("NCT",)


def _of_glu(label: str, module: Any) -> tuple[str, ...]:
    dim = module.dim % 3 if -3 <= module.dim < 3 else module.dim
    layouts = tuple(name for name, axes in LAYOUTS.items() if axes.channel == dim)
    if not layouts:
        refuse(label, "dim must be the channels' axis of a layout", module.dim)
    return layouts


# Modules of torch.nn that look at each position alone: the layouts that they can be in, and why their bits may depend on the
# length. Those without a reason are made of sums, products and comparisons, the same in a vector and beside it.
_ALONE: dict[type[nn.Module], tuple[Callable[[str, nn.Module], tuple[str, ...]], str | None]] = {
    **dict.fromkeys(
        (
            nn.Identity, nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU,
            nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Softsign, nn.Threshold,
        ),
        (_everywhere, None),
    ),
    nn.PReLU: (_of_prelu, None),
    **dict.fromkeys(
        (
            nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.LogSigmoid, nn.Tanhshrink,
        ),
        (_everywhere, _TWO_CODES),
    ),
    nn.GLU: (_of_glu, _TWO_CODES),
    nn.BatchNorm1d: (_of_batch_norm, _TWO_CODES),
    nn.LayerNorm: (_of_normalised_shape, _BLOCKED),
    nn.RMSNorm: (_of_normalised_shape, _BLOCKED),
    nn.Linear: (_channels_last, _BLOCKED),
}  # fmt: skip
