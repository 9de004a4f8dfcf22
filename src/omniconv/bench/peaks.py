"""What this machine can do at best, measured in the same run as what is judged by it.

No convolution is faster than its floor

    max(flops / peak rate of arithmetic, bytes / copy bandwidth of the level of memory that holds its tensors)

where each multiply-accumulate on a real input is two flops, and each tensor moves once. The peaks are practical ones, reached from
Python through torch: the faster of a matrix product and a dense convolution, and copies of buffers that fit each cache.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from omniconv.timing import Timing, alternate

CPUS = Path("/sys/devices/system/cpu")
USUAL_CACHES = (32 << 10, 1 << 20, 32 << 20)  # where the system does not say
LARGEST_BUFFER = 256 << 20

_SIDE = 512  # of the matrix product; larger ones are not faster
_COPIED = 4 << 20  # bytes that a call copies at least, so that the call itself does not count


@dataclass(frozen=True)
class Level:
    """A level of memory: its bytes (None: as many as there are) and the bytes it copies a second, read and written ones added."""

    name: str
    size: int | None
    bandwidth: float


@dataclass(frozen=True)
class Peaks:
    """Flops a second in float32 and, where it was asked for, float64; the levels of memory, the smallest first."""

    flops: float
    flops_f64: float | None
    levels: tuple[Level, ...]

    def level(self, size: int) -> Level:
        """The smallest level that holds so many bytes.

        >>> Peaks(1e9, None, (Level("L1", 100, 2e9), Level("DRAM", None, 1e9))).level(101).name
        'DRAM'
        """
        return next(level for level in self.levels if level.size is None or size <= level.size)

    @property
    def last_cache(self) -> int:
        """Bytes of the largest cache."""
        return max((level.size for level in self.levels if level.size is not None), default=0)


@dataclass(frozen=True)
class Floor:
    """The least seconds that a computation takes, and what sets them: "arithmetic" or the name of a level of memory."""

    seconds: float
    limit: str


@dataclass(frozen=True)
class Demand:
    """What a computation asks of a machine: flops, bytes moved, and the bytes of all its tensors."""

    flops: int
    moved: int
    held: int

    @staticmethod
    def of(macs: int, read: int, written: int, backward: bool) -> "Demand":
        """The demand of a convolution whose operands have ``read`` bytes and whose result has ``written``.

        Backward makes the gradients of the input and of the weight, each with as many multiply-accumulates as forward. It reads
        the operands and the incoming gradient once more and writes a gradient for every operand.

        >>> Demand.of(100, 40, 20, backward=True)
        Demand(flops=600, moved=160, held=120)
        """
        if backward:
            return Demand(6 * macs, 3 * read + 2 * written, 2 * (read + written))
        return Demand(2 * macs, read + written, read + written)

    def floor(self, peaks: Peaks, *, double: bool = False, cold: bool = False) -> Floor:
        """The floor on a machine with these peaks; cold, everything comes from the last level."""
        level = peaks.levels[-1] if cold else peaks.level(self.held)
        rate = peaks.flops_f64 if double and peaks.flops_f64 is not None else peaks.flops
        arithmetic, memory = self.flops / rate, self.moved / level.bandwidth
        return Floor(arithmetic, "arithmetic") if arithmetic > memory else Floor(memory, level.name)


def caches(cpus: Path = CPUS) -> tuple[int, ...]:
    """Bytes of the data caches that this process's first core reaches, level 1 first; usual sizes where the system is silent."""
    affinity = getattr(os, "sched_getaffinity", None)
    core = min(affinity(0)) if affinity else 0
    found: dict[int, int] = {}
    try:
        for index in sorted((cpus / f"cpu{core}" / "cache").glob("index*")):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                found[int(level)] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    except (OSError, ValueError):
        return USUAL_CACHES
    return tuple(found[level] for level in sorted(found)) or USUAL_CACHES


def measure_peaks(*, double: bool = False, budget: float = 1.0) -> Peaks:
    """Measures the peaks with torch's present number of threads.

    Args:
        double: Measure float64 too.
        budget: Seconds.
    """
    sizes = caches()
    memory = min(max(4 * sizes[-1], 64 << 20), LARGEST_BUFFER)
    probes: dict[str, tuple[Callable[[], object], float]] = {}
    for name, dtype in {"f32": torch.float32, "f64": torch.float64}.items():
        if name == "f32" or double:
            probes[f"product {name}"] = _product(dtype)
            probes[f"convolution {name}"] = _convolution(dtype)
    # a quarter of the cache for each of the two buffers leaves room for all else
    buffers = {f"L{level}": size // 4 for level, size in enumerate(sizes, 1)} | {"DRAM": memory}
    probes |= {name: _copy(size) for name, size in buffers.items()}
    with torch.no_grad():
        timings = alternate({name: call for name, (call, _) in probes.items()}, budget=budget)
    rates = {name: _rate(amount, timings[name]) for name, (_, amount) in probes.items()}
    return Peaks(
        max(rates["product f32"], rates["convolution f32"]),
        max(rates["product f64"], rates["convolution f64"]) if double else None,
        tuple(Level(name, size, rates[name]) for name, size in zip(buffers, (*sizes, None), strict=True)),
    )


def _rate(amount: float, timing: Timing) -> float:
    """A peak is what is reached when nothing is in the way: the first quartile."""
    return amount / timing.low


def _product(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    a, b = torch.ones(_SIDE, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
    return (lambda: torch.mm(a, b)), 2.0 * _SIDE**3


def _convolution(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    x, weight = torch.ones(1, 256, 30, 30, dtype=dtype), torch.ones(256, 256, 3, 3, dtype=dtype)
    return (lambda: F.conv2d(x, weight)), 2.0 * 256 * 256 * 9 * 28 * 28


def _copy(size: int) -> tuple[Callable[[], Tensor], float]:
    """Copies a buffer over and over within one call: rows that overlap but for one cache line."""
    numbers, line = size // 4, 16
    rows = -(-_COPIED // size)
    source, target = (torch.ones(numbers + line * rows).as_strided((rows, numbers), (line, 1)) for _ in range(2))
    return (lambda: target.copy_(source)), 2.0 * 4 * rows * numbers
