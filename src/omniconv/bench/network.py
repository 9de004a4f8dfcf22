"""How fast a network of yours is, whole and layer by layer: contiguous beside channels-last, compiled, or beside another network.

What is compared is timed in turns in one process, on the network's real inputs. A candidate is called faster or slower only beyond
noise (:class:`omniconv.timing.Versus`): of runs in which nothing differs, one in a hundred says so of anything, however many layers
a network has. The network itself is called once and left as it was; what is timed are copies.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from omniconv.analysis import targets
from omniconv.analysis.doctor import Package
from omniconv.analysis.layers import Kind, captured, copied, formatted, ready
from omniconv.analysis.targets import Target
from omniconv.analysis.untouched import untouched
from omniconv.bench.peers import reason_of
from omniconv.bench.runner import PACKAGES, agree, commit, package
from omniconv.timing import RISK, Contest, Interrupted, Machine, Timing, Versus, contest, machine

CONTIGUOUS, CHANNELS_LAST, COMPILED = "contiguous", "channels-last", "compiled"
WHOLE = 5.0  # times the budget of a kind of layers

Progress = Callable[[float, str], None]
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Settings:
    """How it is measured. ``risk`` is that of calling anything in a run faster or slower where nothing differs."""

    against: str | None = None
    compiled: bool = False
    threads: int = 1
    budget: float = 0.2
    risk: float = RISK

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"bench: threads must be between 1 and 1024, got {self.threads}")
        if not 0 < self.budget <= 86400:
            raise ValueError(f"bench: the budget must be above 0 and at most 86400 seconds, got {self.budget:g}")


@dataclass(frozen=True)
class Part:
    """A network, or layers of it that are alike: seconds of one call by candidate, and each candidate beside the first.

    ``macs`` (those on real inputs) and ``bytes`` are of one call, 0 where they are not known. ``share`` is what all calls take of
    the whole network, by the first candidate.
    """

    names: tuple[str, ...]
    calls: int
    type: str
    technique: str | None
    problem: str | None
    macs: int
    bytes: int
    timings: Mapping[str, Timing]
    versus: Mapping[str, Versus]
    share: float | None = None


@dataclass(frozen=True)
class NetworkBenchmark:
    """The result: the whole network, its layers in the order of their calls, and how and where they were measured."""

    target: str
    source: str
    inputs: tuple[str, ...]
    settings: Settings
    whole: Part | None
    layers: tuple[Part, ...]
    notes: tuple[str, ...]
    packages: tuple[Package, ...]
    commit: str | None
    machine: Machine
    interrupted: bool = False


def bench_network(
    target: str | Target,
    *,
    input: Sequence[str] = (),
    against: str | Target | None = None,
    compiled: bool = False,
    threads: int = 1,
    budget: float = 0.2,
    progress: Progress | None = None,
) -> NetworkBenchmark:
    """Measures a network, whole and layer by layer, without gradients.

    Args:
        target: A target's text or what :func:`omniconv.analysis.targets.load` made of one.
        input: Example inputs, as there.
        against: Another network to time beside it on the same inputs; of its layers those with the same name and input.
        compiled: Time the network also as torch.compile makes it.
        threads: Of torch.
        budget: Seconds a kind of layers; the whole network has five times as many.
        progress: Called with the share of the work done and what is at work.

    Raises:
        ValueError: A target or a setting is not usable.
        Interrupted: Ctrl-C; it carries the NetworkBenchmark of what was done.
    """
    mine = _found(target, input)
    other = None if against is None else _found(against, input or tuple(map(str, mine.inputs)))
    settings = Settings(None if other is None else other.text, compiled, threads, budget)
    with untouched(), torch.no_grad():
        torch.set_num_threads(threads)
        return _run(mine, other, settings, progress or (lambda share, what: None))


def _found(target: str | Target, input: Sequence[str]) -> Target:
    return targets.load(target, input=input, caller="bench") if isinstance(target, str) else target


def _run(target: Target, other: Target | None, settings: Settings, report: Progress) -> NetworkBenchmark:
    state = machine()
    notes: list[str] = []
    report(0.0, "running the network")
    module, (args, kwargs) = target.network(), target.example_inputs()
    kinds = captured(module, args, kwargs, caller="bench")
    theirs = None if other is None else other.network()
    others: dict[str, Kind] = {}
    if theirs is not None:
        others = {name: kind for kind in captured(theirs, args, kwargs, caller="bench") for name in kind.names}
    layers: list[Part] = []
    whole: Part | None = None
    result = partial(
        NetworkBenchmark, target.text, target.source, tuple(map(str, target.inputs)), settings,
        packages=tuple(map(package, PACKAGES)), commit=commit(), machine=state,
    )  # fmt: skip
    try:
        report(0.02, "making copies ready")
        calls = _wholes(module, theirs, args, kwargs, settings, notes)
        each = [(kind, _layers(kind, others.get(kind.names[0]))) for kind in kinds]
        comparisons = sum(len(candidates) - 1 for candidates in (calls, *(made for _, made in each)))
        report(0.05, "the whole network")
        fought = contest(calls, comparisons=comparisons, budget=WHOLE * settings.budget)
        macs, moved = sum(k.calls * _macs(k) for k in kinds), sum(k.calls * _bytes(k) for k in kinds)
        whole = Part((target.text,), 1, type(module).__name__, None, None, macs, moved, fought.timings, fought.versus)
        for done, (kind, candidates) in enumerate(each):
            report(0.2 + 0.8 * done / len(each), kind.names[0] or kind.type)
            layers.append(_part(kind, contest(candidates, comparisons=comparisons, budget=settings.budget), whole))
    except KeyboardInterrupt:
        raise Interrupted(result(whole=whole, layers=tuple(layers), notes=tuple(notes), interrupted=True)) from None
    report(1.0, "done")
    return result(whole=whole, layers=tuple(layers), notes=tuple(notes))


def _wholes(
    module: nn.Module, other: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any], settings: Settings, notes: list[str]
) -> Calls:
    """Every way to call the network, once it was found to answer as the network does; what does not is noted."""
    calls: Calls = {}
    with untouched(module):
        expected = _tensors(module(*args, **kwargs))
    for name, call in _ways(module, args, kwargs, settings, notes):
        try:
            answer = _tensors(call())
        except Exception as error:  # one way that does not run leaves the others
            notes.append(f"{name}: it does not run: {reason_of(error)}")
            continue
        if agree(answer, expected):
            calls[name] = call
        else:
            notes.append(f"{name}: its answer is another, so its time says nothing")
    if other is not None:
        for name, call in _ways(other, args, kwargs, Settings(), notes):
            with untouched(other):
                if name == CONTIGUOUS and not agree(_tensors(call()), expected):
                    notes.append(f"{settings.against}: its answers are others: it has other weights, or is another network")
            calls[_theirs(name)] = call
    if not calls:
        raise ValueError(f"bench: the network must answer the same twice, got another answer ({'; '.join(notes)})")
    return calls


def _theirs(form: str) -> str:
    """The name of a candidate of the other network."""
    return f"other, {form}"


def _ways(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], settings: Settings, notes: list[str]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name in (CONTIGUOUS, CHANNELS_LAST):
        last = name == CHANNELS_LAST
        given = [formatted(x, last) for x in args], {k: formatted(x, last) for k, x in kwargs.items()}
        try:
            made = copied(module, last)
        except ValueError as error:
            notes.append(f"{name}: {error}")
            if not last:
                yield name, partial(module, *args, **kwargs)
            continue
        yield name, partial(made, *given[0], **given[1])
        if settings.compiled and not last:
            torch._dynamo.reset()
            yield COMPILED, partial(torch.compile(copied(module, False), dynamic=False), *given[0], **given[1])


def _layers(kind: Kind, other: Kind | None) -> Calls:
    calls = {CONTIGUOUS: ready(kind, False)}
    if any(isinstance(x, Tensor) and x.dim() in (4, 5) for x in (*kind.args, *kind.kwargs.values())):
        calls[CHANNELS_LAST] = ready(kind, True)
    if other is not None and _given(other) == _given(kind):
        calls[_theirs(CONTIGUOUS)] = ready(other, False)
    return calls


def _given(kind: Kind) -> list[Any]:
    """The shapes that a layer is called with."""
    named = [value for _, value in sorted(kind.kwargs.items())]
    return [tuple(value.shape) if isinstance(value, Tensor) else value for value in (*kind.args, *named)]


def _tensors(answer: Any) -> list[Tensor]:
    """The floating tensors in whatever a network gives."""
    return [leaf for leaf in _pytree.tree_leaves(answer) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _macs(kind: Kind) -> int:
    return 0 if kind.cost is None else kind.cost.macs_valid


def _bytes(kind: Kind) -> int:
    return 0 if kind.cost is None else kind.cost.bytes_min


def _part(kind: Kind, fought: Contest, whole: Part) -> Part:
    first, total = next(iter(fought.timings.values())), next(iter(whole.timings.values()))
    problem = None if kind.problem is None else str(kind.problem)
    share = kind.calls * first.median / total.median
    return Part(
        kind.names, kind.calls, kind.type, kind.technique, problem, _macs(kind), _bytes(kind), fought.timings, fought.versus, share
    )
