"""The main job: every technique's row is right, counted and timed, and a wrong one is caught before it is timed."""

import csv
import io
import json
import re
from dataclasses import replace
from functools import partial
from math import prod

import pytest
import torch
from PIL import Image

import omniconv.bench.compare as bench
import omniconv.testing
from omniconv import techniques
from omniconv.analysis.tables import as_csv, as_json, as_markdown
from omniconv.bench.compare import BASE, SEQUENCE_BASELINES, Settings, compare, fresh_layer
from omniconv.bench.report import headline, report, tables
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, find, parse
from omniconv.testing import layer_calls, verify_gradients, verify_layer
from omniconv.timing import Interrupted, alternate

SMALL = {"channels": 8, "size": 6, "budget": 0.01}


@pytest.fixture(scope="module")
def small():
    return compare(**SMALL)


@pytest.fixture(autouse=True)
def _one_short_sample(monkeypatch):
    monkeypatch.setattr(bench, "alternate", partial(alternate, rounds=(1, 1), sample=0.0))


def test_every_technique_has_a_verified_row(small):
    assert small.verified == tuple(dict.fromkeys(row.technique for row in small.rows))
    assert set(small.verified) == {t.name for t in TECHNIQUES}
    assert small.verdict.startswith(f"{len(TECHNIQUES)} techniques verified against their references")
    assert not small.failed
    assert not small.interrupted


def test_pictures_for_two_axes_sequences_for_the_rest_beside_the_baselines(small):
    expected = [(t.name, "picture") for t in TECHNIQUES if 2 in t.ranks]
    expected += [(name, "sequence") for name in SEQUENCE_BASELINES]
    expected += [(t.name, "sequence") for t in TECHNIQUES if 2 not in t.ranks]
    assert [(row.technique, row.section) for row in small.rows] == expected


def test_rows_say_what_the_layers_are(small):
    for row in small.rows:
        problem = Problem.parse(row.problem)
        technique = find(problem.technique)
        base = Settings(channels=8, size=6).base((6, 6) if problem.rank == 2 else (36,))
        assert technique.variant_of(base) == problem
        layer = technique.layer(problem)
        assert row.params == sum(p.numel() for p in layer.parameters())
        assert row.macs_valid <= row.macs_dense
        assert len(row.receptive_field) == problem.rank
        assert 0 <= row.share <= 1
        assert row.gradient_share is None


def test_times_and_ratios(small):
    for section in ("picture", "sequence"):
        rows = [row for row in small.rows if row.section == section]
        base = next(row for row in rows if row.technique == BASE)
        for row in rows:
            assert 0 < row.latency_s.low <= row.latency_s.median <= row.latency_s.high
            assert row.to_standard == pytest.approx(row.latency_s.median / base.latency_s.median)
            assert row.peer_agrees
            assert row.peer == find(row.technique).peers[0].name
            assert row.to_peer == pytest.approx(row.op_s.median / row.peer_s.median)


def test_the_same_picture_gives_the_same_maps(small):
    again = compare(**SMALL)
    assert [row.share for row in again.rows] == [row.share for row in small.rows]
    for index, features in small.features.items():
        assert torch.equal(features.maps, again.features[index].maps)
    other = compare(**SMALL, seed=1)
    assert not torch.equal(small.stem.maps, other.stem.maps)


def test_features_have_the_shape_of_the_outputs(small):
    assert set(small.features) == set(range(len(small.rows)))
    for index, row in enumerate(small.rows):
        problem = Problem.parse(row.problem)
        maps = small.features[index].maps
        assert maps.isfinite().all()
        assert prod(maps.shape[1:]) == prod(find(row.technique).output_shape(problem)[2:])
        assert small.features[index].picture_shaped


@pytest.mark.parametrize("dtype", ["f64", "bf16", "f16"])
def test_dtypes(dtype):
    result = compare(**SMALL, dtype=dtype)
    assert len(result.verified) == len(TECHNIQUES), result.verdict
    assert all(f"dt:{dtype}" in row.problem for row in result.rows)


@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16"])
def test_backward_verifies_the_gradients(dtype):
    result = compare(**SMALL, backward=True, dtype=dtype)
    assert len(result.verified) == len(TECHNIQUES), result.verdict
    assert all(0 <= row.gradient_share <= 1 for row in result.rows)
    assert all(row.to_peer for row in result.rows)
    assert "forward + backward" in headline(result)


def test_channels_last_and_batches():
    result = compare(**SMALL, channels_last=True, batch=3)
    assert len(result.verified) == len(TECHNIQUES), result.verdict
    assert all(row.problem.endswith(" cl") == (row.section == "picture") for row in result.rows)
    assert all(" n3 " in row.problem for row in result.rows)


@pytest.mark.parametrize(
    ("channels", "kernel", "size"), [(1, 1, 1), (1, 3, 1), (3, 3, 2), (7, 2, 5), (2, 4, 7), (6, 5, 3), (64, 3, 4), (9, 7, 9)]
)
def test_odd_sizes(channels, kernel, size):
    result = compare(channels=channels, kernel=kernel, size=size, budget=0.001)
    assert len(result.verified) == len(TECHNIQUES), result.verdict
    for row in result.rows:
        problem = Problem.parse(row.problem)
        assert find(row.technique).output_shape(problem)[0] == 1


def test_a_picture_of_the_users(tmp_path):
    Image.radial_gradient("L").save(tmp_path / "mine.png")
    result = compare(tmp_path / "mine.png", **SMALL)
    assert result.picture == "mine.png"
    assert not torch.equal(result.stem.maps, compare(**SMALL).stem.maps)


@pytest.mark.parametrize("length", [1, 2, 20, 1000])
def test_a_sequence_of_the_users(tmp_path, length):
    (tmp_path / "a.csv").write_text("".join(f"{i % 7},{i * i % 11}\n" for i in range(length)))
    result = compare(sequence=tmp_path / "a.csv", **SMALL)
    assert len(result.verified) == len(TECHNIQUES), result.verdict
    assert result.sequence == "a.csv"
    assert {Problem.parse(r.problem).size for r in result.rows if r.section == "sequence"} == {(min(length, 36),)}
    assert not any(result.features[i].picture_shaped for i, r in enumerate(result.rows) if r.section == "sequence")
    assert "a.csv" in report(result)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("channels", 0),
        ("channels", -1),
        ("channels", True),
        ("channels", 1.5),
        ("kernel", 0),
        ("size", 0),
        ("batch", 0),
        ("seed", -1),
        ("size", 2**31),
        ("dtype", "f8"),
        ("channels", 10**6),
        ("size", 10**5),
        ("kernel", 10**6),
    ],
)
def test_settings_that_are_refused(setting, value):
    with pytest.raises(ValueError, match=r"^compare: .* must .*, got "):
        compare(**{setting: value})


# what goes wrong


def owns(row, name):
    """Whether a row's layer is one of that technique or owns one."""
    inside = find(row.technique).layer(Problem.parse(row.problem)).modules()
    return any(isinstance(m, omniconv.testing.Layer) and m.technique == name for m in inside)


def broken(monkeypatch, name, **changes):
    """The list with one technique's record changed."""
    changed = tuple(replace(t, **changes) if t.name == name else t for t in TECHNIQUES)
    monkeypatch.setattr(techniques, "TECHNIQUES", changed)
    monkeypatch.setattr(bench, "TECHNIQUES", changed)


@pytest.mark.parametrize("name", [t.name for t in TECHNIQUES if t.name != BASE])
def test_a_wrong_answer_fails_and_is_not_timed(monkeypatch, name):
    right = find(name)
    broken(monkeypatch, name, reference=lambda *args, **kwargs: right.reference(*args, **kwargs) * 1.001)
    result = compare(**SMALL)
    assert name in {row.technique for row in result.failed}
    assert not {row.technique for row in result.failed} & set(result.verified)
    for row in result.failed:
        assert owns(row, name)
        assert "bound" in row.reason
        assert row.latency_s is row.to_standard is row.to_peer is None
    assert "FAILED" in result.verdict
    assert "FAILED" in as_markdown(tables(result))
    assert "FAILED" in report(result)


def test_a_layer_that_raises_fails_its_own_row(monkeypatch):
    def layer(problem):
        raise RuntimeError("no\nlayer")

    name = next(t.name for t in TECHNIQUES if t.name != BASE and t.name not in SEQUENCE_BASELINES)
    broken(monkeypatch, name, layer=layer)
    result = compare(**SMALL)
    assert [(row.technique, row.reason) for row in result.failed] == [(name, "RuntimeError: no layer")]


def test_a_peer_that_computes_something_else_is_not_compared_with(monkeypatch):
    name = TECHNIQUES[-1].name
    peer = find(name).peers[0]
    broken(monkeypatch, name, peers=(replace(peer, run=lambda **operands: peer.run(**operands) * 1.1),))
    result = compare(**SMALL)
    row = result.rows[-1]
    assert row.status == "verified"
    assert row.latency_s
    assert row.peer_agrees is False
    assert row.to_peer is row.peer_s is None
    assert "≠: plain torch's answer" in as_markdown(tables(result))


def test_a_wrong_gradient_fails(monkeypatch):
    """Forward right, gradient a tenth too large: only ``backward`` sees it."""
    right = find(BASE)

    def reference(input, *args, **kwargs):
        y = right.reference(input, *args, **kwargs)
        return y + 0.1 * (y - y.detach())

    broken(monkeypatch, BASE, reference=reference)
    assert not compare(**SMALL).failed
    failed = compare(**SMALL, backward=True).failed
    assert BASE in {row.technique for row in failed}
    assert all(owns(row, BASE) for row in failed)


def test_a_missing_gradient_fails(monkeypatch):
    right = find(BASE)
    broken(monkeypatch, BASE, reference=lambda input, *args, **kwargs: right.reference(input.detach(), *args, **kwargs))
    assert "gradients must reach" in compare(**SMALL, backward=True).failed[0].reason


def test_a_gradient_wrong_by_a_thousandth_fails(monkeypatch):
    right = find(BASE)

    def reference(*args, **kwargs):
        y = right.reference(*args, **kwargs)
        return y + 0.001 * (y - y.detach())

    broken(monkeypatch, BASE, reference=reference)
    failed = compare(**SMALL, backward=True).failed
    assert BASE in {row.technique for row in failed}


@pytest.mark.parametrize("seed", range(8))
def test_a_gradient_that_cancels_is_not_called_wrong(seed):
    """The softmax of one head over every tap of a circular sequence: its gradient is a small difference of large numbers."""
    technique, problem = parse("lightweight1d n1 c2 i4 k4 psame h1 mode:circular")
    torch.manual_seed(seed)
    assert verify_gradients(technique.layer(problem), torch.randn(1, 2, 4), seed=seed) <= 1


def test_interrupted_while_verifying(monkeypatch):
    seen = []

    def progress(share, what):
        seen.append(what)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        compare(**SMALL, progress=progress)
    result = stopped.value.done
    assert [row.status for row in result.rows[:5]] == ["verified"] * 3 + ["not run"] * 2
    assert result.interrupted
    assert "interrupted" in result.verdict
    assert all(row.latency_s is None for row in result.rows)
    assert f"3 of {len(TECHNIQUES)} techniques" in result.verdict
    assert "not run" in report(result)


def test_interrupted_while_timing():
    def progress(share, what):
        if what == "timing" and share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        compare(**SMALL, progress=progress)
    assert all(row.latency_s.samples == 1 for row in stopped.value.done.rows)
    assert len(stopped.value.done.verified) == len(TECHNIQUES)


def test_progress_rises_to_one():
    shares = []
    compare(**SMALL, progress=lambda share, what: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


# layers


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_fresh_layers_have_no_parameter_left_at_zero(technique):
    problem = technique.variant_of(Settings(channels=8, size=6).base((6, 6) if 2 in technique.ranks else (36,)))
    state = torch.random.get_rng_state()
    layer, again = fresh_layer(technique, problem, 3), fresh_layer(technique, problem, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not layer.training
    for p, q in zip(layer.parameters(), again.parameters(), strict=True):
        assert p.any()
        assert torch.equal(p, q)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_verification_sees_every_layer_inside_and_a_small_error(technique, monkeypatch):
    problem = technique.variant_of(Settings(channels=8, size=6).base((6, 6) if 2 in technique.ranks else (36,)))
    layer = fresh_layer(technique, problem, 0)
    x = torch.randn(1, 8, *problem.size)
    assert 0 < verify_layer(layer, x) <= 1
    assert 0 < verify_gradients(layer, x) <= 1
    inner = [m for m in layer.modules() if isinstance(m, omniconv.testing.Layer)]
    calls = layer_calls(layer, x)
    assert 1 <= len(calls) <= len(inner)
    assert calls[-1].layer is layer
    assert len({id(call.layer) for call in calls}) == len(calls)
    monkeypatch.setattr(type(layer), "forward", lambda self, *a: type(self).op(**self.operands(*a)) + 1e-3)
    with pytest.raises(AssertionError, match="bound"):
        verify_layer(layer, x)


def test_verification_sees_layers_within_other_modules(monkeypatch):
    kind, other = find(BASE).modules[2], find(SEQUENCE_BASELINES[1]).modules[2]
    module = torch.nn.Sequential(kind(2, 4, 3), torch.nn.ReLU(), torch.nn.Sequential(other(4, 3)))
    x = torch.randn(1, 2, 7, 7)
    assert [type(call.layer) for call in layer_calls(module, x)] == [kind, other]
    assert 0 < verify_layer(module, x) <= 1
    monkeypatch.setattr(other, "forward", lambda self, x: type(self).op(**self.operands(x)) + 1e-3)
    with pytest.raises(AssertionError, match="bound"):
        verify_layer(module, x)


def test_verification_needs_an_omniconv_layer():
    with pytest.raises(AssertionError, match="must hold an omniconv layer"):
        verify_layer(torch.nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2))


# what comes out


def test_json_is_whole_and_valid(small):
    data = json.loads(as_json(small), parse_constant=pytest.fail)
    assert data["schema_version"] == 1
    assert data["machine"]["torch"] == torch.__version__
    assert data["settings"]["channels"] == 8
    assert [row["technique"] for row in data["rows"]] == [row.technique for row in small.rows]
    assert data["rows"][0]["latency_s"]["median"] == small.rows[0].latency_s.median
    assert "stem" not in data


def test_csv_has_one_line_a_row_in_full_precision(small):
    lines = list(csv.DictReader(io.StringIO(as_csv(tables(small)))))
    assert [line["problem"] for line in lines] == [row.problem for row in small.rows]
    assert [line["section"] for line in lines] == [row.section for row in small.rows]
    assert float(lines[0]["latency_ms"]) == 1e3 * small.rows[0].latency_s.median
    assert int(lines[0]["macs_dense"]) == small.rows[0].macs_dense


def test_markdown_has_a_table_for_each_section(small):
    text = as_markdown(tables(small))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(small.rows) + 4
    assert len({line.count("|") for line in lines}) == 1


def test_the_report_is_self_contained(small):
    page = report(small)
    assert page.startswith("<!doctype html>")
    assert not re.search(r"""(?:src|href|srcset)\s*=\s*["'](?!data:)""", page)
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)
    assert page.count("data:image/png") == 2 + len(small.rows)
    assert page.count("data:image/svg") == 2
    for row in small.rows:
        assert row.problem in page
        assert row.title in page
    assert small.verdict in page
    assert small.machine.cpu in page


def test_the_report_escapes_names(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "<b>&.png")
    page = report(compare(tmp_path / "<b>&.png", **SMALL))
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;.png" in page
