"""What is known of the technique: error bound, meaning of a Problem, cost, peers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.geometry import Padding, grid
from omniconv.ops.activation import activate
from omniconv.ops.error_bound import activation_error, gamma
from omniconv.ops.grid import call_problem, grid_stage
from omniconv.ops.reference import at_tap, mixed, taps_of
from omniconv.ops.technique import Arguments, Operand, Peer, Stage, Technique
from omniconv.problem import Problem
from omniconv.techniques.deformable.layer import DeformConv2d
from omniconv.techniques.deformable.op import bases_of, convolve, deform_conv2d, make_windows, places_of, reference


def bound(
    u: float,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: Padding = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """γ(C/G·k + 8)·Σ|w̃||x| with w̃ = weight·mask·nearness, and a coordinate term, through the activation.

    A coordinate base + offset is rounded once, by at most u·(|base| + |offset|); the four shares then err by as much again,
    relative to their sum of 1. Along an axis the interpolated value changes by at most 2·max|x| per step (the difference of two
    neighbours, or a ramp to the zero outside), so a tap errs by Σ|w|·mask·2·max|x| times the errors of both coordinates.
    """
    windows = make_windows("bound", input, weight, stride, padding, dilation)
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    strength = None if mask is None else mask.abs()
    made = gamma(weight[0].numel() + 8, u) * reference(
        input.abs(), offset, weight.abs(), None if bias is None else bias.abs(), mask=strength, **settings
    )
    n, c = input.shape[:2]
    kernel, outputs = weight.shape[2:], offset.shape[2:]
    groups = offset.shape[1] // (2 * math.prod(kernel))
    moved = offset.abs().reshape(n, groups, *kernel, 2, *outputs).unbind(4)
    row, column = (base.abs() + by for base, by in zip(bases_of(windows, kernel, outputs, offset), moved, strict=True))
    error = 2 * u * (row + column + 4).flatten(2, 3)
    if strength is not None:
        error = error * strength.reshape(error.shape)
    steepest = 2 * (input.abs().amax((2, 3)) if input.numel() else input.new_zeros(n, c)).reshape(n, groups, c // groups, 1, 1)
    coordinates = input.new_zeros(n, weight.shape[0], *outputs)
    for t, tap in enumerate(taps_of(kernel)):
        per_channel = (steepest * error[:, :, None, t]).flatten(1, 2)
        coordinates = coordinates + mixed(per_channel, at_tap(weight, tap).abs(), c // weight.shape[1])
    before = reference(input, offset, weight, bias, mask=mask, **settings)
    return activation_error(before, made + coordinates, activation, u)


def _output(problem: Problem) -> tuple[int, ...]:
    windows = grid(problem.technique, problem.size, problem.kernel, problem.stride, problem.padding, problem.dilation)
    return windows.output_size(problem.size, problem.kernel)


def operands(problem: Problem) -> dict[str, Operand]:
    """Input, offset, weight, bias and mask."""
    out_channels, taps = problem.out_channels or problem.channels, math.prod(problem.kernel)
    outputs = (problem.batch, problem.offset_groups * taps, *_output(problem))
    return {
        "input": Operand((problem.batch, problem.channels, *problem.size)),
        "offset": Operand((problem.batch, 2 * outputs[1], *outputs[2:]), "offset"),
        "weight": Operand((out_channels, problem.channels // problem.groups, *problem.kernel)),
        "bias": Operand((out_channels,)),
        "mask": Operand(outputs, "unit"),
    }


def arguments(problem: Problem) -> dict[str, Any]:
    """The op's keyword arguments."""
    return {"stride": problem.stride, "padding": problem.padding, "dilation": problem.dilation}


def stages(problem: Problem, modulated: bool = True) -> tuple[Stage, ...]:
    """The offset convolution, beside the path, and the main one: 8 flops a tap and channel to interpolate, 1 to mask."""
    c, taps, out_channels = problem.channels, math.prod(problem.kernel), problem.out_channels or problem.channels
    made = (3 if modulated else 2) * problem.offset_groups * taps
    extras = (9 if modulated else 8) * math.prod(_output(problem)) * taps * c
    return (
        grid_stage(problem, c, made, 1, "offset", side=True),
        grid_stage(problem, c, out_channels, problem.groups, flops=extras),
    )


def problem(rank: int, arguments: Arguments) -> Problem:
    """Returns the Problem of a call."""
    weight = arguments["weight"]
    return call_problem(
        "deformable", rank, arguments, weight.shape[0], kernel=tuple(weight.shape[2:]),
        groups=arguments["input"].shape[-3] // weight.shape[1],
        offset_groups=arguments["offset"].shape[-3] // (2 * math.prod(weight.shape[2:])),
    )  # fmt: skip


def layer(problem: Problem) -> nn.Module:
    """The layer of a Problem: learned offsets and masks."""
    out_channels = problem.out_channels or problem.channels
    groups = {"groups": problem.groups, "offset_groups": problem.offset_groups}
    return DeformConv2d(problem.channels, out_channels, problem.kernel, **(arguments(problem) | groups))


def variant(base: Problem) -> Problem:
    """The same layer, its taps moved."""
    return base.replace(padding_mode="zeros")


def _grid_sample(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: Padding = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
    *,
    activation: str | None = None,
) -> Tensor:
    """What is written today without torchvision: grid_sample for every tap, then one matrix product."""
    n, c, h, w = input.shape
    windows = make_windows("torch", input, weight, stride, padding, dilation)
    rows, columns = places_of(offset, windows, weight.shape[2:])
    groups, taps, *outputs = rows.shape[1:]
    parts = input.reshape(n * groups, c // groups, h, w)
    strengths = None if mask is None else mask.reshape(n * groups, taps, 1, *outputs)
    samples = []
    for t in range(taps):
        row, column = rows[:, :, t].flatten(0, 1), columns[:, :, t].flatten(0, 1)
        # grid_sample's coordinates run from −1 to 1 over the centres with align_corners=True
        points = torch.stack([2 * column / max(w - 1, 1) - 1, 2 * row / max(h - 1, 1) - 1], -1)
        sample = F.grid_sample(parts, points, align_corners=True)
        if strengths is not None:
            sample = sample * strengths[:, t]
        samples.append(sample.reshape(n, c, *outputs))
    stacked = torch.stack(samples, 2).flatten(1, 2)  # (N, C·k, Oh, Ow)
    product_of_all = F.conv2d(stacked, weight.flatten(1)[..., None, None], bias, groups=c // weight.shape[1])
    return activate(product_of_all, activation)


TECHNIQUE = Technique(
    name="deformable",
    title="Deformable",
    summary="every tap looks where a learned offset sends it, with a learned strength",
    sampling="grid + learned offset",
    mixing="all channels or groups",
    weights="free (× mask)",
    formula="y[n,o,p] = b[o] + Σ_c Σ_t W[o,c,t] · m[n,t,p] · x(n,c, p·S − P + t·D + Δ[n,t,p]), x(·) bilinear",
    when="Detection and segmentation of objects whose shape and scale vary; a few late layers of a backbone.",
    traps=(
        "Offsets are (Δy, Δx) interleaved per tap and per output position: not (x, y), and not one per tap.",
        "The offset convolution costs too: 3·Go·k·C·k parameters and as many MACs an output, which most counters leave out.",
        "With mask = sigmoid a fresh layer halves its output; this layer's scale of 2 makes it a standard convolution.",
    ),
    paper="Dai et al. 2017, arXiv:1703.06211; Zhu et al. 2019, arXiv:1811.11168",
    ops={2: deform_conv2d},
    modules={2: DeformConv2d},
    reference=reference,
    composite=convolve,
    takes=frozenset({"kernel", "stride", "padding", "dilation", "out_channels", "groups", "offset_groups"}),
    operands=operands,
    arguments=arguments,
    layer=layer,
    stages=stages,
    bound=bound,
    variant=variant,
    problem=problem,
    cost_options=lambda arguments: {"modulated": arguments.get("mask") is not None},
    moves_taps=True,
    peers=(Peer("torch grid_sample", _grid_sample),),
)
