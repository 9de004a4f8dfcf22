"""What an output really reacts to: gradients at random inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from omniconv.analysis.receptive_field.field import Question, question_of
from omniconv.analysis.receptive_field.graph import Inputs
from omniconv.analysis.untouched import untouched

SHARES = (0.2, 0.5, 0.95)
MEASURES = ("squared", "absolute")
_STEPS = 50  # of the fit, which has settled after ten where a bell is there

Map = NDArray[np.float64]


@dataclass(frozen=True)
class Area:
    """The smallest set of positions that holds a share of the gradient: how many, and the side of a cube of as many.

    ``error`` is the standard error of ``positions`` over the inputs, by the jackknife; None of a single one.
    """

    share: float
    positions: int
    side: float
    error: float | None


@dataclass(frozen=True)
class EffectiveReceptiveField:
    """What an output reacts to, measured.

    Attributes:
        of: The output's name.
        input: Shape of the input.
        axes: The axes of the input that count as space.
        position: Which output.
        samples: How many random inputs.
        seed: Of the inputs and directions.
        measure: What of the gradient is averaged: "squared" or "absolute".
        areas: The positions that hold 20, 50 and 95 % of it.
        centre: Its middle, in positions of the input.
        sigma: Of the Gaussian that fits it best along every axis, in positions of the input.
        sigma_error: Its standard error over the inputs, by the jackknife; None of a single one.
        theoretical: Positions from the first to the last that can be seen in this input, along every axis.
        map: The measure at every position of the input; sums to 1.
    """

    of: str
    input: tuple[int, ...]
    axes: tuple[int, ...]
    position: tuple[int, ...]
    samples: int
    seed: int
    measure: str
    areas: tuple[Area, ...]
    centre: tuple[float, ...]
    sigma: tuple[float, ...]
    sigma_error: tuple[float | None, ...]
    theoretical: tuple[int, ...]
    map: Map = field(metadata={"json": False}, repr=False, compare=False)


def effective_receptive_field(
    module: Callable[..., Any],
    *inputs: Any,
    of: int | str = 0,
    position: Sequence[int] | None = None,
    wrt: int = 0,
    axes: Sequence[int] | None = None,
    named: Mapping[str, Any] | None = None,
    samples: int = 32,
    seed: int = 0,
    measure: str = "squared",
    progress: Callable[[int], None] | None = None,
) -> EffectiveReceptiveField:
    """Measures what an output reacts to: the gradient of a random direction of its channels, at random normal inputs.

    The module runs with the weights and in the training mode that it has; it is left as it was.

    Args:
        module: A module, or any callable of tensors.
        inputs: Example inputs; in place of the floating one that ``wrt`` names, normal numbers of its shape come.
        of: Index of a tensor of the output, or the dotted name of a module inside.
        position: Which output; the middle one by default.
        wrt: Which of the tensors of the inputs.
        axes: Of that input, those that count as space.
        named: Inputs that are given by keyword.
        samples: How many inputs.
        seed: Of all that is random.
        measure: What is averaged over inputs and channels: "squared" gradients, as in the paper's plots, or "absolute".
        progress: Called with the number of inputs done.

    Raises:
        ValueError: A setting is out of range, or the output has no gradient.

    Example:
        >>> from torch import nn
        >>> wide = effective_receptive_field(nn.Conv1d(1, 1, 5, padding=2), torch.zeros(1, 1, 16), samples=2)
        >>> wide.map.shape, wide.theoretical, int((wide.map > 0).sum())
        ((16,), (5,), 5)

    Source: Luo, Li, Urtasun, Zemel 2016, arXiv:1701.04128.
    """
    if samples < 1:
        raise ValueError(f"effective_receptive_field: samples must be at least 1, got {samples}")
    if measure not in MEASURES:
        raise ValueError(f"effective_receptive_field: measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    question = question_of(module, inputs, named, of, position, wrt, axes)
    window = question.answer().window
    maps = _maps(question, samples, seed, measure, progress)
    mean = maps.sum(0)
    if not mean.sum() > 0:
        raise ValueError(f"effective_receptive_field: the output must have a gradient, got none at position {question.position}")
    others = [mean - one for one in maps] if samples > 1 else []
    return EffectiveReceptiveField(
        of=question.name, input=question.input.shape, axes=question.axes, position=question.position, samples=samples, seed=seed,
        measure=measure, areas=tuple(_area(mean, others, share) for share in SHARES),
        centre=tuple(_bell(mean, i)[0] for i in range(mean.ndim)), sigma=tuple(_bell(mean, i)[1] for i in range(mean.ndim)),
        sigma_error=tuple(_jackknife([_bell(other, i)[1] for other in others]) for i in range(mean.ndim)),
        theoretical=window.mask.shape, map=mean / mean.sum(),
    )  # fmt: skip


def _maps(question: Question, samples: int, seed: int, measure: str, progress: Callable[[int], None] | None) -> Map:
    """The measure of every input over the spatial axes."""
    traced, axes = question.traced, question.axes
    module = traced.module
    generator = torch.Generator().manual_seed(seed)
    found = []
    with untouched(module if isinstance(module, nn.Module) else None), torch.enable_grad():
        torch.manual_seed(seed)
        for done in range(1, samples + 1):
            x = _normal(question, generator).requires_grad_()
            y = _output(module, _given(traced.inputs, traced.wrt, x.clone()), traced.of)
            part = y[question.index(y.shape)]
            direction = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part)
            found.append(_sizes(_gradient((part * direction).sum(), x), axes, measure))
            if progress is not None:
                progress(done)
    return np.stack(found)


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    gradient = torch.autograd.grad(y, x, allow_unused=True)[0] if y.requires_grad else None
    return torch.zeros_like(x) if gradient is None else gradient


def _sizes(gradient: Tensor, axes: Sequence[int], measure: str) -> Map:
    """The mean over all but the spatial axes."""
    wide = gradient.double()
    size = wide.square() if measure == "squared" else wide.abs()
    others = [a for a in range(wide.dim()) if a not in axes]
    return size.permute([*axes, *others]).flatten(len(axes)).mean(-1).cpu().numpy() if others else size.permute(*axes).cpu().numpy()


def _normal(question: Question, generator: torch.Generator) -> Tensor:
    example = question.traced.examples[question.traced.wrt]
    if not example.is_floating_point():
        raise ValueError(f"effective_receptive_field: the input must be floating, got {example.dtype}")
    return torch.randn(example.shape, generator=generator, dtype=torch.float64).to(example)


def _given(inputs: Inputs, wrt: int, x: Tensor) -> Inputs:
    number = count()
    return tree_map(lambda leaf: x if isinstance(leaf, Tensor) and next(number) == wrt else leaf, inputs)


class _ReachedError(Exception):
    """The module that was asked for has returned."""


@contextmanager
def _stopped_at(module: Callable[..., Any], name: str, kept: list[Any]) -> Iterator[None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept.append(output)
        raise _ReachedError

    assert isinstance(module, nn.Module)
    handle = module.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _output(module: Callable[..., Any], given: Inputs, of: int | str) -> Tensor:
    """The tensor that ``of`` names."""
    kept: list[Any] = []
    if isinstance(of, str):
        with _stopped_at(module, of, kept), suppress(_ReachedError):
            module(*given[0], **given[1])
    else:
        kept.append(module(*given[0], **given[1]))
    tensors = [leaf for leaf in tree_flatten(kept[0])[0] if isinstance(leaf, Tensor)]
    return tensors[of if isinstance(of, int) else 0]


def _positions(mass: Map, share: float) -> int:
    ranked = np.sort(mass.reshape(-1))[::-1]
    held = np.cumsum(ranked)
    return int(np.searchsorted(held, share * held[-1] * (1 - 1e-12))) + 1


def _area(mean: Map, others: Sequence[Map], share: float) -> Area:
    positions = _positions(mean, share)
    return Area(share, positions, positions ** (1 / mean.ndim), _jackknife([_positions(other, share) for other in others]))


def _jackknife(values: Sequence[float]) -> float | None:
    """The standard error of a statistic from its values with one input left out each."""
    n = len(values)
    return None if n < 2 else float(np.sqrt((n - 1) * np.var(np.array(values, float))))


def _bell(mass: Map, axis: int) -> tuple[float, float]:
    """Centre and σ of the Gaussian that fits the sum over the other axes best, by least squares (Levenberg, Marquardt)."""
    heights = mass.sum(tuple(a for a in range(mass.ndim) if a != axis))
    heights = heights / heights.max()
    x = np.arange(len(heights), dtype=float)
    centre = float((x * heights).sum() / heights.sum())
    spread = float(np.sqrt(((x - centre) ** 2 * heights).sum() / heights.sum()))
    if np.count_nonzero(heights) < 3:
        return centre, spread
    at, damping = np.array([1.0, centre, spread]), 1e-3

    def model(p: Any) -> Any:
        return p[0] * np.exp(-((x - p[1]) ** 2) / (2 * p[2] ** 2))

    error = float(((model(at) - heights) ** 2).sum())
    for _ in range(_STEPS):
        made = model(at)
        slopes = np.stack([made / at[0], made * (x - at[1]) / at[2] ** 2, made * (x - at[1]) ** 2 / at[2] ** 3], 1)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-12), slopes.T @ (heights - made))
        tried = at + step
        new = float(((model(tried) - heights) ** 2).sum()) if tried[2] > 0 and tried[0] > 0 else np.inf
        if new < error:
            at, error, damping = tried, new, damping / 3
        else:
            damping *= 5
    return float(at[1]), float(at[2])
