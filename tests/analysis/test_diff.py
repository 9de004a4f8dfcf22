"""Two summaries against each other: what changed is found, conditions mean what they say, and what is malformed is refused."""

import copy
import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from omniconv.analysis.diff import METRICS, Condition, diff
from omniconv.analysis.summary import summary
from omniconv.analysis.tables import as_json
from omniconv.cli import app


def net(width=8, extra=False, grouped=False):
    layers = {"stem": nn.Conv2d(3, width, 3), "mix": nn.Conv2d(width, 8, 1, groups=4 if grouped else 1)}
    if extra:
        layers["more"] = nn.Conv2d(8, 8, 3, padding=1)
    layers["act"] = nn.ReLU()
    made = nn.Sequential()
    for name, layer in layers.items():
        made.add_module(name, layer)
    return made


def written(folder, name, made, **options):
    file = folder / f"{name}.json"
    file.write_text(as_json(summary(made, torch.zeros(1, 3, 10, 10), **options), "summary"))
    return file


@pytest.fixture
def files(tmp_path):
    return (
        written(tmp_path, "a", net()),
        written(tmp_path, "b", net(width=16, extra=True)),
        written(tmp_path, "c", net(grouped=True)),
    )


def run(*arguments, width=80):
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["diff", *map(str, arguments)])


def test_layers_and_totals(files):
    a, b, c = files
    made = diff(a, b)
    assert [(layer.name, layer.status) for layer in made.layers] == [
        ("stem", "changed"), ("mix", "changed"), ("more", "added"), ("act", "same"),
    ]  # fmt: skip
    stem = made.layers[0]
    assert (stem.before.macs_dense, stem.after.macs_dense) == (64 * 8 * 27, 64 * 16 * 27)
    assert (stem.before.params, stem.after.params) == (8 * 28, 16 * 28)
    totals = {total.metric: total for total in made.totals}
    assert (totals["macs"].before, totals["macs"].after) == (64 * (216 + 64), 64 * (432 + 128 + 576))
    assert "backward" not in totals, "it was not asked for"
    assert set(totals) == set(METRICS) - {"backward"}
    back = diff(b, a)
    assert [layer.status for layer in back.layers] == ["changed", "changed", "removed", "same"]
    assert (back.layers[2].name, back.layers[2].after) == ("more", None)
    assert (diff(a, c).layers[1].kind_before, diff(a, c).layers[1].kind_after) == ("pointwise", "grouped")
    same = diff(a, a)
    assert {layer.status for layer in same.layers} == {"same"}
    assert all(total.before == total.after for total in same.totals)


def test_what_is_gone_first_stands_first(tmp_path):
    first = written(tmp_path, "a", nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)))
    second = json.loads(first.read_text())
    second["lines"] = [line for line in second["lines"] if line["name"] != "0"]
    (tmp_path / "b.json").write_text(json.dumps(second))
    assert [(c.name, c.status) for c in diff(first, tmp_path / "b.json").layers] == [("0", "removed"), ("1", "same")]


@pytest.mark.parametrize(
    ("text", "before", "after", "holds"),
    [
        ("macs>+1%", 100, 101, False),
        ("macs>+1%", 100, 101.5, True),
        ("macs > +1 %", 100, 102, True),
        ("macs<-5%", 100, 95, False),
        ("macs<-5%", 100, 94, True),
        ("macs>-5%", 100, 96, True),
        ("macs>-5%", 100, 95, False),
        ("macs<+5%", 100, 104, True),
        ("params>+10k", 5_000, 15_000, False),
        ("params>+10k", 5_000, 15_001, True),
        ("params>+0", 5, 5, False),
        ("params>+0", 5, 6, True),
        ("params<-10", 50, 39, True),
        ("peak>200M", 0, 200_000_000, False),
        ("peak>0.2G", 0, 200_000_001, True),
        ("intensity<3.5", 9, 3.4, True),
        ("intensity<3.5", 9, 3.5, False),
        ("macs>+1%", 0, 0, False),
        ("macs>+1%", 0, 1, True),
    ],
)
def test_conditions(text, before, after, holds):
    assert Condition.parse(text).holds(before, after) is holds


@pytest.mark.parametrize(
    "text",
    ["", "macs", "macs>", "macs>+", "macs>=1%", "macs=1", "mac>+1%", "macs>1%", "macs>+1k%", "macs>+1%%", "macs>+x", "macs>++1",
     "1<macs", "macs>+1.", "macs>+.5", "macs>+1e3", "macs>+inf", "macs>+1%;", "__import__('os')>+1", "macs>+1 KB",
     "macs>+9999999999999999"],
)  # fmt: skip
def test_malformed_conditions(files, text):
    result = run(files[0], files[0], "--fail-if", text)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("diff: ")
    assert ", got " in line


def test_exit_codes(files):
    a, b, _ = files
    assert run(a, b).exit_code == 0
    assert run(a, b, "--fail-if", "macs>+1%").exit_code == 1
    assert run(b, a, "--fail-if", "macs>+1%").exit_code == 0
    assert run(a, a, "--fail-if", "macs>+0%", "--fail-if", "params>+0").exit_code == 0
    result = run(a, b, "--fail-if", "params<-1%", "--fail-if", "macs>+1%")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "must not be: macs>+1%"
    assert run(a, b, "--fail-if", "backward>+1%").exit_code == 2, "it is in neither file"
    assert "unknown in the second" in run(a, b, "--fail-if", "backward>+1%").stderr


@pytest.mark.parametrize("width", [80, 120])
def test_it_reads_well(files, width):
    result = run(*files[:2], "--fail-if", "macs>+1%", width=width)
    assert max(map(len, result.stdout.splitlines())) <= width
    assert "…" not in result.stdout
    assert "2 layers changed, 1 added, 0 removed, 1 the same" in result.stdout
    assert "+306 %" in result.stdout
    assert "standard" in result.stdout
    assert "pointwise → grouped" in " ".join(run(files[0], files[2], width=120).stdout.split())


def test_formats(files, tmp_path):
    a, b, _ = files
    data = json.loads(run(a, b, "--format", "json").stdout)
    assert (data["kind"], data["failed"]) == ("diff", False)
    assert [layer["status"] for layer in data["layers"]] == ["changed", "changed", "added", "same"]
    assert "stem" in run(a, b, "--format", "csv").stdout
    assert "| stem | changed |" in run(a, b, "--format", "md").stdout
    assert "<h1>omniconv diff</h1>" in run(a, b, "--format", "html").stdout
    assert run(a, b, "-o", tmp_path / "d.md").exit_code == 0
    assert "must not exist" in run(a, b, "-o", tmp_path / "d.md").stderr


def broken(change):
    def write(data, folder):
        change(data)
        (folder / "x.json").write_text(json.dumps(data))

    return write


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda data, folder: None, "must be readable"),
        (lambda data, folder: (folder / "x.json").write_text("{"), "must be JSON"),
        (lambda data, folder: (folder / "x.json").write_bytes(b"\xff\xfe"), "must be JSON"),
        (lambda data, folder: (folder / "x.json").write_text("[" * 100_000), "must be JSON"),
        (broken(lambda d: d.update(macs_dense=float("-inf"))), "-Infinity is no number"),
        (lambda data, folder: (folder / "x.json").write_text("[]"), "of kind None"),
        (broken(lambda d: d.update(kind="bench")), "of kind 'bench'"),
        (broken(lambda d: d.update(schema_version=2)), "schema_version must be 1, got 2"),
        (broken(lambda d: d.pop("flops")), "without 'flops'"),
        (broken(lambda d: d.pop("lines")), "without 'lines'"),
        (broken(lambda d: d["lines"][1].pop("params")), "lines of the file"),
        (broken(lambda d: d["lines"][1].update(params="3")), "lines of the file"),
        (broken(lambda d: d.update(lines=3)), "lines of the file"),
        (broken(lambda d: d.update(lines=[3])), "lines of the file"),
        (broken(lambda d: d.update(status=[])), "status"),
    ],
)  # fmt: skip
def test_files_that_are_refused(files, tmp_path, write, said):
    write(copy.deepcopy(json.loads(files[0].read_text())), tmp_path)
    for pair in ((files[0], tmp_path / "x.json"), (tmp_path / "x.json", files[0])):
        result = run(*pair)
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith("diff: ")
        assert said in line
        assert "x.json" in line


def test_a_total_that_is_unknown_is_not_judged(files, tmp_path):
    data = json.loads(files[0].read_text())
    data["status"]["flops"] = "unknown"
    (tmp_path / "x.json").write_text(json.dumps(data))
    assert "flops" not in {total.metric for total in diff(files[0], tmp_path / "x.json").totals}
    assert "unknown in the first" in run(tmp_path / "x.json", files[0], "--fail-if", "flops>+1%").stderr
