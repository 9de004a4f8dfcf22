"""The timer, with a clock and calls that the test makes."""

import gc
import math
from dataclasses import replace
from itertools import count
from random import Random

import pytest
import torch

from omniconv import timing
from omniconv.timing import Interrupted, Timing, Versus, _timing, alternate, contest, fewest_rounds, machine


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
    low, high = Timing(1.0, 0.9, 1.1, 17, 1), Timing(1.3, 1.2, 1.4, 17, 1)
    assert low.differs_from(high)
    assert high.differs_from(low)
    assert not low.differs_from(Timing(1.2, 1.0, 1.4, 17, 1))
    few = replace(low, samples=5)  # 1.2 of the widths, 0.4 together
    assert not few.differs_from(Timing(1.7, 1.57, 1.77, 17, 1))
    assert few.differs_from(Timing(1.7, 1.59, 1.79, 17, 1))
    assert not replace(low, samples=4).differs_from(Timing(9.0, 9.0, 9.0, 17, 1))


NOISE = {
    "normal": lambda random: random.gauss(1.0, 0.05),
    "lognormal": lambda random: math.exp(random.gauss(0.0, 0.3)),
    "spikes": lambda random: random.gauss(1.0, 0.01) + (random.random() < 0.15) * random.expovariate(1.0),
    "heavy tails": lambda random: 1.0 + 0.01 * abs(math.tan(math.pi * (random.random() - 0.5))),
}


@pytest.mark.parametrize("samples", [5, 7, 9, 13, 17, 31])
@pytest.mark.parametrize("noise", NOISE)
def test_equals_seldom_differ(noise, samples):
    """By quartiles: 1.5 % at most; 4,000 pairs of 1.5 % have more than 90 false alarms once in 10,000 times."""
    random, alarms = Random(1), 0
    for _ in range(4000):
        a, b = (_timing([NOISE[noise](random) for _ in range(samples)], 1) for _ in range(2))
        alarms += a.differs_from(b)
    assert alarms <= 90


# one beside another


@pytest.fixture
def _uncollected(monkeypatch):
    """Thousands of contests: each collects garbage first, which takes a tenth of a second."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def noisy(clock, random, noise, scale=1.0, drift=0.0):
    """A call that takes a noisy second, longer the longer the clock has run."""

    def run():
        clock.now += scale * max(NOISE[noise](random), 0.01) * (1 + drift * clock.now)

    return run


@pytest.mark.parametrize("comparisons", [1, 50])
@pytest.mark.parametrize("drift", [0.0, 0.01])
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.usefixtures("_uncollected")
def test_a_run_of_equals_reports_no_win(noise, drift, comparisons):
    """1 % of the runs at most, however many verdicts a run holds: of 500 runs more than 15 are once in 10,000 times."""
    random, alarms = Random(2), 0
    for _ in range(500):
        verdicts = set()
        for _ in range(comparisons if comparisons == 1 else 4):  # each of fifty has a fiftieth of the risk: four stand for them
            clock = Clock()
            calls = {name: noisy(clock, random, noise, drift=drift) for name in "ab"}
            made = contest(calls, comparisons=comparisons, budget=1e-9, sample=0.0, clock=clock)
            verdicts.add(made.versus["b"].verdict)
        alarms += verdicts != {"within noise"}
    assert alarms <= 15


@pytest.mark.usefixtures("_uncollected")
@pytest.mark.parametrize("noise", NOISE)
def test_a_win_beyond_noise_is_found(noise):
    """Twice as fast, under every noise, in most of the runs."""
    random, found = Random(3), 0
    for _ in range(100):
        clock = Clock()
        calls = {"a": noisy(clock, random, noise, 2.0), "b": noisy(clock, random, noise)}
        made = contest(calls, budget=120.0, sample=0.0, clock=clock)
        found += made.versus["b"].verdict == "faster"
        assert made.versus["b"].low <= made.versus["b"].ratio <= made.versus["b"].high
    assert found >= 95


def test_the_interval_covers_the_median_as_often_as_it_says():
    """The median of ratios of equals is 1: outside in 1 % at most."""
    random, outside = Random(4), 0
    for _ in range(4000):
        a, b = ([NOISE["lognormal"](random) for _ in range(20)] for _ in range(2))
        versus = Versus.of(a, b)
        outside += not versus.low <= 1.0 <= versus.high
    assert 0 < outside <= 70


def test_verdicts_by_hand():
    base = [2.0] * 8
    assert Versus.of(base, [1.0] * 8) == Versus(2.0, 2.0, 2.0, 8, "faster")
    assert Versus.of(base, [4.0] * 8) == Versus(0.5, 0.5, 0.5, 8, "slower")
    assert Versus.of(base, [1.96] * 8).verdict == "within noise"  # 2 % is less than the place in memory makes
    assert Versus.of(base, [1.0] * 7 + [2.0]) == Versus(2.0, 1.0, 2.0, 8, "within noise")
    assert Versus.of(base, [1.0] * 8, comparisons=2) == Versus(2.0, None, None, 8, "within noise")
    assert Versus.of([*base, 2.0], [1.0] * 9, comparisons=2).verdict == "faster"


def test_as_many_rounds_as_a_verdict_takes():
    for comparisons in (1, 2, 3, 50, 51, 1000):
        fewest = fewest_rounds(comparisons)
        assert 2 * 0.5**fewest <= 0.01 / comparisons < 2 * 0.5 ** (fewest - 1)
        clock = Clock()
        calls = {name: clock.call(name, 1.0) for name in "ab"}
        made = contest(calls, comparisons=comparisons, budget=1e-9, sample=0.0, clock=clock)
        assert made.versus["b"].rounds == fewest
        assert made.versus["b"].low == 1.0


def test_each_of_two_comes_first_as_often():
    clock = Clock()
    alternate({n: clock.call(n, 1.0) for n in "ab"}, rounds=(8, 8), budget=1000.0, sample=0.5, clock=clock)
    rounds = ["".join(clock.log[4 + 2 * i : 6 + 2 * i]) for i in range(8)]
    assert rounds == ["ab", "ba", "ba", "ab"] * 2


@pytest.mark.usefixtures("_uncollected")
def test_no_rhythm_of_the_machine_makes_a_win_of_equals():
    """Others run in slices of time: in a fixed order, as AB BA BA AB, the same one could fall into the slow ones in every round."""
    alarms = 0
    for phase in range(8):
        clock, calls = Clock(), count(phase)

        def call(clock=clock, calls=calls):
            clock.now += (1.0, 3.0, 3.0, 1.0, 3.0, 1.0, 1.0, 3.0)[next(calls) % 8]

        made = contest({"a": call, "b": lambda call=call: call()}, budget=1e-9, sample=0.0, clock=clock)
        alarms += made.versus["b"].verdict != "within noise"
    assert alarms == 0


def test_contests_draw_lots_and_call_all_as_often():
    clock = Clock()
    calls = {name: clock.call(name, seconds) for name, seconds in {"a": 0.001, "b": 0.002, "c": 0.003}.items()}
    made = contest(calls, budget=1e-9, sample=0.01, clock=clock)
    assert len({timing.repeats for timing in made.timings.values()}) == 1
    repeats = made.timings["a"].repeats
    rounds = clock.log[-9 * 3 * repeats :][::repeats]
    orders = {"".join(rounds[i : i + 3]) for i in range(0, len(rounds), 3)}
    assert len(orders) > 3
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)


def test_an_interrupted_contest_keeps_its_rounds():
    clock, calls = Clock(), iter(range(100))

    def b():
        if next(calls) == 5:
            raise KeyboardInterrupt
        clock.now += 2.0

    with pytest.raises(Interrupted) as stopped:
        contest({"a": clock.call("a", 1.0), "b": b}, budget=1000.0, sample=0.5, clock=clock)
    made = stopped.value.done
    assert made.timings["b"].median == 2.0
    assert made.versus["b"] == Versus(0.5, None, None, 3, "within noise")

    calls = iter([5])
    with pytest.raises(Interrupted) as stopped:
        contest({"a": clock.call("a", 1.0), "b": b}, clock=clock)
    assert (stopped.value.done.timings, stopped.value.done.versus) == ({}, {})


def test_the_state_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(timing, "CPU_FREQUENCY", tmp_path)
    assert (machine().mhz, machine().governor) == (None, None)
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: A Chip\ncpu MHz\t\t: 2600.5\n")
    assert (machine().cpu, machine().mhz) == ("A Chip", 2600.5)
    (tmp_path / "scaling_cur_freq").write_text("3100000\n")
    (tmp_path / "scaling_governor").write_text("performance\n")
    assert (machine().mhz, machine().governor) == (3100.0, "performance")
    idle = replace(machine(), load=(1.9, 0.0, 0.0), cores=2, threads=1)
    assert not idle.busy
    assert replace(idle, threads=2).busy
    assert not replace(idle, load=None).busy


def test_real_time():
    timing = alternate({"sum": lambda: sum(range(1000))}, budget=0.05)["sum"]
    assert 0 < timing.low <= timing.median <= timing.high < 1e-3


def test_machine():
    here = machine()
    assert here.threads == torch.get_num_threads()
    assert here.torch == torch.__version__
    assert here.cpu
    assert here.capability == torch.backends.cpu.get_cpu_capability()
