"""What a count comes to: rows, totals, the tree of modules, and how far each number can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from omniconv.problem import Problem

STATUSES = ("exact", "estimate", "lower_bound", "unknown")  # from best to worst
PASS = ("macs_dense", "macs_valid", "flops", "bytes_min", "bytes_impl")
METRICS = ("params", *PASS)

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Counts:
    """The work of one pass. MACs are multiply-accumulates; bytes are read or written.

    ``macs_dense`` counts every tap, as papers do; ``macs_valid`` those that meet a real input and a kept output. ``flops`` are
    2·macs_dense and what comes besides. ``bytes_min`` moves each operand once, ``bytes_impl`` is what the ops that run move.

    >>> Counts(4, 4, 8, 16, 16).intensity
    0.5
    """

    macs_dense: int = 0
    macs_valid: int = 0
    flops: int = 0
    bytes_min: int = 0
    bytes_impl: int = 0

    @property
    def intensity(self) -> float:
        """Flops per byte of ``bytes_min``."""
        return self.flops / self.bytes_min if self.bytes_min else 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, name) + getattr(other, name) for name in PASS))


@dataclass(frozen=True)
class Row:
    """The calls of one op, on the same shapes, in one module.

    ``name`` is the module's path ("" is the root), ``type`` its class where it is a leaf or an omniconv layer, else the op's
    short name. Shapes are those of the first call; numbers are over all calls. ``params`` are credited to the first op that reads
    them, so that they add up. ``status`` has a word for each number: "exact", "estimate", "lower_bound" or "unknown".

    >>> Row("head", "Linear", "aten::addmm", flops=8, bytes_min=4).intensity
    2.0
    """

    name: str
    type: str
    op: str
    technique: str | None = None
    problem: Problem | None = None
    inputs: Shapes = ()
    outputs: Shapes = ()
    calls: int = 1
    params: int = 0
    macs_dense: int = 0
    macs_valid: int = 0
    flops: int = 0
    bytes_min: int = 0
    bytes_impl: int = 0
    backward: Counts | None = None
    status: dict[str, str] = field(default_factory=dict)

    @property
    def intensity(self) -> float:
        """Flops per byte of ``bytes_min``."""
        return self.forward.intensity

    @property
    def forward(self) -> Counts:
        """The forward pass alone."""
        return Counts(*(getattr(self, name) for name in PASS))


@dataclass(frozen=True)
class Coverage:
    """How many calls of ops, views apart, have a formula; ``unknown`` names those without, with their calls.

    >>> Coverage(3, 2, (("aten::_fft_r2c", 1),)).text
    '2 of 3 op calls have a formula; without one: aten::_fft_r2c ×1'
    """

    ops: int
    known: int
    unknown: tuple[tuple[str, int], ...] = ()

    @property
    def share(self) -> float:
        """Known calls among all, from 0 to 1."""
        return self.known / self.ops if self.ops else 1.0

    @property
    def text(self) -> str:
        """One line for people."""
        if not self.unknown:
            return f"all {self.ops} op calls have a formula"
        names = ", ".join(f"{op} ×{calls}" for op, calls in self.unknown)
        return f"{self.known} of {self.ops} op calls have a formula; without one: {names}"


@dataclass(frozen=True)
class ModuleCost:
    """One module of the tree with everything below it; ``depth`` is 0 at the root, ``outputs`` are shapes of its last call."""

    name: str
    type: str
    depth: int
    params: int = 0
    macs_dense: int = 0
    macs_valid: int = 0
    flops: int = 0
    bytes_min: int = 0
    bytes_impl: int = 0
    backward: Counts | None = None
    outputs: Shapes = ()
    calls: int = 0


@dataclass(frozen=True)
class Cost:
    """What a model costs for the inputs that it was given, the whole batch; see :func:`omniconv.analysis.cost`.

    ``rows`` are in the order of execution. ``params`` count shared tensors once. ``peak_activation`` is the most bytes alive at
    once: inputs and results of ops under eager lifetimes, without parameters, buffers and what an op allocates inside; with the
    backward pass, what is saved for it too. ``status`` is that of the totals: a row that is unknown makes a lower bound.
    """

    target: str
    rows: tuple[Row, ...]
    params: int
    macs_dense: int
    macs_valid: int
    flops: int
    bytes_min: int
    bytes_impl: int
    peak_activation: int
    backward: Counts | None
    status: dict[str, str]
    coverage: Coverage
    modules: tuple[ModuleCost, ...]
    notes: tuple[str, ...] = ()

    @property
    def intensity(self) -> float:
        """Flops per byte of ``bytes_min``."""
        return self.forward.intensity

    @property
    def forward(self) -> Counts:
        """The forward pass alone."""
        return Counts(*(getattr(self, name) for name in PASS))


def total_status(statuses: Sequence[str]) -> str:
    """That of a sum: its worst part's; unknown parts make it a lower bound, unless there is nothing else.

    >>> total_status(["exact", "unknown"]), total_status(["exact", "estimate"]), total_status(["unknown"])
    ('lower_bound', 'estimate', 'unknown')
    """
    worst = max(statuses, key=STATUSES.index, default="exact")
    return "lower_bound" if worst == "unknown" and set(statuses) != {"unknown"} else worst
