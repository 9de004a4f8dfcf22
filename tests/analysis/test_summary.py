"""A network as a tree of its modules: the sums are right, the drawing fits, and what does not run is said."""

import csv
import io
import json
import re
import warnings
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import omniconv.nn
from omniconv.analysis.cost import cost
from omniconv.analysis.summary import summary
from omniconv.analysis.summary_tables import METRICS, costliest_table, deepest, guides_of, readable_depth, totals, tree_table
from omniconv.analysis.targets import load
from omniconv.cli import app


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.mix = omniconv.nn.PointwiseConv2d(channels, channels, bias=False)
        self.idle = nn.Identity()

    def forward(self, x):
        return F.relu(self.idle(self.mix(self.conv(x))) + x)


class Net(nn.Module):
    """4 classes of 3 channels; every number below is counted by hand."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Stops(Net):
    def forward(self, x):
        x = self.stem(x)
        raise RuntimeError("no way\nsecond line")


class Unknown(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x).abs()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Networks of a user beside the current directory."""
    (tmp_path / "sketch.py").write_text(
        "import sys, os\nsys.path.append(os.environ['TESTS'])\nfrom test_summary import Net, Stops, Unknown\n"
        "def loud():\n    net = Net()\n    net.register_forward_hook(lambda *_: print('ran'))\n    return net\n"
    )
    monkeypatch.setenv("TESTS", __file__.rpartition("/")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments, width=80):
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["summary", *map(str, arguments)])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("summary: ")
    assert ", got " in line
    return line


def by_name(made):
    return {line.name: line for line in made.lines}


X = torch.zeros(1, 3, 8, 8)


def test_sums_of_a_network_counted_by_hand():
    lines = by_name(summary(Net(), X))
    assert lines["stem"].macs_dense == 4 * 4 * 8 * 27
    assert lines["stem"].params == 8 * 27 + 8
    assert (lines["stem"].technique, str(lines["stem"].problem)) == ("standard", "standard2d n1 c3-8 i8 k3 s2 p1")
    assert lines["blocks.0.conv"].macs_dense == 16 * 8 * 9
    assert lines["blocks.0.conv"].macs_valid == 8 * (2 * 2 * 9 + 8 * 6 + 4 * 4), "corners see 4 taps, edges 6"
    assert lines["blocks.0.mix"].macs_dense == 16 * 64
    block = lines["blocks.0"]
    assert block.macs_dense == 16 * 8 * 9 + 16 * 64
    assert block.params == 80 + 64
    assert not block.leaf
    assert block.ops == 4
    assert lines["blocks"].macs_dense == 2 * block.macs_dense
    assert lines["head"].macs_dense == 32
    root = lines[""]
    assert root.macs_dense == 3456 + 2 * block.macs_dense + 32
    assert root.params == sum(p.numel() for p in Net().parameters())
    assert [lines[name].output for name in ("stem", "blocks.0", "", "head")] == [(1, 8, 4, 4), (1, 8, 4, 4), (1, 4), (1, 4)]
    assert (lines["blocks.0:add"].ops, lines["blocks.0:add"].flops, lines["blocks.0:add"].leaf) == (1, 128, True)
    assert [lines[name].calls for name in ("", "blocks", "stem", "blocks.0:add")] == [1, 1, 1, 1]
    assert "blocks.0.idle" not in lines, "what does nothing has no line"


def test_the_tree_is_depth_first_and_adds_up():
    made = summary(Net(), X, backward=True)
    assert made.lines[0].name == ""
    assert [line.depth for line in made.lines[:4]] == [0, 1, 1, 2]
    for metric in ("params", "macs_dense", "macs_valid", "flops", "bytes_min", "bytes_impl"):
        leaves = sum(getattr(line, metric) for line in made.lines if line.leaf)
        assert leaves == getattr(made, metric) == getattr(made.lines[0], metric)
    assert sum(line.backward.macs_dense for line in made.lines if line.leaf) == made.backward.macs_dense
    found = cost(Net(), X, backward=True)
    assert (made.macs_dense, made.backward, made.peak_activation) == (found.macs_dense, found.backward, found.peak_activation)
    assert made.backward.macs_dense == 2 * made.macs_dense - 3456, "the input asks for no gradient"
    assert made.intensity == pytest.approx(made.flops / made.bytes_min)


def test_a_layer_of_the_house_and_a_single_one():
    made = summary(nn.Conv2d(3, 8, 3), X)
    assert [(line.name, line.leaf, line.technique, line.macs_dense) for line in made.lines] == [("", True, "standard", 36 * 216)]
    lines = by_name(summary("standard n1 c64-128 i56 k3 p1"))
    assert lines[""].macs_dense == 231211008


def test_what_does_not_run_keeps_its_parameters(here):
    made = summary(Stops(), X)
    assert made.params == sum(p.numel() for p in Net().parameters())
    assert made.status["macs_dense"] in ("unknown", "lower_bound")
    assert by_name(made)["blocks"].params == 288
    assert any("(Stops)" in note and "RuntimeError: no way" in note for note in made.notes)
    lines = by_name(made)
    assert (lines["stem"].macs_dense, lines["stem"].status["macs_dense"]) == (3456, "exact"), "what ran is counted"
    assert lines[""].status["macs_dense"] == "lower_bound"
    (note,) = summary(Net(), torch.zeros(1, 5, 8, 8)).notes
    assert "in stem (Conv2d) RuntimeError: " in note
    result = run("sketch:Stops", "--input", "1x3x8x8")
    assert result.exit_code == 0
    assert "RuntimeError: no way" in result.stdout.replace("\n", " ")
    assert "second line" not in result.stdout
    assert "Traceback" not in result.output


def test_an_input_that_does_not_fit_is_said(here):
    result = run("sketch:Net", "--input", "1x5x8x8")
    assert result.exit_code == 0
    assert "channels" in result.stdout


def test_ops_without_a_formula_are_named(here):
    made = summary(Unknown(), torch.zeros(2, 8))
    assert made.coverage.unknown == (("aten::_fft_r2c", 1),)
    said = run("sketch:Unknown", "--input", "2x8", width=120).stdout
    assert "aten::_fft_r2c ×1" in said
    assert re.search(r"[≥?]", said)


def test_exported_programs(here):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Net().eval(), (X,)), here / "net.pt2")
    made, direct = summary("net.pt2"), summary(Net().eval(), X)
    assert (made.params, made.macs_dense, made.macs_valid) == (direct.params, direct.macs_dense, direct.macs_valid)
    assert by_name(made)["blocks.1.conv"].technique == "depthwise"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("more", [[], ["--sort", "macs"], ["--backward"], ["--sort", "intensity"], ["--depth", "9"]], ids=" ".join)
def test_it_fits(here, width, more):
    result = run("sketch:Net", "--input", "1x3x8x8", *more, width=width)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in result.stdout
    assert "\x1b" not in result.stdout
    assert lines[0] == "sketch:Net (Net of sketch), input 1x3x8x8"
    assert "coverage: all " in result.stdout
    assert f"{sum(p.numel() for p in Net().parameters()):,} parameters" in result.stdout


def test_the_tree_and_its_depth(here):
    text = run("sketch:Net", "--input", "1x3x8x8").stdout
    for words in ("├ stem ", "standard", "│ └ 1 ", "│   ├ conv ", "depthwise", "└ mean ", "100 %"):
        assert words in text, words
    shallow = run("sketch:Net", "--input", "1x3x8x8", "--depth", "1").stdout
    assert "conv" not in shallow
    assert "1 of 3 levels: --depth 3 shows all" in shallow
    assert "levels" not in text
    assert guides_of([0, 1, 2, 2, 1, 2]) == ["", "├ ", "│ ├ ", "│ └ ", "└ ", "  └ "]


def test_a_large_network_is_shown_as_deep_as_is_readable():
    made = summary(nn.Sequential(*(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(9))) for _ in range(9))), X)
    assert (readable_depth(made), deepest(made)) == (1, 2)
    assert len(tree_table(made).rows) == 10
    assert len(tree_table(made, 2).rows) == 91


@pytest.mark.parametrize("metric", METRICS)
def test_the_costliest_first(metric):
    made = summary(Net(), X, backward=True)
    table = costliest_table(made, METRICS[metric], 5)
    assert len(table.rows) == 5
    assert all(row.line.leaf for row in table.rows)
    values = [row.share for row in table.rows]
    assert values == sorted(values, reverse=True)
    if metric == "macs":
        assert table.rows[0].line.name == "stem"
        assert sum(row.share for row in costliest_table(made, "macs_dense").rows) == pytest.approx(1)
        assert table.caption.startswith("and ")


def test_formats(here):
    arguments = ("sketch:Net", "--input", "1x3x8x8", "--depth", "1")
    data = json.loads(run(*arguments, "--format", "json").stdout)
    assert (data["kind"], data["schema_version"], data["inputs"]) == ("summary", 1, ["1x3x8x8"])
    assert next(line for line in data["lines"] if line["name"] == "blocks.0.conv")["problem"] == "depthwise2d n1 c8 i4 k3 p1"
    rows = list(csv.DictReader(io.StringIO(run(*arguments, "--format", "csv").stdout)))
    assert len(rows) == len(data["lines"]), "machines get every line"
    assert next(row for row in rows if row["layer"] == "stem")["macs_dense"] == "3456"
    markdown = run(*arguments, "--format", "md").stdout
    assert "| ├ stem | standard |" in markdown
    assert "coverage: all" in markdown
    page = run(*arguments, "--format", "html").stdout
    assert "<h1>omniconv summary</h1>" in page
    assert "├ stem" in page
    assert 'style="--share: 100.0"' in page


def test_what_the_users_code_prints_stays_out_of_the_result(here):
    result = run("sketch:loud", "--input", "1x3x8x8", "--format", "json")
    assert json.loads(result.stdout)["kind"] == "summary"
    assert "ran" in result.stderr


def test_refusals(here):
    assert "at least 1, got 0" in refused("sketch:Net", "--input", "1x3x8x8", "--depth", "0")
    assert "at least 1, got -2" in refused("sketch:Net", "--input", "1x3x8x8", "--top", "-2")
    assert "--backward" in refused("sketch:Net", "--input", "1x3x8x8", "--sort", "backward")
    assert "there must be an input" in refused("sketch:Net")
    assert "got '1x3y8'" in refused("sketch:Net", "--input", "1x3y8")
    assert "got 'Nte'" in refused("sketch:Nte", "--input", "1x3x8x8")
    (here / "a.json").write_text("mine")
    assert "must not exist" in refused("sketch:Net", "--input", "1x3x8x8", "-o", here / "a.json")
    assert (here / "a.json").read_text() == "mine"
    assert run("sketch:Net", "--sort", "nothing").exit_code == 2


def test_totals_of_a_known_network():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module("timm")
    except Exception as error:
        pytest.skip(f"timm: {error}")
    made = summary(load("timm:efficientnet_b0"))
    assert (made.params, made.macs_dense) == (5_288_548, 385_814_752)
    assert totals(made)[0].startswith("total: 5,288,548 parameters · 386M MACs")
    assert by_name(made)["blocks.1.0.conv_dw"].technique == "depthwise"


def test_a_module_that_runs_twice_counts_twice_but_its_parameters_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x):
            return self.conv(self.conv(x))

    line = by_name(summary(Twice(), X))["conv"]
    assert (line.calls, line.ops, line.params, line.macs_dense) == (2, 2, 9, 2 * 64 * 9)
