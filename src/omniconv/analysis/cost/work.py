"""What one call of an op costs, and the convolution it is, if it is one."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from omniconv.geometry import Pairs
from omniconv.ops.technique import Stage
from omniconv.problem import DTYPE_NAMES, Problem
from omniconv.techniques import find, find_convolution


@dataclass(frozen=True)
class Work:
    """The arithmetic of one call. ``extra`` are flops beyond 2·macs_dense; ``bytes_min`` None means each operand once.

    ``scratch`` are bytes that the op writes and reads again inside. ``valid`` and ``flops_status`` are statuses. A MAC of
    ``complex`` numbers is one MAC, and four products and four sums.
    """

    macs_dense: int = 0
    macs_valid: int = 0
    extra: int = 0
    technique: str | None = None
    problem: Problem | None = None
    bytes_min: int | None = None
    scratch: int = 0
    valid: str = "exact"
    flops_status: str = "estimate"
    complex: bool = False

    @property
    def flops(self) -> int:
        """All of them."""
        return (8 if self.complex else 2) * self.macs_dense + self.extra


def bytes_of(x: Tensor) -> int:
    """Bytes of its different numbers: along an axis of stride 0 they are the same.

    >>> bytes_of(torch.ones(2, 1).expand(2, 5))
    8
    """
    if x.layout != torch.strided:
        return x.numel() * x.element_size()
    return prod(n if s else 1 for n, s in zip(x.shape, x.stride(), strict=True)) * x.element_size()


def problem_of(stage: Stage, batch: int, x: Tensor, output_padding: Sequence[int] = ()) -> Problem | None:
    """Returns the Problem of a plain convolution; None where its dtype or rank has none."""
    if x.dtype not in DTYPE_NAMES or not 1 <= len(stage.size) <= 3 or stage.in_channels < 1:
        return None
    problem = find_convolution(stage).problem_of(
        stage, batch=batch, dtype=DTYPE_NAMES[x.dtype], output_padding=tuple(output_padding) if stage.transposed else (),
        channels_last=len(stage.size) == 2 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous(),
    )  # fmt: skip
    return known_problem(problem)


def known_problem(problem: Problem) -> Problem | None:
    """Returns the problem, or None where its technique does not take it."""
    try:
        return find(problem.technique).check(problem)
    except ValueError:
        return None


def convolution_stage(
    x: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    pads: Pairs,
    dilation: Sequence[int],
    groups: int,
    out: Sequence[int],
    transposed: bool = False,
    padding_mode: str = "zeros",
) -> Stage:
    """The Stage of a convolution, from the shapes (N, C, …) of its operands and the spatial size of its result."""
    out_channels = weight[1] * groups if transposed else weight[0]
    return Stage(
        "main", x[1], out_channels, tuple(x[2:]), tuple(out), tuple(weight[2:]), tuple(stride), pads, tuple(dilation), groups,
        padding_mode, transposed, biases=out_channels,
    )  # fmt: skip


def mixing_stage(positions: int, channels: int, out_channels: int) -> Stage:
    """Returns the Stage of a matrix product that mixes the channels of every position by itself."""
    return convolution_stage(
        (1, channels, positions), (out_channels, channels, 1), (1,), ((0, 0),), (1,), 1, (positions,)
    )  # fmt: skip
