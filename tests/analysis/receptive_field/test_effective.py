"""The effective field against what is known: box filters in a row make a bell whose width is known; gradients taken apart."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from omniconv.analysis.receptive_field import effective_receptive_field
from omniconv.analysis.receptive_field.effective import _jackknife


def boxes(depth, kernel=3, rank=2):
    layer = {1: nn.Conv1d, 2: nn.Conv2d}[rank]
    network = nn.Sequential(*[layer(1, 1, kernel, padding=kernel // 2, bias=False) for _ in range(depth)]).double()
    for weight in network.parameters():
        nn.init.constant_(weight, 1 / kernel**rank)
    return network


@pytest.mark.parametrize(("measure", "narrower"), [("absolute", 1.0), ("squared", math.sqrt(2))])
def test_a_stack_of_boxes_is_a_bell(measure, narrower):
    """The variance of n boxes of 3 is n·2/3 (central limit); squared, a Gaussian's is half of it."""
    depth = 30
    found = effective_receptive_field(boxes(depth), torch.empty(1, 1, 81, 81, dtype=torch.float64), samples=2, measure=measure)
    for centre, sigma, error in zip(found.centre, found.sigma, found.sigma_error, strict=True):
        assert centre == pytest.approx(40, abs=1e-6)
        assert sigma == pytest.approx(math.sqrt(depth * 2 / 3) / narrower, rel=0.01)
        assert error < 1e-6  # a linear network has the same map at every input
    assert found.theoretical == (61, 61)
    # of a round Gaussian a share s lies within the radius σ·√(−2·ln(1 − s))
    for area in found.areas:
        expected = -2 * math.pi * found.sigma[0] ** 2 * math.log(1 - area.share)
        assert area.positions == pytest.approx(expected, rel=0.05), area.share


def test_a_box_is_held_by_its_share_of_positions():
    found = effective_receptive_field(boxes(1, 5), torch.empty(1, 1, 15, 15, dtype=torch.float64), samples=3)
    assert [area.positions for area in found.areas] == [5, 13, 24]  # of 25: 20 %, 50 % and 95 %, rounded up
    assert np.count_nonzero(found.map) == 25
    assert found.map.sum() == pytest.approx(1)


def nonlinear():
    torch.manual_seed(3)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))]
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Dropout(0.5))


def test_the_seed_decides_all_of_it():
    network, x = nonlinear().train(), torch.empty(2, 1, 20, 20)
    one, two, other = (effective_receptive_field(network, x, samples=4, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.map, two.map)
    assert not np.array_equal(one.map, other.map)


def test_the_map_is_the_mean_of_the_gradients_of_its_inputs():
    """Against gradients taken here, with hooks and functions of another kind."""
    network = nonlinear().eval()
    found = effective_receptive_field(network, torch.empty(1, 1, 16, 16), of="6", samples=3, seed=5, position=(7, 9))
    generator, total = torch.Generator().manual_seed(5), torch.zeros(16, 16, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(1, 1, 16, 16, generator=generator, dtype=torch.float64).float()
        direction = torch.randn(1, 4, 1, 1, generator=generator, dtype=torch.float64).float()
        gradient = torch.func.grad(lambda x, d=direction: (network[:7](x.clone())[:, :, 7, 9] * d[..., 0, 0]).sum())(x)
        total += gradient[0, 0].detach().double() ** 2
    assert np.allclose(found.map, (total / total.sum()).numpy(), rtol=1e-3, atol=1e-9)


def test_more_inputs_make_a_smaller_error():
    network, x = nonlinear().eval(), torch.empty(1, 1, 24, 24)
    few, many = (effective_receptive_field(network, x, samples=n) for n in (4, 64))
    assert many.sigma_error[0] < few.sigma_error[0]
    assert many.areas[1].error < few.areas[1].error
    single = effective_receptive_field(network, x, samples=1)
    assert single.sigma_error == (None, None)
    assert single.areas[0].error is None


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=12)
    without = [(values.sum() - v) / 11 for v in values]
    assert _jackknife(without) == pytest.approx(values.std(ddof=1) / math.sqrt(12))


class Breaks(nn.Module):
    """Raises the second time it really runs."""

    def __init__(self):
        super().__init__()
        self.conv, self.runs = nn.Conv2d(1, 1, 3), 0

    def forward(self, x):
        if type(x) is torch.Tensor:
            self.runs += 1
            if self.runs == 2:
                raise KeyboardInterrupt
        return self.conv(x)


@pytest.mark.parametrize("build", [nonlinear, Breaks])
def test_the_model_is_left_as_it_was(build):
    network = build().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    state = torch.get_rng_state()
    try:
        effective_receptive_field(network, torch.empty(2, 1, 12, 12), samples=3)
    except KeyboardInterrupt:
        assert build is Breaks
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"samples": 0}, "samples must be at least 1, got 0"), ({"measure": "cubed"}, "measure must be one of squared, absolute")],
)
def test_settings_are_checked_first(settings, message):
    with pytest.raises(ValueError, match=f"effective_receptive_field: {message}"):
        effective_receptive_field(boxes(1), torch.empty(1, 1, 9, 9), **settings)


def test_no_gradient_is_said():
    with pytest.raises(ValueError, match="must have a gradient"):
        effective_receptive_field(lambda x: x.detach() * 2, torch.empty(1, 1, 9, 9))
