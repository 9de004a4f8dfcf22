"""Which storages are alive: the most bytes that eager execution holds at once."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor


class Memory:
    """Counts the storages it is shown until they are freed.

    >>> memory = Memory()
    >>> x = torch.ones(8)
    >>> memory.see([x])
    >>> del x
    >>> memory.alive, memory.peak
    (0, 32)
    """

    def __init__(self) -> None:
        self.alive = 0
        self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Storages that are never counted, as those of parameters."""
        for x in tensors:
            self._note(x, counted=False)

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Counts the storages of these tensors from now on."""
        for x in tensors:
            self._note(x, counted=True)

    def _note(self, x: Tensor, counted: bool) -> None:
        if x.layout != torch.strided:
            return
        storage = x.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes() if counted else 0

        def freed(_: object) -> None:
            self.alive -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.alive += size
        self.peak = max(self.peak, self.alive)
