"""Every switch of the library, in one place: per thread; a compiled graph is traced anew when one changes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Switches(threading.local):
    def __init__(self) -> None:  # runs in every thread; torch's tracer guards on what an instance holds itself
        self.precise = False
        self.composite = False


_switches = _Switches()


@contextmanager
def _switched(name: str) -> Iterator[None]:
    before = getattr(_switches, name)
    setattr(_switches, name, True)
    try:
        yield
    finally:
        setattr(_switches, name, before)


@contextmanager
def precise() -> Iterator[None]:
    """Direct algorithms only, and denormal numbers kept; a context manager and a decorator, for the calling thread.

    Native kernels otherwise count denormal numbers, which would slow them down a hundredfold, as zeros.

    >>> from omniconv.functional import depthwise_conv1d
    >>> tiny = torch.full((1, 1, 1), 1e-40)
    >>> with precise():
    ...     depthwise_conv1d(tiny, torch.ones(1, 1, 1)).item() > 0
    True
    """
    with _switched("precise"):
        yield


@contextmanager
def composite_only() -> Iterator[None]:
    """No native kernels: every op takes its composite path, in the calling thread. For tests and comparisons."""
    with _switched("composite"):
        yield


def is_precise() -> bool:
    """Whether :func:`precise` is in force."""
    return _switches.precise


def is_composite_only() -> bool:
    """Whether :func:`composite_only` is in force."""
    return _switches.composite
