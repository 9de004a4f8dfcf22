"""The bars of a network's cost are its rows."""

import pytest
import torch
from small_network import Net, X
from typer.testing import CliRunner

from omniconv.analysis import cost
from omniconv.analysis.plots.cost_bars import REST, bars, cost_bars
from omniconv.analysis.plots.style import check_extra, rendered
from omniconv.cli import app

METRICS = ("macs_dense", "params", "bytes_min")


@pytest.mark.parametrize("most", [1, 2, 99])
def test_bars_sum_to_the_totals(most):
    found = cost(Net().eval(), X)
    shown = bars(found, most)
    assert len(shown) <= most + 1
    assert (shown[-1].name == REST) == (most < 99)
    for metric in METRICS:
        assert sum(getattr(bar, metric) for bar in shown) == sum(getattr(row, metric) for row in found.rows)


def test_the_costliest_are_kept_in_their_order():
    names = [bar.name for bar in bars(cost(Net().eval(), X), 3)]
    assert names == ["first", "again.0", "wide", REST]


def test_lengths_are_the_numbers():
    found = cost(Net().eval(), X)
    drawn = cost_bars(found, 3)
    shown = bars(found, 3)
    for axes, metric in zip(drawn.axes, METRICS, strict=True):
        assert [bar.get_width() for bar in axes.patches] == [getattr(bar, metric) for bar in shown]
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == [bar.name for bar in shown]
    assert rendered(drawn, ".png").startswith(b"\x89PNG")
    assert rendered(cost_bars(found, 3), ".svg") == rendered(cost_bars(found, 3), ".svg")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_summary_writes_the_picture(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    call = ["summary", "small_network:Net", "--input", "1x4x6x6", "-o", str(file)]
    assert CliRunner().invoke(app, call).exit_code == 0
    assert file.read_bytes() == rendered(cost_bars(cost(Net().eval(), X)), suffix)
    refused = CliRunner().invoke(app, call)
    assert refused.exit_code == 2
    assert "must not exist" in refused.stderr


def test_nothing_to_show():
    assert rendered(cost_bars(cost(torch.nn.Identity(), X)), ".png")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr("omniconv.analysis.plots.style.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^summary: a plot must have matplotlib \(pip install 'omniconv\[plot\]'\), got none$"):
        check_extra("summary")
