"""Costs of torch's own modules and functions, as the dispatcher sees them, against torch itself on ones and numbers by hand."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omniconv.analysis import cost

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SPREAD = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def drawn(seed):
    """A convolution at random: the function, its operands of ones, its settings."""
    draw = random.Random(seed)
    rank, transposed = draw.choice((1, 2, 2, 3)), draw.random() < 0.4
    groups = draw.choice((1, 1, 2, 3))
    c, o = groups * draw.randint(1, 3), groups * draw.randint(1, 3)
    kernel = [draw.randint(1, 4) for _ in range(rank)]
    stride, dilation, padding = ([draw.randint(low, 3) for _ in range(rank)] for low in (1, 1, 0))
    x = torch.ones(draw.randint(1, 3), c, *(draw.randint(9, 13) for _ in range(rank)), dtype=torch.float64)
    shape = (c, o // groups, *kernel) if transposed else (o, c // groups, *kernel)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (SPREAD if transposed else CONVOLVE)[rank], x, torch.ones(shape, dtype=torch.float64), settings, transposed


@pytest.mark.parametrize("seed", range(60))
def test_a_convolution_counts_what_ones_sum_to(seed):
    convolution, x, weight, settings, transposed = drawn(seed)
    y = convolution(x, weight, **settings)
    found = cost(lambda x, w: convolution(x, w, **settings), x, weight)
    assert found.macs_valid == y.sum()
    positions = x[:, 0] if transposed else y[:, 0]
    assert found.macs_dense == positions.numel() * weight[0].numel() * (x.shape[1] if transposed else y.shape[1])
    assert found.flops == 2 * found.macs_dense
    assert found.bytes_min == 8 * (x.numel() + weight.numel() + y.numel())


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("wanted", ["x", "weight", "both"])
def test_each_gradient_costs_one_forward(seed, wanted):
    """Whatever the groups; torch's own counter makes it g + 1 times for two."""
    convolution, x, weight, settings, _ = drawn(seed)
    x.requires_grad_(wanted != "weight")
    weight.requires_grad_(wanted != "x")
    found = cost(lambda x, w: convolution(x, w, **settings), x, weight, backward=True)
    gradients = 2 if wanted == "both" else 1
    assert found.backward.macs_dense == gradients * found.macs_dense
    assert found.backward.macs_valid == gradients * found.macs_valid


def test_a_small_network_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    found = cost(network, torch.empty(2, 3, 8, 8))
    assert found.params == 3 * 8 * 9 + 8 + 16 + 8 * 10 + 10
    assert found.macs_dense == 2 * (16 * 3 * 8 * 9 + 80)
    # at stride 2 with one zero before, the first row and column of taps are zeros: 4·4 windows of 9, 3 + 3·... = 11·11 of 12·12
    assert found.macs_valid == 2 * (11 * 11 * 3 * 8 + 80)
    assert [(row.name, row.type, row.technique) for row in found.rows if row.macs_dense] == [
        ("0", "Conv2d", "standard"), ("5", "Linear", "pointwise"),
    ]  # fmt: skip
    assert sum(row.params for row in found.rows) == found.params
    assert found.modules[0].macs_dense == found.macs_dense
    assert found.modules[1].params == 3 * 8 * 9 + 8
    assert not found.coverage.unknown


def test_shared_parameters_count_once():
    shared = nn.Linear(6, 6)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    found = cost(network, torch.empty(4, 6))
    assert found.params == sum(row.params for row in found.rows) == 42
    assert found.macs_dense == 2 * 4 * 36
    (row,) = [row for row in found.rows if row.macs_dense]
    assert row.calls == 2


class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(3, 3), nn.Linear(5, 5)

    def forward(self, x):
        return self.used(x)


def test_parameters_that_nothing_reads_are_told():
    found = cost(Forgetful(), torch.empty(1, 3))
    assert found.params == 12 + 30
    assert ("spare", "unused", 30) in [(row.name, row.op, row.params) for row in found.rows]
    assert any("30 parameters" in note for note in found.notes)
