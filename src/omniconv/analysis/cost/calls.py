"""A call of an op as the dispatcher sees it, and the table of formulas by the op's name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import Tensor

from omniconv.analysis.cost.work import Work
from omniconv.geometry import Pairs


@dataclass(frozen=True)
class Call:
    """One call of an op as the dispatcher sees it: every argument by position, defaults filled in, and its results."""

    op: str
    args: tuple[Any, ...]
    out: Any
    pads: Pairs | None = None  # zeros that the first operand holds on its sides already
    shared: bool = False  # an operand of a product is a parameter

    @property
    def result(self) -> Tensor:
        """The first tensor that came out."""
        return self.out if isinstance(self.out, Tensor) else next(t for t in self.out if isinstance(t, Tensor))


Formula = Callable[[Call], Work]
FORMULAS: dict[str, Formula] = {}


def formula(*names: str) -> Callable[[Formula], Formula]:
    """Puts a function into the table under the names of ops."""

    def put(function: Formula) -> Formula:
        for name in names:
            FORMULAS[name] = function
        return function

    return put


def per_axis(values: Sequence[int], rank: int) -> tuple[int, ...]:
    """One number an axis; torch hands a single one on as it is."""
    return tuple(values) * rank if len(values) == 1 else tuple(values)


def base_name(op: str) -> str:
    """The name without namespace and the underscore of in-place ops.

    >>> base_name("aten::relu_"), base_name("aten::add")
    ('relu', 'add')
    """
    name = op.split("::")[-1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in an argument list; lists, tuples, dictionaries and dataclasses are opened."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in tensors_in(part)]
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors_in(part)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for part in vars(value).values() for t in tensors_in(part)]
    return []
