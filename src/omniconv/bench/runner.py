"""How fast a technique is: every layer of ``shapes/<technique>.txt``, ours beside every peer and beside the machine's own limits.

All ways to compute a layer are timed in turns in one process, hot and, if asked, cold; each is checked before. Ours must stay under
its derived error bound, forward and backward, or the layer fails; a peer only has to compute the same convolution. Among memory
formats, or layouts, the faster counts, for us as for torch.
"""

import gc
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.analysis.doctor import Package, examine
from omniconv.analysis.peaks import Demand, Peaks, measure_peaks
from omniconv.bench.compare import PEER_TOLERANCE, fresh_layer
from omniconv.bench.layer_lists import NetworkLayer, read_layers
from omniconv.bench.peers import BOTH, DIRECTIONS, FORMATS, Absent, Rival, Task, Way, laid_out, reason_of, rivals, torch_way, ways
from omniconv.bench.results import SHORTEST_SCALED, Benchmark, Measured, Row, Settings
from omniconv.ops.sequence import LAYOUTS
from omniconv.problem import Problem
from omniconv.techniques import Technique, find
from omniconv.testing import assert_within_bound, layer_calls, make_inputs, verify_gradients, verify_layer, widened
from omniconv.timing import Interrupted, Timing, alternate, machine

PACKAGES = ("omniconv", "torch", "onnx", "onnxruntime", "openvino")
HALF = ("bf16", "f16")
COLD_ROUNDS = (5, 21)  # emptying the caches takes longer than most calls
MANY = 8  # of more peers only those that may be the best take part in the rounds
MAY_BE_BEST = 3.0  # times the fastest in the shorter of two calls: no noise makes up for more
EXACT = 1e-12  # of the 1-norm, in float64
LAYOUT_TOLERANCE = 1e-3  # of the 1-norm between gradients in two layouts

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class _Layer:
    """A layer of ours that was found right, in a memory format or layout: what it called its op with, and what came out."""

    form: str
    op: Callable[..., Tensor]
    operands: Mapping[str, Any]
    y: Tensor
    share: float
    gradient_share: float | None


def run(
    technique: str,
    *,
    directions: Sequence[str] = DIRECTIONS,
    dtype: str | None = None,
    only: str | None = None,
    threads: int = 1,
    cold: bool = False,
    compiled: bool = False,
    budget: float = 2.0,
    seed: int = 0,
    progress: Progress | None = None,
    layers: Sequence[NetworkLayer] | None = None,
) -> Benchmark:
    """Measures a technique on its layers.

    Args:
        technique: Its name.
        directions: "forward", "both" (forward and backward), or the two of them.
        dtype: Of all layers, in place of their own: "f32", "f64", "bf16" or "f16".
        only: Keeps the layers in whose network or problem this text occurs.
        threads: Of torch and of every peer.
        cold: Measure also with empty caches.
        compiled: Compare with torch.compile too; every layer is compiled twice.
        budget: Seconds of timing per layer.
        seed: Of weights and inputs.
        progress: Called with the share of the work done and what is at work.
        layers: What to measure instead of the technique's file; ``dtype`` and ``only`` then have no effect.

    Raises:
        ValueError: A setting is not usable.
        Interrupted: Ctrl-C; it carries the Benchmark of what was done.
    """
    settings = Settings(technique, tuple(directions), dtype, only, threads, cold, compiled, budget, seed)
    found, work = read_layers(technique, dtype=dtype, only=only) if layers is None else (find(technique), tuple(layers))
    report = progress or (lambda share, what: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _run(settings, found, work, report)
    finally:
        torch.set_num_threads(before)


def _run(settings: Settings, technique: Technique, layers: Sequence[NetworkLayer], report: Progress) -> Benchmark:
    asked, absent = rivals(settings.compiled)
    state = machine()
    report(0.0, "peaks of the machine")
    try:
        peaks = measure_peaks(double=any(layer.problem.dtype == "f64" for layer in layers))
    except Interrupted:
        raise KeyboardInterrupt from None  # nothing to keep yet
    result = partial(
        Benchmark, settings, peaks=peaks, absent=absent, notes=_notes(settings), path=_path(technique),
        packages=tuple(map(package, PACKAGES)), commit=commit(), machine=state,
    )  # fmt: skip
    rows: list[Row] = []
    try:
        for done, layer in enumerate(layers):
            report(done / len(layers), f"{layer.network}: {layer.problem}")
            rows += _rows(settings, technique, layer, peaks, asked)
    except KeyboardInterrupt:
        raise Interrupted(result(rows=tuple(rows), interrupted=True)) from None
    report(1.0, "done")
    return result(rows=tuple(rows))


def _rows(settings: Settings, technique: Technique, layer: NetworkLayer, peaks: Peaks, asked: Sequence[Rival]) -> list[Row]:
    """The layer in every direction: checked, then timed."""
    problem = layer.problem.replace(channels_last=False)  # both formats are measured
    named = partial(Row, layer.network, str(problem))
    try:
        made = _verified(technique, problem, settings)
        plain_made = _verified(technique, problem.replace(dtype="f32"), settings) if problem.dtype in HALF else []
    except Exception as error:  # whatever our layer raises is the row's failure, not the command's
        reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        return [named(direction, "failed", " ".join(reason.split())) for direction in settings.directions]
    rows = []
    for direction in settings.directions:
        read = sum(v.numel() * v.element_size() for v in made[0].operands.values() if isinstance(v, Tensor))
        # what makes offsets or kernels is another op
        macs = problem.batch * sum(stage.macs_valid for stage in technique.stages(problem) if not stage.side)
        demand = Demand.of(macs, read, made[0].y.numel() * made[0].y.element_size(), direction == BOTH)
        ours, f32, peers, one_thread = _timed(settings, technique, problem, direction, made, plain_made, peaks, asked)
        floor = partial(demand.floor, peaks, double=problem.dtype == "f64")
        rows.append(
            named(
                direction, "verified", "", max(m.share for m in made),
                max(m.gradient_share or 0.0 for m in made) if direction == BOTH else None,
                demand.flops // 2, demand.moved, floor(), floor(cold=True) if settings.cold else None, ours, f32, peers, one_thread,
            )
        )  # fmt: skip
    return rows


def _verified(technique: Technique, problem: Problem, settings: Settings) -> list[_Layer]:
    """Our layer in every memory format or layout, once each was found right; contiguous, or in NCT, comes first.

    Raises:
        AssertionError: It is not.
    """
    if "layout" in signature(technique.ops[problem.rank]).parameters:
        return _verified_layouts(technique, problem, settings)
    made = []
    for form, asked in _forms(technique, problem):
        layer = fresh_layer(technique, asked.replace(channels_last=False), settings.seed)
        if asked.channels_last:
            # torch's stubs know memory_format only beside other arguments
            layer.to(memory_format=FORMATS[asked.rank])  # type: ignore[call-overload]
        x = make_inputs(technique, asked, seed=settings.seed)["input"]
        share = verify_layer(layer, x)
        gradient = _verified_gradients(technique, layer, x, settings.seed) if BOTH in settings.directions else None
        call = layer_calls(layer, x)[-1]
        operands = {k: v.detach() if isinstance(v, Tensor) else v for k, v in call.operands.items()}
        made.append(_Layer(form, type(call.layer).op, operands, call.y, share, gradient))
    return made


def _verified_layouts(technique: Technique, problem: Problem, settings: Settings) -> list[_Layer]:
    """The same operands in every layout: one reference and one bound for all; NCT's gradients, once found right, are the others'.

    Raises:
        AssertionError: A layout is not right.
    """
    layer = fresh_layer(technique, problem, settings.seed)
    x = make_inputs(technique, problem, seed=settings.seed)["input"]
    call = layer_calls(layer, x)[-1]
    op, wide = type(call.layer).op, widened(call.operands)
    with torch.no_grad():
        expected = technique.reference(**wide)
        bound = cache(lambda u: technique.bound(u, **wide))
    known = replace(
        technique,
        reference=lambda *, layout, **_: LAYOUTS[layout].of(expected),
        bound=lambda u, *, layout, **_: LAYOUTS[layout].of(bound(u)),
    )
    made, gradient = [], None
    for layout in LAYOUTS:
        operands = {k: v.detach() if isinstance(v, Tensor) else v for k, v in laid_out(call.operands, layout).items()}
        with torch.no_grad():
            y = op(**operands)
            share = assert_within_bound(known, operands, y)
        made.append(_Layer(layout, op, operands, y, share, None))
    if BOTH in settings.directions:
        with torch.no_grad():
            same = agree([technique.peers[0].run(**wide)], [expected], EXACT)
        references = {technique.name: technique.peers[0].run} if same else {}
        gradient = verify_gradients(layer, x, seed=settings.seed, references=references)
        first, *others = (torch_way(m.form, BOTH, op, m.operands, torch.ones_like(call.y)) for m in made)
        answer = first.answer()
        for way in others:
            if not agree(way.answer(), answer, PEER_TOLERANCE if problem.dtype in HALF else LAYOUT_TOLERANCE):
                raise AssertionError(f"{technique.name}: the gradients in {way.name} must be those in {first.name}")
    return [replace(m, gradient_share=gradient) for m in made]


def _forms(technique: Technique, problem: Problem) -> Iterator[tuple[str, Problem]]:
    """The memory formats that a layer has; over one axis also as one over two, the first of one row, as torch is asked too."""
    yield "contiguous", problem
    if problem.rank > 1:
        yield "channels-last", problem.replace(channels_last=True)
    elif 2 in technique.ranks and problem.padding_mode == "zeros":
        stage = technique.stages(problem)[-1]
        yield (
            "as 2-D channels-last",
            problem.replace(
                size=(1, *problem.size), kernel=(1, *problem.kernel), stride=(1, *problem.stride), padding=((0, 0), *stage.pads),
                dilation=(1, *problem.dilation), output_padding=(0, 0), channels_last=True,
            ),
        )  # fmt: skip


def _verified_gradients(technique: Technique, layer: nn.Module, x: Tensor, seed: int) -> float:
    """Compared with plain torch in float64: the reference's own gradients of a 31×31 kernel take minutes and gigabytes.

    torch's result is compared with the reference before; where torch is wrong, the reference serves after all.
    """
    references = {}
    for call in layer_calls(layer, x):
        if call.technique is technique and technique.peers:
            wide = widened(call.operands)
            try:
                with torch.no_grad():
                    assert_within_bound(technique, wide, technique.peers[0].run(**wide))
                references[technique.name] = technique.peers[0].run
            except AssertionError:
                pass
    return verify_gradients(layer, x, seed=seed, references=references)


def _timed(
    settings: Settings,
    technique: Technique,
    problem: Problem,
    direction: str,
    made: Sequence[_Layer],
    plain_made: Sequence[_Layer],
    peaks: Peaks,
    asked: Sequence[Rival],
) -> tuple[tuple[Measured, ...], ...]:
    """Ours, ours in float32, the peers, and ours with one thread where there are more, measured in turns."""
    generator = torch.Generator().manual_seed(settings.seed)
    grad_y = (torch.rand(made[0].y.shape, generator=generator) + 0.5).to(problem.torch_dtype)
    with torch.set_grad_enabled(direction == BOTH):
        groups: dict[str, list[Way | Measured]] = {"ours": [], "f32": [], "peers": [], "one thread": []}
        for group, layers in {"ours": made, "f32": plain_made}.items():
            for m in layers:
                groups[group].append(torch_way(m.form, direction, m.op, m.operands, grad_y))
        if settings.threads > 1:
            groups["one thread"] = [
                replace(way, call=_with_one_thread(way.call, settings.threads)) for way in groups["ours"] if isinstance(way, Way)
            ]
        task = Task(technique, problem, made[0].operands, grad_y, settings.threads)
        first = groups["ours"][0]
        assert isinstance(first, Way)
        expected = first.answer()
        for way in ways(task, direction, asked):
            groups["peers"].append(_checked(way, expected))
        groups["peers"] = _contenders(groups["peers"])
        calls = {f"{group} {way.name}": way.call for group, listed in groups.items() for way in listed if isinstance(way, Way)}
        share = settings.budget / len(settings.directions) / (2 if settings.cold else 1)
        hot = alternate(calls, budget=share)
        cold = _cold(calls, peaks, share) if settings.cold else {}
    gc.collect()

    def measured(group: str, way: Way | Measured) -> Measured:
        if isinstance(way, Measured):
            return way
        name = f"{group} {way.name}"
        return Measured(way.name, hot.get(name), cold.get(name), True)

    return tuple(tuple(measured(group, way) for way in listed) for group, listed in groups.items())


def _with_one_thread(call: Callable[[], object], threads: int) -> Callable[[], object]:
    def run() -> object:
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return run


def _contenders(found: list[Way | Measured]) -> list[Way | Measured]:
    """Of many ways those that may be the fastest; the others have the shorter time of two calls, which the check has warmed up."""
    timed = {way.name: min(_one_call(way), _one_call(way)) for way in found if isinstance(way, Way)}
    if len(timed) <= MANY:
        return found
    most = MAY_BE_BEST * min(timed.values())
    return [
        Measured(way.name, Timing(*3 * (timed[way.name],), samples=1, repeats=1), agrees=True)
        if isinstance(way, Way) and timed[way.name] > most
        else way
        for way in found
    ]


def _one_call(way: Way) -> float:
    began = time.perf_counter()
    way.call()
    return time.perf_counter() - began


def _checked(way: Way | Absent, expected: Sequence[Tensor]) -> Way | Measured:
    """The way itself if it computes the same as ours; otherwise why it is not timed."""
    if isinstance(way, Absent):
        return Measured(way.name, reason=way.reason)
    try:
        answer = way.answer()
    except Exception as error:  # a peer that cannot run is only not compared with
        return Measured(way.name, reason=reason_of(error))
    if agree(answer, expected):
        return way
    return Measured(way.name, agrees=False, reason=f"its answer is more than {PEER_TOLERANCE:.0%} away")


def agree(theirs: Sequence[Tensor], ours: Sequence[Tensor], tolerance: float = PEER_TOLERANCE) -> bool:
    """Whether two answers are the same but for rounding, each tensor in the 1-norm.

    >>> agree([torch.tensor([1.0, 2.0])], [torch.tensor([[1.0, 2.01]])]), agree([torch.tensor([1.0])], [torch.tensor([1.1])])
    (True, False)
    """
    if [t.numel() for t in theirs] != [o.numel() for o in ours]:
        return False
    pairs = [(t.double().reshape(o.shape), o.double()) for t, o in zip(theirs, ours, strict=True)]
    return all(bool((t - o).abs().sum() <= tolerance * o.abs().sum()) for t, o in pairs)


class StoppedClock:
    """A clock that stands still while the caches are emptied, so that only what follows is timed."""

    def __init__(self, size: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._stood = clock, 0.0
        self._buffer = torch.zeros(max(size // 4, 1))

    def __call__(self) -> float:
        """Seconds, those of emptying apart."""
        return self._clock() - self._stood

    def cold(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call after a buffer was streamed through the caches."""

        def run() -> object:
            began = self._clock()
            self._buffer.add_(1.0)
            self._stood += self._clock() - began
            return call()

        return run


def _cold(calls: Mapping[str, Callable[[], object]], peaks: Peaks, budget: float) -> dict[str, Timing]:
    """One call a sample, each after the caches were emptied."""
    clock = StoppedClock(2 * peaks.last_cache)
    emptied = {name: clock.cold(call) for name, call in calls.items()}
    return alternate(emptied, budget=budget, rounds=COLD_ROUNDS, sample=0.0, clock=clock)


def package(name: str) -> Package:
    """An installed package and its version, if it is."""
    try:
        return Package(name, version(name))
    except PackageNotFoundError:
        return Package(name, None)


def _path(technique: Technique) -> str:
    return next(path.path for path in examine().paths if path.technique == technique.name)


def commit() -> str | None:
    """The commit of the sources, where they lie in a repository of their own."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--exclude", "*")
    except (OSError, subprocess.SubprocessError):
        return None


def _notes(settings: Settings) -> tuple[str, ...]:
    """What a reader must know to read the numbers, in sentences."""
    gradients = ", gradients in the 1-norm against plain torch's in float64" if BOTH in settings.directions else ""
    notes = [
        "Ratio: time of the best peer over ours; above 1 we are faster, ≈ where the quartiles overlap. Ours and torch count in "
        "their faster memory format or layout.",
        f"Verified before timed: ours against the reference in float64 under its derived error bound{gradients}; a peer (≠) whose "
        f"answer is more than {PEER_TOLERANCE:.0%} from ours is not timed.",
        "Time: median, all in one process and in turns. Hot: called again and again. Backward: gradients of input, weight and bias "
        "for a fixed gradient of the result.",
        "Floor: max(flops / peak, bytes / copy bandwidth of the smallest memory that holds all tensors), each tensor moved once, "
        "kernels per position too, exponentials not counted; peaks measured in the same run through torch: the faster of a matrix "
        "product and a dense convolution, and copies.",
    ]
    if settings.threads > 1:
        notes.append(
            f"Scaling: our time with one thread over that with {settings.threads}, in turns, where one takes "
            f"{1e6 * SHORTEST_SCALED:.0f} µs at least."
        )
    if settings.cold:
        notes.append("Cold: a buffer of twice the largest cache was streamed before every call; its floor is that of main memory.")
    return tuple(notes)
