"""What runs here and why: versions, the machine, and the path that every op takes."""

import inspect
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from omniconv.techniques import TECHNIQUES
from omniconv.timing import Machine, machine

PACKAGES = ("omniconv", "torch", "numpy", "pillow", "typer", "rich", "matplotlib", "jinja2")
WHY_COMPOSITE = "this build has no native library"


@dataclass(frozen=True)
class OpPath:
    """The path of one op, what it is in words, and why it and no other."""

    op: str
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
    paths: tuple[OpPath, ...]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def examine() -> Examination:
    """Looks at what is installed, at the machine, and at the path of every op.

    >>> examine().paths[0].path
    'composite'
    """
    paths = [
        OpPath(op.__name__, "composite", (inspect.getdoc(technique.composite) or "").partition("\n")[0], WHY_COMPOSITE)
        for technique in TECHNIQUES
        for op in technique.ops.values()
    ]
    return Examination(tuple(Package(name, _version(name)) for name in PACKAGES), machine(), tuple(paths))
