"""The timer: warm-up, interleaved rounds in one process, medians and quartiles, and the state of the machine.

What is compared is timed in turns, so that a change of clock speed or of load falls on all of it alike. A sample is as many calls
as it takes to outlast the clock's resolution by far; what is reported is the median over the samples and the quartiles around it.
"""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

FEWEST_ROUNDS = 5
MOST_ROUNDS = 101
SAMPLE_SECONDS = 2e-3  # 40,000 times what reading the clock costs


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
        """Whether the two ranges between the quartiles lie apart; otherwise the difference is within noise."""
        return self.low > other.high or other.low > self.high


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
    names = list(candidates)
    taken: dict[str, list[float]] = {name: [] for name in names}
    repeats: dict[str, int] = {}
    was_collecting = gc.isenabled()
    try:
        for name in names:
            candidates[name]()  # the first call builds plans and fills caches
            repeats[name] = _repeats(candidates[name], sample, clock)
        gc.collect()
        gc.disable()
        _run(candidates, taken, repeats, budget, rounds, progress or (lambda share: None), clock)
    except KeyboardInterrupt:
        raise Interrupted({n: _timing(s, repeats[n]) for n, s in taken.items() if s}) from None
    finally:
        if was_collecting:
            gc.enable()
    return {name: _timing(samples, repeats[name]) for name, samples in taken.items()}


def _run(
    candidates: Mapping[str, Call],
    taken: dict[str, list[float]],
    repeats: Mapping[str, int],
    budget: float,
    rounds: tuple[int, int],
    progress: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    names, (fewest, most) = list(candidates), rounds
    share = budget / max(len(names), 1)
    began = clock()
    for turn in range(most):
        spent = clock() - began
        if turn >= fewest and spent >= budget:
            break
        # another neighbour and another place every round: what a neighbour leaves in the caches averages out
        first = turn % max(len(names), 1)
        order = names[first:] + names[:first]
        for name in reversed(order) if turn % 2 else order:
            if turn >= fewest and sum(taken[name]) * repeats[name] > share:
                continue
            taken[name].append(_seconds(candidates[name], repeats[name], clock) / repeats[name])
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
    """Where and in what state something was measured. ``load`` is the load average over 1, 5 and 15 minutes where there is one."""

    cpu: str
    cores: int
    threads: int
    capability: str
    system: str
    python: str
    torch: str
    load: tuple[float, ...] | None


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
    )


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"
