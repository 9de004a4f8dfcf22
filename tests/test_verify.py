"""``verify``: all that the library says of its convolutions is what they do, and a wrong formula turns it red."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from omniconv.analysis import verify as room
from omniconv.analysis.verify import checks, counted, of_problem, problems, summaries, verify
from omniconv.cli import app
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, _technique, find, parse
from omniconv.techniques._technique import Stage

RUN = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.mark.slow
def test_everything_that_every_technique_takes():
    result = verify("all")
    assert result.failed == ()
    assert result.problems > 5000
    assert {s.of for s in summaries(result, by="technique")} == {t.name for t in TECHNIQUES}
    assert {s.of for s in summaries(result)} >= set(KINDS)
    assert result.seconds < 180


KINDS = [value for name, value in vars(checks).items() if name.isupper() and isinstance(value, str)]


@pytest.mark.parametrize("name", ["pointwise", "lightweight", "dynamic"])
def test_a_technique(name):
    result = verify(name)
    assert result.failed == ()
    assert {row.technique for row in result.rows} == {name}


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_the_grid_crosses_all_that_a_technique_takes(technique):
    found = list(problems(technique))
    assert len(set(map(str, found))) == len(found)
    assert {p.rank for p in found} == set(technique.ranks)
    for name in technique.takes - {"kernel", "out_channels", "heads", "padding_mode"}:
        for rank in technique.ranks:
            assert len({getattr(p, name) for p in found if p.rank == rank}) > 1, (name, rank)
    if "padding" in technique.takes:
        assert any(p.padding_mode == "zeros" and any(a != b for a, b in p.padding) for p in found if not isinstance(p.padding, str))
        assert {"valid", "same"} <= {p.padding for p in found if isinstance(p.padding, str)}
        assert 1 not in technique.ranks or any(p.padding == "causal" for p in found)
    if "padding_mode" in technique.takes:
        assert {p.padding_mode for p in found} == {"zeros", "reflect", "replicate", "circular"}
    # stride, dilation, groups and a pad of each kind meet in one problem
    if {"stride", "dilation", "groups"} <= technique.takes:
        met = {(max(p.stride) > 1, max(p.dilation) > 1, p.groups > 1, str(p.padding)) for p in found if p.rank == 2}
        assert len(met) == 8 * len({str(p.padding) for p in found if p.rank == 2})


# by hand: 2·3 channel pairs; the middle outputs of 4 read 3 taps an axis, the outer ones 2
@pytest.mark.parametrize(
    ("text", "dense", "valid"),
    [
        ("standard1d c2-3 i4 k3 p1", 6 * 12, 6 * (2 + 3 + 3 + 2)),
        ("standard2d c2-3 i4 k3 p1", 6 * 144, 6 * (2 + 3 + 3 + 2) ** 2),
        ("standard1d c2-3 i4 k3 p1 mode:reflect", 6 * 12, 6 * 12),
        ("grouped1d c4-2 i4 k3 p1+0 g2", 4 * 3 * 3, 4 * (2 + 3 + 3)),
        ("transposed1d c1 i3 k4 s2 p1", 3 * 4, 3 + 4 + 3),  # 8 outputs, the first and the last cropped: one tap each
        ("transposed1d c1 i1 k2 p1 op0 s3 d4", 2, 0),  # taps fall on 0 and 4 of 5: both are cropped
    ],
)
def test_ones_count_what_a_hand_does(text, dense, valid):
    technique, problem = parse(text)
    (stage,) = technique.stages(problem)
    assert (counted(stage, real=False), counted(stage, real=True)) == (dense, valid)


def test_large_stages_are_counted_by_one_pair_of_channels(monkeypatch):
    technique, problem = parse("grouped2d n1 c4-6 i5x6 k3x2 s2x1 p1+0x2 g2")
    (stage,) = technique.stages(problem)
    whole = [counted(stage, real=real) for real in (False, True)]
    monkeypatch.setattr("omniconv.analysis.verify.oracle.FEW", 10)
    assert [counted(stage, real=real) for real in (False, True)] == whole


def wrong_stages(name, **changes):
    """The technique with one number of its last stage changed."""
    technique = find(name)

    def stages(problem, **options):
        *rest, last = technique.stages(problem, **options)
        return (*rest, replace(last, **{field: change(getattr(last, field)) for field, change in changes.items()}))

    return replace(technique, stages=stages)


@pytest.mark.parametrize(
    ("text", "changes", "kinds"),
    [
        ("lightweight1d c4 i9 k3 h2 psame", {"weights": lambda w: w + 1}, {checks.PARAMETERS}),
        ("standard2d c3-4 i6 k3 p1", {"biases": lambda b: 0}, {checks.PARAMETERS}),
        ("standard2d c3-4 i6 k3 p1", {"dilation": lambda d: (2, 2)}, {checks.OP, checks.GRADIENT, checks.FIELD}),
        ("standard2d c3-4 i6 k3 p1", {"pads": lambda p: ((1, 1), (0, 2))}, {checks.OP, checks.GRADIENT}),
        ("grouped2d c4 i6 k3 p1 g2", {"groups": lambda g: 1}, {checks.PARAMETERS, checks.OP, checks.GRADIENT}),
        ("transposed2d c3-4 i5 k4 s2 p1", {"stride": lambda s: (1, 1)}, {checks.OP, checks.GRADIENT}),
        ("deformable2d c4 i5 k3 p1", {"kernel": lambda k: (3, 2)}, {checks.OP, checks.PARAMETERS, checks.FIELD}),
    ],
)
def test_a_wrong_stage_is_seen(text, changes, kinds):
    _, problem = parse(text)
    wrong = {check.check for check in of_problem(wrong_stages(problem.technique, **changes), problem) if not check.ok}
    assert wrong >= kinds, wrong


@pytest.mark.parametrize(
    ("name", "formula", "kind"),
    [
        ("macs_dense", lambda s: s.in_channels * s.out_channels * 9 * s.out[0] * s.out[1], checks.EVERY_TAP),  # forgets the groups
        ("macs_valid", lambda s: s.macs_dense, checks.REAL_INPUTS),  # forgets the padding
        ("params", lambda s: s.in_channels * s.out_channels * 9, checks.PARAMETERS),
    ],
)
def test_a_wrong_formula_is_seen(name, formula, kind, monkeypatch):
    text = "grouped2d c4 i6 k3 p1 g2"
    assert verify(text).failed == ()
    monkeypatch.setattr(Stage, name, property(formula))
    assert kind in {check.check for check in verify(text).failed}


def test_transposed_counted_on_its_output_is_seen(monkeypatch):
    """What torchinfo, thop and torch-scan do."""

    def on_outputs(stage):
        return stage.out[0] * stage.out[1] * stage.in_channels * stage.out_channels * 16

    monkeypatch.setattr(Stage, "macs_dense", property(on_outputs))
    (wrong,) = [c for c in verify("transposed2d c2-3 i5 k4 s2 p1").failed if c.check == checks.EVERY_TAP]
    assert wrong.got == 4 * wrong.expected


def test_an_op_that_does_something_else_is_seen(monkeypatch):
    technique, problem = parse("standard2d c3-4 i6 k3 p1")
    halved = replace(technique, ops={2: lambda *a, **k: technique.ops[2](*a, **k)[..., ::2]})
    assert {c.check for c in of_problem(halved, problem, field=False) if not c.ok} == {checks.OP, checks.GRADIENT}


def test_a_wrong_receptive_field_is_seen(monkeypatch):
    monkeypatch.setattr(_technique, "receptive_field", lambda kernel, dilation: kernel)
    (wrong,) = verify("dilated2d c2 i9 k3 d2").failed
    assert (wrong.check, wrong.expected, wrong.got) == (checks.FIELD, (5, 5), (3, 3))


def test_other_padding_modes_land_every_tap():
    for mode in ("reflect", "replicate", "circular"):
        result = verify(f"standard2d c2-3 i5x4 k3x2 s2 p1+0x1 mode:{mode}")
        (row,) = [r for r in result.rows if r.check == checks.OTHER_MODES]
        (dense,) = [r for r in result.rows if r.check == checks.EVERY_TAP]
        assert row.ok
        assert row.expected == dense.expected


def test_the_command(monkeypatch, tmp_path):
    text = "depthwise2d c3 i6 k3 p1 m2"
    shown = RUN.invoke(app, ["verify", text])
    assert shown.exit_code == 0, shown.output
    assert "all equal" in shown.stdout
    whole = json.loads(RUN.invoke(app, ["verify", text, "--format", "json"]).stdout)
    assert whole["schema_version"] == 1
    assert {"check", "problem", "expected", "got", "ok"} <= whole["rows"][0].keys()
    assert all(row["ok"] for row in whole["rows"])
    assert RUN.invoke(app, ["verify", "pointwise", "-o", str(tmp_path / "v.csv")]).exit_code == 0
    assert len((tmp_path / "v.csv").read_text().splitlines()) == len(verify("pointwise").rows) + 1
    assert "| pointwise |" in RUN.invoke(app, ["verify", "pointwise", "--format", "md"]).stdout
    monkeypatch.setattr(Stage, "macs_valid", property(lambda stage: stage.macs_dense))
    for target in (text, "lightweight"):
        for form in ("table", "json", "csv", "md"):
            assert RUN.invoke(app, ["verify", target, "--format", form]).exit_code == 1
    assert "do not agree" in RUN.invoke(app, ["verify", "lightweight"]).stdout


@pytest.mark.parametrize("target", ["nonsense", "standard2d c3-4", "standard2d c3 i2 k5", ""])
def test_what_is_no_target_is_refused(target):
    result = RUN.invoke(app, ["verify", target])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert ", got " in result.stderr


def test_the_room_names_what_it_has():
    assert set(room.__all__) <= set(dir(room))
    assert Problem.parse("standard2d c2 i3")  # a Problem's text is the target's
