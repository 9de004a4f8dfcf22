"""The one equation, written to be read: the oracle of every technique.

    y[n, o, p] = bias[o] + Σ_{t ∈ taps} Σ_{c ∈ mix(o)} W[o, c, t] · x[n, c, position(p, t)]

A technique's ``reference`` is a setting of it: what a tap looks at (:func:`sampled`, :func:`spread_out`), which channels meet
(groups), where the weights come from. Plain torch, any dtype, differentiable; slow on purpose.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from omniconv.geometry import Grid, Pair, Spread, source


def taps_of(kernel: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every tap of a kernel as a tuple of indices."""
    return product(*(range(k) for k in kernel))


def padded(x: Tensor, axis: int, pads: Pair, mode: str) -> Tensor:
    """``x`` padded on both sides of one axis, by looking up the position that each new place reads."""
    before, after = pads
    size = x.shape[axis]
    reads = [source(p, size, mode) for p in range(-before, size + after)]
    looked_up = x.index_select(axis, torch.tensor([r or 0 for r in reads], device=x.device))
    outside = torch.tensor([r is None for r in reads], device=x.device)
    return looked_up.masked_fill(outside.reshape(-1, *(1,) * (x.dim() - 1 - axis)), 0)


def at_tap(weight: Tensor, tap: Sequence[int]) -> Tensor:
    """The two channel axes of a weight at one tap."""
    for t in reversed(tap):
        weight = weight[..., t]
    return weight


def sampled(x: Tensor, tap: Sequence[int], windows: Grid, outputs: Sequence[int]) -> Tensor:
    """What one tap of every output reads: x[n, c, o·S − before + t·D] as (N, C, Out…). ``x`` is already padded."""
    for axis, (t, o) in enumerate(zip(tap, outputs, strict=True)):
        first = t * windows.dilation[axis]
        index = torch.arange(o, device=x.device) * windows.stride[axis] + first
        x = x.index_select(axis + 2, index)
    return x


def mixed(sample: Tensor, weight: Tensor, groups: int) -> Tensor:
    """One tap's product over the channels that meet: (N, C, Out…) with (O, C/G) to (N, O, Out…)."""
    parts = [torch.einsum("nc...,oc->no...", s, w) for s, w in zip(sample.chunk(groups, 1), weight.chunk(groups), strict=True)]
    return torch.cat(parts, 1)


def with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y`` plus one number per output channel."""
    return y if bias is None else y + bias.reshape(-1, *(1,) * (y.dim() - 2))


def grid_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid, groups: int = 1) -> Tensor:
    """The equation with positions on a grid: x (N, C, In…), weight (O, C/G, K…)."""
    kernel = weight.shape[2:]
    outputs = windows.output_size(x.shape[2:], kernel)
    for axis, pads in enumerate(windows.pads):
        x = padded(x, axis + 2, pads, windows.mode)
    y = x.new_zeros(x.shape[0], weight.shape[0], *outputs)
    for tap in taps_of(kernel):
        y = y + mixed(sampled(x, tap, windows, outputs), at_tap(weight, tap), groups)
    return with_bias(y, bias)


def spread_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Spread, groups: int = 1) -> Tensor:
    """The equation with fractional stride: x (N, C, In…), weight (C, O/G, K…). Input i adds to output i·S − before + t·D."""
    kernel, inputs = weight.shape[2:], x.shape[2:]
    outputs = windows.output_size(inputs, kernel)
    y = x.new_zeros(x.shape[0], weight.shape[1] * groups, *outputs)
    for tap in taps_of(kernel):
        # (C, O/G) of one tap as (O, C/G), group by group
        per_group = torch.cat([w.t() for w in at_tap(weight, tap).chunk(groups)])
        contribution = mixed(x, per_group, groups)
        for axis, (t, out) in enumerate(zip(tap, outputs, strict=True)):
            targets = [i * windows.stride[axis] - windows.crops[axis][0] + t * windows.dilation[axis] for i in range(inputs[axis])]
            kept = [i for i, target in enumerate(targets) if 0 <= target < out]
            places = torch.tensor([targets[i] for i in kept], dtype=torch.long, device=x.device)
            chosen = contribution.index_select(axis + 2, torch.tensor(kept, dtype=torch.long, device=x.device))
            wide = [out if a == axis + 2 else n for a, n in enumerate(contribution.shape)]
            contribution = chosen.new_zeros(wide).index_add(axis + 2, places, chosen)
        y = y + contribution
    return with_bias(y, bias)
