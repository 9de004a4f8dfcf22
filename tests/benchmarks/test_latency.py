"""The latency of whole networks: who is compared computes the same, who cannot is said, and the README says what was measured."""

import doctest
import importlib
import json

import pytest
import torch
from cases import REPOSITORY
from torch import nn
from typer.testing import CliRunner

from omniconv.bench.peers import Absent
from omniconv.models import drn_d_22
from omniconv.nn import Conv2d, DilatedConv2d, PointwiseConv2d, SeparableConv2d
from omniconv.ops.layer import Layer

RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("latency-*.json"))
EAGER = ["torch contiguous", "torch channels-last", "omniconv contiguous", "omniconv channels-last"]
COMPILED = ["torch.compile", "torch.compile frozen", "omniconv, torch.compile frozen"]
RUNTIMES = ["ONNX Runtime", "OpenVINO"]
SMALL = f"{__file__}:Small"


@pytest.fixture(scope="module")
def latency():
    return importlib.import_module("latency")


@pytest.fixture
def quick(latency, monkeypatch):
    """One thread, put back; results that land nowhere; nobody but torch."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(latency, "lacking", lambda name, packages: Absent(name, "none today"))
    yield
    torch.set_num_threads(threads)


class Small(nn.Module):
    """Every kind of layer that a DRN has, in a few channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(Conv2d(3, 4, 7, padding=3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.wide = nn.Sequential(DilatedConv2d(4, 4, 3, 2, padding=2, bias=False), nn.BatchNorm2d(4))
        self.head = PointwiseConv2d(4, 5, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.wide(x)).mean((2, 3))


class Wrong(Small):
    """One whose answer depends on whose convolutions it has."""

    def forward(self, x):
        return super().forward(x) + isinstance(self.head, Layer)


class Two(Small):
    def forward(self, x):
        return super().forward(x), x


def small(latency):
    torch.manual_seed(0)
    ours = Small().eval()
    latency.unsettle(ours, 0)
    return ours, torch.randn(1, 3, 9, 8)


def test_examples(latency):
    assert doctest.testmod(latency).failed == 0


def test_the_plain_network_is_torchs_alone_and_the_same(latency):
    ours, x = small(latency)
    theirs = latency.plain(ours)
    assert not [m for m in theirs.modules() if isinstance(m, Layer)]
    assert [m for m in ours.modules() if isinstance(m, Layer)]
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert not theirs.training
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=0)
        theirs.head.weight.zero_()  # a copy: ours does not notice
        assert ours.head.weight.abs().sum() > 0


def test_the_plain_drn(latency):
    ours = drn_d_22(3, pool_size=2).eval()
    latency.unsettle(ours, 0)
    theirs, x = latency.plain(ours), torch.randn(1, 3, 17, 16)
    assert not [m for m in theirs.modules() if isinstance(m, Layer)]
    with torch.no_grad():
        assert torch.equal(theirs(x), ours(x))


@pytest.mark.parametrize(
    "layer",
    [
        Conv2d(2, 2, 2, padding=((0, 1), (0, 0))),
        Conv2d(2, 2, 3, stride=2, padding="same_minimal"),
        Conv2d(2, 2, 3, activation="relu"),
        SeparableConv2d(2, 2, 3),
    ],
    ids=["uneven", "same_minimal", "activation", "not one convolution"],
)
def test_what_torch_lacks_is_refused(latency, layer):
    with pytest.raises(ValueError, match=r"latency: every layer must be a convolution that torch\.nn has, got 0: "):
        latency.plain(nn.Sequential(layer))


def test_norms_matter(latency):
    """Whoever left a norm out would be found out."""
    ours, x = small(latency)
    with torch.no_grad():
        expected = ours(x)
        for norm in (ours.stem[1], ours.wide[1]):
            kept = norm.state_dict()
            kept = {k: v.clone() for k, v in kept.items()}
            norm.reset_parameters()
            assert latency.distance(ours(x), expected) > 100 * latency.BOUND
            norm.load_state_dict(kept)
        assert torch.equal(ours(x), expected)


@pytest.mark.usefixtures("quick")
def test_every_eager_way_is_verified_and_timed(latency):
    with torch.no_grad():
        case = latency.measure(SMALL, "1x3x9x8", 1, 0.01, False, 1, lambda what: None)
    assert [way.name for way in case.ways] == EAGER
    assert all(0 <= way.error < 1e-6 and way.timing.median > 0 for way in case.ways)
    assert [way.ratio is None for way in case.ways] == [True, False, False, False]
    assert (case.parameters, case.macs) == (588 + 144 + 25 + 16, 72 * (588 + 144) + 20 * 20)
    away = dict.fromkeys(COMPILED, "it was not asked for (--no-compile)") | dict.fromkeys(RUNTIMES, "none today")
    assert {way.name: way.reason for way in case.away} == away


@pytest.mark.usefixtures("quick")
def test_another_answer_is_not_timed(latency):
    with torch.no_grad():
        case = latency.measure(f"{__file__}:Wrong", "1x3x9x8", 1, 0.01, False, 1, lambda what: None)
    assert [way.name for way in case.ways] == EAGER[:2]
    wrong = [way for way in case.away if way.name.startswith("omniconv ")]
    assert [way.name for way in wrong] == EAGER[2:]
    assert all("of the 1-norm away, the bound is 1e-04" in way.reason for way in wrong)


@pytest.mark.usefixtures("quick")
def test_a_peer_that_does_not_run_is_away_and_ours_raises(latency, monkeypatch):
    def broken(name, model, x, frozen):
        raise RuntimeError(f"no {name} here")

    monkeypatch.setattr(latency, "_compiled", broken)
    ours, x = small(latency)
    made = latency.makers(ours, latency.plain(ours), x, ours(x), 1, True)
    found = {}
    with pytest.raises(RuntimeError, match=r"no omniconv, torch\.compile frozen here"):
        found.update(latency._verified({n: made[n] for n in COMPILED[2:]}, ours(x), lambda what: None))
    found.update(latency._verified({n: made[n] for n in COMPILED[:2]}, ours(x), lambda what: None))
    assert found["torch.compile"] == Absent("torch.compile", "RuntimeError: no torch.compile here")


@pytest.mark.usefixtures("quick")
def test_a_network_of_two_tensors_is_refused(latency):
    with torch.no_grad(), pytest.raises(ValueError, match="latency: the network must make one tensor of one, got "):
        latency.measure(f"{__file__}:Two", "1x3x9x8", 1, 0.01, False, 1, lambda what: None)


@pytest.mark.parametrize(("name", "package"), [("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")])
def test_a_runtime_computes_the_same(latency, name, package):
    for needed in ("onnx", "onnxscript", package):
        pytest.importorskip(needed)
    ours, x = small(latency)
    with torch.no_grad():
        y = latency.plain(ours).double()(x.double())
        way = latency.makers(ours, latency.plain(ours), x, y.float(), 1, False)[name]()
        assert latency.distance(way.answer()[0], y) < 1e-6
        x.neg_()  # bound, not copied
        y = latency.plain(ours).double()(x.double())
        assert latency.distance(way.answer()[0], y) < 1e-6


def test_a_package_that_is_missing_is_named(latency, monkeypatch):
    monkeypatch.setattr("omniconv.bench.peers.find_spec", lambda name: None if name == "onnxscript" else object())
    ours, x = small(latency)
    made = latency.makers(ours, latency.plain(ours), x, ours(x), 1, False)
    assert made["OpenVINO"] == Absent("OpenVINO", "onnxscript is not installed")


@pytest.mark.usefixtures("quick")
def test_the_command(latency, tmp_path, monkeypatch):
    report, readme = tmp_path / "latency.json", tmp_path / "README.md"
    options = ["run", "--budget", "0.01", "--no-compile", "--report", str(report)]
    monkeypatch.setattr(latency, "NETWORKS", {SMALL: ("1x3x9x8", "1x3x12x7")})
    first = CliRunner().invoke(latency.app, options)
    assert first.exit_code == 0, first.output
    made = json.loads(report.read_text())
    assert [(case["name"], case["input"]) for case in made["cases"]] == [("Small", "1x3x9x8"), ("Small", "1x3x12x7")]
    assert made["settings"]["bound"] == latency.BOUND
    assert latency.table(made) in first.stdout
    assert "| way | 9×8: ms | × | 12×7: ms | × |" in first.stdout
    assert "`Small`: 0.0 M parameters; G MACs: 0.0 at 9×8, 0.0 at 12×7." in first.stdout
    assert "Not timed: torch.compile (it was not asked for (--no-compile))" in first.stdout
    readme.write_text("a\n<!-- bench:latency -->\nold\n<!-- /bench:latency -->\nz\n")
    shown = CliRunner().invoke(latency.app, ["table", str(report), "--readme", str(readme)])
    assert shown.exit_code == 0, shown.output
    assert readme.read_text() == f"a\n<!-- bench:latency -->\n{latency.table(made)}\n<!-- /bench:latency -->\nz\n"


@pytest.mark.usefixtures("quick")
def test_a_wrong_answer_of_ours_fails_the_command(latency, tmp_path):
    options = ["run", f"{__file__}:Wrong", "--input", "1x3x9x8", "--budget", "0.01", "--no-compile"]
    result = CliRunner().invoke(latency.app, [*options, "--report", str(tmp_path / "latency.json")])
    assert result.exit_code == 1
    assert (tmp_path / "latency.json").exists()
    alone = CliRunner().invoke(latency.app, ["run", SMALL])
    assert alone.exit_code == 2


@pytest.mark.parametrize("file", RESULTS, ids=lambda p: p.stem)
def test_the_committed_result(latency, file):
    """Every network on every input, every way verified, and the README's table is that of one thread."""
    report = json.loads(file.read_text())
    assert report["schema_version"] == 1
    assert [(case["target"], case["input"]) for case in report["cases"]] == [
        (target, size) for target, sizes in latency.NETWORKS.items() for size in sizes
    ]
    for case in report["cases"]:
        assert {way["name"] for way in case["ways"]} == {*EAGER, *COMPILED, *RUNTIMES}
        assert all(way["error"] <= report["settings"]["bound"] for way in case["ways"])
        assert case["away"] == []
    assert report["settings"]["threads"] > 1 or latency.table(report) in (REPOSITORY / "README.md").read_text()
