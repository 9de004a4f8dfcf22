"""A network's check-up: which rules hold of which layer, what is quoted, what is measured, and that nothing else is claimed."""

import json

import pytest
import torch
from bench_rows import benchmark, row
from cases import REPOSITORY
from small_network import Net, same, state
from torch import nn
from typer.testing import CliRunner

from omniconv import nn as ours_nn
from omniconv.analysis.layers import captured
from omniconv.analysis.slow_paths import SLOW_PATHS, slow_paths
from omniconv.analysis.tables import as_json
from omniconv.analysis.targets import Input, Target
from omniconv.bench import checkup as room
from omniconv.bench.checkup import RESULTS, checkup, committed_rows, ours, quoted
from omniconv.bench.checkup_tables import checkup_remarks, verdict
from omniconv.bench.runner import agree
from omniconv.cli import app
from omniconv.problem import Problem
from omniconv.timing import Contest, Interrupted, Timing, Versus


def target(net, *shape):
    return Target("net", "module", "a test", (Input(shape or (1, 4, 6, 6)),), module=net)


def kind(layer, *shape, **changes):
    x = torch.ones(*shape, dtype=layer.weight.dtype, **changes)
    (found,) = captured(layer, [x.to(memory_format=torch.channels_last) if changes.pop("last", False) else x])
    return found


HALF = "half types, converted" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "half types"
CASES = {
    "standard": (nn.Conv2d(4, 8, 3), (1, 4, 6, 6), []),
    "depthwise 1-D": (nn.Conv1d(4, 4, 3, groups=4), (1, 4, 9), ["depthwise 1-D"]),
    "depthwise 2-D": (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 6, 6), ["contiguous depthwise"]),
    "depthwise 3-D": (nn.Conv3d(4, 4, 2, groups=4), (1, 4, 4, 4, 4), ["depthwise 3-D"]),
    "multiplier": (nn.Conv1d(4, 8, 3, groups=4), (1, 4, 9), ["depthwise 1-D", "depth multiplier"]),
    "dilated": (nn.Conv1d(4, 4, 3, groups=4, dilation=2), (1, 4, 9), ["depthwise 1-D", "dilated depthwise"]),
    "large": (nn.Conv2d(4, 4, 15, groups=4), (1, 4, 19, 19), ["contiguous depthwise", "large-kernel depthwise"]),
    "not yet large": (nn.Conv2d(4, 4, 13, groups=4), (1, 4, 19, 19), ["contiguous depthwise"]),
    "not so large": (nn.Conv1d(4, 4, 12, groups=4), (1, 4, 19), ["depthwise 1-D"]),
    "one channel": (nn.Conv1d(1, 1, 3), (1, 1, 9), []),
    "grouped": (nn.Conv2d(8, 8, 3, groups=2), (1, 8, 6, 6), ["grouped"]),
    "wide groups": (nn.Conv2d(32, 32, 3, groups=2), (1, 32, 6, 6), []),
    "transposed": (nn.ConvTranspose2d(4, 4, 3), (1, 4, 6, 6), []),
    "transposed groups": (nn.ConvTranspose2d(4, 4, 3, groups=2), (1, 4, 6, 6), ["transposed with groups"]),
    "padding": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (1, 4, 6, 6), ["padding mode"]),
    "float64": (nn.Conv2d(4, 8, 3).double(), (1, 4, 6, 6), ["float64"]),
    "bfloat16": (nn.Conv2d(4, 8, 3).bfloat16(), (1, 4, 6, 6), [HALF]),
    "linear": (nn.Linear(4, 8).bfloat16(), (1, 4), []),
    "ours": (ours_nn.DepthwiseConv1d(4, 3), (1, 4, 9), []),
}


@pytest.mark.parametrize("name", CASES)
def test_which_rules_hold(name):
    layer, shape, names = CASES[name]
    assert [path.name for path in slow_paths(kind(layer, *shape))] == names


def test_channels_last_depthwise_is_no_slow_path():
    layer = nn.Conv2d(4, 4, 3, groups=4)
    (found,) = captured(layer, [torch.ones(1, 4, 6, 6).to(memory_format=torch.channels_last)])
    assert slow_paths(found) == ()


def test_every_rule_has_a_name_and_a_reason():
    assert len({path.name for path in SLOW_PATHS}) == len(SLOW_PATHS)
    assert all(path.why for path in SLOW_PATHS)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("linear", "ours")])
def test_ours_takes_a_layers_place(name):
    layer, shape, _ = CASES[name]
    torch.manual_seed(1)
    (found,) = captured(layer, [torch.randn(*shape).to(layer.weight.dtype)])
    with torch.no_grad():
        expected = layer(*found.args)
        for last in (False, True):
            assert agree([ours(found, last)()], [expected], 2e-2 if name == "bfloat16" else 1e-4)


def test_what_ours_does_not_take_is_said():
    class Other(nn.Linear):
        pass

    with pytest.raises(ValueError, match="no layer to take the place of Other"):
        ours(kind(Other(4, 8), 1, 4), False)
    found = checkup(target(ours_nn.DepthwiseConv1d(4, 3), 1, 4, 9), measure=True, results=REPOSITORY / "none").findings
    assert [f.reason for f in found] == ["it is omniconv's already"]


# quotes


def test_quotes_by_hand(tmp_path):
    exact, noise = row(2.0), row(1.5, noise=True, problem="depthwise2d n1 c8 i8 k3 p1")
    dilated = row(9.0, problem="depthwise2d n1 c4 i8 k3 p2 d2")
    half = row(8.0, problem="depthwise2d n1 c4 i8 k3 p1 dt:bf16")
    (tmp_path / "a.json").write_text(as_json(benchmark(exact, noise, dilated, half, row(7.0, direction="both")), "bench"))
    (tmp_path / "b.json").write_text("{}")
    known = committed_rows(tmp_path)
    assert len(known) == 4
    quote = quoted(Problem.parse("depthwise2d n1 c4 i8 k3 p1 cl"), known)
    assert (quote.ratio, quote.layers, quote.exact, quote.differs) == (4.0, 1, True, True)  # eager torch, not the best peer
    assert quote.source.startswith("benchmarks/results/a.json: ")
    like = quoted(Problem.parse("depthwise2d n1 c5 i8 k3 p1"), known)
    assert (like.ratio, like.low, like.high, like.layers, like.exact, like.differs) == (3.5, 3.0, 4.0, 2, False, False)
    assert quoted(Problem.parse("depthwise2d n1 c5 i8 k3 d3"), known).ratio == 18.0
    assert quoted(Problem.parse("depthwise2d n1 c5 i8 k3 dt:f16"), known).ratio == 16.0
    assert quoted(Problem.parse("depthwise1d n1 c5 i8 k3"), known) is None
    assert quoted(Problem.parse("depthwise2d n1 c5 i8 k3 dt:f64"), known) is None


def test_what_is_committed_is_quoted():
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32))
    (found,) = checkup(target(net, 1, 32, 112, 112), results=REPOSITORY / RESULTS).findings  # an installed package has none
    assert found.quote.exact
    assert found.quote.layers == 1
    assert "depthwise-amd-epyc-avx512.json" in found.quote.source
    assert found.verdict is None
    assert found.gained == 0.0


def test_without_results_nothing_is_quoted(tmp_path):
    result = checkup(target(Net().eval()), results=tmp_path)
    assert all(f.quote is None for f in result.findings)
    assert result.notes == ("no committed measurements are at hand",)


# measured


def fake(monkeypatch, **seconds):
    asked = []

    def contest(calls, *, comparisons, budget):
        asked.append((list(calls), comparisons))
        for call in calls.values():
            call()
        taken = {name: seconds.get(name.replace(", channels-last", "_last"), 1.0) for name in calls}
        timings = {name: Timing(s, s, s, 9, 1) for name, s in taken.items()}
        return Contest(
            timings, {n: Versus.of([taken["stock"]] * 40, [s] * 40, comparisons) for n, s in taken.items() if n != "stock"}
        )

    monkeypatch.setattr(room, "contest", contest)
    return asked


def test_gains_are_those_measured(monkeypatch):
    asked = fake(monkeypatch, stock=1.0, omniconv=0.25, stock_last=0.5)
    result = checkup(target(Net().eval()), measure=True)
    assert asked == [(["stock", "omniconv", "stock, channels-last", "omniconv, channels-last"], 6)] * 2
    first, wide = result.findings
    assert (first.calls, first.verdict, first.gained) == (2, "faster", 1.5)
    assert first.versus["stock, channels-last"].verdict == "faster"
    assert verdict(result) == (
        "0 of 3 convolutions on slow paths of torch by rule; measured: omniconv faster in 3, torch in 0, 0 within noise; "
        "where it is faster it saves 2250 of 3000 ms"
    )
    assert wide.gained == 0.75


@pytest.mark.parametrize(("seconds", "word"), [(0.99, "within noise"), (2.0, "slower")])
def test_noise_and_losses_are_no_gains(monkeypatch, seconds, word):
    fake(monkeypatch, omniconv=seconds)
    result = checkup(target(Net().eval()), measure=True)
    assert [f.verdict for f in result.findings] == [word] * 2
    assert all(f.gained == 0.0 for f in result.findings)
    assert "saves" not in verdict(result)
    assert ("torch in 3" in verdict(result)) == (word == "slower")


def test_an_answer_that_differs_is_not_measured(monkeypatch):
    asked = fake(monkeypatch)
    right = room.ours
    monkeypatch.setattr(room, "ours", lambda k, last: lambda: right(k, last)() * 1.01)
    result = checkup(target(Net().eval()), measure=True)
    assert not asked
    assert {f.reason for f in result.findings} == {"its answer is another"}
    assert "Not measured: first: its answer is another." in checkup_remarks(result)


@pytest.mark.parametrize("stage", ["first run", "preparing", "layer 1", "layer 2"])
def test_an_interruption_keeps_what_is_done_and_the_network(monkeypatch, stage):
    net = Net().eval()
    asked = fake(monkeypatch)
    right = room.contest

    def stopped(*args, **kwargs):
        if stage == f"layer {len(asked) + 1}":
            raise Interrupted(Contest({}, {}))
        return right(*args, **kwargs)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "contest", stopped)
    if stage == "preparing":
        monkeypatch.setattr(room, "ours", interrupted)
    if stage == "first run":
        net.stop = KeyboardInterrupt()
    before = state(net)
    with pytest.raises(KeyboardInterrupt) as caught:
        checkup(target(net), measure=True, threads=3)
    assert same(before, state(net))
    if stage != "first run":
        assert caught.value.done.interrupted
        assert len(caught.value.done.findings) == (1 if stage == "layer 2" else 0)


def test_a_network_that_fails_stays_as_it_was():
    net = Net().train()
    net.stop, before = ValueError("no"), state(net)
    with pytest.raises(ValueError, match=r"^doctor: the network must run on its example inputs, got ValueError: no$"):
        checkup(target(net))
    assert same(before, state(net))


# the command


def command(*arguments, width=80):
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(map(str, arguments)))


ONE = ["doctor", "small_network:Net", "--input", "1x4x6x6"]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("measure", [True, False])
def test_the_table_fits(monkeypatch, width, measure):
    fake(monkeypatch, omniconv=0.5)
    result = command(*ONE, *(["--measure"] * measure), width=width)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "…" not in result.stdout
    assert "standard2d n1 c4 i6 k3 p1" in result.stdout


def test_formats(tmp_path):
    data = json.loads(command(*ONE, "--format", "json").stdout)
    assert data["kind"] == "doctor-network"
    assert [f["names"] for f in data["findings"]] == [["first", "again.0"], ["wide"]]
    assert command(*ONE, "-o", tmp_path / "a.csv").exit_code == 0
    assert command(*ONE, "-o", tmp_path / "a.csv").exit_code == 2
    assert json.loads(command("doctor", "--format", "json").stdout)["kind"] == "doctor"


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "--measure"],
        ["doctor", "--input", "1x3"],
        ["doctor", "nothing:here"],
        [*ONE, "--threads", "0"],
        [*ONE, "--budget", "0"],
    ],
)
def test_usage_errors_are_one_line(arguments):
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("doctor: ")


def test_ctrl_c_is_exit_code_130(monkeypatch):
    def stopped(*_, **__):
        raise Interrupted(Contest({}, {}))

    monkeypatch.setattr(room, "contest", stopped)
    result = command(*ONE, "--measure")
    assert result.exit_code == 130
    assert result.stdout.rstrip().endswith("interrupted")
