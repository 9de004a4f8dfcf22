"""What runs here and why: versions, the machine, and the path that the ops of every technique take."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from omniconv import _native
from omniconv.analysis.catalogue import op_names
from omniconv.techniques import TECHNIQUES, Technique
from omniconv.timing import Machine, machine

PACKAGES = ("omniconv", "torch", "numpy", "pillow", "typer", "rich", "matplotlib", "jinja2")
WHY_COMPOSITE = "no native kernels are built for it yet"


@dataclass(frozen=True)
class Path:
    """The path that the ops of a technique take, what it is in words, and why it and no other."""

    technique: str
    ops: tuple[str, ...]
    path: str
    description: str
    reason: str


@dataclass(frozen=True)
class Refusal:
    """What sends a call to the composite path: the place of the question in the engine's order, and the question."""

    engine: str
    place: int
    reason: str


@dataclass(frozen=True)
class Package:
    """An installed package; ``version`` is None where it is missing."""

    name: str
    version: str | None


@dataclass(frozen=True)
class Examination:
    """The state of this installation. ``native`` is the instruction set of the native kernels, or why there are none."""

    packages: tuple[Package, ...]
    machine: Machine
    native: str
    paths: tuple[Path, ...]
    refusals: tuple[Refusal, ...]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _summary(function: Callable[..., object]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0].replace("``", "")


def _path(technique: Technique) -> Path:
    composite, engine = _summary(technique.composite), technique.engine
    if engine is None:
        return Path(technique.name, op_names(technique), "composite", composite, WHY_COMPOSITE)
    if not _native.AVAILABLE:
        return Path(technique.name, op_names(technique), "composite", composite, _native.WHY_ABSENT)
    why = f"where {engine.when}; else {composite[0].lower()}{composite[1:]}"
    return Path(technique.name, op_names(technique), "native", f"{engine.name} kernels ({_native.isa()})", why)


def examine() -> Examination:
    """Looks at what is installed, at the machine, and at the path of every technique.

    >>> len(examine().paths)
    11
    """
    engines = {t.engine.name: t.engine for t in TECHNIQUES if t.engine is not None}
    return Examination(
        tuple(Package(name, _version(name)) for name in PACKAGES),
        machine(),
        f"{_native.isa()} of {', '.join(_native.levels())}" if _native.AVAILABLE else _native.WHY_ABSENT,
        tuple(_path(t) for t in TECHNIQUES),
        tuple(Refusal(e.name, i + 1, reason) for e in engines.values() for i, reason in enumerate(e.reasons)),
    )
