"""What a machine can do at best: floors by hand, caches, measured peaks, and the file that keeps them."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_rows import PEAKS

from omniconv.analysis import peaks as limits
from omniconv.analysis.peaks import Demand, Floor, caches, machine_roofs, measure_peaks, roofs_file
from omniconv.timing import alternate, machine


def test_the_floor_by_hand():
    demand = Demand.of(macs=1000, read=600, written=300, backward=False)
    assert demand == Demand(flops=2000, moved=900, held=900)
    assert demand.floor(PEAKS) == Floor(2000 / 1e9, "arithmetic")
    assert demand.floor(PEAKS, double=True) == Floor(2000 / 5e8, "arithmetic")
    assert Demand(100, 900, 900).floor(PEAKS) == Floor(900 / 4e9, "L1")
    assert Demand(100, 900, 900).floor(PEAKS, cold=True) == Floor(900 / 1e9, "DRAM")
    # forward reads 600 and writes 300; backward reads 600 and 300 and writes 600
    both = Demand.of(macs=1000, read=600, written=300, backward=True)
    assert both == Demand(flops=6000, moved=2400, held=1800)
    assert both.floor(PEAKS) == Floor(6000 / 1e9, "arithmetic")
    assert replace(both, flops=0).floor(PEAKS) == Floor(2400 / 2e9, "L2")
    assert Demand(0, 1, 1000).floor(PEAKS).limit == "L1"
    assert Demand(0, 1, 10_001).floor(PEAKS).limit == "DRAM"


def test_cache_sizes(tmp_path):
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    assert caches(tmp_path) == limits.USUAL_CACHES
    facts_of = (("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K"), ("3", "Unified", "32M"))
    for index, facts in enumerate(facts_of):
        folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, fact in zip(("level", "type", "size"), facts, strict=True):
            (folder / name).write_text(fact + "\n")
    assert caches(tmp_path) == (48 << 10, 1 << 20, 32 << 20)
    (tmp_path / f"cpu{core}" / "cache" / "index0" / "size").write_text("odd")
    assert caches(tmp_path) == limits.USUAL_CACHES


def test_peaks_of_this_machine(monkeypatch):
    monkeypatch.setattr(limits, "alternate", partial(alternate, rounds=(1, 1), sample=0.0))
    monkeypatch.setattr(limits, "caches", lambda: (1 << 14, 1 << 18))
    found = measure_peaks(double=True, budget=0.01)
    assert [(level.name, level.size) for level in found.levels] == [("L1", 1 << 14), ("L2", 1 << 18), ("DRAM", None)]
    assert found.last_cache == 1 << 18
    assert all(1e8 < level.bandwidth < 1e13 for level in found.levels)
    assert 1e8 < found.flops < 1e14
    assert 1e8 < found.flops_f64 < 1e14


def test_a_copy_goes_over_all_its_rows():
    call, moved = limits._copy(1 << 12)
    target = call()
    assert moved == 2 * 4 * target.numel() >= 2 * limits._COPIED


# what is kept of them


FOUND = {"f32": 2e9, "bf16": 4e9}, PEAKS.levels


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """An idle machine, an empty cache, and a list of what is measured."""
    measured = []

    def found(dtypes, budget):
        measured.append(tuple(dtypes))
        return {name: FOUND[0].get(name, 1e9) for name in dtypes}, FOUND[1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(limits, "_measured", found)
    state = replace(machine(), load=(0.0, 0.0, 0.0), threads=1, cpu="Chip", torch="9", capability="AVX9")
    monkeypatch.setattr(limits, "machine", lambda: state)
    return SimpleNamespace(measured=measured, state=state, folder=tmp_path / "omniconv")


def test_peaks_are_measured_once(quiet):
    first, again = machine_roofs(), machine_roofs()
    assert quiet.measured == [("f32",)]
    assert (first.cached, again.cached) == (False, True)
    assert replace(again, cached=False) == first
    assert (first.cpu, first.capability, first.threads, first.torch) == ("Chip", "AVX9", 1, "9")
    assert first.levels == PEAKS.levels
    assert [p.name for p in quiet.folder.iterdir()] == [roofs_file(quiet.state).name]
    assert not machine_roofs(refresh=True).cached
    assert len(quiet.measured) == 2


def test_another_dtype_is_measured_beside(quiet):
    machine_roofs()
    assert machine_roofs("bf16").rates == {"f32": 2e9, "bf16": 4e9}
    assert quiet.measured == [("f32",), ("f32", "bf16")]
    machine_roofs("f64")
    assert machine_roofs("bf16").rates == {"f32": 2e9, "bf16": 4e9, "f64": 1e9}
    assert len(quiet.measured) == 3


@pytest.mark.parametrize("change", [{"cpu": "Other"}, {"threads": 2}, {"torch": "10"}, {"capability": "AVX2"}])
def test_another_machine_has_peaks_of_its_own(quiet, monkeypatch, change):
    machine_roofs()
    monkeypatch.setattr(limits, "machine", lambda: replace(quiet.state, **change))
    assert not machine_roofs().cached
    assert machine_roofs().cached
    assert len(list(quiet.folder.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda d: "",
        lambda d: json.dumps(d)[:-9],
        lambda d: "[]",
        lambda d: json.dumps({**d, "torch": "8"}),
        lambda d: json.dumps({**d, "rates": {"f32": 0.0}}),
        lambda d: json.dumps({**d, "rates": {"f32": float("nan")}}),
        lambda d: json.dumps({**d, "rates": {"f64": 1.0}}),
        lambda d: json.dumps({**d, "rates": [1.0]}),
        lambda d: json.dumps({**d, "levels": []}),
        lambda d: json.dumps({**d, "levels": [{"name": "L1", "size": 9, "bandwidth": 1.0}]}),
        lambda d: json.dumps({**d, "levels": [{"name": "DRAM", "bandwidth": 1.0}]}),
        lambda d: json.dumps({**d, "measured": "yesterday"}),
    ],
)
def test_a_malformed_or_stale_file_counts_for_nothing(quiet, change):
    machine_roofs()
    file = roofs_file(quiet.state)
    file.write_text(change(json.loads(file.read_text())))
    assert not machine_roofs().cached
    assert machine_roofs().cached
    file.write_bytes(b"\xff\x00")
    assert not machine_roofs().cached


def test_a_file_that_cannot_be_written_is_said(quiet, monkeypatch):
    quiet.folder.write_text("not a folder")
    made = machine_roofs()
    assert made.note.startswith("the peaks were not kept: ")
    assert made.rates["f32"] == 2e9


def test_a_file_is_written_whole_or_not_at_all(quiet, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    machine_roofs()
    before = roofs_file(quiet.state).read_text()
    monkeypatch.setattr(limits.os, "replace", fail)
    assert "No space left" in machine_roofs(refresh=True).note
    assert roofs_file(quiet.state).read_text() == before
    assert len(list(quiet.folder.iterdir())) == 1


def test_what_is_measured_beside_others_is_not_kept(quiet, monkeypatch):
    monkeypatch.setattr(limits, "machine", lambda: replace(quiet.state, load=(9.0, 9.0, 9.0), cores=2))
    assert machine_roofs().note == "the peaks were measured while others were running: too low perhaps, and not kept"
    assert not quiet.folder.exists()


def test_where_peaks_are_kept(monkeypatch):
    state = machine()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert roofs_file(state).parent == Path.home() / ".cache" / "omniconv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert roofs_file(state).parent == Path.home() / ".cache" / "omniconv"
