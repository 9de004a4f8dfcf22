"""Layers as they are called, and the roofline: points by hand on a machine whose peaks are known."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_rows import PEAKS
from small_network import Net, X, same, state
from torch import nn
from typer.testing import CliRunner

from omniconv.analysis import layers
from omniconv.analysis import roofline as room
from omniconv.analysis.layers import captured, copied, is_leaf, leaves, ready, shortened
from omniconv.analysis.peaks import Roofs
from omniconv.analysis.plots import roofline as picture
from omniconv.analysis.plots.style import rendered
from omniconv.analysis.roofline import roofline
from omniconv.cli import app
from omniconv.nn import DynamicConv1d
from omniconv.timing import Interrupted, Timing, alternate

ROOFS = Roofs("Chip", "AVX9", 1, "9", {"f32": 2e9, "bf16": 3e9}, PEAKS.levels, "2026-01-02T03:04:05+00:00", cached=True)


def test_layers_that_are_alike_come_once():
    kinds = captured(Net().eval(), [X], {"scale": 2.0})
    assert [(k.names, k.calls, k.type, str(k.problem)) for k in kinds] == [
        (("first", "again.0"), 2, "Conv2d", "standard2d n1 c4 i6 k3 p1"),
        (("wide",), 1, "Conv2d", "pointwise2d n1 c4-8 i6 s2"),
        (("head",), 2, "Linear", "pointwise1d n1 c8-3 i1"),
    ]
    assert kinds[1].kwargs["input"].shape == (1, 4, 6, 6)
    assert [k.flops for k in kinds] == [k.cost.flops for k in kinds]
    assert [k.cost.macs_dense for k in kinds] == [4 * 4 * 9 * 36, 4 * 8 * 9, 24]


def test_what_counts_as_a_layer():
    dynamic = DynamicConv1d(4, 3, 2)
    assert [name for name, _ in leaves(nn.Sequential(dynamic, nn.ReLU()))] == ["0"]  # the projection inside is not another
    assert not is_leaf(nn.BatchNorm2d(3))
    assert shortened(["a.b"]) == "a.b"
    assert shortened([""]) == "(whole)"
    assert len(shortened(["x" * 50, "y"], 20)) == 20


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stop", [None, ValueError("no such\nsize"), KeyboardInterrupt()])
def test_a_look_leaves_the_network_as_it_was(training, stop):
    net = Net().train(training)
    net.stop, before = stop, state(net)
    if stop is None:
        captured(net, [X])
    elif isinstance(stop, ValueError):
        with pytest.raises(ValueError, match=r"^me: the network must run on its example inputs, got ValueError: no such size$"):
            captured(net, [X], caller="me")
    else:
        with pytest.raises(KeyboardInterrupt):
            captured(net, [X])
    assert same(before, state(net))


def test_copies_take_the_format_and_leave_the_layer():
    layer = nn.Conv2d(4, 8, 3)
    made = copied(layer, True)
    assert made.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous()
    assert copied(nn.Conv3d(2, 2, 2), True).weight.is_contiguous(memory_format=torch.channels_last_3d)
    (kind,) = captured(layer, [X])
    with torch.no_grad():
        assert ready(kind, True)().is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(ready(kind, True)(), layer(X), atol=1e-6)

    class Stubborn(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise RuntimeError("no")

    (kind,) = captured(Stubborn(4, 8, 3), [X])
    assert ready(kind, True)().shape == (1, 8, 4, 4)


def test_a_layer_that_cannot_be_counted_can_be_timed(monkeypatch):
    def uncounted(*_, **__):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(layers, "cost", uncounted)
    (kind,) = captured(nn.Conv2d(4, 8, 3), [X])
    assert (kind.cost, kind.flops, kind.problem, kind.technique) == (None, 0, None, None)
    with torch.no_grad():
        assert ready(kind, False)().shape == (1, 8, 4, 4)


# points


@pytest.fixture
def _known(monkeypatch):
    monkeypatch.setattr(room, "machine_roofs", lambda dtype, refresh: ROOFS)
    monkeypatch.setattr(room, "alternate", partial(alternate, rounds=(1, 1), sample=0.0))


TARGET = "small_network:Net"


@pytest.mark.usefixtures("_known")
def test_points_by_hand(monkeypatch):
    """4·4·9·36 multiply-accumulates of 2 flops and 144 biases; input, weights and output move once."""
    monkeypatch.setattr(room, "alternate", lambda calls, budget: dict.fromkeys(calls, Timing(1e-3, 1e-3, 1e-3, 5, 1)))
    result = roofline(TARGET, input=("1x4x6x6",))
    first, wide, head = result.points
    flops, moved = 2 * 4 * 4 * 9 * 36 + 144, 4 * (144 + 144 + 4 + 144)
    assert (first.flops, first.bytes, first.intensity) == (flops, moved, flops / moved)
    assert first.rate == flops / 1e-3
    assert (first.level, first.limit, first.attainable) == ("L2", "arithmetic", 2e9)  # 1744 bytes do not fit 1000
    assert first.share == first.rate / 2e9
    assert (first.seconds, first.calls) == (2e-3, 2)
    assert first.lost == 2e-3 * (1 - first.share)
    # 24 multiply-accumulates on 8 + 24 + 3 + 3 numbers
    assert (head.level, head.limit, head.attainable) == ("L1", "L1", pytest.approx(head.flops / (4 * 38) * 4e9))
    assert result.furthest[0] is first or result.furthest[0] is head
    assert result.dtype == "f32"
    assert wide.technique == "pointwise"


@pytest.mark.usefixtures("_known")
def test_a_network_of_another_dtype_has_its_own_roof():
    def half():
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).bfloat16()

    target = room.targets.Target("t", "module", "s", (room.targets.Input((1, 4, 9, 9)),), module=half())
    result = roofline(target, channels_last=True)
    assert result.dtype == "bf16"
    for point in result.points:
        assert point.dtype == "bf16"
        assert point.attainable == min(3e9, point.intensity * {"L1": 4e9, "L2": 2e9}[point.level])


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("when", ["running", "peaks", "layer", "second layer"])
def test_an_interruption_leaves_the_network_as_it_was(monkeypatch, when):
    net, calls = Net(), []
    target = room.targets.Target("t", "module", "s", (room.targets.Input((1, 4, 6, 6)),), module=net)
    right = room.alternate

    def stopped(*args, **kwargs):
        calls.append(1)
        if when == "layer" or len(calls) == 2:
            raise Interrupted({})
        return right(*args, **kwargs)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if when == "running":
        net.stop = KeyboardInterrupt()
    elif when == "peaks":
        monkeypatch.setattr(room, "machine_roofs", interrupted)
    else:
        monkeypatch.setattr(room, "alternate", stopped)
    before = state(net)
    with pytest.raises(KeyboardInterrupt) as caught:
        roofline(target, threads=3)
    assert same(before, state(net))
    if when in ("layer", "second layer"):
        assert caught.value.done.interrupted
        assert len(caught.value.done.points) == (when == "second layer")


def test_what_is_refused():
    for options, words in (
        ({"threads": 0}, "threads must be between 1 and 1024, got 0"),
        ({"budget": 0.0}, "the budget must be above 0"),
        ({"input": ("1x5x6x6",)}, "the network must run on its example inputs, got RuntimeError"),
    ):
        with pytest.raises(ValueError, match=rf"^roofline: {words}"):
            roofline(TARGET, **({"input": ("1x4x6x6",)} | options))
    with pytest.raises(ValueError, match=r"^roofline: the network must have convolutions or linear layers, got none in 't'$"):
        roofline(room.targets.Target("t", "module", "s", (room.targets.Input((1, 4)),), module=nn.ReLU()))


# the command


def command(*arguments, width=80):
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["roofline", *map(str, arguments)])


ONE = [TARGET, "--input", "1x4x6x6", "--budget", "0.01"]


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(width):
    result = command(*ONE, width=width)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "first +1" in result.stdout
    assert "standard2d n1 c4 i6 k3 p1" in result.stdout
    assert "measured 2026-01-02, --refresh measures anew" in " ".join(result.stdout.split())


@pytest.mark.usefixtures("_known")
def test_formats_and_pictures(tmp_path):
    data = json.loads(command(*ONE, "--format", "json").stdout)
    assert data["kind"] == "roofline"
    assert [p["names"] for p in data["points"]] == [["first", "again.0"], ["wide"], ["head"]]
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        assert command(*ONE, "-o", tmp_path / f"a{suffix}").exit_code == 0
        assert (tmp_path / f"a{suffix}").read_bytes().startswith(magic)
    assert command(*ONE, "-o", tmp_path / "a.png").exit_code == 2
    refused = command("nothing:here", "--input", "1x1")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("roofline: ")


@pytest.mark.usefixtures("_known")
def test_the_picture_says_what_was_measured():
    result = roofline(TARGET, input=("1x4x6x6",))
    drawn = picture.roofline_plot(result)
    axes, side = drawn.axes
    found = sorted(tuple(xy) for collection in axes.collections for xy in collection.get_offsets().tolist())
    assert found == sorted((p.intensity, p.rate / 1e9) for p in result.points)
    words = [text.get_text() for text in side.texts]
    assert "first +1" in words
    assert any(word.startswith("DRAM 1 GB/s") for word in (t.get_text() for t in axes.texts))
    roofs = [line.get_xydata().tolist() for line in axes.lines]
    assert roofs[0][0] == [0.5, 2.0]  # 2 GFLOP/s meet 4 GB/s at a half
    assert rendered(picture.roofline_plot(result), ".svg") == rendered(drawn, ".svg")
    assert rendered(picture.roofline_plot(replace(result, points=())), ".png")


@pytest.mark.usefixtures("_known")
def test_ctrl_c_is_exit_code_130(monkeypatch):
    def stopped(*_, **__):
        raise Interrupted({})

    monkeypatch.setattr(room, "alternate", stopped)
    result = command(*ONE)
    assert result.exit_code == 130
    assert result.stdout.rstrip().endswith("interrupted")
