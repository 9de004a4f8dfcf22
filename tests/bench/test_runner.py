"""Speed: the layers that are measured, and that nothing wrong is ever timed."""

import json
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from bench_rows import PEAKS, SMALL, TINY, benchmark, broken, layers, measured, row, timing
from typer.testing import CliRunner

from omniconv.analysis.peaks import Demand
from omniconv.analysis.tables import as_markdown
from omniconv.bench import peers, runner
from omniconv.bench.layer_lists import measurable, parse_layers, read_layers
from omniconv.bench.peers import BOTH, DIRECTIONS, FORWARD, Way, rivals
from omniconv.bench.results import Measured, fastest, load
from omniconv.bench.runner import StoppedClock, agree, run
from omniconv.bench.speed import NO_RESULTS, remarks, summaries, tables, verdict
from omniconv.cli import app
from omniconv.nn import LightweightConv1d
from omniconv.techniques import find
from omniconv.timing import Interrupted

pytestmark = pytest.mark.usefixtures("quick_bench")


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
        [*ONE, "-o", "a.txt"],
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
