"""The timer, with a clock and calls that the test makes."""

import gc

import pytest
import torch

from omniconv.timing import Interrupted, Timing, alternate, machine


class Clock:
    """Seconds that pass only while something runs."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def call(self, name, *seconds):
        """A call that takes these seconds in turn, the last one ever after."""
        left = list(seconds)

        def run():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_median_and_quartiles_of_one_call():
    clock = Clock()
    # the first call and the one that finds the repeats are warm-up
    slow = clock.call("slow", 90.0, 80.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    timing = alternate({"slow": slow}, rounds=(5, 5), budget=1000.0, sample=0.5, clock=clock)["slow"]
    assert timing == Timing(median=3.0, low=2.0, high=4.0, samples=5, repeats=1)
    assert timing.spread == 2.0


def test_short_calls_are_repeated_until_a_sample_lasts():
    clock = Clock()
    timing = alternate({"short": clock.call("short", 0.001)}, rounds=(3, 3), budget=10.0, sample=0.01, clock=clock)["short"]
    assert timing.repeats >= 10
    assert timing.median == pytest.approx(0.001)


def test_rounds_take_turns_in_changing_order():
    clock = Clock()
    alternate({n: clock.call(n, 1.0) for n in "abc"}, rounds=(6, 6), budget=1000.0, sample=0.5, clock=clock)
    rounds = ["".join(clock.log[6 + 3 * i : 9 + 3 * i]) for i in range(6)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3


def test_the_budget_ends_the_rounds_after_the_fewest():
    clock = Clock()
    assert alternate({"a": clock.call("a", 1.0)}, budget=10.0, rounds=(3, 99), sample=0.5, clock=clock)["a"].samples == 10
    assert alternate({"a": clock.call("a", 9.0)}, budget=10.0, rounds=(3, 99), sample=0.5, clock=clock)["a"].samples == 3


def test_a_slow_candidate_does_not_use_up_the_others_time():
    clock = Clock()
    timings = alternate(
        {"slow": clock.call("slow", 10.0), "fast": clock.call("fast", 1.0)}, budget=60.0, rounds=(2, 99), sample=0.5, clock=clock
    )
    assert timings["slow"].samples < 9
    assert timings["fast"].samples > timings["slow"].samples


def test_an_interruption_keeps_what_was_sampled():
    clock, calls = Clock(), iter(range(100))
    a = clock.call("a", 1.0)

    def b():
        if next(calls) == 4:
            raise KeyboardInterrupt
        clock.now += 2.0

    gc.enable()
    with pytest.raises(Interrupted) as stopped:
        alternate({"a": a, "b": b}, rounds=(9, 9), budget=1000.0, sample=0.5, clock=clock)
    assert gc.isenabled()
    assert stopped.value.done["a"].median == 1.0
    assert stopped.value.done["b"].median == 2.0
    assert stopped.value.done["b"].samples == 2


def test_progress_rises_to_one():
    clock, shares = Clock(), []
    alternate({"a": clock.call("a", 1.0)}, rounds=(3, 8), budget=6.0, sample=0.5, clock=clock, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_nothing_to_time():
    assert alternate({}) == {}


def test_difference_beyond_noise():
    low, high = Timing(1.0, 0.9, 1.1, 9, 1), Timing(1.3, 1.2, 1.4, 9, 1)
    assert low.differs_from(high)
    assert high.differs_from(low)
    assert not low.differs_from(Timing(1.2, 1.0, 1.4, 9, 1))


def test_real_time():
    timing = alternate({"sum": lambda: sum(range(1000))}, budget=0.05)["sum"]
    assert 0 < timing.low <= timing.median <= timing.high < 1e-3


def test_machine():
    here = machine()
    assert here.threads == torch.get_num_threads()
    assert here.torch == torch.__version__
    assert here.cpu
    assert here.capability == torch.backends.cpu.get_cpu_capability()
