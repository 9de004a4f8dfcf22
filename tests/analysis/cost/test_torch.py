"""Costs of torch's own modules and functions, as the dispatcher sees them, against torch itself on ones and numbers by hand."""

import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy

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


@pytest.mark.parametrize(
    "write", [lambda y: y.add_(1), lambda y: y.fill_(1), lambda y: y[:, :, 0].fill_(1), lambda y: y.copy_(y + 1)]
)
def test_a_border_that_was_written_to_is_no_padding(write):
    weight, x = torch.ones(4, 3, 3, 3), torch.ones(1, 3, 5, 5)

    def padded(x):
        y = F.pad(x, (1, 1, 1, 1))
        write(y)
        return F.conv2d(y, weight)

    assert cost(padded, x).macs_valid == 4 * 3 * 25 * 9


def test_a_border_that_stays_zero_is_padding():
    weight, x = torch.ones(4, 3, 3, 3), torch.ones(1, 3, 5, 5)
    rectified = cost(lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)).relu_(), weight), x)
    assert rectified.macs_valid == 4 * 3 * 13 * 13


@dataclass
class Held:
    x: torch.Tensor


class Wraps(nn.Conv2d):
    def forward(self, target):
        return Held(super().forward(target.x))


def test_dataclasses_are_opened_and_any_keyword_may_be_given():
    found = cost(Wraps(3, 4, 3), target=Held(torch.ones(1, 3, 5, 5)), backward=True)
    assert (found.macs_dense, found.backward.macs_dense) == (972, 972)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")  # torch 2.15
@pytest.mark.parametrize("made", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(1, 3, 5, 5)), torch.compile])
def test_compiled_networks(made):
    network = nn.Sequential(made(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), nn.Conv2d(4, 2, 1)).train()
    found = cost(network, torch.ones(1, 3, 5, 5), backward=True)
    assert (found.params, found.macs_dense, found.backward.macs_dense) == (122, 972 + 72, 972 + 2 * 72)
    assert not network[1]._forward_hooks


def test_lazy_networks_stay_lazy():
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    found = cost(network, torch.ones(2, 3, 5, 5), backward=True)
    assert (found.params, found.macs_dense, found.backward.macs_dense) == (112 + 8 + 74, 2 * 1044, 2 * (1044 + 72))
    assert all(is_lazy(x) for x in [*network.parameters(), network[1].running_mean])
    with pytest.raises(ValueError, match="a model with lazy parameters must run on its inputs, got"):
        cost(network, torch.ones(3))


def test_in_inference_mode_and_of_what_was_made_in_it():
    with torch.inference_mode():
        layer, x = nn.Conv2d(3, 4, 3), torch.ones(1, 3, 5, 5)
        inside = cost(layer, x, backward=True)
    for found in (inside, cost(layer, x, backward=True), cost(nn.Conv2d(3, 4, 3), x, backward=True)):
        assert (found.params, found.macs_dense, found.backward.macs_dense) == (112, 972, 972)
    assert layer.weight.is_inference()


def test_a_complex_product_is_four_of_real_numbers():
    found = cost(torch.mm, torch.ones(2, 3, dtype=torch.cfloat), torch.ones(3, 4, dtype=torch.cfloat))
    assert (found.macs_dense, found.flops, found.status["flops"]) == (24, 8 * 24, "exact")


def test_sparse_operands_are_unknown_and_no_end():
    found = cost(lambda x: torch.sparse.mm(x.to_sparse(), x) @ x, torch.eye(5))
    assert (found.macs_dense, found.status["macs_dense"]) == (125, "lower_bound")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind):
    steps, x, gates = 7, torch.ones(7, 3, 6), {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    found = cost(kind(6, 5), x.requires_grad_(), backward=True)
    seen, state = steps * 3 * gates * 5 * 6, steps * 3 * gates * 5 * 5
    assert (found.macs_dense, found.status["macs_dense"]) == (seen + state, "exact")
    assert 2 * (seen + state) - found.backward.macs_dense in (0, state // steps)  # the first state wants no gradient


def test_coverage_is_of_both_passes():
    layer, x = nn.EmbeddingBag(10, 4), torch.zeros(2, 3, dtype=torch.long)
    found = cost(layer, x, backward=True)
    assert found.coverage.unknown
    assert found.coverage.ops > cost(layer, x).coverage.ops
    assert found.coverage.known + sum(calls for _, calls in found.coverage.unknown) == found.coverage.ops


def test_errors_inside_are_reported_and_nothing_is_printed(capfd):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(9, 9))
    stopped = cost(network, torch.ones(1, 3, 5, 5))
    assert (stopped.macs_dense, stopped.status["macs_dense"]) == (972, "lower_bound")
    assert capfd.readouterr() == ("", "")
