"""What every generic test runs on: the problems of ``tests/problems/<technique>.txt``, and operands for them.

Nothing here knows a technique by name: shapes, settings and layers come from the Technique record.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omniconv.geometry import span
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, Technique, parse
from omniconv.testing import make_inputs

REPOSITORY = Path(__file__).parent.parent
DATA = REPOSITORY / "build" / "data"
PROBLEMS = Path(__file__).parent / "problems"

Case = tuple[Technique, Problem]


def read_problems(path: Path) -> list[str]:
    """The texts of a file, one a line, comments and empty lines left out."""
    lines = (line.split("#", 1)[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def fetched(path: str) -> Path:
    """A file or folder of the data that `make data` fetches; the test that asks for it is skipped where it is absent."""
    if not (DATA / path).exists():
        pytest.skip(f"{path.split('/')[0]} is not in build/data: make data")
    return DATA / path


def cases_of(technique: Technique) -> tuple[Case, ...]:
    """Every problem of a technique's file."""
    return _parsed(technique.name)


@cache
def _parsed(name: str) -> tuple[Case, ...]:
    return tuple(parse(text) for text in read_problems(PROBLEMS / f"{name}.txt"))


def all_cases() -> list[Case]:
    """Every problem of every technique."""
    return list(chain.from_iterable(cases_of(t) for t in TECHNIQUES))


def on(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrises a test by ``technique, problem``; the problem's text is the id."""
    return pytest.mark.parametrize(("technique", "problem"), [pytest.param(t, p, id=str(p)) for t, p in cases])


def features(technique: Technique, problem: Problem) -> frozenset[tuple[str, Any]]:
    """What a problem exercises: the rank, and for each setting its kind of value."""
    found: set[tuple[str, Any]] = {("rank", problem.rank), ("mode", problem.padding_mode), ("last", problem.channels_last)}
    found.add(("pads", problem.padding if isinstance(problem.padding, str) else _kind_of_pads(problem)))
    found.add(("rank and pads", (problem.rank, isinstance(problem.padding, str))))
    found |= {(name, max(getattr(problem, name)) > 1) for name in ("stride", "dilation", "kernel")}
    found |= {(name, max(getattr(problem, name)) > 0) for name in ("output_padding",)}
    found |= {(name, getattr(problem, name) > 1) for name in ("groups", "offset_groups")}
    found |= {(name, getattr(problem, name)) for name in ("multiplier",)}
    found.add(("heads", None if problem.heads is None else (problem.heads > 1, problem.heads < problem.channels)))
    found.add(("one position", prod(technique.output_shape(problem)[2:]) == 1))
    return frozenset(found)


def _kind_of_pads(problem: Problem) -> str:
    if any(before != after for before, after in problem.padding):
        return "uneven"
    return "even" if any(before for before, _ in problem.padding) else "none"


def covering(cases: Iterable[Case], minimum_batch: int = 0) -> list[Case]:
    """Fewer cases that still reach every feature that any of them has: the next one is always the one that adds most."""
    left = [(t, p, features(t, p)) for t, p in cases if p.batch >= minimum_batch]
    chosen, reached = [], set()
    while left:
        best = max(left, key=lambda case: len(case[2] - reached))
        if not best[2] - reached:
            break
        chosen.append(best[:2])
        reached |= best[2]
        left.remove(best)
    return chosen


def few_cases(minimum_batch: int = 1) -> list[Case]:
    """A covering choice for every technique, for what is dear."""
    return list(chain.from_iterable(covering(cases_of(t), minimum_batch) for t in TECHNIQUES))


def one_case_per_op() -> list[Case]:
    """A case with a batch of two and a window for every technique and rank."""
    found = []
    for technique in TECHNIQUES:
        for rank in technique.ranks:
            candidates = [p for _, p in cases_of(technique) if p.rank == rank and p.batch]
            found.append((technique, max(candidates, key=lambda p: (p.batch, min(p.size) > 1, max(p.kernel) > 1))))
    return found


def on_few_cases() -> pytest.MarkDecorator:
    """Parametrises a dear test by ``few_cases`` and a case per op.

    All are exhaustive but those of the ops, and a choice that reaches every feature in some technique or other.
    """
    cases = {str(p): (t, p) for t, p in [*one_case_per_op(), *few_cases()]}
    kept = {str(p) for _, p in [*one_case_per_op(), *covering(few_cases())]}
    marks = {text: () if text in kept else pytest.mark.exhaustive for text in cases}
    return pytest.mark.parametrize(
        ("technique", "problem"), [pytest.param(*case, id=text, marks=marks[text]) for text, case in cases.items()]
    )


def integer_operands(technique: Technique, problem: Problem, seed: int = 0) -> dict[str, Tensor]:
    """Small whole numbers."""
    return make_inputs(technique, problem, fill="integers", seed=seed)


def smooth_operands(technique: Technique, problem: Problem, fill: str = "normal", seed: int = 0) -> dict[str, Tensor]:
    """float64 operands away from the places where sampling has a kink: whole offsets, moved by a quarter."""
    operands = make_inputs(technique, problem.replace(dtype="f64"), fill=fill, seed=seed)
    for name, operand in technique.operands(problem).items():
        if operand.fill == "offset":
            operands[name] = operands[name] + 0.25 if fill == "integers" else _off_whole_numbers(operands[name])
    return operands


def _off_whole_numbers(x: Tensor) -> Tensor:
    return x.floor() + (x - x.floor()).clamp(0.05, 0.95)


def zero_offsets(technique: Technique, problem: Problem, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same operands, sampling on the grid."""
    fills = {name: operand.fill for name, operand in technique.operands(problem).items()}
    return {name: torch.zeros_like(x) if fills[name] == "offset" else x for name, x in operands.items()}


def batched_operands(technique: Technique, problem: Problem) -> set[str]:
    """The operands with a batch axis: those whose first size is the batch's, whatever it is."""
    two, three = (technique.operands(problem.replace(batch=n)) for n in (2, 3))
    return {name for name in two if two[name].shape != three[name].shape}


def calling(technique: Technique, problem: Problem, **changes: Any) -> Callable[..., Tensor]:
    """The op as a function of its tensors alone, in the order of the record's operands."""
    names = tuple(technique.operands(problem))

    def call(*tensors: Tensor) -> Tensor:
        return technique.call(problem, dict(zip(names, tensors, strict=True)), **changes)

    return call


def referring(technique: Technique, problem: Problem, **changes: Any) -> Callable[..., Tensor]:
    """The same function of the reference."""
    names, arguments = tuple(technique.operands(problem)), technique.arguments(problem) | changes

    def call(*tensors: Tensor) -> Tensor:
        return technique.reference(**dict(zip(names, tensors, strict=True)), **arguments)

    return call


def parameters_of(op: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """An op's arguments by name."""
    return inspect.signature(op).parameters


def constructor_call(technique: Technique, problem: Problem) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class of a problem's layer and the arguments, by name, with which the record makes it."""
    cls = technique.modules[problem.rank]
    seen: dict[str, Any] = {}
    original = cls.__init__

    def spy(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not seen and type(self) is cls:
            seen.update(inspect.signature(original).bind(self, *args, **kwargs).arguments)
        original(self, *args, **kwargs)

    owned = "__init__" in cls.__dict__
    cls.__init__ = spy  # type: ignore[method-assign]
    try:
        technique.layer(problem)
    finally:
        if owned:
            cls.__init__ = original  # type: ignore[method-assign]
        else:
            del cls.__init__
    seen.pop("self")
    return cls, seen


def layer_input(problem: Problem, seed: int = 0) -> Tensor:
    """A random input of a problem's layer."""
    shape = (problem.batch, problem.channels, *problem.size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(problem.torch_dtype)


def larger_than_input(problem: Problem) -> bool:
    """Whether a window is wider than the unpadded input on some axis."""
    return any(span(k, d) > i for k, d, i in zip(problem.kernel, problem.dilation, problem.size, strict=True))


def as_made(x: Tensor) -> Tensor:
    """The tensor itself."""
    return x


def strided(x: Tensor) -> Tensor:
    """The same numbers with every second element of a wider storage, which starts three elements late."""
    store = torch.empty(2 * x.numel() + 3, dtype=x.dtype)
    view = store[3:].as_strided(x.shape, [2 * s for s in x.contiguous().stride()])
    return view.copy_(x)


def offset(x: Tensor) -> Tensor:
    """The same numbers, one element into a storage."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def reversed_axes(x: Tensor) -> Tensor:
    """The same numbers, the slowest axis lying fastest."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def channels_last(x: Tensor) -> Tensor:
    """The same numbers, the second axis lying fastest."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x


def expanded(x: Tensor) -> Tensor:
    """Other numbers: all along the last axis the same one, at stride 0."""
    return x[..., :1].expand(x.shape)


def expanded_batch(x: Tensor) -> Tensor:
    """Other numbers: all samples the same one, at stride 0."""
    return x[:1].expand(x.shape)


VIEWS = (as_made, strided, offset, reversed_axes, channels_last, expanded, expanded_batch)
