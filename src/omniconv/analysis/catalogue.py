"""The taxonomy and what is known of one technique, read from the records."""

from dataclasses import dataclass

from omniconv import functional
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, Cost, Technique, find

EXAMPLE = {1: "standard1d c64 i3136 k3 p1", 2: "standard2d c64 i56 k3 p1", 3: "standard3d c64 i14 k3 p1"}


@dataclass(frozen=True)
class Entry:
    """A technique on the three axes of the one equation."""

    name: str
    title: str
    summary: str
    sampling: str
    mixing: str
    weights: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Catalogue:
    """Every technique, in the order of the list."""

    techniques: tuple[Entry, ...]


@dataclass(frozen=True)
class Description:
    """What is known of one technique, and what its version of a standard layer costs."""

    entry: Entry
    formula: str
    when: str
    traps: tuple[str, ...]
    paper: str
    ops: tuple[str, ...]
    layers: tuple[str, ...]
    example: str
    operands: dict[str, tuple[int, ...]]
    output: tuple[int, ...]
    cost: Cost
    standard: str
    standard_cost: Cost


def op_names(technique: Technique) -> tuple[str, ...]:
    """The names that people look for its ops under: dilated_conv2d rather than conv2d, which is the same function.

    >>> op_names(find("dilated"))
    ('dilated_conv1d', 'dilated_conv2d', 'dilated_conv3d')
    """
    ops = tuple(technique.ops.values())
    named = [n for n in functional.__all__ if n.startswith(f"{technique.name}_conv") and getattr(functional, n) in ops]
    return tuple(named) or tuple(op.__name__ for op in ops)


def _entry(technique: Technique) -> Entry:
    return Entry(
        technique.name,
        technique.title,
        technique.summary,
        technique.sampling,
        technique.mixing,
        technique.weights,
        technique.ranks,
    )


def catalogue() -> Catalogue:
    """The taxonomy.

    >>> catalogue().techniques[0].mixing
    'all channels'
    """
    return Catalogue(tuple(map(_entry, TECHNIQUES)))


def describe(name: str) -> Description:
    """What is known of the technique of that name; its example is its version of a 64-channel layer of 3 taps an axis.

    Raises:
        ValueError: There is no such technique.

    >>> describe("standard").cost.params
    36928
    """
    try:
        technique = find(name)
    except ValueError:
        names = ", ".join(t.name for t in TECHNIQUES)
        raise ValueError(f"info: the technique must be one of {names}, got {name!r}") from None
    rank = 2 if 2 in technique.ranks else technique.ranks[0]
    base = Problem.parse(EXAMPLE[rank])
    problem = technique.variant_of(base)
    return Description(
        entry=_entry(technique),
        formula=technique.formula,
        when=technique.when,
        traps=technique.traps,
        paper=technique.paper,
        ops=op_names(technique),
        layers=tuple(module.__name__ for module in technique.modules.values()),
        example=str(problem),
        operands={name: operand.shape for name, operand in technique.operands(problem).items()},
        output=technique.output_shape(problem),
        cost=technique.cost(problem),
        standard=str(base),
        standard_cost=find(base.technique).cost(base),
    )
