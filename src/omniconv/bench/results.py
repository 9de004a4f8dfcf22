"""What a measurement of a technique's layers says, and its file: written by the command line, read back and checked here."""

import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omniconv.analysis.doctor import Package
from omniconv.analysis.peaks import Floor, Peaks
from omniconv.analysis.tables import SCHEMA_VERSION, plain
from omniconv.bench.peers import DIRECTIONS, Absent
from omniconv.ops.sequence import LAYOUTS
from omniconv.problem import DTYPES
from omniconv.timing import Machine, Timing, machine

SHORTEST_SCALED = 1e-4  # seconds; what one thread does in less is not worth a second one


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    technique: str
    directions: tuple[str, ...] = DIRECTIONS
    dtype: str | None = None
    only: str | None = None
    threads: int = 1
    cold: bool = False
    compiled: bool = False
    budget: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.directions or any(d not in DIRECTIONS for d in self.directions):
            raise ValueError(f"bench: the direction must be {' or '.join(DIRECTIONS)}, got {', '.join(self.directions) or 'none'}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"bench: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"bench: threads must be between 1 and 1024, got {self.threads}")
        if not 0 < self.budget <= 86400:
            raise ValueError(f"bench: the budget must be above 0 and at most 86400 seconds, got {self.budget:g}")


@dataclass(frozen=True)
class Measured:
    """One way to compute a layer. ``agrees`` is None where it was not run; ``reason`` says why there is no time."""

    name: str
    hot: Timing | None = None
    cold: Timing | None = None
    agrees: bool | None = None
    reason: str = ""


def fastest(ways: Iterable[Measured], *, cold: bool = False) -> Measured | None:
    """The one with the smallest median, if there is a time at all."""
    timed = {way: timing.median for way in ways if (timing := _time_of(way, cold=cold))}
    return min(timed, key=timed.__getitem__, default=None)


@dataclass(frozen=True)
class Row:
    """One layer in one direction ("both": forward and backward). Ratios are their time over ours: above 1 we are faster.

    ``share`` and ``gradient_share`` are our largest errors as shares of their bounds. ``f32`` is ours in float32 where the layer
    has a half type, ``one_thread`` is ours with one thread where there are more. The rest follows from the times: ``ratio`` is the
    best peer over ours, ``torch_ratio`` eager torch over ours, ``scaling`` one thread over ours where it takes 100 µs at least,
    ``f32_ratio`` ours in float32 over ours, ``to_floor`` ours over the floor, and ``differs`` says whether the difference to the
    best peer is beyond noise.
    """

    network: str
    problem: str
    direction: str
    status: str
    reason: str = ""
    share: float | None = None
    gradient_share: float | None = None
    macs: int = 0
    bytes: int = 0
    floor: Floor | None = None
    cold_floor: Floor | None = None
    ours: tuple[Measured, ...] = ()
    f32: tuple[Measured, ...] = ()
    peers: tuple[Measured, ...] = ()
    one_thread: tuple[Measured, ...] = ()
    best: str | None = field(init=False)
    best_peer: str | None = field(init=False)
    ratio: float | None = field(init=False)
    differs: bool | None = field(init=False)
    torch_ratio: float | None = field(init=False)
    f32_ratio: float | None = field(init=False)
    to_floor: float | None = field(init=False)
    cold_ratio: float | None = field(init=False)
    cold_to_floor: float | None = field(init=False)
    scaling: float | None = field(init=False)

    def __post_init__(self) -> None:
        best, peer = fastest(self.ours), fastest(self.peers)
        ours, theirs = _time_of(best), _time_of(peer)
        eager = _time_of(fastest(way for way in self.peers if way.name.startswith("torch ")))
        alone = _time_of(fastest(self.one_thread))
        cold, cold_peer = (_time_of(fastest(ways, cold=True), cold=True) for ways in (self.ours, self.peers))
        for name, value in {
            "best": best.name if best else None,
            "best_peer": peer.name if peer else None,
            "ratio": _ratio(theirs, ours),
            "differs": ours.differs_from(theirs) if ours and theirs else None,
            "torch_ratio": _ratio(eager, ours),
            "f32_ratio": _ratio(_time_of(fastest(self.f32)), ours),
            "to_floor": ours.median / self.floor.seconds if ours and self.floor else None,
            "cold_ratio": _ratio(cold_peer, cold),
            "cold_to_floor": cold.median / self.cold_floor.seconds if cold and self.cold_floor else None,
            "scaling": _ratio(alone, ours) if alone and alone.median >= SHORTEST_SCALED else None,
        }.items():
            object.__setattr__(self, name, value)

    @property
    def layouts(self) -> dict[str, float]:
        """The best peer over ours, both in the same layout, by layout; empty where the layer knows none."""
        found = {}
        for layout in LAYOUTS:
            ours, theirs = (
                _time_of(fastest(way for way in ways if way.name.rpartition(" ")[2] == layout)) for ways in (self.ours, self.peers)
            )
            ratio = _ratio(theirs, ours)
            if ratio is not None:
                found[layout] = ratio
        return found


def _time_of(way: Measured | None, *, cold: bool = False) -> Timing | None:
    if way is None:
        return None
    return way.cold if cold else way.hot


def _ratio(theirs: Timing | None, ours: Timing | None) -> float | None:
    return theirs.median / ours.median if theirs and ours else None


@dataclass(frozen=True)
class Benchmark:
    """The result: the rows in order, what they are judged by, and how and where they were measured."""

    settings: Settings
    rows: tuple[Row, ...]
    peaks: Peaks
    absent: tuple[Absent, ...]
    notes: tuple[str, ...]
    path: str
    packages: tuple[Package, ...]
    commit: str | None
    machine: Machine
    interrupted: bool = False

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows in which our answer was wrong."""
        return tuple(row for row in self.rows if row.status == "failed")


def slug(state: Machine | None = None) -> str:
    """The name of a machine, by default this one, in file names.

    >>> slug(Machine("AMD EPYC 9B45 (x)", 2, 1, "AVX512", "Linux x86_64", "3.11.7", "2.14.1", None))
    'amd-epyc-9b45-x-avx512'
    >>> slug(Machine("AMD EPYC 9B45 (x)", 2, 2, "AVX512", "Linux x86_64", "3.11.7", "2.14.1", None))
    'amd-epyc-9b45-x-avx512-2-threads'
    """
    state = state or machine()
    threads = f" {state.threads} threads" if state.threads > 1 else ""
    words = "".join(c if c.isalnum() else " " for c in f"{state.cpu} {state.capability}{threads}".lower())
    return "-".join(words.split())


def load(path: str | Path) -> Benchmark:
    """Reads a Benchmark back from its JSON.

    Raises:
        ValueError: The file is not one; the message names the file and the place in it.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"bench: the file must be readable, got '{path}' ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"bench: the file must be JSON, got '{path}' ({error})") from None
    try:
        if not isinstance(data, dict) or data.pop("schema_version", None) != SCHEMA_VERSION:
            raise ValueError(f"schema_version must be {SCHEMA_VERSION}")
        data.pop("kind", None)  # runs of before there were kinds have none
        made = _read(Benchmark, data, "")
    except ValueError as error:
        raise ValueError(f"bench: {error}, in '{path}'") from None
    assert isinstance(made, Benchmark)
    return made


def _read(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as a value of this type."""
    if is_dataclass(kind):
        return _read_record(kind, value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _read(next(k for k in inner if k is not types.NoneType), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        return tuple(_read(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} must be {kind.__name__}, got {value!r}")
    return float(value) if kind is float else value


def _read_record(kind: Any, value: Any, where: str) -> Any:
    """A record field by field; those that follow from others must say the same, those added since may be missing."""
    dot = f"{where}." if where else ""
    known = {f.name: f for f in fields(kind)}
    added = {name for name, f in known.items() if f.metadata.get("added")}
    if not isinstance(value, dict) or value.keys() - known.keys() or known.keys() - value.keys() - added:
        got = ", ".join(value) if isinstance(value, dict) else repr(value)
        raise ValueError(f"{where or 'the file'} must have the fields {', '.join(known)}, got {got}")
    hints = typing.get_type_hints(kind)
    made = kind(**{name: _read(hints[name], value[name], dot + name) for name, f in known.items() if f.init and name in value})
    for name, f in known.items():
        if not f.init and plain(getattr(made, name)) != value[name]:
            raise ValueError(f"{dot}{name} must be {getattr(made, name)!r} as the times say, got {value[name]!r}")
    return made
