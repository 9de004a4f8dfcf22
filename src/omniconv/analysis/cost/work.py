"""What one call of an op costs, and the convolution it is, if it is one."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from omniconv.geometry import Pairs
from omniconv.ops.technique import Stage
from omniconv.problem import DTYPES, Problem
from omniconv.techniques import find

WORDS = {dtype: word for word, dtype in DTYPES.items()}


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


def technique_of(stage: Stage) -> str:
    """The name that a single convolution goes by.

    >>> technique_of(Stage("", 8, 8, (5,), (3,), (3,), (1,), ((0, 0),), (1,), groups=8))
    'depthwise'
    """
    if stage.transposed:
        return "transposed"
    if stage.groups > 1:
        return "depthwise" if stage.groups == stage.in_channels else "grouped"
    if all(k == 1 for k in stage.kernel):
        return "standard" if any(before or after for before, after in stage.pads) else "pointwise"
    dilated = any(d > 1 and k > 1 for k, d in zip(stage.kernel, stage.dilation, strict=True))
    return "dilated" if dilated else "standard"


def problem_of(stage: Stage, batch: int, x: Tensor, output_padding: Sequence[int] = ()) -> Problem | None:
    """The Problem of a single convolution; None where its dtype or rank has none."""
    if x.dtype not in WORDS or not 1 <= len(stage.size) <= 3 or stage.in_channels < 1:
        return None
    name = technique_of(stage)
    multiplier = stage.out_channels // stage.in_channels
    asked = Problem(
        technique=name,
        channels=stage.in_channels,
        size=stage.size,
        batch=batch,
        out_channels=None if name == "depthwise" or stage.out_channels == stage.in_channels else stage.out_channels,
        kernel=() if name == "pointwise" else stage.kernel,
        stride=stage.stride,
        padding=stage.pads,
        dilation=() if name == "pointwise" else stage.dilation,
        groups=1 if name == "depthwise" else stage.groups,
        multiplier=multiplier if name == "depthwise" and multiplier > 1 else None,
        output_padding=tuple(output_padding) if stage.transposed else (),
        padding_mode=stage.padding_mode,
        dtype=WORDS[x.dtype],
        channels_last=len(stage.size) == 2 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous(),
    )
    return known_problem(asked)


def known_problem(problem: Problem) -> Problem | None:
    """The problem, where its technique takes it."""
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
