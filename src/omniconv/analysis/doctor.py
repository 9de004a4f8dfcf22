"""What runs here and why: versions, the machine, and the path that the ops of every technique take."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from omniconv.analysis.catalogue import op_names
from omniconv.techniques import TECHNIQUES
from omniconv.timing import Machine, machine

PACKAGES = ("omniconv", "torch", "numpy", "pillow", "typer", "rich", "matplotlib", "jinja2")
WHY_COMPOSITE = "this build has no native library"


@dataclass(frozen=True)
class Path:
    """The path that the ops of a technique take, what it is in words, and why it and no other."""

    technique: str
    ops: tuple[str, ...]
    path: str
    description: str
    reason: str


@dataclass(frozen=True)
class Package:
    """An installed package; ``version`` is None where it is missing."""

    name: str
    version: str | None


@dataclass(frozen=True)
class Examination:
    """The state of this installation."""

    packages: tuple[Package, ...]
    machine: Machine
    paths: tuple[Path, ...]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _summary(function: Callable[..., object]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0].replace("``", "")


def examine() -> Examination:
    """Looks at what is installed, at the machine, and at the path of every technique.

    >>> examine().paths[0].path
    'composite'
    """
    paths = [Path(t.name, op_names(t), "composite", _summary(t.composite), WHY_COMPOSITE) for t in TECHNIQUES]
    return Examination(tuple(Package(name, _version(name)) for name in PACKAGES), machine(), tuple(paths))
