"""What every layer of the house has."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from omniconv.techniques._operator import ranked_text


class Layer(nn.Module):
    """A layer knows its technique, its rank, its op, and the operands with which one call of it calls the op.

    A class that names no rank is the template of its ranked children: its docstring serves them, filled in for their rank.
    """

    technique: ClassVar[str]
    rank: ClassVar[int]
    op: ClassVar[Callable[..., Tensor]]
    activation: str | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "rank" in cls.__dict__ and not cls.__dict__.get("__doc__"):
            cls.__doc__ = ranked_text(next(base.__doc__ for base in cls.__mro__[1:] if base.__doc__), cls.rank)

    def operands(self, *inputs: Any, **named: Any) -> dict[str, Any]:
        """The keyword arguments, tensors and settings, with which ``forward`` calls the op for these inputs."""
        raise NotImplementedError

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The op on :meth:`operands`."""
        return type(self).op(**self.operands(*inputs, **named))
