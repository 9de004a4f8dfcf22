"""What checks found out about calls, by shapes and settings alone, so that a call like one before is not checked again."""

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

_MOST = 4096  # then all are forgotten: shapes that vary without end must not grow memory


class Calls(Generic[T]):
    """Findings by the key of their call; tensors are never kept.

    >>> calls = Calls[int]()
    >>> calls.note(("op", 3), 7)
    >>> calls.find(("op", 3)), calls.find(("op", 4)), calls.find(("op", [])), calls.find(None)
    (7, None, None, None)
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, T] = {}

    def find(self, key: Hashable) -> T | None:
        """What was noted of a call; None where nothing was, or a setting has no hash."""
        try:
            return self._found.get(key)
        except TypeError:
            return None

    def note(self, key: Hashable, finding: T) -> None:
        """Keeps a finding; None for a key, which no call has, is passed over."""
        if key is None:
            return
        if len(self._found) >= _MOST:
            self._found.clear()
        self._found[key] = finding
