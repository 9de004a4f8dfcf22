"""One layer, what if: ratios that papers state, every technique once, and times that say where they were taken."""

import csv
import io
import json
from functools import partial

import pytest
from typer.testing import CliRunner

import omniconv.bench.what_if as timed
from omniconv.analysis.what_if import way_of, what_if
from omniconv.bench.what_if import measured
from omniconv.cli import app
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES
from omniconv.timing import alternate

LAYER = "standard n1 c64-128 i56 k3 p1"


@pytest.fixture(autouse=True)
def _one_short_sample(monkeypatch):
    monkeypatch.setattr(timed, "alternate", partial(alternate, rounds=(1, 1), sample=0.0))


def run(*arguments, width=80):
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["cost", *map(str, arguments)])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert ", got " in line
    return line


def ways(text):
    return {(way.technique, way.problem.rank): way for way in what_if(text, every=True).ways}


def test_every_technique_once_beside_a_standard_layer_of_its_axes():
    made = what_if(LAYER, every=True)
    names = [t.name for t in TECHNIQUES if 2 in t.ranks]
    assert [way.technique for way in made.ways] == [*names, "standard", "lightweight", "dynamic"]
    assert str(made.ways[len(names)].problem) == "standard1d n1 c64-128 i3136 k3 psame"
    along = what_if("standard1d c8 i20 k3 p1", every=True)
    assert [way.technique for way in along.ways] == [t.name for t in TECHNIQUES if 1 in t.ranks]
    assert {note.partition(":")[0] for note in along.notes} >= {"separable", "deformable"}
    assert any("not defined on 1 axis" in note for note in along.notes)


def test_ratios_that_papers_state():
    made = ways(LAYER)
    assert made["standard", 2].macs_dense == 56 * 56 * 64 * 128 * 9
    assert set(vars(made["standard", 2].to_standard).values()) == {1.0, None}
    assert made["depthwise_separable", 2].to_standard.macs_dense == pytest.approx(1 / 128 + 1 / 9), "Howard et al. 2017"
    assert made["grouped", 2].to_standard.macs_dense == pytest.approx(1 / 8)
    assert made["pointwise", 2].to_standard.macs_dense == pytest.approx(1 / 9)
    assert made["dilated", 2].to_standard.receptive_field == pytest.approx(25 / 9)
    assert made["dilated", 2].to_standard.params == 1
    assert ways("standard c64 i56 k3 p1")["separable", 2].to_standard.params == pytest.approx(
        (2 * 64 * 64 * 3 + 128) / (64 * 64 * 9 + 64), rel=0.01
    )
    standard = made["standard", 2]
    assert standard.bytes == 4 * (64 * 56 * 56 + standard.params + 128 * 56 * 56)
    assert standard.intensity == standard.flops / standard.bytes


def test_unlike_outputs_are_said():
    made = what_if("standard c3-64 i32 k7 s2 p3", every=True)
    assert [way.technique for way in made.ways if not way.same_output] == ["transposed", "depthwise", "lightweight", "dynamic"]
    assert "depthwise: output 1 × 63 × 16 × 16, not 1 × 64 × 16 × 16" in made.notes


def test_one_alone():
    (way,) = what_if("depthwise2d c32 i112 k3 s2 p1").ways
    assert (way.params, way.to_standard, way.latency_s) == (320, None, None)
    assert way == way_of(Problem.parse("depthwise2d c32 i112 k3 s2 p1"))
    text = run("depthwise2d c32 i112 k3 s2 p1").stdout
    assert "× std" not in text
    assert "903k" in text


def test_times_are_verified_and_say_where():
    made = measured(what_if("standard n2 c8-16 i6 k3 p1 cl dt:bf16", every=True), budget=0.01)
    assert made.machine is not None
    base = {way.problem.rank: way for way in made.ways if way.technique == "standard"}
    for way in made.ways:
        assert way.latency_s.median > 0
        assert way.to_standard.time == pytest.approx(way.latency_s.median / base[way.problem.rank].latency_s.median)


def test_of_a_wrong_layer_no_time_is_given(monkeypatch):
    right = timed.verify_layer

    def verify(layer, x):
        if layer.technique == "grouped":
            raise AssertionError("grouped: every error must stay\nunder its bound")
        return right(layer, x)

    monkeypatch.setattr(timed, "verify_layer", verify)
    result = run("standard c8 i6 k3 p1", "--all", "--measure", "--budget", "0.01", width=120)
    assert result.exit_code == 1
    row = next(line for line in result.stdout.splitlines() if line.startswith("grouped "))
    assert "FAILED" in row
    assert "grouped is not measured: AssertionError: grouped: every error must stay under its bound" in result.stdout


def test_an_interruption_keeps_what_is_done(monkeypatch, tmp_path):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(timed, "alternate", partial(alternate, progress=None))
    monkeypatch.setattr("omniconv.timing._run", stopped)
    result = run("standard c8 i6 k3 p1", "--all", "--measure", "-o", tmp_path / "a.json")
    assert result.exit_code == 130
    assert result.stdout.splitlines()[-1] == "interrupted"
    assert json.loads((tmp_path / "a.json").read_text())["interrupted"] is True


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("more", [[], ["--all"], ["--all", "--measure", "--budget", "0.01"]], ids=" ".join)
def test_it_reads_well(width, more):
    result = run("standard c8-16 i6 k3 p1", *more, width=width)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "…" not in result.stdout
    assert ("in turns in one process" in result.stdout) == ("--measure" in more)
    if more:
        assert "n1 c8-16 i3 k4 s2 p1" in result.stdout, "the geometry keeps to a line"


def test_formats(tmp_path):
    arguments = ("standard c8-16 i6 k3 p1", "--all")
    data = json.loads(run(*arguments, "--format", "json").stdout)
    assert (data["kind"], data["problem"], data["machine"]) == ("cost", "standard2d n1 c8-16 i6 k3 p1", None)
    rows = list(csv.DictReader(io.StringIO(run(*arguments, "--format", "csv").stdout)))
    assert [row["technique"] for row in rows] == [way["technique"] for way in data["ways"]]
    assert float(rows[0]["macs_dense_ratio"]) == 1
    assert "| standard | n1 c8-16 i6 k3 p1 |" in run(*arguments, "--format", "md").stdout
    assert "<h1>omniconv cost</h1>" in run(*arguments, "--format", "html").stdout
    assert run(*arguments, "-o", tmp_path / "a.csv").exit_code == 0
    assert "must not exist" in refused(*arguments, "-o", tmp_path / "a.csv")


def test_refusals():
    assert "--all must start from a standard layer, got 'depthwise2d n1 c8 i6'" in refused("depthwise c8 i6", "--all")
    assert "omniconv summary takes networks" in refused("torch.nn:ReLU", "--all") or "there must be an input" in refused(
        "torch.nn:ReLU"
    )
    assert "budget" in refused("standard c8 i6", "--measure", "--budget", "0")
    assert "budget" in refused("standard c8 i6", "--measure", "--budget", "nan")
    assert "near: standard" in refused("standrad c8 i6")
    assert "i<size>" in refused("standard c8")
    assert refused("standard c8 i6 k3 g3").startswith("cost: ")
