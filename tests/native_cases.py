"""What the tests of the native kernels share: random tensors, layouts, which ops are called, threads, resident memory."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omniconv.ops.sequence import LAYOUTS

Result = TypeVar("Result")

OPS = torch.ops.omniconv
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STATUS = Path("/proc/self/status")
needs_proc = pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from /proc")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same in every dtype but for rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, most: int = 3) -> Tensor:
    """Whole numbers from −most to most."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """(N, C, T) in a layout of sequences, contiguous."""
    return x.permute(LAYOUTS[layout].order).contiguous()


def from_layout(y: Tensor, layout: str) -> Tensor:
    """A layout's tensor as (N, C, T)."""
    order = LAYOUTS[layout].order
    return y.permute([order.index(axis) for axis in range(3)])


class RecordedOps(TorchDispatchMode):
    """The ops that reach the dispatcher, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def called(function: Callable[[], Any]) -> list[str]:
    """The ops that a call sends to the dispatcher."""
    with RecordedOps() as recorded:
        function()
    return recorded.names


def on_threads(count: int, function: Callable[[], Result]) -> Result:
    """The result of a call on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def resident() -> int:
    """Resident memory of this process in kB."""
    found = re.search(r"VmRSS:\s+(\d+)", STATUS.read_text())
    assert found is not None
    return int(found.group(1))
