"""The Technique record: everything the library, its tests, its instruments and its pages know of one kind of convolution."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm, prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omniconv.geometry import Pairs, landings, receptive_field, transposed_receptive_field
from omniconv.problem import Problem

Operands = dict[str, Tensor]
Arguments = Mapping[str, Any]  # of a call, by name; those left out left out

# what every technique's Problem has
_COMMON = frozenset({"channels", "size", "batch", "dtype", "channels_last"})


@dataclass(frozen=True)
class Operand:
    """One tensor argument of an op: its shape, and what a test or a timer may fill it with.

    ``fill`` is "normal", "unit" (values in [0, 1]) or "offset" (a few positions either way).
    """

    shape: tuple[int, ...]
    fill: str = "normal"


@dataclass(frozen=True)
class Stage:
    """One linear convolution inside a technique; its cost is counted and proved by itself.

    ``weights`` and ``biases`` are the free numbers it owns (None: a weight for every tap and channel pair that meet).
    ``flops`` are extras beyond the MACs per sample, ``batch_flops`` those made once for a whole batch.
    ``side`` marks a stage beside the path from input to output, such as the one that makes the offsets. ``bypass`` counts the
    channels of its input that it hands on as they are, behind those that it makes.
    """

    name: str
    in_channels: int
    out_channels: int
    size: tuple[int, ...]
    out: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pads: Pairs
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    weights: int | None = None
    biases: int = 0
    flops: int = 0
    batch_flops: int = 0
    side: bool = False
    bypass: int = 0

    @property
    def params(self) -> int:
        """Free weights, biases apart."""
        if self.weights is not None:
            return self.weights
        return self.in_channels * self.out_channels * prod(self.kernel) // self.groups

    @property
    def bypassed(self) -> int:
        """Numbers of one sample that are handed on as they are."""
        return self.bypass * prod(self.out)

    @property
    def results(self) -> int:
        """Numbers of one sample that it makes or hands on."""
        return self.out_channels * prod(self.out) + self.bypassed

    @property
    def macs_dense(self) -> int:
        """Multiply-accumulates of one sample where every tap counts: the papers' convention."""
        pairs = self.in_channels * self.out_channels // self.groups
        return prod(self.size if self.transposed else self.out) * pairs * prod(self.kernel)

    @property
    def macs_valid(self) -> int:
        """Those that read a real input and write a kept output; all of them where the padding mode reads real inputs."""
        if self.padding_mode != "zeros":
            return self.macs_dense
        many, few = (self.out, self.size) if self.transposed else (self.size, self.out)
        axes = zip(many, self.kernel, self.stride, self.pads, self.dilation, few, strict=True)
        landed = prod(landings(m, k, s, before, d, f) for m, k, s, (before, _), d, f in axes)
        return landed * (self.in_channels * self.out_channels // self.groups)


@dataclass(frozen=True)
class StageArguments:
    """The names of the arguments of an op that one of its stages takes; None where the stage has no such argument."""

    weight: str = "weight"
    bias: str | None = "bias"
    activation: str | None = "activation"


@dataclass(frozen=True)
class Cost:
    """What one layer costs for a whole batch. MACs are multiply-accumulates; bytes are each operand moved once."""

    params: int
    macs_dense: int
    macs_valid: int
    flops: int
    bytes: int
    receptive_field: tuple[int, ...]


@dataclass(frozen=True)
class Peer:
    """Another way to compute the same result, to compare speed with: called like the op, rank first."""

    name: str
    run: Callable[..., Tensor]


class NativeEngine(Protocol):
    """The part of an engine that a record tells, such as of :class:`omniconv.engines.engine.Engine`."""

    name: str
    when: str

    @property
    def reasons(self) -> tuple[str, ...]:
        """In order, what still sends a call to the composite path."""


@dataclass(frozen=True)
class Technique:
    """One kind of convolution; see the fields' comments. ``TECHNIQUES`` in the package is the only list of them."""

    name: str
    title: str
    summary: str
    # the three axes of the one equation
    sampling: str
    mixing: str
    weights: str
    # for people: the formula, when it helps, what goes wrong, where it comes from
    formula: str
    when: str
    traps: tuple[str, ...]
    paper: str
    # what runs; ops and modules by rank
    ops: Mapping[int, Callable[..., Tensor]]
    modules: Mapping[int, type[nn.Module]]
    reference: Callable[..., Tensor]
    composite: Callable[..., Tensor]
    # what a Problem means here: fields taken besides channels, size and batch; tensors; keyword arguments; the layer
    takes: frozenset[str]
    operands: Callable[[Problem], dict[str, Operand]]
    arguments: Callable[[Problem], dict[str, Any]]
    layer: Callable[[Problem], nn.Module]
    # cost, error bound, and the technique's version of a standard layer
    stages: Callable[..., tuple[Stage, ...]]
    bound: Callable[..., Tensor]
    variant: Callable[[Problem], Problem]
    # cost of a call of the op of a rank: the Problem that its arguments make, and the options of ``stages`` that they ask for
    problem: Callable[[int, Arguments], Problem]
    cost_options: Callable[[Arguments], dict[str, Any]] = lambda arguments: {}
    # for each stage on the path from input to output, in order
    stage_arguments: tuple[StageArguments, ...] = (StageArguments(),)
    # whether a tap's place depends on numbers, so that macs_valid of a call is an estimate: that of taps on the grid
    moves_taps: bool = False
    # whether this is the name of a plain convolution; of every convolution it is that of one technique
    names_convolution: Callable[[Stage], bool] = lambda stage: False
    peers: tuple[Peer, ...] = ()
    engine: NativeEngine | None = None
    # keyword arguments under which the op is linear, so that whole numbers give whole numbers
    linear: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The numbers of spatial axes it is defined for."""
        return tuple(self.ops)

    def check(self, problem: Problem) -> Problem:
        """The same problem, once it is known to make sense for this technique.

        Raises:
            ValueError: The technique does not take the rank or a setting, or the settings do not fit together.
        """
        if problem.rank not in self.ops:
            raise ValueError(
                f"{self.name}: the rank must be one of {', '.join(map(str, self.ops))}, got {problem.rank} in '{problem}'"
            )
        for name, value in problem.settings().items():
            if name != "technique" and name not in self.takes | _COMMON:
                raise ValueError(f"{self.name}: the problem must not set {name}, got {value} in '{problem}'")
        parts = lcm(problem.groups, problem.heads or 1, problem.offset_groups)
        for divisor in (problem.groups, problem.heads or 1, problem.offset_groups):
            if problem.channels % divisor:
                raise ValueError(f"{self.name}: the {problem.channels} channels must be divisible by {parts}, got '{problem}'")
        for stage in self.stages(problem):
            if stage.out_channels % stage.groups:
                raise ValueError(f"{self.name}: groups must divide the {stage.out_channels} output channels, got '{problem}'")
        return problem

    def variant_of(self, base: Problem) -> Problem:
        """What this technique makes of a standard layer: same channels, kernel and output where it can."""
        return self.check(self.variant(base.replace(technique=self.name)))

    def problem_of(self, convolution: Stage, **settings: Any) -> Problem:
        """Returns the Problem of a plain convolution under this technique's name; settings that it does not take are left out."""
        channels, out_channels = convolution.in_channels, convolution.out_channels
        multiplier = out_channels // channels
        known = {
            "channels": channels, "out_channels": None if out_channels == channels else out_channels, "size": convolution.size,
            "kernel": convolution.kernel, "stride": convolution.stride, "padding": convolution.pads,
            "dilation": convolution.dilation, "groups": convolution.groups, "multiplier": None if multiplier == 1 else multiplier,
            "padding_mode": convolution.padding_mode,
        } | settings  # fmt: skip
        return Problem(self.name, **{name: value for name, value in known.items() if name in self.takes | _COMMON})

    def call(self, problem: Problem, operands: Mapping[str, Tensor], **changes: Any) -> Tensor:
        """The op on these operands with the problem's arguments."""
        return self.ops[problem.rank](**operands, **(self.arguments(problem) | changes))

    def output_shape(self, problem: Problem) -> tuple[int, ...]:
        """(N, O, Out…)."""
        last = self.stages(problem)[-1]
        return (problem.batch, last.out_channels + last.bypass, *last.out)

    def cost(self, problem: Problem, bias: bool = True, **options: Any) -> Cost:
        """Parameters, MACs, flops, bytes and receptive field of the layer; ``options`` go to the technique's stages.

        >>> from omniconv.techniques import find
        >>> find("standard").cost(Problem.parse("standard2d c64-128 i56 k3 p1"), bias=False).macs_dense
        231211008
        """
        stages = self.stages(problem, **options)
        params = sum(s.params + (s.biases if bias else 0) for s in stages)
        dense = problem.batch * sum(s.macs_dense for s in stages)
        adds = problem.batch * sum(prod(s.out) * s.out_channels for s in stages if bias and s.biases)
        values = prod((problem.batch, problem.channels, *problem.size)) + params + prod(self.output_shape(problem))
        return Cost(
            params=params,
            macs_dense=dense,
            macs_valid=problem.batch * sum(s.macs_valid for s in stages),
            flops=2 * dense + adds + sum(problem.batch * s.flops + s.batch_flops for s in stages),
            bytes=values * torch.empty((), dtype=problem.torch_dtype).element_size(),
            receptive_field=chained_receptive_field(stages),
        )


def chained_receptive_field(stages: Sequence[Stage]) -> tuple[int, ...]:
    """Input positions that one output can see, per axis, through the stages on the path from input to output."""
    path = [s for s in stages if not s.side]
    fields = [1] * len(path[0].kernel)
    jumps = [1] * len(fields)
    for stage in path:
        for axis, (k, s, d) in enumerate(zip(stage.kernel, stage.stride, stage.dilation, strict=True)):
            seen = transposed_receptive_field(k, s, d) if stage.transposed else receptive_field(k, d)
            fields[axis] += (seen - 1) * jumps[axis]
            jumps[axis] *= 1 if stage.transposed else s
    return tuple(fields)
