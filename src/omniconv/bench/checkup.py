"""A network's check-up: which of its layers are slow in stock torch, and what omniconv would gain, measured here or quoted."""

import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from omniconv import functional
from omniconv.analysis import targets
from omniconv.analysis.layers import Kind, captured, copied, formatted, ready
from omniconv.analysis.slow_paths import SlowPath, slow_paths
from omniconv.analysis.targets import Target
from omniconv.analysis.untouched import untouched
from omniconv.bench.compare import PEER_TOLERANCE
from omniconv.bench.peers import FORWARD, reason_of
from omniconv.bench.results import Benchmark, Row, fastest, load
from omniconv.bench.runner import HALF, LAYOUT_TOLERANCE, agree
from omniconv.ops.layer import Layer
from omniconv.problem import Problem
from omniconv.techniques import find
from omniconv.timing import RISK, Interrupted, Machine, Timing, Versus, contest, machine

STOCK, OURS = "stock", "omniconv"
LAST = ", channels-last"
RESULTS = Path("benchmarks") / "results"

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Quote:
    """What was measured before and is committed: eager torch's time over ours, the median and the range over like layers.

    ``exact`` where the very layer was measured; then ``differs`` says whether the difference is beyond noise.
    """

    ratio: float
    low: float
    high: float
    layers: int
    exact: bool
    differs: bool
    source: str


@dataclass(frozen=True)
class Finding:
    """Layers that are alike: the rules that hold of them, what is quoted, and what was measured.

    ``timings`` are seconds of one call of stock torch and of ours, in the format that the network has and in channels-last;
    ``versus`` each beside stock torch in the network's own. ``reason`` says why ours was not measured.
    """

    names: tuple[str, ...]
    calls: int
    type: str
    technique: str | None
    problem: str | None
    slow: tuple[str, ...]
    why: tuple[str, ...]
    quote: Quote | None = None
    timings: Mapping[str, Timing] | None = None
    versus: Mapping[str, Versus] | None = None
    reason: str = ""

    @property
    def verdict(self) -> str | None:
        """What replacing the layer does in the network's own memory format: "faster", "slower", "within noise"; None: unknown."""
        return None if self.versus is None or OURS not in self.versus else self.versus[OURS].verdict

    @property
    def gained(self) -> float:
        """Seconds that ours saves over all calls; 0 where that is not measured or within noise."""
        if self.verdict != "faster" or self.timings is None:
            return 0.0
        return self.calls * (self.timings[STOCK].median - self.timings[OURS].median)


@dataclass(frozen=True)
class Checkup:
    """The result: findings in the order of the network, and how and where they were measured."""

    target: str
    source: str
    inputs: tuple[str, ...]
    measured: bool
    risk: float
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    machine: Machine
    interrupted: bool = False


def checkup(
    target: str | Target,
    *,
    input: Sequence[str] = (),
    measure: bool = False,
    threads: int = 1,
    budget: float = 0.2,
    results: Path | None = None,
    progress: Progress | None = None,
) -> Checkup:
    """Looks at every convolution of a network.

    Args:
        target: A target's text or what :func:`omniconv.analysis.targets.load` made of one.
        input: Example inputs, as there.
        measure: Time stock torch and ours in turns on each layer's own input.
        threads: Of torch.
        budget: Seconds a kind of layers.
        results: The folder of committed measurements; by default the one of the repository that this package lies in, if any.
        progress: Called with the share of the work done and what is at work.

    Raises:
        ValueError: The target or a setting is not usable.
        Interrupted: Ctrl-C; it carries the Checkup of what was done.
    """
    if not 1 <= threads <= 1024:
        raise ValueError(f"doctor: threads must be between 1 and 1024, got {threads}")
    if not 0 < budget <= 86400:
        raise ValueError(f"doctor: the budget must be above 0 and at most 86400 seconds, got {budget:g}")
    found = targets.load(target, input=input, caller="doctor") if isinstance(target, str) else target
    report = progress or (lambda share, what: None)
    known = committed_rows(Path(__file__).parents[3] / RESULTS if results is None else results)
    with untouched(), torch.no_grad():
        torch.set_num_threads(threads)
        report(0.0, "running the network")
        args, kwargs = found.example_inputs()
        kinds = [k for k in captured(found.network(), args, kwargs, caller="doctor") if not isinstance(k.module, nn.Linear)]
        notes = ("no convolutions were found",) * (not kinds) + (("no committed measurements are at hand",) * (not known))
        result = partial(
            Checkup, found.text, found.source, tuple(map(str, found.inputs)), measure, RISK, notes=notes, machine=machine()
        )
        findings: list[Finding] = []
        try:
            prepared = [_prepared(kind) if measure else {} for kind in kinds]
            comparisons = sum(len(calls) - 1 for calls in prepared if len(calls) > 1)
            for done, (kind, calls) in enumerate(zip(kinds, prepared, strict=True)):
                report(done / len(kinds), kind.names[0] or kind.type)
                findings.append(_finding(kind, calls, comparisons, budget, known, measure))
        except KeyboardInterrupt:
            raise Interrupted(result(findings=tuple(findings), interrupted=True)) from None
    report(1.0, "done")
    return result(findings=tuple(findings))


def _finding(
    kind: Kind,
    calls: dict[str, Callable[[], Any]],
    comparisons: int,
    budget: float,
    known: Sequence[tuple[Row, str]],
    measure: bool,
) -> Finding:
    paths: tuple[SlowPath, ...] = slow_paths(kind)
    made = partial(
        Finding, kind.names, kind.calls, kind.type, kind.technique, None if kind.problem is None else str(kind.problem),
        tuple(p.name for p in paths), tuple(p.why for p in paths), None if kind.problem is None else quoted(kind.problem, known),
    )  # fmt: skip
    if not measure:
        return made()
    if OURS not in calls:
        return made(reason=_refusal(kind))
    fought = contest(calls, comparisons=comparisons, budget=budget)
    return made(timings=fought.timings, versus=fought.versus)


def _prepared(kind: Kind) -> dict[str, Callable[[], Any]]:
    """Stock torch and ours in the network's own format and in channels-last, each once it was found to compute the same."""
    if _refusal(kind):
        return {}
    x = next(x for x in (*kind.args, *kind.kwargs.values()) if isinstance(x, Tensor))
    own = x.dim() in (4, 5) and not x.is_contiguous()
    calls: dict[str, Callable[[], Any]] = {STOCK: ready(kind, own), OURS: ours(kind, own)}
    if x.dim() in (4, 5) and not own:
        calls |= {STOCK + LAST: ready(kind, True), OURS + LAST: ours(kind, True)}
    expected = calls[STOCK]()
    return {name: call for name, call in calls.items() if agree([call()], [expected], _tolerance(kind))}


def _tolerance(kind: Kind) -> float:
    return PEER_TOLERANCE if kind.dtype in (torch.bfloat16, torch.float16) else LAYOUT_TOLERANCE


def _refusal(kind: Kind) -> str:
    """Why ours cannot take the layer's place here; empty where it can and computes the same."""
    if isinstance(kind.module, Layer):
        return "it is omniconv's already"
    try:
        answer, expected = ours(kind, False)(), ready(kind, False)()
    except Exception as error:  # one layer that does not run leaves the others
        return reason_of(error)
    return "" if agree([answer], [expected], _tolerance(kind)) else "its answer is another"


def ours(kind: Kind, channels_last: bool) -> Callable[[], Any]:
    """Our op in place of a layer of torch or torchvision, with that layer's own weights and settings.

    Raises:
        ValueError: There is none.
    """
    layer: Any
    try:
        layer = copied(kind.module, channels_last)
    except ValueError:
        layer = kind.module
    inputs = [formatted(x, channels_last) for x in kind.args]
    named = {k: formatted(x, channels_last) for k, x in kind.kwargs.items()}
    if kind.type == "DeformConv2d":
        mask = inputs[2] if len(inputs) > 2 else named.get("mask")
        settings = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "mask": mask}
        return partial(functional.deform_conv2d, inputs[0], inputs[1], layer.weight, layer.bias, **settings)
    if not isinstance(layer, _ConvNd) or kind.technique is None:
        raise ValueError(f"omniconv has no layer to take the place of {kind.type}")
    op = find(kind.technique).ops[layer.weight.dim() - 2]
    known = inspect.signature(op).parameters
    names = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
    settings = {name: getattr(layer, name) for name in names if name in known}
    return partial(op, inputs[0] if inputs else named["input"], layer.weight, layer.bias, **settings)


def committed_rows(folder: Path) -> tuple[tuple[Row, str], ...]:
    """The forward rows of every result in a folder with where they are from; what is no such result is passed over."""
    found: list[tuple[Row, str]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = load(path)
        except ValueError:
            continue
        found += [(row, _source(path, result)) for row in result.rows if row.direction == FORWARD and row.torch_ratio is not None]
    return tuple(found)


def _source(path: Path, result: Benchmark) -> str:
    threads = result.settings.threads
    return (
        f"{RESULTS / path.name}: {result.machine.cpu}, {result.machine.capability}, {threads} thread{'s' * (threads > 1)}, "
        f"torch {result.machine.torch}"
    )


def quoted(problem: Problem, known: Sequence[tuple[Row, str]]) -> Quote | None:
    """What is committed of a problem, or of those like it: same technique, axes, kind of dtype, and dilated or not."""
    plain = problem.replace(channels_last=False)
    exact = [(row, source) for row, source in known if row.problem == str(plain)]
    like = exact or [(row, source) for row, source in known if _like(Problem.parse(row.problem)) == _like(plain)]
    if not like:
        return None
    ratios = [row.torch_ratio for row, _ in like if row.torch_ratio is not None]
    sources = "; ".join(dict.fromkeys(source for _, source in like))
    differs = bool(exact) and _differs(exact[0][0])
    return Quote(statistics.median(ratios), min(ratios), max(ratios), len(ratios), bool(exact), differs, sources)


def _like(problem: Problem) -> tuple[object, ...]:
    kind = "half" if problem.dtype in HALF else problem.dtype
    return problem.technique, problem.rank, kind, max(problem.dilation) > 1


def _differs(row: Row) -> bool:
    """Whether eager torch and ours differ beyond noise."""
    best, eager = fastest(row.ours), fastest(way for way in row.peers if way.name.startswith("torch "))
    if best is None or eager is None or best.hot is None or eager.hot is None:
        return False
    return best.hot.differs_from(eager.hot)
