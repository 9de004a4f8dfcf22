"""Speed: the layers that are measured, who they are compared with, what the times say, and that nothing wrong is ever timed."""

import csv
import importlib
import io
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from omniconv import techniques
from omniconv.analysis.tables import as_csv, as_json, as_markdown
from omniconv.bench import peaks as limits
from omniconv.bench import peers, runner
from omniconv.bench.networks import NetworkLayer, measurable, parse_layers, read_layers
from omniconv.bench.peaks import Demand, Floor, Level, Peaks, caches, measure_peaks
from omniconv.bench.peers import BOTH, DIRECTIONS, FORWARD, Absent, Task, Way, onnx_model, rivals, ways
from omniconv.bench.runner import Benchmark, Measured, Row, StoppedClock, agree, fastest, load, run, slug
from omniconv.bench.speed import NO_RESULTS, RESULTS, committed, readme_table, remarks, summaries, tables, update_readme, verdict
from omniconv.cli import app
from omniconv.nn import LightweightConv1d
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, find, parse
from omniconv.testing import make_inputs
from omniconv.timing import Interrupted, Timing, alternate, machine

REPOSITORY = Path(__file__).parent.parent
PEAKS = Peaks(1e9, 5e8, (Level("L1", 1000, 4e9), Level("L2", 10_000, 2e9), Level("DRAM", None, 1e9)))
TINY = ("depthwise1d c3 i9 k3 p1", "depthwise2d c3 i5x6 k3 p1", "depthwise3d c2 i3x4x3 k2 p1")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """One short sample of everything on a machine with known peaks, without the runtimes that may be installed here."""
    monkeypatch.setattr(runner, "alternate", partial(alternate, rounds=(1, 1), sample=0.0))
    monkeypatch.setattr(runner, "COLD_ROUNDS", (1, 1))
    monkeypatch.setattr(runner, "measure_peaks", lambda double: PEAKS)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


def layers(*texts):
    return [NetworkLayer("net", Problem.parse(text)) for text in texts]


def measured(*texts, **options):
    return run("depthwise", layers=layers(*(texts or TINY)), budget=0.01, **options)


def timing(median, width=0.0):
    return Timing(median, median - width, median + width, samples=5, repeats=1)


def row(ratio=2.0, *, problem="depthwise2d n1 c4 i8 k3 p1", direction=FORWARD, f32=None, noise=False, network="net"):
    """Ours takes a second, the best peer as many as the ratio says."""
    return Row(
        network,
        problem,
        direction,
        "verified",
        floor=Floor(0.25, "L2"),
        ours=(Measured("contiguous", timing(1.5), agrees=True), Measured("channels-last", timing(1.0, 0.1), agrees=True)),
        f32=() if f32 is None else (Measured("contiguous", timing(f32), agrees=True),),
        peers=(
            Measured("torch contiguous", timing(2 * ratio), agrees=True),
            Measured("OpenVINO", timing(ratio, 10.0 if noise else 0.0), agrees=True),
            Measured("ONNX Runtime", reason="NotImplemented: no"),
        ),
    )


def benchmark(*rows, **changes):
    absent = (Absent("OpenVINO", "openvino is not installed"),)
    made = Benchmark(runner.Settings("depthwise"), rows, PEAKS, absent, ("A note.",), "native", (), None, machine())
    return replace(made, **changes)


# what is measured


@pytest.mark.parametrize("name", measurable())
def test_the_layers_of_a_technique(name):
    technique, found = read_layers(name)
    assert technique.name == name
    assert len({layer.problem for layer in found}) == len(found)
    assert all(layer.network and not layer.problem.channels_last for layer in found)


def test_the_layers_of_depthwise():
    _, found = read_layers("depthwise")
    assert 40 <= len(found) <= 60
    assert {layer.problem.rank for layer in found} == {1, 2, 3}
    assert {layer.problem.dtype for layer in found} == {"f32", "bf16", "f16"}
    assert {k for layer in found for k in layer.problem.kernel} >= {3, 4, 5, 7, 31}
    assert any(layer.problem.channels % 8 and max(layer.problem.dilation) > 1 for layer in found)


@pytest.mark.parametrize("name", ["lightweight", "dynamic"])
def test_the_layers_over_sequences(name):
    _, found = read_layers(name)
    assert 30 <= len(found) <= 40
    problems = [layer.problem for layer in found]
    assert {p.dtype for p in problems} == {"f32", "bf16", "f16"}
    for network, heads in (("WMT encoder", 16), ("WMT decoder", 16), ("IWSLT", 4)):
        mine = [layer.problem for layer in found if layer.network.endswith(network)]
        assert {p.kernel[0] for p in mine} >= {3, 7, 15, 31}
        assert {p.heads for p in mine} == {heads}
    assert any(p.size == (1,) for p in problems)
    assert any(p.kernel > p.size > (1,) for p in problems)
    assert any(p.heads == 1 for p in problems)
    assert any(p.heads == p.channels for p in problems)
    assert any(p.channels % 8 and p.dilation > (1,) for p in problems)


def test_headers_comments_and_malformed_lines():
    text = "# of networks\n\n#  network:  Big Net \ndepthwise2d c3 i5 k3  # the first\n# more\n# network: B\ndepthwise1d c2 i4 k3\n"
    assert [(layer.network, str(layer.problem)) for layer in parse_layers(text, "depthwise")] == [
        ("Big Net", "depthwise2d n1 c3 i5 k3"),
        ("B", "depthwise1d n1 c2 i4 k3"),
    ]
    with pytest.raises(ValueError, match=r"^bench: line 1: a layer must follow a line '# network: NAME', got"):
        parse_layers("depthwise2d c3 i5 k3", "depthwise")
    with pytest.raises(ValueError, match=r"^bench: line 2: .*got 'x9'"):
        parse_layers("# network: A\ndepthwise2d c3 i5 x9", "depthwise")
    with pytest.raises(ValueError, match=r"^bench: line 2: the technique must be depthwise, got"):
        parse_layers("# network: A\nstandard2d c3-4 i5 k3", "depthwise")


def test_a_choice_of_layers():
    _, all_of_them = read_layers("depthwise")
    _, some = read_layers("depthwise", only="convnext")
    assert {layer.network for layer in some} == {"ConvNeXt-T"}
    _, some = read_layers("depthwise", only="k31")
    assert some
    assert all("k31" in str(layer.problem) for layer in some)
    _, double = read_layers("depthwise", dtype="f64")
    assert {layer.problem.dtype for layer in double} == {"f64"}
    assert len({layer.problem for layer in double}) == len(double) < len(all_of_them)  # half types fall on layers that are there
    with pytest.raises(ValueError, match=r"^bench: 'only' must occur in a network or a problem of depthwise, got 'no such'"):
        read_layers("depthwise", only="no such")
    with pytest.raises(ValueError, match=r"^bench: the technique must be one of depthwise.*, got 'convolution'"):
        read_layers("convolution")


# what the machine can do


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


def test_the_rows_floor_is_that_of_its_layer():
    forward, both = measured("depthwise2d n2 c3 i5x6 k3 p1").rows
    # rows and columns that a tap finds: 4 + 5 + 4 of 5, 5 + 6 + 5 of 6
    macs = 2 * 3 * (4 + 5 + 4) * (5 + 6 + 5)
    x, parameters = 4 * 2 * 3 * 5 * 6, 4 * (3 * 9 + 3)
    assert (forward.macs, forward.bytes) == (macs, x + parameters + x)
    assert (both.macs, both.bytes) == (3 * macs, 3 * (x + parameters) + 2 * x)
    assert forward.floor == Demand(2 * macs, 2 * x + parameters, 2 * x + parameters).floor(PEAKS)
    assert forward.to_floor == fastest(forward.ours).hot.median / forward.floor.seconds
    assert forward.cold_floor is None


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


# who is compared with


def task(text, threads=1):
    technique, problem = parse(text)
    operands = make_inputs(technique, problem)
    arguments = technique.arguments(problem)
    if problem.technique in ("lightweight", "dynamic"):
        arguments["layout"] = "NCT"
    grad_y = torch.rand(technique.output_shape(problem)) + 0.5
    return Task(technique, problem, {**operands, **arguments}, grad_y.to(problem.torch_dtype), threads)


def right_answer(given, direction):
    op = given.technique.ops[given.problem.rank]
    return peers.torch_way("ours", direction, op, given.operands, given.grad_y).answer()


PROBLEMS = (
    *TINY,
    "depthwise1d n2 c3 i11 k4 p3+0",
    "depthwise1d n2 c3 i11 k4 s2 p1+0",
    "depthwise1d n2 c3 i11 k4 p0+2",
    "depthwise2d c3 i7x9 k3 s2x1 p0+2x1+3",
    "depthwise2d n2 c3 i7x6 k3x2 s2 p0+1",
    "depthwise2d c3 i7x6 k3 s2 p2+0x1",
    "depthwise2d c2 i9 k3 d2 psame m2",
    "depthwise3d c2 i4x5x3 k2x3x1 s1x2x1 p1+0x1x0",
    "depthwise2d c3 i5 k3 p1 dt:bf16",
    "depthwise2d c3 i5 k3 p1 mode:reflect",
    "separable2d c3-4 i5 k3 p1",
)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("text", PROBLEMS)
def test_every_way_of_torch_computes_the_same(text, direction):
    given = task(text)
    with torch.set_grad_enabled(direction == BOTH):
        found = list(ways(given, direction, [peers.TORCH]))
        assert all(isinstance(way, Way) for way in found), found
        expected = right_answer(given, direction)
        assert len(expected) == (1 if direction == FORWARD else sum(isinstance(v, torch.Tensor) for v in given.operands.values()))
        for way in found:
            assert agree(way.answer(), expected), way.name


SEQUENCES = (
    "lightweight1d n2 c6 i9 k4 pcausal d2 h3",
    "lightweight1d n3 c5 i7 k3 p0+3 h1",
    "lightweight1d n3 c5 i20 k3 pcausal h5",
    "lightweight1d c8 i16 k5 psame h4 mode:circular",
    "lightweight1d n2 c4 i1 k5 pcausal h2",
    "lightweight1d n2 c4 i3 k7 psame h2 dt:bf16",
    "lightweight1d c1 i7 k3 psame h1",
    "dynamic1d n2 c6 i9 k4 pcausal d2 h3",
    "dynamic1d n3 c5 i7 k3 psame h1",
    "dynamic1d c5 i7 k3 psame h5",
    "dynamic1d n2 c8 i16 k5 psame h4 mode:replicate",
    "dynamic1d n2 c4 i3 k7 psame h2 dt:f16",
)
FORMULATIONS = ("depthwise", "depthwise 2-D", "folded", "folded 2-D", "unfold", "band", "shift and add", "add out of place")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("text", [*SEQUENCES, *(text + " one kernel" for text in SEQUENCES if text.startswith("dynamic"))])
def test_every_formulation_computes_the_same_in_every_layout(text, direction):
    text, one, _ = text.partition(" one kernel")
    given = task(text)
    if one:
        given.operands["kernels"] = given.operands["kernels"][..., :1].contiguous()
    with torch.set_grad_enabled(direction == BOTH):
        found = list(ways(given, direction, [peers.TORCH]))
        assert {w.name for w in found} == {f"torch {name} {layout}" for name in FORMULATIONS for layout in ("NCT", "NTC", "TNC")}
        expected = right_answer(given, direction)
        for way in found:
            if text.startswith("dynamic") and not one and ("depthwise" in way.name or "folded" in way.name):
                with pytest.raises(ValueError, match="one kernel for all positions"):
                    raise ValueError(way.reason) if isinstance(way, Absent) else way.answer()
            else:
                assert agree(way.answer(), expected), way.name


def test_operands_are_given_in_a_layout():
    given = task("dynamic1d n2 c6 i5 k3 psame h3").operands
    changed = peers.laid_out(given, "TNC")
    assert changed["layout"] == "TNC"
    assert changed["input"].shape == (5, 2, 6)
    assert changed["input"].is_contiguous()
    assert torch.equal(changed["input"].permute(1, 2, 0), given["input"])
    assert torch.equal(changed["kernels"], given["kernels"])
    assert changed["kernels"].permute(3, 0, 1, 2).is_contiguous()
    assert changed["bias"] is given["bias"]


def test_the_ways_of_torch():
    def names(text):
        return [way.name for way in ways(task(text), FORWARD, [peers.TORCH])]

    assert names("depthwise2d c3 i5 k3 p1") == ["torch contiguous", "torch channels-last"]
    assert names("depthwise1d c3 i5 k3") == [
        "torch contiguous",
        "torch as 2-D contiguous",
        "torch as 2-D channels-last",
    ]
    assert names("depthwise3d c3 i5 k3 s2 p0+1") == [  # a stride of two cannot begin a step earlier
        "torch contiguous, padded",
        "torch channels-last, padded",
    ]
    assert "torch contiguous, cropped" in names("depthwise2d c3 i5 k3 s2 p0+2")
    assert names("depthwise2d c3 i5 k3 p1+0")[2:] == ["torch contiguous, cropped", "torch channels-last, cropped"]
    assert names("separable2d c3-4 i5 k3") == ["torch contiguous", "torch channels-last"]


def test_operands_are_given_in_channels_last():
    given = task("depthwise2d c3 i5 k3 p1")
    changed = peers.formatted(given.operands, 2)
    assert changed["input"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(changed["input"], given.operands["input"])
    assert changed["bias"] is given.operands["bias"]


@pytest.mark.parametrize("text", ["depthwise1d n2 c3 i11 k4 p3+0", "depthwise2d n2 c4 i7x6 k3x2 s2x1 p1+0x2 m2", *TINY[2:]])
def test_the_onnx_model_is_the_problem(text):
    onnx = pytest.importorskip("onnx")
    reference = importlib.import_module("onnx.reference")
    given = task(text)
    model = onnx.load_from_string(onnx_model(given))
    onnx.checker.check_model(model, full_check=True)
    (y,) = reference.ReferenceEvaluator(model).run(None, {"input": given.operands["input"].numpy()})
    assert agree([torch.from_numpy(y)], right_answer(given, FORWARD))


@pytest.mark.parametrize("rival", [peers.ONNXRUNTIME, peers.OPENVINO], ids=lambda r: r.name)
@pytest.mark.parametrize("text", ["depthwise2d n2 c4 i7x6 k3x2 s2x1 p1+0x2 m2", *TINY])
def test_the_runtimes_compute_the_same(rival, text):
    for package in rival.packages:
        pytest.importorskip(package)
    given = task(text)
    (way,) = ways(given, FORWARD, [rival])
    assert isinstance(way, Way), way
    assert agree(way.answer(), right_answer(given, FORWARD))
    given.operands["input"].mul_(2)  # the input is bound, not copied
    assert agree(way.answer(), right_answer(given, FORWARD))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_computes_sequences_the_same():
    given = task("lightweight1d n2 c6 i9 k4 pcausal h3")
    with torch.no_grad():
        found = list(ways(given, FORWARD, [peers.COMPILED]))
        assert [way.name for way in found] == ["torch.compile shift and add NCT", "torch.compile shift and add NTC"]
        assert all(agree(way.answer(), right_answer(given, FORWARD)) for way in found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_computes_the_same():
    given = task("depthwise2d n2 c4 i7x6 k3x2 s2x1 p1+0x2 m2")
    with torch.no_grad():
        found = list(ways(given, FORWARD, [peers.COMPILED]))
        assert [way.name for way in found][:2] == ["torch.compile contiguous, padded", "torch.compile channels-last, padded"]
        assert all(agree(way.answer(), right_answer(given, FORWARD)) for way in found)
    assert not list(ways(task(TINY[0]), FORWARD, [peers.COMPILED]))
    assert not list(ways(given, BOTH, [peers.COMPILED]))


def test_a_peer_that_is_not_installed_is_absent_with_a_reason():
    asked, absent = rivals(compiled=False)
    assert asked == (peers.TORCH,)
    assert absent == (
        Absent("torch.compile", "it was not asked for (--compile)"),
        Absent("ONNX Runtime", "onnx and onnxruntime are not installed"),
        Absent("OpenVINO", "onnx and openvino are not installed"),
    )
    assert rivals(compiled=True)[0] == (peers.TORCH, peers.COMPILED)
    result = measured(TINY[1])
    assert result.absent == absent
    assert "Absent: OpenVINO: onnx and openvino are not installed." in remarks(result)


def test_a_peer_that_refuses_is_absent_from_its_row(monkeypatch):
    def refuse(task, direction):
        raise RuntimeError("no such\nconvolution" + 300 * "!")

    stubborn = replace(peers.OPENVINO, prepare=refuse)
    monkeypatch.setattr(runner, "rivals", lambda compiled: ((peers.TORCH, stubborn), ()))
    forward, both = measured(TINY[1]).rows
    (absent,) = [way for way in forward.peers if way.name == "OpenVINO"]
    assert absent.reason.startswith("RuntimeError: no such convolution!")
    assert len(absent.reason) == 200
    assert absent.hot is absent.agrees is None
    assert forward.ratio > 0
    assert all(way.name != "OpenVINO" for way in both.peers)


def test_what_is_no_plain_convolution_is_refused_in_words():
    for text in ("separable2d c3-4 i5 k3", "transposed2d c3-4 i5 k3", "depthwise2d c3 i5 k3 p1 mode:reflect"):
        with pytest.raises(ValueError, match="not one plain convolution"):
            _ = task(text).stage


# what is right and what is not


def test_every_layer_is_verified_and_timed_in_both_directions():
    result = measured()
    assert [(r.problem.partition(" ")[0], r.direction) for r in result.rows] == [
        (f"depthwise{rank}d", direction) for rank in (1, 2, 3) for direction in DIRECTIONS
    ]
    for r in result.rows:
        assert r.status == "verified"
        assert 0 <= r.share <= 1
        assert (r.gradient_share is not None) == (r.direction == BOTH)
        assert [way.name for way in r.ours] == ["contiguous", "as 2-D channels-last" if "1d" in r.problem else "channels-last"]
        assert all(way.agrees and way.hot and way.cold is None for way in (*r.ours, *r.peers))
        best = min(way.hot.median for way in r.peers)
        assert r.ratio == best / min(way.hot.median for way in r.ours)
        assert not r.f32
        assert r.f32_ratio is r.cold_ratio is None
    assert not result.failed
    assert not result.interrupted
    assert verdict(result).startswith("6 verified; 2-D forward × ")


SMALL = ("lightweight1d n2 c6 i9 k3 psame h3", "dynamic1d n2 c6 i9 k3 psame h3")


@pytest.mark.parametrize("text", SMALL)
def test_sequences_are_verified_and_timed_in_every_layout(text):
    result = run(text.partition("1d")[0], layers=layers(text), budget=0.01)
    assert [(r.status, r.direction) for r in result.rows] == [("verified", FORWARD), ("verified", BOTH)], result.failed
    for r in result.rows:
        assert [way.name for way in r.ours] == ["NCT", "NTC", "TNC"]
        assert all(way.agrees and way.hot for way in r.ours)
        assert 0 <= r.share <= 1
        assert (r.gradient_share is not None) == (r.direction == BOTH)
        timed = [way for way in r.peers if way.hot]
        assert len(timed) == (24 if r.problem.startswith("lightweight") else 12)
        assert all(way.reason for way in r.peers if not way.hot)
        assert r.layouts.keys() == {"NCT", "NTC", "TNC"}
        ours = {way.name: way.hot.median for way in r.ours}
        for layout, ratio in r.layouts.items():
            assert ratio == min(way.hot.median for way in timed if way.name.endswith(layout)) / ours[layout]
    (absent,) = [line for line in remarks(result) if "one kernel for all" in line] or [""]
    assert absent.count("torch") == (0 if text.startswith("lightweight") else 4)


def test_the_floor_of_a_dynamic_layer_is_that_of_the_application():
    """Positions that a tap finds: 8, 9 and 8 of 9; the projection is another op."""
    (only,) = run("dynamic", layers=layers(SMALL[1]), budget=0.01, directions=(FORWARD,)).rows
    assert only.macs == 2 * 6 * (8 + 9 + 8)
    assert only.bytes == 4 * (2 * (2 * 6 * 9) + 2 * 3 * 3 * 9 + 6)


@pytest.mark.parametrize("wrong", ["forward", "gradients"])
def test_a_layout_of_ours_that_is_wrong_fails(monkeypatch, wrong):
    right = LightweightConv1d.op

    def op(*args, **kwargs):
        y = right(*args, **kwargs)
        if kwargs["layout"] != "NTC":
            return y
        return y * 1.001 if wrong == "forward" else y + 0.01 * (y - y.detach())

    monkeypatch.setattr(LightweightConv1d, "op", staticmethod(op))
    failed = run("lightweight", layers=layers(SMALL[0]), budget=0.01).failed
    assert len(failed) == 2
    assert ("bound" if wrong == "forward" else "the gradients in NTC must be those in NCT") in failed[0].reason


def test_of_many_peers_only_those_that_may_be_the_best_are_timed_again(monkeypatch):
    def way(name, seconds):
        return Way(name, lambda: seconds, lambda: ())

    monkeypatch.setattr(runner, "_one_call", lambda way: way.call())
    few = [way("best", 1.0), way("slow", 9.0)]
    assert runner._contenders(few) == few
    odd = Measured("odd", reason="no")
    many = [way("slow", 3.1), odd, *(way(f"{i}", 2.9) for i in range(7)), way("best", 1.0)]
    first, *others = runner._contenders(many)
    assert (first.hot.median, first.hot.samples, first.agrees) == (3.1, 1, True)
    assert others == many[1:]


def test_scaling_is_measured_where_there_are_threads():
    before = torch.get_num_threads()
    (only,) = measured(TINY[1], threads=2, directions=(FORWARD,)).rows
    assert torch.get_num_threads() == before
    assert [way.name for way in only.one_thread] == [way.name for way in only.ours]
    assert all(way.hot for way in only.one_thread)
    (only,) = measured(TINY[1], directions=(FORWARD,)).rows
    assert only.one_thread == ()
    assert only.scaling is None


def test_one_thread_is_one_thread():
    seen, before = [], torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        runner._with_one_thread(lambda: seen.append(torch.get_num_threads()), 2)()
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_half_types_are_compared_with_our_float32():
    (only,) = measured("depthwise2d c3 i5 k3 p1 dt:bf16", directions=(FORWARD,)).rows
    assert [way.name for way in only.f32] == ["contiguous", "channels-last"]
    assert only.f32_ratio == fastest(only.f32).hot.median / fastest(only.ours).hot.median
    assert only.bytes == 2 * (2 * 3 * 25 + 3 * 9 + 3)


def test_cold_times():
    (only,) = measured("depthwise2d c3 i5 k1", directions=(FORWARD,), cold=True).rows
    assert only.floor.limit == "L1"
    assert all(way.cold.repeats == 1 for way in (*only.ours, *only.peers))
    assert only.cold_floor.limit == "DRAM"
    assert only.cold_ratio == fastest(only.peers, cold=True).cold.median / fastest(only.ours, cold=True).cold.median


def test_the_clock_stands_still_while_the_caches_are_emptied():
    now = [0.0]
    stopped = StoppedClock(64, lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    emptied = []
    stopped._buffer = SimpleNamespace(add_=lambda _: emptied.append(1) or passes(100.0))
    began = stopped()
    stopped.cold(lambda: passes(10.0))()
    assert stopped() - began == 10.0
    passes(1.0)
    assert stopped() - began == 11.0
    assert emptied == [1]


def broken(monkeypatch, **changes):
    changed = tuple(replace(t, **changes) if t.name == "depthwise" else t for t in TECHNIQUES)
    monkeypatch.setattr(techniques, "TECHNIQUES", changed)


def test_a_wrong_answer_of_ours_fails_and_is_not_timed(monkeypatch):
    right = find("depthwise")
    broken(monkeypatch, reference=lambda *args, **kwargs: right.reference(*args, **kwargs) * 1.001)
    result = measured(TINY[1])
    assert [r.status for r in result.rows] == ["failed", "failed"]
    for r in result.failed:
        assert "bound" in r.reason
        assert r.ours == r.peers == ()
        assert r.ratio is r.to_floor is r.best is None
    assert verdict(result).startswith("0 of 2 verified; FAILED: depthwise2d n1 c3 i5x6 k3 p1: depthwise: ")
    assert "FAILED" in as_markdown(tables(result))
    assert summaries(result.rows) == ()


def test_a_wrong_gradient_of_ours_fails(monkeypatch):
    """Plain torch's is the measure; one that is a thousandth larger makes ours wrong."""
    peer = find("depthwise").peers[0]

    def steeper(**operands):
        y = peer.run(**operands)
        return y + 0.001 * (y - y.detach())

    broken(monkeypatch, peers=(replace(peer, run=steeper),))
    assert not measured(TINY[1], directions=(FORWARD,)).failed
    assert "the gradient of" in measured(TINY[1], directions=(BOTH,)).failed[0].reason


def test_where_torch_is_wrong_the_reference_is_the_measure_of_gradients(monkeypatch):
    peer = find("depthwise").peers[0]
    broken(monkeypatch, peers=(replace(peer, run=lambda **operands: peer.run(**operands) * 1.1),))
    assert not measured(TINY[1], directions=(BOTH,)).failed


def test_a_peer_that_computes_something_else_gets_no_time(monkeypatch):
    right = torch.nn.functional.conv2d
    monkeypatch.setitem(peers._CONVOLUTIONS, 2, lambda *args, **kwargs: 1.1 * right(*args, **kwargs))
    result = measured(TINY[1])
    for r in result.rows:
        assert r.status == "verified"
        assert [way.agrees for way in r.peers] == [False, False]
        assert all(way.hot is None and "2% away" in way.reason for way in r.peers)
        assert r.ratio is r.best_peer is None
        assert r.to_floor > 0
    assert "≠ torch contiguous; ≠ torch channels-last" in as_markdown(tables(result))


def test_agreement():
    assert agree([torch.ones(2, 1, 3)], [torch.ones(2, 3)])
    assert not agree([torch.ones(2, 3)], [torch.ones(2, 3), torch.ones(1)])
    assert not agree([torch.ones(4)], [torch.ones(5)])
    assert not agree([torch.full((4,), torch.nan)], [torch.ones(4)])
    assert agree([torch.full((4,), 1.019)], [torch.ones(4)])
    assert not agree([torch.full((4,), 1.021)], [torch.ones(4)])


# what the times say


def test_ratios_by_hand():
    one = row(2.0, f32=3.0)
    assert (one.best, one.best_peer) == ("channels-last", "OpenVINO")
    assert one.ratio == 2.0
    assert one.torch_ratio == 4.0
    assert one.f32_ratio == 3.0
    assert one.to_floor == 4.0
    assert one.differs is True
    assert row(1.05, noise=True).differs is False
    alone = (Measured("contiguous", timing(1.7), agrees=True),)
    assert replace(one, one_thread=alone).scaling == 1.7
    short = tuple(Measured(way.name, timing(way.hot.median * 5e-5), agrees=True) for way in alone)
    assert replace(one, one_thread=short).scaling is None
    nothing = Row("net", TINY[1], FORWARD, "failed", "no")
    assert nothing.ratio is nothing.best is nothing.differs is nothing.torch_ratio is None


def test_cold_and_hot_have_their_own_best():
    way = Measured("a", timing(1.0), timing(9.0)), Measured("b", timing(2.0), timing(3.0))
    assert fastest(way).name == "a"
    assert fastest(way, cold=True).name == "b"
    assert fastest([Measured("c", reason="no")]) is None
    assert fastest([]) is None


def test_summaries_by_hand():
    rows = (
        row(4.0),
        row(1.0 / 4, network="slow"),
        row(0.5, network="slower", noise=True),
        row(3.0, direction=BOTH),
        row(2.0, problem="depthwise2d n1 c4 i8 k3 p1 dt:bf16", f32=8.0),
        row(2.0, problem="depthwise1d n1 c4 i8 k3 p1"),
    )
    assert [s.name for s in summaries(rows)] == ["2-D forward", "2-D forward + backward", "1-D forward", "bf16, f16 forward"]
    first, *_, half = summaries(rows)
    assert first.shapes == 3
    assert first.ratio == pytest.approx(0.5 ** (1 / 3))
    assert first.worst == 0.25
    assert [r.network for r in first.losses] == ["slow", "slower"]
    assert first.to_floor == pytest.approx(4.0)
    assert first.torch_ratio == pytest.approx(2 * 0.5 ** (1 / 3))
    assert first.f32_ratio is None
    assert half.f32_ratio == pytest.approx(8.0)


def test_the_readmes_table_by_hand():
    slow, slower = row(1 / 4, network="slow"), row(0.5, network="slower", noise=True)
    text = readme_table([benchmark(row(4.0), slow, slower, row(3.0, direction=BOTH))])
    assert "| 2-D forward | 3 | 0.79 | 0.25 | 1.59 | 0.50 | – | – | 4.00 |" in text
    assert "| 2-D forward + backward | 1 | 3.00 | 3.00 | 6.00 | 6.00 | – | – | 4.00 |" in text
    assert "- 2-D forward: slow `n1 c4 i8 k3 p1` 0.25 (OpenVINO); slower `n1 c4 i8 k3 p1` ≈0.50 (OpenVINO)" in text
    assert "peak 1 GFLOP/s, copies L1 4, L2 2, DRAM 1 GB/s" in text
    assert "Losses: none." in readme_table([benchmark(row(2.0))])
    assert readme_table([]) == NO_RESULTS
    text = "depthwise2d n1 c4 i8 k3 p1 dt:bf16"
    halves = readme_table([benchmark(row(2.0, problem=text, f32=0.5), row(2.0, problem=text, f32=2.0))])
    assert "| bf16, f16 forward | 2 | 2.00 | 2.00 | 4.00 | 4.00 | 1.00 | 0.50 | 4.00 |" in halves
    scaled = replace(row(2.0), one_thread=(Measured("contiguous", timing(1.9), agrees=True),))
    made = readme_table([benchmark(scaled, row(2.0))])
    assert "| ours ÷ floor | one thread ÷ ours |" in made
    assert "| 4.00 | 1.90 |" in made
    flat = Row(
        "net", SMALL[0], FORWARD, "verified",
        ours=(Measured("NCT", timing(1.0), agrees=True), Measured("TNC", timing(2.0), agrees=True)),
        peers=(Measured("torch a NCT", timing(5.0), agrees=True), Measured("torch a TNC", timing(4.0), agrees=True)),
    )  # fmt: skip
    assert flat.layouts == {"NCT": 5.0, "TNC": 2.0}
    made = readme_table([benchmark(flat)])
    assert "| ours ÷ floor | both in NCT | both in TNC |" in made
    assert "| 1-D forward | 1 | 4.00 | 4.00 | 4.00 | 4.00 | – | – | – | 5.00 | 2.00 |" in made


def test_tables_for_machines():
    result = benchmark(row(2.0), row(0.5, direction=BOTH), row(2.0, problem="depthwise1d n1 c4 i8 k3 dt:f16", f32=2.0))
    lines = list(csv.DictReader(io.StringIO(as_csv(tables(result)))))
    assert [(line["direction"], line["ratio"], line["peer"]) for line in lines] == [
        ("forward", "2.0", "OpenVINO"),
        ("both", "0.5", "OpenVINO"),
        ("forward", "2.0", "OpenVINO"),
    ]
    assert lines[0]["ours_ms"] == "1000.0"
    assert lines[0]["peer_q3_ms"] == "2000.0"
    assert lines[2]["f32_ratio"] == "2.0"
    assert [table.title for table in tables(result)] == ["2-D, forward", "2-D, forward + backward", "bf16, f16, forward"]


def test_names_of_machines():
    assert slug(replace(machine(), cpu="AMD EPYC 7B13 (R)", capability="AVX2")) == "amd-epyc-7b13-r-avx2"
    assert slug(replace(machine(), cpu="AMD EPYC", capability="AVX2", threads=2)) == "amd-epyc-avx2-2-threads"
    assert slug() == slug(machine())


# the file


def test_a_result_comes_back_from_its_file(tmp_path):
    result = measured(TINY[1], "depthwise2d c3 i5 k3 p1 dt:f16", cold=True)
    file = tmp_path / "a.json"
    file.write_text(as_json(result))
    assert load(file) == result
    assert json.loads(file.read_text())["rows"][0]["ratio"] == result.rows[0].ratio


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema_version=0), "schema_version must be 1"),
        (lambda d: d.pop("peaks"), "the file must have the fields .*, got "),
        (lambda d: d.update(more=1), "the file must have the fields "),
        (lambda d: d["rows"][0].pop("ours"), r"rows\[0\] must have the fields "),
        (lambda d: d["rows"][0].update(ratio=9.0), r"rows\[0\].ratio must be 2.0 as the times say, got 9.0"),
        (lambda d: d["rows"][0].update(best_peer="torch"), r"rows\[0\].best_peer must be 'OpenVINO'"),
        (
            lambda d: d["rows"][0]["ours"][0]["hot"].update(median="fast"),
            r"rows\[0\].ours\[0\].hot.median must be float, got 'fast'",
        ),
        (lambda d: d["rows"][0]["floor"].update(seconds=True), r"rows\[0\].floor.seconds must be float, got True"),
        (lambda d: d["rows"][0].update(macs=1.5), r"rows\[0\].macs must be int, got 1.5"),
        (lambda d: d.update(rows={}), "rows must be a list"),
        (lambda d: d["settings"].update(directions=["up"]), "the direction must be forward or both, got up"),
    ],
)
def test_malformed_files_are_refused_by_name(tmp_path, change, words):
    data = json.loads(as_json(benchmark(row())))
    change(data)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"^bench: .*{words}.*a\.json'$"):
        load(file)


def test_files_that_are_no_results(tmp_path):
    with pytest.raises(ValueError, match="must be readable"):
        load(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="schema_version"):
        load(tmp_path / "a.json")


COMMITTED = [path for name in measurable() for path in committed(name, REPOSITORY)]


def test_the_committed_results_are_whole():
    """Every file is of a technique, can be read, and holds neither failures nor half a run."""
    others = set((REPOSITORY / RESULTS).glob("g2p-*.json"))  # of benchmarks/g2p.py, which has its own test
    assert set(COMMITTED) == set((REPOSITORY / RESULTS).glob("*")) - others
    for path in COMMITTED:
        result = load(path)
        assert path.name == f"{result.settings.technique}-{slug(result.machine)}.json"
        assert result.rows
        assert not result.failed
        assert not result.interrupted


@pytest.mark.parametrize("name", measurable())
def test_the_readme_says_what_the_committed_results_say(tmp_path, name):
    copy = tmp_path / "README.md"
    shutil.copy(REPOSITORY / "README.md", copy)
    (tmp_path / RESULTS).mkdir(parents=True)
    for path in committed(name, REPOSITORY):
        shutil.copy(path, tmp_path / RESULTS)
    assert not update_readme(name, copy), f"omniconv bench {name} --readme README.md"


def test_the_readme_is_written_between_its_marks(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / RESULTS
    results.mkdir(parents=True)
    readme.write_text("a\n<!-- bench:depthwise -->\nold\n<!-- /bench:depthwise -->\nb\n")
    (results / "depthwise-here.json").write_text(as_json(benchmark(row(0.5))))
    assert update_readme("depthwise", readme)
    text = readme.read_text()
    assert text.startswith("a\n<!-- bench:depthwise -->\n")
    assert text.endswith("\n<!-- /bench:depthwise -->\nb\n")
    assert "old" not in text
    assert "| 2-D forward | 1 | 0.50 |" in text
    assert not update_readme("depthwise", readme)
    (results / "depthwise-here.json").write_text(as_json(benchmark(row(0.6))))
    assert update_readme("depthwise", readme)
    readme.write_text("no marks")
    with pytest.raises(ValueError, match=r"^bench: the README must have one '<!-- bench:depthwise -->'"):
        update_readme("depthwise", readme)


# running it


def test_settings_that_are_refused():
    for options, words in (
        ({"directions": ("up",)}, "direction must be forward or both, got up"),
        ({"directions": ()}, "got none"),
        ({"dtype": "f8"}, "dtype must be one of"),
        ({"threads": 0}, "threads must be between"),
        ({"only": "nothing like it"}, "'only' must occur"),
    ):
        with pytest.raises(ValueError, match=rf"^bench: .*{words}"):
            run("depthwise", **options)
    with pytest.raises(ValueError, match="budget must be above 0"):
        run("depthwise", budget=float("nan"))


def test_threads_are_set_and_put_back(monkeypatch):
    seen = []
    before = torch.get_num_threads()
    monkeypatch.setattr(runner, "measure_peaks", lambda double: seen.append((torch.get_num_threads(), double)) or PEAKS)
    result = measured(TINY[1], threads=3, directions=(FORWARD,))
    assert torch.get_num_threads() == before
    measured("depthwise1d c2 i4 k3 dt:f64", directions=(FORWARD,))
    assert seen == [(3, False), (1, True)]
    assert result.machine.threads == 3


def test_an_interruption_keeps_the_layers_that_are_done(monkeypatch):
    right, calls = runner.alternate, []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the second direction of the second layer
            raise Interrupted({})
        return right(*args, **kwargs)

    monkeypatch.setattr(runner, "alternate", stopped)
    with pytest.raises(Interrupted) as caught:
        measured()
    result = caught.value.done
    assert [r.problem.partition(" ")[0] for r in result.rows] == ["depthwise1d", "depthwise1d"]
    assert result.interrupted
    assert verdict(result).endswith("; interrupted")
    assert torch.is_grad_enabled()


def test_progress_rises_to_one():
    seen = []
    measured(*TINY[:2], directions=(FORWARD,), progress=lambda share, what: seen.append((share, what)))
    assert [share for share, _ in seen] == [0.0, 0.0, 0.5, 1.0]
    assert seen[1][1].startswith("net: depthwise1d")


ONE = ["bench", "depthwise", "--only", "c19 i23", "--budget", "0.01"]


def command(*arguments, width=80):
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width):
    result = command(*ONE, "--cold", width=width)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in result.stdout
    assert sum(line.startswith("n1 c19 i23 k3 p1 ") for line in lines) == 2
    assert "odd sizes" in result.stdout
    assert ("MACs" in result.stdout) == (width == 120)
    assert "2 verified; 2-D forward × " in result.stdout


@pytest.mark.parametrize("name", ["depthwise", "lightweight", "dynamic"])
@pytest.mark.parametrize("width", [80, 120])
def test_every_layer_fits(monkeypatch, width, name):
    """The longest of names, with half types and cold times."""

    def made(technique, **options):
        _, found = read_layers(name)
        rows = [row(2.0, problem=str(layer.problem), network=layer.network, f32=4.0) for layer in found]
        cold = [replace(r, ours=(Measured("contiguous", timing(1.0), timing(1.0), True),), peers=(*r.peers, long)) for r in rows]
        return benchmark(*cold)

    long = Measured("torch as 2-D channels-last, cropped", timing(1e-4, 1e-5), timing(2e-4), True)
    monkeypatch.setattr("omniconv.cli.bench.run", made)
    result = command(*ONE, width=width)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "…" not in result.stdout


def test_formats_and_files(tmp_path):
    data = json.loads(command(*ONE, "--format", "json", "--direction", "forward", "--threads", 2).stdout)
    assert data["settings"]["threads"] == data["machine"]["threads"] == 2
    assert [r["direction"] for r in data["rows"]] == ["forward"]
    assert command(*ONE, "--format", "md").stdout.startswith("### 2-D, forward\n")
    file = tmp_path / "a.json"
    assert command(*ONE, "-o", file, "--dtype", "f16").exit_code == 0
    assert load(file).rows[0].f32_ratio > 0
    refused = command(*ONE, "-o", file)
    assert refused.exit_code == 2
    assert "must not exist (--force overwrites it)" in refused.stderr
    assert command(*ONE, "-o", file, "--force").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "convolution"],
        [*ONE, "--direction", "up"],
        [*ONE, "--dtype", "f8"],
        [*ONE, "--threads", "0"],
        [*ONE, "--budget", "0"],
        ["bench", "depthwise", "--only", "no such"],
        [*ONE, "-o", "a.html"],
        [*ONE, "--readme", "no/README.md"],
    ],
)
def test_usage_errors_are_one_line(arguments):
    result = command(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("bench: ")
    assert ", got " in line


def test_a_wrong_answer_of_ours_is_exit_code_1(monkeypatch, tmp_path):
    right = find("depthwise")
    broken(monkeypatch, reference=lambda *args, **kwargs: right.reference(*args, **kwargs) * 1.001)
    result = command(*ONE, "-o", tmp_path / "a.json")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert load(tmp_path / "a.json").failed


def test_ctrl_c_is_exit_code_130(monkeypatch, tmp_path):
    def stopped(*_, **__):
        raise Interrupted({})

    monkeypatch.setattr(runner, "alternate", stopped)
    result = command(*ONE, "-o", tmp_path / "a.json")
    assert result.exit_code == 130
    assert result.stdout.rstrip().endswith("interrupted")
    assert load(tmp_path / "a.json").interrupted


def test_the_readme_by_command(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench:depthwise -->\n<!-- /bench:depthwise -->\n")
    assert command("bench", "depthwise", "--readme", readme).exit_code == 0
    assert NO_RESULTS in readme.read_text()


def test_the_extras_of_the_peers_are_looked_up_by_their_names(monkeypatch):
    """The real look-up, whatever is installed here."""
    monkeypatch.setattr(peers, "find_spec", find_spec)
    asked, absent = rivals(compiled=True)
    assert {r.name for r in asked} | {a.name for a in absent} == {"torch", "torch.compile", "ONNX Runtime", "OpenVINO"}
