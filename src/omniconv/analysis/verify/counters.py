"""What :func:`omniconv.analysis.cost` says of every way to run a problem: the layer, its function, and plain torch modules."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.problem import Problem
from omniconv.techniques import Stage, Technique

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_SPREADS: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@dataclass(frozen=True)
class Way:
    """One way to run a problem: what is called with what, which of its stages that runs, and whether it owns their weights."""

    name: str
    call: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    stages: tuple[Stage, ...]
    owns: bool = True
    backward: bool = False


def ways(technique: Technique, problem: Problem) -> Iterator[Way]:
    """The layer, forward and backward; the op as a function; and, where every stage owns its weights, torch's own modules.

    >>> from omniconv.techniques import parse
    >>> [way.name for way in ways(*parse("standard2d c2-3 i4 k3 p1"))]
    ['layer', 'function', 'torch modules']
    """
    stages = technique.stages(problem)
    path = tuple(stage for stage in stages if not stage.side)
    with torch.device("meta"):
        x = torch.empty(problem.batch, problem.channels, *problem.size, requires_grad=True)
        layer = technique.layer(problem)
        operands = {name: torch.empty(o.shape) for name, o in technique.operands(problem).items()}
        modules = torch_modules(path)
    yield Way("layer", layer, {"input": x}, stages, backward=True)

    def function(**tensors: Tensor) -> Tensor:
        return technique.call(problem, tensors)

    yield Way("function", function, operands, path, owns=False)
    if modules is not None and path == stages:
        yield Way("torch modules", modules, {"input": x}, stages)


def torch_modules(stages: tuple[Stage, ...]) -> nn.Module | None:
    """torch.nn's modules for stages, one after the other; None where they have none.

    They have none for weights that are shared or made from the input, for pads that differ between the sides, and, transposed, for
    crops that do.
    """
    if any(stage.weights is not None or stage.bypass or any(a != b for a, b in stage.pads) for stage in stages):
        return None
    return nn.Sequential(*map(_module, stages))


def _module(stage: Stage) -> nn.Module:
    rank, bias = len(stage.size), bool(stage.biases)
    pads = tuple(before for before, _ in stage.pads)
    made: Any = _SPREADS[rank] if stage.transposed else _CONVOLUTIONS[rank]
    settings: dict[str, Any] = {
        "groups": stage.groups,
        "bias": bias,
        "dilation": stage.dilation,
        "padding_mode": stage.padding_mode,
    }
    if stage.transposed:
        least = [
            (i - 1) * s - 2 * p + d * (k - 1) + 1
            for i, s, p, d, k in zip(stage.size, stage.stride, pads, stage.dilation, stage.kernel, strict=True)
        ]
        settings["output_padding"] = tuple(o - low for o, low in zip(stage.out, least, strict=True))
    return made(stage.in_channels, stage.out_channels, stage.kernel, stage.stride, pads, **settings)


def covering(problems: list[Problem]) -> list[Problem]:
    """Fewer problems in which every two settings that meet in any of them still meet: the next is always one that adds most.

    >>> texts = ["standard1d c1 i9 k3", "standard1d c1 i9 k3 s2", "standard1d c1 i9 k3 d2", "standard1d c1 i9 k3 s2 d2"]
    >>> len(covering([Problem.parse(text) for text in texts]))
    4
    """
    names = ("size", "stride", "padding", "padding_mode", "dilation", "groups", "multiplier", "offset_groups", "output_padding")
    left = {problem: set(combinations([(name, getattr(problem, name)) for name in names], 2)) for problem in problems}
    chosen = []
    while left:
        best = max(left, key=lambda problem: len(left[problem]))
        if not left[best]:
            break
        chosen.append(best)
        added = left.pop(best)
        for pairs in left.values():
            pairs -= added
    return chosen
