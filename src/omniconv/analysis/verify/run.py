"""``verify``: all checks of a target."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from omniconv.analysis.verify.checks import Check, of_problem
from omniconv.analysis.verify.grid import problems
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, Technique, parse

Progress = Callable[[float, str], None]


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


def verify(target: str = "all", progress: Progress | None = None) -> Verification:
    """Compares what the library says of convolutions with what they do; the comparisons are exact.

    Formula against ones (:mod:`omniconv.analysis.verify.oracle`), stage by stage: multiply-accumulates of every tap and of those on
    real inputs. With another padding mode than zeros every tap lands on a real input, so that both are the same number. The op
    itself on ones, forward and backward. Parameters against the numbers in the layer, receptive field against the reach of
    the float64 gradient.

    Args:
        target: "all" (or "grid") for every technique on all it takes, the name of a technique, or the text of a problem.
        progress: Told the share that is done and what is next.

    Raises:
        ValueError: The target is none of these.

    Example:
        >>> verify("grouped2d c4-6 i5 k3 p1 g2").failed
        ()
    """
    start = time.perf_counter()
    rows: list[Check] = []
    asked = _asked(target)
    windows: set[tuple[object, ...]] = set()
    for i, (technique, problem) in enumerate(asked):
        if progress is not None and i % 50 == 0:
            progress(i / len(asked), technique.name)
        seen = (technique.name, problem.kernel, problem.stride, problem.dilation)
        rows += of_problem(technique, problem, field=seen not in windows)
        windows.add(seen)
    return Verification(target, len(asked), time.perf_counter() - start, tuple(rows))


def _asked(target: str) -> list[tuple[Technique, Problem]]:
    if target in ("all", "grid"):
        return list(_of_all(TECHNIQUES))
    named = [technique for technique in TECHNIQUES if technique.name == target]
    if named:
        return list(_of_all(tuple(named)))
    if " " not in target:
        names = ", ".join(technique.name for technique in TECHNIQUES)
        raise ValueError(f"verify: the target must be all, the text of a problem or one of {names}, got {target!r}")
    return [parse(target)]


def _of_all(techniques: tuple[Technique, ...]) -> Iterator[tuple[Technique, Problem]]:
    for technique in techniques:
        for problem in problems(technique):
            yield technique, problem
