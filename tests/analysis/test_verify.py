"""``verify``: all that the library says of its convolutions is what they do, and a wrong formula turns it red."""

import json
import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from omniconv.analysis import cost
from omniconv.analysis import verify as room
from omniconv.analysis.verify import checks, counted, networks, of_network, of_problem, problems, run, summaries, verify
from omniconv.analysis.verify.counters import covering, torch_modules, ways
from omniconv.cli import app
from omniconv.ops import technique as record
from omniconv.ops.technique import Stage
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, find, parse

RUN = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})


KINDS = {value for name, value in vars(checks).items() if name.isupper() and isinstance(value, str)}
WITH_ONE_STAGE = {checks.OP, checks.GRADIENT}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["some", "grid"])
@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_all_that_a_technique_takes(technique, whole, monkeypatch):
    """On a dozen problems of the grid, or on all of it; most of the time goes into the counters of each."""
    grid = list(problems(technique))
    chosen = grid if whole else random.Random(0).sample(grid, min(12, len(grid)))
    monkeypatch.setattr(run, "problems", lambda technique: chosen)
    result = verify(technique.name)
    assert result.failed == ()
    assert {row.technique for row in result.rows} == {technique.name}
    assert result.problems == len(chosen)
    some = next(iter(problems(technique)))
    left_out = set() if len([s for s in technique.stages(some) if not s.side]) == 1 else WITH_ONE_STAGE
    left_out |= {checks.GRAPH} if technique.moves_taps else set()
    left_out |= set() if "padding_mode" in technique.takes else {checks.OTHER_MODES}
    assert {s.of for s in summaries(result)} == KINDS - left_out
    assert {"layer", "function"} <= {row.of for row in result.rows if row.check == checks.DISPATCHED_DENSE}


def test_all_is_every_technique(monkeypatch):
    some = [find("pointwise"), find("lightweight")]
    monkeypatch.setattr(run, "TECHNIQUES", some)
    monkeypatch.setattr(run, "problems", lambda technique: list(problems(technique))[:2])
    told = []
    result = verify("all", progress=lambda share, what: told.append((share, what)))
    assert result.failed == ()
    assert result.problems == 4
    assert told == [(0.0, "pointwise")]
    assert [s.of for s in summaries(result, by="technique")] == ["pointwise", "lightweight"]


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
    wrong = {check.check for check in of_problem(halved, problem, field=False) if not check.ok}
    assert wrong == {checks.OP, checks.GRADIENT}


def test_a_wrong_receptive_field_is_seen(monkeypatch):
    monkeypatch.setattr(record, "receptive_field", lambda kernel, dilation: kernel)
    (wrong,) = verify("dilated2d c2 i9 k3 d2").failed
    assert (wrong.check, wrong.expected, wrong.got) == (checks.FIELD, (5, 5), (3, 3))


@pytest.mark.parametrize(
    ("metric", "kind"),
    [("macs_dense", checks.DISPATCHED_DENSE), ("macs_valid", checks.DISPATCHED_VALID), ("params", checks.DISPATCHED_PARAMETERS)],
)
def test_a_wrong_counter_is_seen(metric, kind, monkeypatch):
    def wrong(*inputs, **named):
        found = cost(*inputs, **named)
        return replace(found, **{metric: 4 * getattr(found, metric)})

    monkeypatch.setattr(checks, "cost", wrong)
    failed = verify("transposed2d c2-3 i5 k4 s2 p1").failed
    assert {row.check for row in failed} == {kind}
    owning = {"layer", "torch modules"}
    assert {row.of for row in failed} == (owning if metric == "params" else owning | {"function"})


def test_a_wrong_backward_pass_is_seen(monkeypatch):
    """What torch's own FlopCounterMode counts of a grouped one: g + 1 : 2 too much."""

    def wrong(*inputs, **named):
        found = cost(*inputs, **named)
        if found.backward is None:
            return found
        return replace(found, backward=replace(found.backward, macs_valid=found.macs_valid * 5))

    monkeypatch.setattr(checks, "cost", wrong)
    (row,) = verify("grouped2d c8 i5 k3 p1 g4").failed
    assert (row.check, row.of) == (checks.DISPATCHED_BACKWARD, "layer")
    assert row.got * 2 == row.expected * 5


def test_a_number_that_is_not_sure_is_no_agreement(monkeypatch):
    def unsure(*inputs, **named):
        found = cost(*inputs, **named)
        return replace(found, status=found.status | {"macs_dense": "lower_bound"})

    monkeypatch.setattr(checks, "cost", unsure)
    failed = verify("standard2d c2-3 i5 k3").failed
    assert {row.check for row in failed} == {checks.DISPATCHED_DENSE}
    assert {row.got for row in failed} == {f"{9 * 9 * 6} (lower_bound)"}


def test_a_graph_that_sees_something_else_is_seen(monkeypatch):
    def shifted(*inputs, **named):
        found = checks_field(*inputs, **named)
        window = replace(found.window, start=tuple(i - 1 for i in found.window.start), stop=tuple(i - 1 for i in found.window.stop))
        return replace(found, window=window)

    checks_field = checks.receptive_field
    monkeypatch.setattr(checks, "receptive_field", shifted)
    (row,) = verify("dilated2d c2 i9 k3 d2").failed
    assert (row.check, row.expected, row.got) == (checks.GRAPH, 9, 9)


def test_ways_to_run_a_problem():
    def names(text):
        return [way.name for way in ways(*parse(text))]

    assert names("separable2d c3-4 i6 k3 p1") == ["layer", "function", "torch modules"]
    assert names("standard2d c3-4 i6 k3 p1+0x1") == ["layer", "function"]  # torch has no uneven pads
    assert names("lightweight1d c4 i9 k3 h2") == ["layer", "function"]
    technique, problem = parse("transposed2d c4-6 i5x4 k4x3 s2 p1x0 op1 g2")
    made = torch_modules(technique.stages(problem))
    assert made(torch.ones(1, 4, 5, 4)).shape == technique.output_shape(problem)


def test_covering_problems_meet_all_pairs():
    found = list(problems(find("grouped")))
    few = covering(found)
    assert len(few) < len(found) / 5

    def pairs(some):
        return {(p.rank, p.stride, p.groups) for p in some} | {(str(p.padding), p.dilation) for p in some}

    assert pairs(few) >= {(str(p.padding), p.dilation) for p in found}
    assert {(p.stride, p.groups) for p in few} == {(p.stride, p.groups) for p in found}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.up(self.deep(self.deep(x))).mean((2, 3)))


def test_a_network():
    network = Small().train()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    rows = list(of_network("small", network, (torch.randn(2, 3, 9, 9),), {}))
    assert all(row.ok for row in rows)
    (together,) = [row for row in rows if row.check == networks.ALL_VALID]
    assert together.of == "4 calls"
    assert {row.technique for row in rows} >= {"standard", "depthwise", "transposed"}
    assert network.training
    assert all(torch.equal(before[name], x) for name, x in network.state_dict().items())


def test_a_wrong_row_of_a_network_is_seen(monkeypatch):
    def wrong(*inputs, **named):
        found = cost(*inputs, **named)
        rows = [replace(row, macs_dense=4 * row.macs_dense) if row.technique == "transposed" else row for row in found.rows]
        return replace(found, rows=tuple(rows))

    monkeypatch.setattr(networks, "cost", wrong)
    (row,) = [row for row in of_network("small", Small(), (torch.randn(1, 3, 9, 9),), {}) if not row.ok]
    assert (row.check, row.of) == (networks.ROW_DENSE, "up")


def test_a_convolution_that_is_not_in_the_cost_is_seen(monkeypatch):
    def without_one(*inputs, **named):
        found = cost(*inputs, **named)
        return replace(found, rows=tuple(row for row in found.rows if row.name != "stem"))

    monkeypatch.setattr(networks, "cost", without_one)
    (row,) = [row for row in of_network("small", Small(), (torch.randn(1, 3, 9, 9),), {}) if not row.ok]
    assert row.check == networks.ALL_VALID


def test_large_convolutions_of_a_network_are_counted_by_one_pair_of_channels(monkeypatch):
    whole = [row.expected for row in of_network("small", Small(), (torch.randn(2, 3, 9, 9),), {})]
    monkeypatch.setattr(networks, "FEW", 10)
    assert [row.expected for row in of_network("small", Small(), (torch.randn(2, 3, 9, 9),), {})] == whole


def test_networks_of_the_command(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2))\n"
        "class Broken(nn.Module):\n    def forward(self, x): raise RuntimeError('no such luck')\n"
    )
    shown = RUN.invoke(app, ["verify", f"{tmp_path / 'mine.py'}:net", "--input", "1x3x9x9"])
    assert shown.exit_code == 0, shown.output
    assert "all equal" in shown.stdout
    broken = RUN.invoke(app, ["verify", f"{tmp_path / 'mine.py'}:Broken", "--input", "1x3x9x9"])
    assert broken.exit_code == 2
    assert "RuntimeError: no such luck" in broken.stderr
    assert RUN.invoke(app, ["verify", f"{tmp_path / 'mine.py'}:net", "--input", "1x2x9x9"]).exit_code == 2


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


def test_a_problem_beyond_running_is_refused():
    for text in ("standard2d c999999999 i999999999 k3", "pointwise1d c1 i999999999"):
        with pytest.raises(ValueError, match=r"^verify: the problem must be small enough to run, at most 1e\+10 multiply"):
            verify(text)
