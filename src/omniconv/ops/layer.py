"""What every layer of the house has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from omniconv.geometry import Padding, normal_padding, pads_of
from omniconv.ops.operator import ranked_text

SHORT = 16  # positions of a chunk that is better taken position by position than channel by channel


@dataclass(frozen=True)
class Causal:
    """How a layer reads a sequence that comes in chunks.

    Output p, counted from 0, is made of the ``past`` inputs before position p·stride and the one there; before the first there
    are zeros. ``layouts`` are those in which its input may be, ``channels`` how many that has, where the layer knows; ``inexact``
    is why the bits of an output may depend on the chunk, None where they do not.
    """

    past: int = 0
    stride: int = 1
    layouts: tuple[str, ...] = ("NCT", "NTC", "TNC")
    channels: int | None = None
    inexact: str | None = None


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

    def stream_reads(self) -> Causal | None:
        """How the layer reads a sequence that comes in chunks; None where its children do, by a method ``stream``.

        See :func:`omniconv.streaming`, which calls it, and puts the layer's name before the reason.

        Raises:
            ValueError: It cannot; the message is the reason.
        """
        if self.rank != 1:
            raise ValueError(f"the layer must have one spatial axis, got {self.rank}")
        raise ValueError(f"the bits of an output must not depend on the length, got a {self.technique} layer, whose kernels' do")

    def stream_step(self, window: Tensor) -> Tensor:
        """What ``forward`` makes of an input behind its past, without any pads: one output per whole window."""
        raise NotImplementedError


def one_position(weight: Tensor, channels: int) -> Tensor:
    """(1, C, 1) of the kind of a layer's weight, to ask an engine whether it takes such an input."""
    return weight.new_empty(1).expand(1, channels, 1)


def causal_past(padding: Padding, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], mode: str) -> int:
    """The D(K − 1) inputs that a window along one axis sees before its last one.

    Raises:
        ValueError: The pads are others than D(K − 1) zeros before.
    """
    past = dilation[0] * (kernel[0] - 1)
    normal = normal_padding("causal", padding, 1)
    if normal == "same_minimal":
        if stride[0] > 1:
            raise ValueError(f"pads must be known before the length is, got {padding!r} with stride {stride[0]}")
        normal = "same"
    ((before, after),) = pads_of(normal, (), kernel, stride, dilation)
    if (before, after) != (past, 0):
        raise ValueError(f"padding must be 'causal', which is {past} before and 0 after, got {padding!r}: {before} and {after}")
    if past and mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros', got {mode!r}")
    return past
