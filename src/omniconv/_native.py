"""The native library: loads it, names the instruction sets, and says in words why it is absent.

``pip install`` builds it where there is a compiler with vector extensions; without it every op takes its composite path.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

LEVELS = ("base", "avx2", "avx512")
_LEAVE = -(2**63)  # asks the library for the level in force


def _cap() -> str | None:
    cap = os.environ.get("OMNICONV_ISA")
    if cap is not None and cap not in LEVELS:
        raise ValueError(f"omniconv: OMNICONV_ISA must be one of {', '.join(LEVELS)}, got {cap!r}")
    return cap


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why."""
    _cap()
    path = os.environ.get("OMNICONV_LIBRARY")  # another build, such as a sanitizer's
    if path is None:
        spec = find_spec("omniconv._library")
        if spec is None or spec.origin is None:
            return None, "this build has no native library: no compiler that builds it was found when it was installed"
        path = spec.origin
    try:
        torch.ops.load_library(path)
        return ctypes.CDLL(path), ""
    except OSError as error:
        return None, f"the native library cannot be loaded: {error}"


_library, WHY_ABSENT = _load()
AVAILABLE = _library is not None
if _library is not None:
    _library.omniconv_isa.argtypes = [ctypes.c_int64]
    _library.omniconv_isa.restype = ctypes.c_int64
else:
    warnings.warn(
        f"omniconv runs without native kernels, by its slower composite paths; {WHY_ABSENT}", RuntimeWarning, stacklevel=2
    )


def isa() -> str | None:
    """The instruction set in force, one of LEVELS; None without the library.

    The best that the machine has, capped by the environment variable OMNICONV_ISA as it was when the library was loaded.
    """
    return None if _library is None else LEVELS[_library.omniconv_isa(_LEAVE)]


def levels() -> tuple[str, ...]:
    """The instruction sets that can run here, best last."""
    best = isa()
    return () if best is None else LEVELS[: LEVELS.index(best) + 1]


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Kernels of that instruction set, in every thread, at most the best one. For tests and comparisons."""
    if _library is None:
        raise RuntimeError(f"omniconv: the native library must be there to choose a level, got none; {WHY_ABSENT}")
    before = _library.omniconv_isa(_LEAVE)
    _library.omniconv_isa(LEVELS.index(level))
    try:
        yield
    finally:
        _library.omniconv_isa(before)
