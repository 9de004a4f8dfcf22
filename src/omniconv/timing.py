"""The timer: warm-up, interleaved rounds in one process, medians and quartiles, and the state of the machine.

What is compared is timed in turns, so that a change of clock speed or of load falls on all of it alike. A sample is as many calls
as it takes to outlast the clock's resolution by far; what is reported is the median over the samples and the quartiles around it.
Whether one is faster than another is said round by round (:class:`Versus`), or from their quartiles alone where the rounds are gone
(:meth:`Timing.differs_from`).
"""

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

Call = Callable[[], object]
Order = Callable[[Sequence[str], int], Sequence[str]]  # who is timed after whom in a round

CPU_FACTS = Path("/proc/cpuinfo")
CPU_FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")

FEWEST_ROUNDS = 5
MOST_ROUNDS = 101
SAMPLE_SECONDS = 2e-3  # 40,000 times what reading the clock costs
RISK = 0.01  # that a run in which nothing differs calls anything faster or slower
LEAST = 0.03  # the same call on other buffers: another place in memory is up to so much faster
SURE_ROUNDS = 17  # of so many samples quartiles lie apart by chance in 0.5 % of all cases


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and first and third quartile over ``samples`` samples of ``repeats`` calls each."""

    median: float
    low: float
    high: float
    samples: int
    repeats: int

    @property
    def spread(self) -> float:
        """Interquartile range in seconds.

        >>> Timing(2.0, 1.5, 3.0, samples=9, repeats=1).spread
        1.5
        """
        return self.high - self.low

    def differs_from(self, other: "Timing") -> bool:
        """Whether the two ranges between the quartiles lie apart; otherwise the difference is within noise.

        Of fewer than 17 samples they must lie apart by (17 - n) / 2n of their summed widths: quartiles alone would call one pair in
        five of equals different at five samples, so it is one in seventy (simulated with normal, exponential and Cauchy noise).
        Of fewer than five samples nothing differs.

        >>> Timing(1.0, 0.9, 1.1, 17, 1).differs_from(Timing(1.3, 1.2, 1.4, 17, 1))
        True
        >>> Timing(1.0, 0.9, 1.1, 5, 1).differs_from(Timing(1.3, 1.2, 1.4, 17, 1))
        False
        """
        fewest = min(self.samples, other.samples)
        if fewest < FEWEST_ROUNDS:
            return False
        apart = max(self.low - other.high, other.low - self.high)
        return apart > max(SURE_ROUNDS - fewest, 0) / (2 * fewest) * (self.spread + other.spread)


@dataclass(frozen=True)
class Versus:
    """One candidate beside the baseline, timed in the same rounds: how many times as fast it is, above 1 it is faster.

    ``ratio`` is the median over the rounds of baseline seconds over its own; between ``low`` and ``high`` that median lies with
    the confidence 1 - risk / comparisons, whatever the noise is like: the interval between two order statistics of the ratios that
    the binomial distribution gives (Thompson 1936), None where the rounds are too few for one. ``verdict`` is "faster" or "slower"
    where the interval lies beyond 1 by 3 %, which is what the place of a buffer in memory can make of one and the same
    call, else "within noise".

    Where nothing differs, all the verdicts of a run together are "within noise" with probability 99 %: the order in a round is
    drawn by lot, so that of two equals either is as likely the slower, round by round anew, whatever else the machine does.
    """

    ratio: float
    low: float | None
    high: float | None
    rounds: int
    verdict: str

    @staticmethod
    def of(baseline: Sequence[float], other: Sequence[float], comparisons: int = 1) -> "Versus":
        """The ratios of samples that were taken in the same rounds, one of so many comparisons in a run.

        >>> Versus.of([2.0] * 8, [1.0] * 8).verdict, Versus.of([2.0] * 7, [1.0] * 7).verdict
        ('faster', 'within noise')
        """
        ratios = sorted(a / b for a, b in zip(baseline, other, strict=True))
        inside = _order_statistic(len(ratios), RISK / comparisons)
        if inside is None:
            return Versus(statistics.median(ratios), None, None, len(ratios), WITHIN_NOISE)
        low, high = ratios[inside], ratios[-1 - inside]
        verdict = "faster" if low > 1 + LEAST else "slower" if high < 1 / (1 + LEAST) else WITHIN_NOISE
        return Versus(statistics.median(ratios), low, high, len(ratios), verdict)


WITHIN_NOISE = "within noise"


def _order_statistic(count: int, risk: float) -> int | None:
    """How many of the smallest, and of the largest, of ``count`` numbers lie outside the interval; None where there is none.

    >>> _order_statistic(7, 0.01), _order_statistic(8, 0.01), _order_statistic(20, 0.01)
    (None, 0, 3)
    """
    below, outside = 0.0, None
    for k in range(count):
        below += math.comb(count, k) * 2.0**-count  # as if each number were below the median or above it by the toss of a coin
        if 2 * below > risk:
            break
        outside = k
    return outside


def fewest_rounds(comparisons: int) -> int:
    """The rounds that a verdict of one of so many comparisons takes at least.

    >>> fewest_rounds(1), fewest_rounds(100)
    (8, 15)
    """
    return 1 + math.ceil(math.log2(comparisons / RISK))


@dataclass(frozen=True)
class Contest:
    """Timings by name, and every candidate but the first beside the first."""

    timings: Mapping[str, Timing]
    versus: Mapping[str, Versus]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, together with what was done until then."""

    def __init__(self, done: Any) -> None:
        super().__init__("interrupted")
        self.done = done


def alternate(
    candidates: Mapping[str, Call],
    *,
    budget: float = 10.0,
    rounds: tuple[int, int] = (FEWEST_ROUNDS, MOST_ROUNDS),
    sample: float = SAMPLE_SECONDS,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times the candidates in turns.

    Args:
        candidates: What to call, by name.
        budget: Seconds that the rounds may take, warm-up apart. Whoever has used up an equal share of it leaves the rest of the
            rounds to the others.
        rounds: The fewest and the most samples of each.
        sample: Seconds that one sample lasts at least.
        progress: Called with the share of the work that is done, in [0, 1].
        clock: Where the seconds come from.

    Returns:
        A Timing of each, in the order given.

    Raises:
        Interrupted: Ctrl-C; it carries the Timings of what had been sampled.

    >>> sorted(alternate({"sum": lambda: sum(range(10)), "max": lambda: max(range(10))}, budget=0.01))
    ['max', 'sum']
    """
    taken, repeats, stopped = _sampled(candidates, budget, rounds, sample, progress, clock, _mirrored)
    timings = {name: _timing(list(samples.values()), repeats[name]) for name, samples in taken.items() if samples}
    if stopped:
        raise Interrupted(timings)
    return timings


def contest(
    candidates: Mapping[str, Call],
    *,
    comparisons: int | None = None,
    budget: float = 1.0,
    sample: float = SAMPLE_SECONDS,
    progress: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Contest:
    """Times the candidates in turns and says whether each is faster or slower than the first, or within noise: :class:`Versus`.

    Args:
        candidates: What to call, by name; the first is the baseline.
        comparisons: How many verdicts the whole run will hold, these included; by default one a candidate but the first.
        budget: Seconds; but no fewer rounds than a verdict takes.
        sample: Seconds that one sample lasts at least.
        progress: Called with the share of the work that is done.
        clock: Where the seconds come from.

    Raises:
        Interrupted: Ctrl-C; it carries the Contest of what had been sampled.

    >>> contest({"a": lambda: sum(range(9000)), "b": lambda: sum(range(900))}, budget=0.1).versus["b"].verdict
    'faster'
    """
    count = max(comparisons or len(candidates) - 1, 1)
    fewest = fewest_rounds(count)
    rounds = fewest, max(fewest, MOST_ROUNDS)
    taken, repeats, stopped = _sampled(candidates, budget, rounds, sample, progress, clock, _drawn(), alike=True)
    timings = {name: _timing(list(samples.values()), repeats[name]) for name, samples in taken.items() if samples}
    versus = {}
    first, *others = taken
    for name in others:
        shared = sorted(taken[first].keys() & taken[name].keys())
        if shared:
            versus[name] = Versus.of([taken[first][i] for i in shared], [taken[name][i] for i in shared], count)
    if stopped:
        raise Interrupted(Contest(timings, versus))
    return Contest(timings, versus)


def _sampled(
    candidates: Mapping[str, Call],
    budget: float,
    rounds: tuple[int, int],
    sample: float,
    progress: Callable[[float], None] | None,
    clock: Callable[[], float],
    order: Order,
    alike: bool = False,
) -> tuple[dict[str, dict[int, float]], dict[str, int], bool]:
    """Seconds of one call by name and round, the calls of a sample, as many for all if ``alike``, and whether Ctrl-C came."""
    taken: dict[str, dict[int, float]] = {name: {} for name in candidates}
    repeats: dict[str, int] = {}
    was_collecting, stopped = gc.isenabled(), False
    try:
        for name, call in candidates.items():
            call()  # the first call builds plans and fills caches
            repeats[name] = _repeats(call, sample, clock)
        if alike:
            repeats = dict.fromkeys(repeats, max(repeats.values(), default=1))
        gc.collect()
        gc.disable()
        _run(candidates, taken, repeats, budget, rounds, progress or (lambda share: None), clock, order)
    except KeyboardInterrupt:
        stopped = True
    finally:
        if was_collecting:
            gc.enable()
    return taken, repeats, stopped


def _mirrored(names: Sequence[str], turn: int) -> Sequence[str]:
    """Every order is followed by its mirror, so that drift cancels; then another one: what a neighbour leaves averages out."""
    first = turn // 2 % max(len(names), 1)
    order = [*names[first:], *names[:first]]
    return order[::-1] if turn % 2 else order


def _drawn() -> Order:
    """Every order by lot, the same every time."""
    lots = Random(0)
    return lambda names, turn: lots.sample(names, len(names))


def _run(
    candidates: Mapping[str, Call],
    taken: dict[str, dict[int, float]],
    repeats: Mapping[str, int],
    budget: float,
    rounds: tuple[int, int],
    progress: Callable[[float], None],
    clock: Callable[[], float],
    order: Order,
) -> None:
    names, (fewest, most) = list(candidates), rounds
    share = budget / max(len(names), 1)
    began = clock()
    for turn in range(most):
        spent = clock() - began
        if turn >= fewest and spent >= budget:
            break
        for name in order(names, turn):
            if turn >= fewest and sum(taken[name].values()) * repeats[name] > share:
                continue
            taken[name][turn] = _seconds(candidates[name], repeats[name], clock) / repeats[name]
        progress(min(max((turn + 1) / most, (clock() - began) / budget if turn + 1 >= fewest else 0.0), 1.0))
    progress(1.0)


def _seconds(call: Call, repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return clock() - start


def _repeats(call: Call, sample: float, clock: Callable[[], float]) -> int:
    """How many calls last as long as a sample must."""
    repeats = 1
    while (took := _seconds(call, repeats, clock)) < sample and repeats < 1 << 20:
        repeats = max(2 * repeats, int(1.2 * repeats * sample / took) if took > 0 else 0)
    return repeats


def _timing(samples: Sequence[float], repeats: int) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1, repeats)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples), repeats)


@dataclass(frozen=True)
class Machine:
    """Where and in what state something was measured. ``load`` is the load average over 1, 5 and 15 minutes where there is one.

    ``mhz`` is the clock frequency and ``governor`` what rules it, where the system says so; older files lack both.
    """

    cpu: str
    cores: int
    threads: int
    capability: str
    system: str
    python: str
    torch: str
    load: tuple[float, ...] | None
    mhz: float | None = field(default=None, metadata={"added": True})
    governor: str | None = field(default=None, metadata={"added": True})

    @property
    def busy(self) -> bool:
        """Whether others were running beside what was measured."""
        return self.load is not None and self.load[0] > self.cores - self.threads + 1


def machine() -> Machine:
    """The machine as it is now: the cores this process may use, torch's threads and its instruction set.

    >>> machine().cores >= 1
    True
    """
    affinity = getattr(os, "sched_getaffinity", None)
    load = getattr(os, "getloadavg", None)
    return Machine(
        cpu=_cpu(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        load=tuple(round(value, 2) for value in load()) if load else None,
        mhz=_mhz(),
        governor=_text_of(CPU_FREQUENCY / "scaling_governor") or None,
    )


def _text_of(path: Path) -> str:
    """What a file of the system says; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _fact(name: str) -> str:
    """What /proc/cpuinfo says of the first core under this name."""
    for line in _text_of(CPU_FACTS).splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _cpu() -> str:
    return _fact("model name") or platform.processor() or platform.machine() or "unknown"


def _mhz() -> float | None:
    try:
        return float(_text_of(CPU_FREQUENCY / "scaling_cur_freq")) / 1e3
    except ValueError:
        pass
    try:
        return float(_fact("cpu MHz"))
    except ValueError:
        return None
