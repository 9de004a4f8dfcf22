"""The convolutions and linear layers of a network, each kind once, with what it is really called with."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from omniconv.analysis.cost import Cost, cost
from omniconv.analysis.untouched import untouched
from omniconv.ops.layer import Layer
from omniconv.problem import Problem

# known by their names, since their packages need not be installed: torchvision's, and fairseq's layers over sequences
BY_NAME = (
    "DeformConv2d", "LightweightConv1d", "LightweightConv1dTBC", "LightconvLayer", "DynamicConv1dTBC", "DynamicconvLayer",
)  # fmt: skip

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, eq=False)
class Kind:
    """Layers that are alike: same settings, same input. ``names`` in the order of their first calls, ``calls`` of all of them.

    ``module``, ``args`` and ``kwargs`` are the first one's; ``cost`` is of one call, None where it cannot be counted, and
    ``problem`` the convolution that it is.
    """

    names: tuple[str, ...]
    calls: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    cost: Cost | None
    problem: Problem | None
    technique: str | None

    @property
    def type(self) -> str:
        """The class of the layers."""
        return type(self.module).__name__

    @property
    def flops(self) -> int:
        """Of one call; 0 where they are not known."""
        return 0 if self.cost is None else self.cost.flops

    @property
    def dtype(self) -> torch.dtype:
        """That of the first floating tensor that goes in."""
        return next((x.dtype for x in self.args if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one convolution or linear layer.

    >>> is_leaf(torch.nn.Conv2d(1, 1, 1)), is_leaf(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)))
    (True, False)
    """
    return isinstance(module, (_ConvNd, nn.Linear, Layer)) or type(module).__name__ in BY_NAME


def leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every convolution and linear layer by its dotted name, those inside another one apart."""
    if is_leaf(module):
        yield name, module
        return
    for key, child in module.named_children():
        yield from leaves(child, f"{name}.{key}" if name else key)


def captured(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    caller: str = "layers",
    progress: Callable[[float], None] | None = None,
) -> tuple[Kind, ...]:
    """Runs a network once, without gradients, and keeps what each of its layers is called with.

    The network is left as it was, whatever happens: :func:`omniconv.analysis.untouched.untouched`.

    Args:
        module: The network, in the mode that it is to be looked at in.
        args: Its inputs.
        kwargs: Those by name.
        caller: Who speaks in errors.
        progress: Called with the share of the layers that are counted.

    Raises:
        ValueError: The network does not run on these inputs.

    Example:
        >>> net = torch.nn.Sequential(*[torch.nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)])
        >>> [(kind.names, str(kind.problem)) for kind in captured(net, [torch.ones(1, 2, 8, 8)])]
        [(('0', '1', '2'), 'standard2d n1 c2 i8 k3 p1')]
    """
    seen: dict[Any, tuple[list[str], list[Any]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(leaf: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            names, first = seen.setdefault(_signature(leaf, inputs, named), ([], []))
            names.append(name)
            if not first:
                first += [leaf, tuple(map(_detached, inputs)), {k: _detached(v) for k, v in named.items()}]

        return hook

    with untouched(module), torch.no_grad():
        handles = [leaf.register_forward_pre_hook(keep(name), with_kwargs=True) for name, leaf in leaves(module)]
        try:
            module(*args, **(kwargs or {}))
        except Exception as error:  # whatever a network raises says that it cannot be measured
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{caller}: the network must run on its example inputs, got {words[:200]}") from error
        finally:
            for handle in handles:
                handle.remove()
    made = []
    for done, (names, (leaf, inputs, named)) in enumerate(seen.values()):
        if progress is not None:
            progress(done / len(seen))
        found = _counted(leaf, inputs, named)
        main = None if found is None else max(found.rows, key=lambda row: row.macs_dense, default=None)
        problem, technique = (None, None) if main is None else (main.problem, main.technique)
        made.append(Kind(tuple(dict.fromkeys(names)), len(names), leaf, inputs, named, found, problem, technique))
    return tuple(made)


def _counted(leaf: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Cost | None:
    try:
        return cost(leaf, *inputs, **named)
    except Exception:  # a layer that runs but cannot be traced is still one that can be timed
        return None


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _signature(leaf: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Alike for layers that take the same time."""
    parameters = tuple((name, tuple(p.shape), p.stride(), p.dtype) for name, p in leaf.named_parameters())
    given = tuple(_shape(value) for value in (*inputs, *named.items()))
    return type(leaf), repr(leaf), parameters, given


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else repr(value)


def formatted(value: Any, channels_last: bool) -> Any:
    """A tensor in channels-last or contiguous format where it has as many axes; what else there is as it is."""
    if not isinstance(value, Tensor):
        return value
    form = FORMATS.get(value.dim()) if channels_last else torch.contiguous_format
    return value if form is None else value.contiguous(memory_format=form)


def copied(module: nn.Module, channels_last: bool) -> nn.Module:
    """A copy of a module with its parameters in this memory format; the module itself stays as it is.

    Raises:
        ValueError: It cannot be copied.

    >>> copied(torch.nn.Conv2d(2, 2, 3), True).weight.is_contiguous(memory_format=torch.channels_last)
    True
    """
    try:
        made = copy.deepcopy(module)
    except Exception as error:  # whatever a module raises says that it cannot be copied
        raise ValueError(f"the module must be one that can be copied, got {type(error).__name__}") from error
    for parameter in made.parameters():
        parameter.data = formatted(parameter.data, channels_last)
    return made


def ready(kind: Kind, channels_last: bool) -> Callable[[], Any]:
    """A call of a copy of the layer in this memory format; of the layer itself, as it is, where it cannot be copied."""
    try:
        module = copied(kind.module, channels_last)
    except ValueError:
        module = kind.module
    return partial(module, *(formatted(value, channels_last) for value in kind.args), **kind.kwargs)


def shortened(names: Sequence[str], length: int = 40) -> str:
    """The names of layers that are alike in so many characters: the first and how many more.

    >>> shortened(("features.1.conv", "features.2.conv"), 30), shortened(("a_very_long_name_of_a_layer",), 12)
    ('features.1.conv +1', '…_of_a_layer')
    """
    more = f" +{len(names) - 1}" if len(names) > 1 else ""
    first, room = names[0] or "(whole)", length - len(more)
    return (first if len(first) <= room else f"…{first[len(first) - room + 1 :]}") + more
