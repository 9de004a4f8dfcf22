"""``omniconv dilate``: what it prints and writes, and how it fails."""

import io
import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from omniconv.analysis.cost import cost
from omniconv.cli import app
from omniconv.surgery import dilate_target, stride_to_dilation

NET = """
from torch import nn


def net():
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))


def flat():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Flatten(), nn.Linear(8 * 16, 2))
"""


def run(*arguments):
    return CliRunner(env={"COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}).invoke(app, ["dilate", *map(str, arguments)])


@pytest.fixture
def target(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)  # a short target keeps the table's title on one line
    return "net.py:net"


def test_the_table_says_what_changes(target):
    result = run(target, "--input", "1x3x32x24", "--output-stride", 2)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"3 layers of {target} at output stride 2"
    rows = [line.split() for line in lines[3:6]]
    assert rows[0] == ["1", "Conv2d", "2", "→", "1", "1", "0", "yes"]
    assert rows[1] == ["2", "Conv2d", "2", "→", "1", "1", "→", "2", "1", "→", "2"]
    assert rows[2] == ["3", "Conv2d", "1", "1", "→", "4", "1", "→", "4"]
    assert lines[7] == "for an input of 1×3×32×24: 1,656 parameters stay"
    assert "note: AdaptiveAvgPool2d '4' pools more positions than before" in result.stdout


def test_costs_are_those_of_both_networks(target):
    result = dilate_target(target, 2, inputs=["1x3x32x24"])
    x = torch.zeros(1, 3, 32, 24)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1))
    assert result.macs == (cost(net, x).macs_dense, cost(stride_to_dilation(net, 2), x).macs_dense)
    first, same = 16 * 12 * 3 * 9 * 8, 8 * 8
    assert result.macs == (first + same * (8 * 6 * 4 + 4 * 3 * 18), first + same * 16 * 12 * (4 + 18))
    assert result.params == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_the_file_holds_the_network(target, suffix, tmp_path):
    file = tmp_path / f"dense{suffix}"
    result = run(target, "--input", "1x3x32x24", "--output-stride", 2, "-o", file, "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [change["module"] for change in data["changes"]] == ["1", "2", "3"]
    assert data["changes"][1]["stride"] == [[2, 2], [1, 1]]
    expected = dilate_target(target, 2, inputs=["1x3x32x24"])
    x = torch.randn(1, 3, 32, 24)
    found = torch.export.load(file).module() if suffix == ".pt2" else torch.load(file, weights_only=False)
    torch.testing.assert_close(found(x), expected.module(x))
    again = run(target, "--input", "1x3x32x24", "-o", file)
    assert again.exit_code == 2
    assert "must not exist" in again.stderr


@pytest.mark.parametrize(
    ("changed", "arguments", "said"),
    [
        (
            ":flat",
            ("--input", "1x3x8x8", "--output-stride", 1),
            "stride_to_dilation: a map that grows must be pooled to one position",
        ),
        (":net", ("--input", "1x3x32x24", "--output-stride", 0), "stride_to_dilation: output_stride must be at least 1, got 0"),
        (":net", ("--input", "1x3x32x24", "-o", "net.txt"), "dilate: the output file must end in .pt, .pt2, .json"),
        (":net", ("--input", "input=1x3x32x24"), "dilate: inputs must be given by their place, got input"),
        (":none", ("--input", "1x3x32x24"), "dilate: "),
    ],
)
def test_what_cannot_be_done_is_one_line(target, changed, arguments, said):
    result = run(target.replace(":net", changed), *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith(said)
    assert ", got " in result.stderr


def test_a_problem_is_a_network_of_one_layer():
    result = dilate_target("standard2d c4-8 i9 k3 s2 p1", 1)
    assert [(c.module, c.stride) for c in result.changes] == [("", ((2, 2), (1, 1)))]
    assert result.macs == (25 * 9 * 32, 81 * 9 * 32)
    torch.load(io.BytesIO(result.saved(".pt")), weights_only=False)
    with pytest.raises(ValueError, match=r"dilate: the suffix must be \.pt or \.pt2, got '\.onnx'"):
        result.saved(".onnx")
