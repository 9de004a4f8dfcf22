"""Every technique's version of one standard layer on a real picture, verified, counted and timed.

A picture goes through a fixed stem to feature maps (:mod:`omniconv.bench.picture`) and these through each technique that has a
two-dimensional layer. The others work on a sequence, the maps' positions row after row or one of the user's, beside the techniques
of ``SEQUENCE_BASELINES``. No time is reported for a wrong answer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.bench.picture import (
    LONGEST_HOP,
    STEM_KERNEL,
    Picture,
    Sequence,
    feature_maps,
    read_picture,
    read_sequence,
    sequence_features,
    square,
)
from omniconv.problem import DTYPES, Problem
from omniconv.techniques import TECHNIQUES, Technique, find
from omniconv.testing import layer_calls, verify_gradients, verify_layer
from omniconv.timing import Interrupted, Machine, Timing, alternate, machine

BASE = "standard"  # all others are variants of its layer
SEQUENCE_BASELINES = (BASE, "depthwise")
LARGEST_TENSOR = 1 << 26  # numbers: 512 MiB in the float64 of the reference, which holds several
SHOWN_MAPS = 8
PEER_TOLERANCE = 0.02  # of the 1-norm: two stages in bfloat16 differ by less, another convolution by far more

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Settings:
    """The standard layer that all others are variants of, and how it runs."""

    channels: int = 64
    kernel: int = 3
    size: int = 56
    batch: int = 1
    backward: bool = False
    dtype: str = "f32"
    channels_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"channels": 1, "kernel": 1, "size": 1, "batch": 1, "seed": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"compare: {name} must be a whole number, got {value!r}")
            if not least <= value < 2**31:
                raise ValueError(f"compare: {name} must be at least {least} and below 2^31, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"compare: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def base(self, size: tuple[int, ...]) -> Problem:
        """The standard layer on this size: its output is as large as its input."""
        pads = (((self.kernel - 1) // 2, self.kernel // 2),) * len(size)
        return Problem(
            BASE, self.channels, size, self.batch, kernel=(self.kernel,) * len(size), padding=pads, dtype=self.dtype,
            channels_last=self.channels_last and len(size) > 1,
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One technique. MACs and bytes are of the whole batch; ratios are times over times, below 1 is faster.

    ``share`` is the largest error as a share of its derived bound. ``op_s`` and ``peer_s`` time the op alone and the first of its
    peers, in plain torch, on the same operands, provided that it gives the same answer (``peer_agrees``). ``to_standard`` compares
    whole layers, with the base layer's row of the section.
    """

    technique: str
    title: str
    section: str
    problem: str
    status: str
    reason: str
    share: float | None
    gradient_share: float | None
    params: int
    macs_dense: int
    macs_valid: int
    receptive_field: tuple[int, ...]
    bytes: int
    latency_s: Timing | None = None
    op_s: Timing | None = None
    peer: str | None = None
    peer_agrees: bool | None = None
    peer_s: Timing | None = None
    to_standard: float | None = None
    to_peer: float | None = None
    peer_differs: bool | None = None


@dataclass(frozen=True)
class Features:
    """What the report shows of one row: the first maps of its first sample, (channels, positions…)."""

    maps: Tensor
    picture_shaped: bool


@dataclass(frozen=True)
class Comparison:
    """The result: rows in order, what they were made of, how and where they were measured."""

    picture: str
    sequence: str
    settings: Settings
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    machine: Machine
    interrupted: bool = False
    pixels: Tensor | None = field(default=None, repr=False, compare=False, metadata={"json": False})
    stem: Features | None = field(default=None, repr=False, compare=False, metadata={"json": False})
    features: Mapping[int, Features] = field(default_factory=dict, repr=False, compare=False, metadata={"json": False})

    @property
    def verified(self) -> tuple[str, ...]:
        """The techniques that have a verified row and no failed one."""
        failed = {row.technique for row in self.failed}
        names = dict.fromkeys(row.technique for row in self.rows if row.status == "verified")
        return tuple(name for name in names if name not in failed)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows whose check failed."""
        return tuple(row for row in self.rows if row.status == "failed")

    @property
    def verdict(self) -> str:
        """One line that says what was verified and what was not."""
        total = len(dict.fromkeys(row.technique for row in self.rows))
        done = len(self.verified)
        shares = [row.share for row in self.rows if row.share is not None and row.status == "verified"]
        words = f"{done} {'' if done == total else f'of {total} '}techniques verified against their references"
        if shares:
            words += f"; largest error {max(shares):.0%} of its bound"
        for row in self.failed:
            words += f"; FAILED: {row.problem}: {row.reason}"
        return words + ("; interrupted" if self.interrupted else "")


@dataclass
class _Work:
    """A row on its way."""

    technique: Technique
    row: Row
    problem: Problem
    x: Tensor
    layer: nn.Module | None = None
    shown: Tensor | None = None


def compare(
    picture: str | Path | None = None,
    sequence: str | Path | None = None,
    *,
    channels: int = 64,
    kernel: int = 3,
    size: int = 56,
    batch: int = 1,
    backward: bool = False,
    dtype: str = "f32",
    channels_last: bool = False,
    seed: int = 0,
    budget: float = 10.0,
    progress: Progress | None = None,
) -> Comparison:
    """Runs every technique's version of one standard layer on a picture; verifies each, counts what it costs and times it.

    Args:
        picture: A picture file; by default the photograph that ships with the package.
        sequence: A WAV or CSV file for the techniques on sequences; by default the feature maps, row after row.
        channels: Of the standard layer, in and out.
        kernel: Taps per axis.
        size: Positions per axis of the feature maps; a sequence has at most size² steps.
        batch: Samples.
        backward: Verify the gradients too, and time forward and backward together.
        dtype: "f32", "f64", "bf16" or "f16".
        channels_last: Give the maps and the layers channels-last memory format.
        seed: Of the stem and the layers' weights.
        budget: Seconds of timing.
        progress: Called with the share of the work done and what is at work.

    Raises:
        ValueError: A setting or a file is not usable.
        Interrupted: Ctrl-C; it carries the Comparison of what was done.
    """
    settings = Settings(channels, kernel, size, batch, backward, dtype, channels_last, seed)
    plans = _planned(settings, (size * size,))
    seen = read_picture(picture)
    heard = None if sequence is None else read_sequence(sequence, size * size * LONGEST_HOP)
    report = progress or (lambda share, what: None)
    report(0.0, "stem")
    maps = feature_maps(seen, channels, size, batch=batch, seed=seed)
    steps = maps.flatten(2) if heard is None else sequence_features(heard, channels, size * size, batch=batch, seed=seed)
    if heard is not None:
        plans = _planned(settings, tuple(steps.shape[2:]))
    work = [_Work(t, _counted(t, problem), problem, _fitted(maps if problem.rank == 2 else steps, problem)) for t, problem in plans]
    state = machine()
    result = partial(_comparison, settings, seen, heard, state)
    try:
        for done, item in enumerate(work):
            report(0.5 * done / len(work), f"verifying {item.row.technique}")
            _verify(item, settings)
        with torch.set_grad_enabled(backward):
            _time(work, settings, budget, lambda share: report(0.5 + 0.5 * share, "timing"))
    except KeyboardInterrupt:
        raise Interrupted(result(maps, work, interrupted=True)) from None
    return result(maps, work, interrupted=False)


def _planned(settings: Settings, steps: tuple[int, ...]) -> list[tuple[Technique, Problem]]:
    """Every row's technique and problem: pictures first, then sequences with their baselines in front."""
    flat, line = settings.base((settings.size,) * 2), settings.base(steps)
    plans = [(t, t.variant_of(flat)) for t in TECHNIQUES if 2 in t.ranks]
    others = [t for t in TECHNIQUES if 2 not in t.ranks]
    plans += [(t, t.variant_of(line)) for t in [*map(find, SEQUENCE_BASELINES), *others]]
    for technique, problem in plans:
        for count in (*(prod(o.shape) for o in technique.operands(problem).values()), prod(technique.output_shape(problem))):
            if count > LARGEST_TENSOR:
                raise ValueError(f"compare: a tensor must have at most {LARGEST_TENSOR:,} numbers, got {count:,} in '{problem}'")
    return plans


def _counted(technique: Technique, problem: Problem) -> Row:
    cost = technique.cost(problem)
    return Row(
        technique=technique.name,
        title=technique.title,
        section="picture" if problem.rank == 2 else "sequence",
        problem=str(problem),
        status="not run",
        reason="",
        share=None,
        gradient_share=None,
        params=cost.params,
        macs_dense=cost.macs_dense,
        macs_valid=cost.macs_valid,
        receptive_field=cost.receptive_field,
        bytes=cost.bytes,
    )


def _fitted(x: Tensor, problem: Problem) -> Tensor:
    """The feature maps in the problem's size (averaged down where it is smaller), dtype and memory format."""
    if tuple(x.shape[2:]) != problem.size:
        pool: Callable[..., Tensor] = F.adaptive_avg_pool2d if problem.rank == 2 else F.adaptive_avg_pool1d
        x = pool(x, problem.size)
    x = x.to(problem.torch_dtype)
    return x.to(memory_format=torch.channels_last) if problem.channels_last else x


def fresh_layer(technique: Technique, problem: Problem, seed: int) -> nn.Module:
    """The technique's layer with seeded weights, in evaluation mode, in the problem's dtype and memory format.

    Parameters that a fresh layer leaves all zero get normal values: weights half of 1/√fan-in, so that what they make of
    normalised maps (offsets, say) is about half a unit either way.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = technique.layer(problem).eval()
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.numel() and not parameter.any():
                    fan_in = parameter[0].numel() if parameter.dim() > 1 else 64
                    parameter.normal_(std=0.5 / fan_in**0.5)
    layer = layer.to(problem.torch_dtype)
    return layer.to(memory_format=torch.channels_last) if problem.channels_last else layer  # type: ignore[call-overload]


def _verify(item: _Work, settings: Settings) -> None:
    """Builds the layer, runs it once and checks it; what it raises becomes the row's reason."""
    share = gradient_share = None
    try:
        layer = fresh_layer(item.technique, item.problem, settings.seed)
        with torch.no_grad():
            item.shown = layer(item.x)[0, :SHOWN_MAPS].float()
        share = verify_layer(layer, item.x)
        if settings.backward:
            gradient_share = verify_gradients(layer, item.x, seed=settings.seed)
    except Exception as error:  # whatever a layer raises is its own row's failure, not the command's
        status, reason = "failed", str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    else:
        item.layer, status, reason = layer, "verified", ""
    item.row = replace(item.row, status=status, reason=" ".join(reason.split()), share=share, gradient_share=gradient_share)


def _time(work: list[_Work], settings: Settings, budget: float, progress: Callable[[float], None]) -> None:
    """Times every verified layer, its op and the op's peer in turns and completes the rows, also when interrupted."""
    candidates: dict[str, Callable[[], object]] = {}
    for index, item in enumerate(work):
        if item.layer is None:
            continue
        candidates[f"layer {index}"] = _layer_call(item.layer, item.x, settings.backward)
        call = layer_calls(item.layer, item.x)[-1]
        candidates[f"op {index}"] = _op_call(type(call.layer).op, call.operands, call.y, settings.backward)
        if item.technique.peers:
            peer = item.technique.peers[0]
            agrees = _agrees(peer.run, call.operands, call.y)
            item.row = replace(item.row, peer=peer.name, peer_agrees=agrees)
            if agrees:
                candidates[f"peer {index}"] = _op_call(peer.run, call.operands, call.y, settings.backward)
    try:
        timings = alternate(candidates, budget=budget, progress=progress)
    except Interrupted as stopped:
        _complete(work, stopped.done)
        raise
    _complete(work, timings)


def _layer_call(layer: nn.Module, x: Tensor, backward: bool) -> Callable[[], object]:
    if not backward:
        return partial(layer, x)
    x = x.detach().requires_grad_()
    leaves = [x, *layer.parameters()]
    grad_y = torch.ones_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), leaves, grad_y, allow_unused=True)


def _op_call(op: Callable[..., Tensor], operands: Mapping[str, Any], y: Tensor, backward: bool) -> Callable[[], object]:
    operands = {k: v.detach() if isinstance(v, Tensor) else v for k, v in operands.items()}
    if not backward:
        return partial(op, **operands)
    leaves = [v.requires_grad_() for v in operands.values() if isinstance(v, Tensor) and v.is_floating_point()]
    grad_y = torch.ones_like(y)
    return lambda: torch.autograd.grad(op(**operands), leaves, grad_y, allow_unused=True)


def _agrees(op: Callable[..., Tensor], operands: Mapping[str, Any], y: Tensor) -> bool:
    """Whether a peer computes the same: a time beside another convolution would mean nothing."""
    with torch.no_grad():
        theirs = op(**operands)
    return theirs.shape == y.shape and bool((theirs.double() - y.double()).abs().sum() <= PEER_TOLERANCE * y.double().abs().sum())


def _complete(work: list[_Work], timings: Mapping[str, Timing]) -> None:
    standard = {
        item.problem.rank: timings[f"layer {index}"].median
        for index, item in enumerate(work)
        if item.technique.name == BASE and f"layer {index}" in timings
    }
    for index, item in enumerate(work):
        layer, op, peer = (timings.get(f"{kind} {index}") for kind in ("layer", "op", "peer"))
        base = standard.get(item.problem.rank)
        item.row = replace(
            item.row,
            latency_s=layer,
            op_s=op,
            peer_s=peer,
            to_standard=layer.median / base if layer and base else None,
            to_peer=op.median / peer.median if op and peer else None,
            peer_differs=op.differs_from(peer) if op and peer else None,
        )


def _notes(settings: Settings, seen: Picture, heard: Sequence | None) -> tuple[str, ...]:
    """What a reader must know to read the numbers, in sentences."""
    backward = " and its gradients in float64, in the 1-norm" if settings.backward else ""
    what = "forward and backward" if settings.backward else "forward"
    return (
        f"Picture: {seen.name}, its middle square{''.join(f', {note}' for note in seen.notes)}.",
        f"Stem: {settings.channels} fixed {STEM_KERNEL}×{STEM_KERNEL} Gabor filters (orientation, wavelength, colour; seed "
        f"{settings.seed}), stride 2, every map normalised to mean 0 and variance 1.",
        "Sequence: the feature maps, row after row."
        if heard is None
        else f"Sequence: {heard.name}{''.join(f', {note}' for note in heard.notes)}; fixed Gabor filters along time.",
        "Weights: as a fresh layer has them; parameters that a fresh layer leaves all zero are filled with small normal values, so "
        "that offsets are real.",
        f"Verified before timed: every layer inside, against its reference in float64 under its derived error bound{backward}.",
        f"Time: {what} of the layer, median ± half the interquartile range, all in one process and in turns.",
        "× std: layer time over that of the standard layer of the same section. × torch: the op's time over plain torch's on the "
        "same operands; ≈ where the quartiles overlap. Below 1 is faster.",
        "MACs are multiply-accumulates (dense: every tap; valid: taps on real inputs and kept outputs); bytes: each operand once.",
    )


def _comparison(
    settings: Settings,
    seen: Picture,
    heard: Sequence | None,
    state: Machine,
    maps: Tensor,
    work: list[_Work],
    interrupted: bool,
) -> Comparison:
    side = (settings.size,) * 2
    features = {}
    for index, item in enumerate(work):
        first = item.shown
        if first is None:
            continue
        flat = first.dim() == 2 and heard is None and first.shape[1] == prod(side)
        features[index] = Features(first.reshape(-1, *side) if flat else first, flat or first.dim() == 3)
    return Comparison(
        picture=seen.name,
        sequence="the picture's rows" if heard is None else heard.name,
        settings=settings,
        rows=tuple(item.row for item in work),
        notes=_notes(settings, seen, heard),
        machine=state,
        interrupted=interrupted,
        pixels=square(seen, 2 * settings.size),
        stem=Features(maps[0, :SHOWN_MAPS], True),
        features=features,
    )
