"""A network of one's own: what is timed beside what, that equals stay equal, and that the network stays as it was."""

import csv
import io
import json
from functools import partial

import pytest
import torch
from small_network import Net, same, state
from torch import nn
from typer.testing import CliRunner

from omniconv.analysis.tables import as_csv
from omniconv.analysis.targets import Input, Target
from omniconv.bench import network as room
from omniconv.bench.network import bench_network
from omniconv.bench.network_tables import network_remarks, network_tables, verdict
from omniconv.cli import app
from omniconv.timing import Contest, Interrupted, Timing, Versus, contest, fewest_rounds

ONE = ["bench", "small_network:Net", "--input", "1x4x6x6"]


def target(net, *shape):
    return Target("net", "module", "a test", (Input(shape or (1, 4, 6, 6)),), module=net)


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(room, "contest", partial(contest, sample=0.0))


@pytest.fixture
def fakes(monkeypatch):
    """A second a call, half of it in channels-last; keeps who was asked."""
    asked = []

    def contest(calls, *, comparisons, budget):
        asked.append((list(calls), comparisons, budget))
        for call in calls.values():
            call()
        seconds = {name: 0.5 if "last" in name else 1.0 for name in calls}
        timings = {name: Timing(s, s, s, 9, 1) for name, s in seconds.items()}
        first = next(iter(calls))
        return Contest(timings, {n: Versus.of([1.0] * 40, [s] * 40, comparisons) for n, s in seconds.items() if n != first})

    monkeypatch.setattr(room, "contest", contest)
    return asked


def test_whole_and_layer_by_layer(fakes):
    result = bench_network(target(Net().eval()), budget=0.3)
    assert [asked[0] for asked in fakes] == [["contiguous", "channels-last"]] * 3 + [["contiguous"]]
    assert {asked[1] for asked in fakes} == {3}  # the verdicts of the whole run
    assert [asked[2] for asked in fakes] == [5 * 0.3, 0.3, 0.3, 0.3]
    assert [p.names for p in result.layers] == [("first", "again.0"), ("wide",), ("head",)]
    assert [p.share for p in result.layers] == [2.0, 1.0, 2.0]
    assert result.layers[0].macs == 4 * 4 * (6 + 5 + 5) ** 2
    assert result.whole.macs == sum(p.calls * p.macs for p in result.layers)
    assert result.whole.versus["channels-last"].verdict == "faster"
    assert result.layers[2].versus == {}
    assert verdict(result) == "channels-last: faster × 2.00; layers: 2 faster"
    assert result.notes == ()
    assert not result.interrupted


def test_beside_another_network(fakes):
    one, other = Net().eval(), Net().eval()
    other.load_state_dict(one.state_dict())
    other.wide = nn.Conv2d(4, 8, 1, stride=2, bias=False)
    result = bench_network(target(one), against=target(other))
    everyone = ["contiguous", "channels-last", "other, contiguous", "other, channels-last"]
    assert fakes[0][0] == everyone
    assert [asked[0] for asked in fakes[1:]] == [everyone[:3], everyone[:3], ["contiguous", "other, contiguous"]]
    assert {asked[1] for asked in fakes} == {3 + 2 + 2 + 1}
    assert any("its answers are others" in note for note in result.notes)
    other.wide = one.wide
    assert bench_network(target(one), against=target(other)).notes == ()


def test_a_way_that_answers_otherwise_is_not_timed(fakes, monkeypatch):
    class Picky(Net):
        def forward(self, x):
            if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
                return super().forward(x + 1)
            return super().forward(x)

    result = bench_network(target(Picky().eval()))
    assert fakes[0][0] == ["contiguous"]
    assert result.notes == ("channels-last: its answer is another, so its time says nothing",)

    class Refusing(Net):
        def forward(self, x):
            if not x.is_contiguous():
                raise RuntimeError("view size is not compatible")
            return super().forward(x)

    result = bench_network(target(Refusing().eval()))
    assert result.notes == ("channels-last: it does not run: RuntimeError: view size is not compatible",)


@pytest.mark.filterwarnings("ignore")
def test_compiled_is_one_more_way(fakes, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    bench_network(target(Net().eval()), compiled=True)
    assert fakes[0][0] == ["contiguous", "compiled", "channels-last"]


class Still(nn.Module):
    """A network that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.conv(x)

    def __deepcopy__(self, memo):
        raise RuntimeError("no")


def test_a_network_that_cannot_be_copied_is_timed_as_it_is(fakes):
    net = Still()
    before = state(net)
    result = bench_network(target(net))
    assert fakes[0][0] == ["contiguous"]
    assert len(result.notes) == 2
    assert same(before, state(net))


@pytest.mark.usefixtures("_quick")
def test_an_a_a_run_reports_no_win():
    """A real one: a network beside itself. 1 % of such runs may, and a win of 3 % besides; twice in a row none does."""
    net = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1, groups=g) for g in (1, 2, 4, 8)]).eval()
    for attempt in range(2):
        result = bench_network(target(net, 1, 8, 24, 24), against=target(net, 1, 8, 24, 24), budget=0.05)
        verdicts = {part.versus["other, contiguous"].verdict for part in (result.whole, *result.layers)}
        if verdicts == {"within noise"}:
            return
        assert attempt == 0, verdicts


@pytest.mark.usefixtures("_quick")
def test_the_network_stays_as_it_was():
    net = Net().eval()
    net.first.requires_grad_(False)
    net(torch.ones(1, 4, 6, 6))[0].sum().backward()
    before = state(net)
    bench_network(target(net), budget=1e-6, threads=3)
    assert same(before, state(net))
    training = Net().train()
    before = state(training)
    bench_network(target(training), budget=1e-6)
    assert same(before, state(training))


class Moody(nn.Module):
    """A network whose copies answer otherwise."""

    def __init__(self, count=1):
        super().__init__()
        self.conv, self.count = nn.Conv2d(4, 4, 1), count

    def forward(self, x):
        return self.conv(x * self.count)

    def __deepcopy__(self, memo):
        return Moody(self.count + 1)


def test_a_network_whose_copies_answer_otherwise_is_refused():
    with pytest.raises(ValueError, match=r"^bench: the network must answer the same twice, got another answer"):
        bench_network(target(Moody()))


@pytest.mark.parametrize("stage", ["first run", "copies", "whole", "layer 1", "layer 3"])
def test_an_interruption_keeps_what_is_done_and_the_network(fakes, monkeypatch, stage):
    net = Net().eval()
    right = room.contest

    def stopped(*args, **kwargs):
        if stage == "whole" or (stage.startswith("layer") and len(fakes) == int(stage[-1])):
            raise Interrupted(Contest({}, {}))
        return right(*args, **kwargs)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "contest", stopped)
    if stage == "first run":
        net.stop = KeyboardInterrupt()
    if stage == "copies":
        monkeypatch.setattr(room, "copied", interrupted)
    before = state(net)
    with pytest.raises(KeyboardInterrupt) as caught:
        bench_network(target(net), threads=3)
    assert same(before, state(net))
    if stage != "first run":
        done = caught.value.done
        assert done.interrupted
        assert (done.whole is not None) == stage.startswith("layer")
        assert len(done.layers) == (int(stage[-1]) - 1 if stage.startswith("layer") else 0)
        assert verdict(done).endswith("; interrupted")


def test_a_network_that_fails_stays_as_it_was():
    net = Net().eval()
    net.stop, before = ValueError("no"), state(net)
    with pytest.raises(ValueError, match=r"^bench: the network must run on its example inputs, got ValueError: no$"):
        bench_network(target(net))
    assert same(before, state(net))


def test_a_verdict_has_as_many_rounds_as_the_whole_run_needs(monkeypatch):
    seen = []
    monkeypatch.setattr(room, "contest", lambda calls, **k: seen.append(contest(calls, sample=0.0, **k)) or seen[-1])
    bench_network(target(Net().eval()), budget=1e-9)
    assert {v.rounds for made in seen for v in made.versus.values()} == {fewest_rounds(3)}


# tables and the command


def command(*arguments, width=80):
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit(fakes, width):
    result = command(*ONE, "--against", "small_network:Net", width=width)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "standard2d n1 c4 i6 k3 p1" in result.stdout
    assert "2.00 (2.00–2.00)" in result.stdout
    assert "≈1.00" in result.stdout
    assert "…" not in result.stdout


def test_formats(fakes, tmp_path):
    data = json.loads(command(*ONE, "--format", "json").stdout)
    assert data["kind"] == "bench-network"
    assert data["machine"].keys() >= {"cpu", "threads", "load", "mhz", "governor", "torch"}
    assert data["whole"]["versus"]["channels-last"]["verdict"] == "faster"
    result = bench_network(target(Net().eval()))
    lines = list(csv.DictReader(io.StringIO(as_csv(network_tables(result)))))
    assert [line["channels_last_ratio"] for line in lines[2:]] == ["2.0", "", "2.0"]
    assert "1% of all runs say otherwise" in network_remarks(result)[0]
    assert command(*ONE, "-o", tmp_path / "a.html").exit_code == 0
    refused = command(*ONE, "-o", tmp_path / "a.html")
    assert refused.exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "small_network:Nothing", "--input", "1x1"],
        ["bench", "small_network:Net"],
        [*ONE, "--direction", "forward"],
        [*ONE, "--cold"],
        [*ONE, "--only", "x"],
        [*ONE, "--threads", "0"],
        [*ONE, "--budget", "0"],
        [*ONE, "--against", "nothing:here"],
        ["bench", "depthwise", "--against", "small_network:Net"],
        ["bench", "standard2d c4 i6 k3", "--input", "1x4x6x6"],
        ["bench", "standard2d c4 i6 k3", "--only", "x"],
        ["bench", "standard2d c4 i6 k3 what"],
        ["bench", "nothing"],
    ],
)
def test_usage_errors_are_one_line(arguments):
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("bench: ")


def test_ctrl_c_is_exit_code_130(monkeypatch):
    def stopped(*_, **__):
        raise Interrupted(Contest({}, {}))

    monkeypatch.setattr(room, "contest", stopped)
    result = command(*ONE)
    assert result.exit_code == 130
    assert result.stdout.rstrip().endswith("interrupted")


@pytest.mark.usefixtures("quick_bench")
@pytest.mark.parametrize("text", ["standard c4-6 i6 k3 p1", "transposed2d c6-4 i6 k4 s2 p1", "depthwise2d c3 i5 k3 p1"])
def test_one_problem_against_all_its_peers(text):
    result = command("bench", text, "--budget", "0.01")
    assert result.exit_code == 0, result.output
    assert "one layer" in result.stdout
    assert "2 verified; 2-D forward × " in " ".join(result.stdout.split())
