"""``verify``: all checks of a target."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from omniconv.analysis.targets import Target, load
from omniconv.analysis.verify.checks import Check, of_counters, of_problem
from omniconv.analysis.verify.counters import covering
from omniconv.analysis.verify.grid import problems
from omniconv.analysis.verify.networks import of_network
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, Technique, find

Progress = Callable[[float, str], None]

# of a problem asked for by name, which is run in float64 several times over
MOST_MACS, MOST_BYTES = 10**10, 10**9


@dataclass(frozen=True)
class Verification:
    """What was compared with what, and whether all of it agreed."""

    target: str
    problems: int
    seconds: float
    rows: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The comparisons that do not agree."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def verdict(self) -> str:
        """One line."""
        what = f"{len(self.rows):,} comparisons on {self.problems:,} {'problem' if self.problems == 1 else 'problems'}"
        if self.failed:
            return f"{len(self.failed):,} of {what} do not agree"
        return f"{what}, all equal ({self.seconds:.1f} s)"


@dataclass(frozen=True)
class Summary:
    """The comparisons of one kind, or on one technique."""

    of: str
    problems: int
    compared: int
    failed: int


def summaries(result: Verification, by: str = "check") -> tuple[Summary, ...]:
    """How many comparisons there were of each kind ("check") or on each technique ("technique"), in the order of the rows.

    >>> [(s.of, s.problems, s.failed) for s in summaries(verify("pointwise2d c2 i3"), by="technique")]
    [('pointwise', 1, 0)]
    """
    groups: dict[str, list[Check]] = {}
    for row in result.rows:
        groups.setdefault(getattr(row, by), []).append(row)
    return tuple(
        Summary(of, len({row.problem for row in rows}), len(rows), sum(not row.ok for row in rows)) for of, rows in groups.items()
    )


def _countable(problem: Problem) -> Problem:
    """The problem, unless it is too large to be run on ones."""
    cost = find(problem.technique).cost(problem)
    if cost.macs_dense > MOST_MACS or cost.bytes > MOST_BYTES:
        raise ValueError(
            f"verify: the problem must be small enough to run, at most {MOST_MACS:.0e} multiply-accumulates and "
            f"{MOST_BYTES:.0e} bytes, got {cost.macs_dense:.0e} and {cost.bytes:.0e} of '{problem}'"
        )
    return problem


def verify(target: str = "all", input: Sequence[str] = (), progress: Progress | None = None) -> Verification:
    """Compares what the library says of convolutions with what they do; the comparisons are exact.

    Formula against ones (:mod:`omniconv.analysis.verify.oracle`), stage by stage: multiply-accumulates of every tap and of those on
    real inputs. With another padding mode than zeros every tap lands on a real input, so that both are the same number. The op
    itself on ones, forward and backward. :func:`omniconv.analysis.cost`, at the dispatcher, of the layer (forward and backward), of
    the function and of torch's own modules, against ones; of a grid, on problems in which every two settings meet. Parameters
    against the numbers in the layer. Receptive fields, of the formula and of the recorded graph, against the float64 gradient.

    Of a network: every convolution in its cost on its own shapes, and all that it really runs, against ones.

    Args:
        target: "all" (or "grid") for every technique on all it takes, the name of a technique, the text of a problem, or a
            network, as :mod:`omniconv.analysis.targets` reads it.
        input: Example inputs of a network.
        progress: Told the share that is done and what is next.

    Raises:
        ValueError: The target is none of these.

    Example:
        >>> verify("grouped2d c4-6 i5 k3 p1 g2").failed
        ()
    """
    start = time.perf_counter()
    if target in ("all", "grid"):
        asked = list(_of_all(TECHNIQUES))
    elif re.fullmatch("[a-z_]*", target):
        asked = list(_of_all(_named(target)))
    else:
        read = load(target, input=input, caller="verify")
        if read.problem is None:
            return _network(read, start)
        asked = [(find(read.problem.technique), _countable(read.problem))]
    rows: list[Check] = []
    dispatched = _covered(asked)
    windows: set[tuple[object, ...]] = set()
    for i, (technique, problem) in enumerate(asked):
        if progress is not None and i % 50 == 0:
            progress(i / len(asked), technique.name)
        seen = (technique.name, problem.kernel, problem.stride, problem.dilation)
        rows += of_problem(technique, problem, field=seen not in windows)
        windows.add(seen)
        if problem in dispatched:
            rows += of_counters(technique, problem)
    return Verification(target, len(asked), time.perf_counter() - start, tuple(rows))


def _named(name: str) -> tuple[Technique, ...]:
    found = tuple(technique for technique in TECHNIQUES if technique.name == name)
    if not found:
        names = ", ".join(technique.name for technique in TECHNIQUES)
        raise ValueError(f"verify: the target must be all, one of {names}, the text of a problem or a network, got {name!r}")
    return found


def _network(read: Target, start: float) -> Verification:
    if read.module is None:
        raise ValueError(f"verify: the target must be something that runs in torch, got '{read.text}'")
    inputs, named = read.example_inputs()
    try:
        rows = tuple(of_network(read.text, read.module, inputs, named))
    except Exception as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"verify: the network must run on its inputs, got {what}") from error
    return Verification(read.text, len({row.problem for row in rows}), time.perf_counter() - start, rows)


def _covered(asked: list[tuple[Technique, Problem]]) -> set[Problem]:
    """Those whose every way to run is counted at the dispatcher, which takes a hundred times longer than a formula."""
    grids: dict[str, list[Problem]] = {}
    for technique, problem in asked:
        grids.setdefault(technique.name, []).append(problem)
    return {problem for grid in grids.values() for problem in covering(grid)}


def _of_all(techniques: tuple[Technique, ...]) -> Iterator[tuple[Technique, Problem]]:
    for technique in techniques:
        for problem in problems(technique):
            yield technique, problem
