"""The windows of a layer before and after dilation, and what torch has no setting for.

One axis of a layer: kernel K, stride S, pads P, dilation D, on a map of n positions that the dilated network makes r times denser:
m positions, r(n − 1) < m ≤ rn. It gets dilation r·D, pads r·P and a stride σ that divides S, and its output p becomes output ρ·p,
ρ = r·S/σ, whose reads are r times those of p: (ρ·p)·σ − r·P + k·r·D = r·(p·S − P + k·D). Zeros stay zeros: a read outside the n is
one outside the m.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Window:
    """A layer along one axis, as it is: kernel, stride, pads (before, after), dilation, and how the last window is counted."""

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int = 1
    ceil: bool = False

    @property
    def slack(self) -> int:
        """How far the window reaches beyond its pads; 0 where stride 1 would keep the size."""
        return self.dilation * (self.kernel - 1) - self.before - self.after

    @property
    def is_point(self) -> bool:
        """Whether it looks at one position and pads none."""
        return self.kernel == 1 and self.before == self.after == 0

    @property
    def halves(self) -> bool:
        """Whether it gives ⌈n/S⌉ on every n: as a window that keeps the size would with its stride."""
        return self.slack == (self.stride - 1 if self.ceil else 0)

    def positions(self, size: int) -> int:
        """Outputs on ``size`` positions, as torch counts them."""
        last = size - 1 - self.slack
        if not self.ceil:
            return last // self.stride + 1
        count = -(-last // self.stride) + 1
        return count - 1 if (count - 1) * self.stride >= size + self.before else count


@dataclass(frozen=True)
class Dense:
    """The same axis dilated: ``rate`` r of the input, ``stride`` σ that is left."""

    window: Window
    rate: int
    stride: int

    @property
    def grows(self) -> int:
        """ρ: new positions for each old one of the output."""
        return self.rate * self.window.stride // self.stride

    @property
    def fits(self) -> bool:
        """Whether pads and dilation alone give :meth:`positions` on maps of every size."""
        if self.window.stride == 1 or (self.rate == 1 and self.stride == self.window.stride):
            return True
        return self.window.slack == 0 and not self.window.ceil

    def positions(self, size: int) -> int:
        """Outputs on the ``size`` = m positions.

        All that stand for an old one or lie between two of them, and as many behind the last as a layer that keeps the size would
        give: so that branches, which may shrink a map by different layers, meet at the same size.
        """
        if self.window.stride == 1:
            return size - self.rate * self.window.slack
        if self.window.halves:  # told from the rest for the sake of symbolic sizes, as all of this is linear where σ is 1
            return size if self.stride == 1 else -(-size // self.stride)
        before = -(-size // self.rate)
        after = self.window.positions(before)
        return min(max(-(-size // self.stride), self.grows * (after - 1) + 1), self.grows * after)

    def missing(self, size: int) -> int:
        """Positions that lack at the end of the map for :meth:`positions`."""
        lacks = (self.positions(size) - 1) * self.stride + 1 - size + self.rate * self.window.slack
        return lacks if self.stride == 1 else max(lacks, 0)


class Extension:
    """A forward pre-hook that lengthens a map to what a dilated layer reads beyond its pads, by a value it passes over.

    With ``pads`` it adds the pads too: torch refuses those of a max pooling that are wider than half its kernel, dilated or not.
    """

    def __init__(self, axes: Sequence[Dense], value: float, pads: bool = False) -> None:
        self.axes, self.value, self.pads = tuple(axes), value, pads

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs, the first of them lengthened."""
        x, rank = inputs[0], len(self.axes)
        flat: list[int] = []
        for axis, size in zip(reversed(self.axes), reversed(x.shape[-rank:]), strict=True):
            before, after = (axis.rate * axis.window.before, axis.rate * axis.window.after) if self.pads else (0, 0)
            flat += [before, after + axis.missing(size)]
        return (F.pad(x, flat, value=self.value), *inputs[1:])


class DilatedAvgPool(nn.Module):
    """Average pooling whose window is dilated, over the last axes.

    Sums tap by tap in the order of torch's own loops, half types in float32.

    Args:
        axes: The windows.
        count_include_pad: Whether zeros of the pads are counted.
        divisor: What to divide by instead of the number of positions.
    """

    def __init__(self, axes: Sequence[Dense], count_include_pad: bool, divisor: int | None) -> None:
        super().__init__()
        self.axes, self.count_include_pad, self.divisor = tuple(axes), count_include_pad, divisor
        self.taps = prod(a.window.kernel for a in axes)

    def forward(self, input: Tensor) -> Tensor:
        """(…, m…) to (…, new positions…)."""
        rank = len(self.axes)
        sizes = input.shape[-rank:]
        flat: list[int] = []
        for axis, size in zip(reversed(self.axes), reversed(sizes), strict=True):
            flat += [axis.rate * axis.window.before, axis.rate * axis.window.after + axis.missing(size)]
        x = F.pad(input.float() if input.dtype in (torch.float16, torch.bfloat16) else input, flat)
        total = self._tap(x, sizes, 0)
        for tap in range(1, self.taps):
            total = total + self._tap(x, sizes, tap)
        return (total / self._counts(x, sizes)).to(input.dtype)

    def _tap(self, x: Tensor, sizes: Sequence[int], tap: int) -> Tensor:
        """What one place of the window reads, for every output."""
        for i in reversed(range(len(self.axes))):
            axis, at = self.axes[i], x.dim() + i - len(self.axes)
            tap, k = divmod(tap, axis.window.kernel)
            length = (axis.positions(sizes[i]) - 1) * axis.stride + 1
            x = x.narrow(at, k * axis.rate, length)
            if axis.stride > 1:
                x = x.index_select(at, torch.arange(0, length, axis.stride, device=x.device))
        return x

    def _counts(self, x: Tensor, sizes: Sequence[int]) -> Tensor | int:
        if self.divisor is not None:
            return self.divisor
        counts = torch.ones((), dtype=x.dtype, device=x.device)
        for axis, size in zip(self.axes, sizes, strict=True):
            r, w = axis.rate, axis.window
            starts = torch.arange(axis.positions(size), device=x.device) * axis.stride - r * w.before
            reads = starts[:, None] + r * torch.arange(w.kernel, device=x.device)
            counted = r * (-(-size // r) + w.after)
            seen = reads < counted if self.count_include_pad else (reads >= 0) & (reads < size)
            counts = counts[..., None] * seen.sum(1).clamp(min=1).to(x.dtype)
        return counts

    def extra_repr(self) -> str:
        """The windows."""
        kernels, rates = tuple(a.window.kernel for a in self.axes), tuple(a.rate for a in self.axes)
        return f"kernel_size={kernels}, stride={tuple(a.stride for a in self.axes)}, dilation={rates}"
