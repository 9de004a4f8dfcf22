"""Who is compared with: every way computes the same, and those who cannot take part say why."""

import importlib
from dataclasses import replace

import pytest
import torch
from bench_rows import TINY, measured

from omniconv.bench import peers, runner
from omniconv.bench.peers import BOTH, DIRECTIONS, FORWARD, Absent, Task, Way, onnx_model, rivals, ways
from omniconv.bench.runner import agree
from omniconv.bench.speed import remarks
from omniconv.techniques import parse
from omniconv.testing import make_inputs

pytestmark = pytest.mark.usefixtures("quick_bench")


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
