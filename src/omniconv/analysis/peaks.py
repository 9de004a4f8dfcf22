"""What this machine can do at best: measured in the same run as what is judged by it, or once and kept in the user's cache.

No convolution is faster than its floor

    max(flops / peak rate of arithmetic, bytes / copy bandwidth of the level of memory that holds its tensors)

where each multiply-accumulate on a real input is two flops, and each tensor moves once. The peaks are practical ones, reached from
Python through torch: the faster of a matrix product and a dense convolution, and copies of buffers that fit each cache.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniconv.problem import DTYPES
from omniconv.timing import Machine, Timing, alternate, machine

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
    rates, levels = _measured(["f32", "f64"] if double else ["f32"], budget)
    return Peaks(rates["f32"], rates.get("f64"), levels)


def _measured(dtypes: Sequence[str], budget: float) -> tuple[dict[str, float], tuple[Level, ...]]:
    """Flops a second by dtype, and the levels of memory."""
    sizes = caches()
    memory = min(max(4 * sizes[-1], 64 << 20), LARGEST_BUFFER)
    probes: dict[str, tuple[Callable[[], object], float]] = {}
    for name in dtypes:
        probes[f"product {name}"] = _product(DTYPES[name])
        probes[f"convolution {name}"] = _convolution(DTYPES[name])
    # a quarter of the cache for each of the two buffers leaves room for all else
    buffers = {f"L{level}": size // 4 for level, size in enumerate(sizes, 1)} | {"DRAM": memory}
    probes |= {name: _copy(size) for name, size in buffers.items()}
    with torch.no_grad():
        timings = alternate({name: call for name, (call, _) in probes.items()}, budget=budget)
    rates = {name: _rate(amount, timings[name]) for name, (_, amount) in probes.items()}
    return (
        {name: max(rates[f"product {name}"], rates[f"convolution {name}"]) for name in dtypes},
        tuple(Level(name, size, rates[name]) for name, size in zip(buffers, (*sizes, None), strict=True)),
    )


@dataclass(frozen=True)
class Roofs:
    """The peaks of a machine with so many threads: flops a second by dtype, the levels of memory, and when they were measured."""

    cpu: str
    capability: str
    threads: int
    torch: str
    rates: Mapping[str, float]
    levels: tuple[Level, ...]
    measured: str
    cached: bool = False
    note: str = ""


def roofs_file(state: Machine) -> Path:
    """Where the peaks of a machine in this state are kept: below ``XDG_CACHE_HOME``, by default ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = (
        Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    )  # a relative one is to be ignored, says the specification
    key = hashlib.sha256(json.dumps(_key(state)).encode()).hexdigest()[:16]
    return folder / "omniconv" / f"roofs-{key}.json"


def _key(state: Machine) -> dict[str, Any]:
    return {"cpu": state.cpu, "capability": state.capability, "threads": state.threads, "torch": state.torch}


def machine_roofs(dtype: str = "f32", *, refresh: bool = False, budget: float = 2.0) -> Roofs:
    """The peaks of this machine with torch's present number of threads, from the cache or measured and kept there.

    Another processor, instruction set, number of threads or torch has peaks of its own. A file that is malformed or lacks the dtype
    counts for nothing. What was measured while others were running is not kept.

    Args:
        dtype: Whose arithmetic must be among them: "f32", "f64", "bf16" or "f16".
        refresh: Measure, whatever the cache says.
        budget: Seconds that measuring takes.
    """
    state = machine()
    file = roofs_file(state)
    known = None if refresh else _kept(file, state)
    if known is not None and dtype in known.rates:
        return known
    rates, levels = _measured(list(dict.fromkeys(["f32", dtype])), budget)
    if known is not None:
        rates = {**known.rates, **rates}
    made = Roofs(**_key(state), rates=rates, levels=levels, measured=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    if state.busy:
        return replace(made, note="the peaks were measured while others were running: too low perhaps, and not kept")
    return replace(made, note=_keep(file, made))


def _kept(file: Path, state: Machine) -> Roofs | None:
    """What a file says, if it is whole and of this machine."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        levels = tuple(
            Level(str(v["name"]), None if v["size"] is None else int(v["size"]), float(v["bandwidth"])) for v in data["levels"]
        )
        rates = {str(name): float(rate) for name, rate in data["rates"].items()}
        right = {name: data[name] for name in _key(state)} == _key(state)
        measured = datetime.fromisoformat(data["measured"]).isoformat()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    sound = all(math.isfinite(value) and value > 0 for value in (*rates.values(), *(level.bandwidth for level in levels)))
    if not (right and sound and "f32" in rates and levels and levels[-1].size is None):
        return None
    return Roofs(**_key(state), rates=rates, levels=levels, measured=measured, cached=True)


def _keep(file: Path, roofs: Roofs) -> str:
    """Writes the file whole or not at all; returns why it could not be written."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(roofs), indent=2), encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        return f"the peaks were not kept: {error.strerror}: '{file}'"
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return ""


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
