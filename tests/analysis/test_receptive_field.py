"""The field that is computed is the support of the float64 gradient: positive weights, no nonlinearity, means for maxima."""

import pytest
import torch
from field_networks import NETWORKS
from torch import nn

from omniconv.analysis.receptive_field import receptive_field

AVERAGES = {nn.MaxPool1d: nn.AvgPool1d, nn.MaxPool2d: nn.AvgPool2d, nn.MaxPool3d: nn.AvgPool3d}
NONLINEAR = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.GELU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU)


def positive(network: nn.Module) -> nn.Module:
    """The network with positive weights and without nonlinearities: nothing that is seen can cancel."""
    network = network.double().eval()
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NONLINEAR):
                setattr(parent, name, nn.Identity())
            elif type(child) in AVERAGES:
                settings = {k: getattr(child, k) for k in ("kernel_size", "stride", "padding", "ceil_mode")}
                setattr(parent, name, AVERAGES[type(child)](**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
            weight /= max(weight[0].numel() if weight.dim() > 1 else 1, 1)
    return network


def seen_by_gradient(network, x, of, position, places, axes):
    """Which positions of the input the output at a position has a gradient for."""
    x = x.clone().requires_grad_()
    y = of(network, x)
    index = [slice(None)] * y.dim()
    if y.shape[0] == x.shape[0] and 0 not in axes:
        index[0] = slice(0, 1)
    for axis, p in zip(places, position, strict=True):
        index[axis] = slice(p, p + 1)
    part = y[tuple(index)]
    generator = torch.Generator().manual_seed(1)
    (part * (torch.rand(part.shape, generator=generator) + 0.5)).sum().backward()
    return x.grad.abs().sum([a for a in range(x.dim()) if a not in axes]) > 0


def whole(network, x):
    return network(x)


def boxed(field):
    full = torch.zeros([field.input[a] for a in field.axes], dtype=torch.bool)
    full[tuple(slice(a, b) for a, b in zip(field.window.start, field.window.stop, strict=True))] = torch.from_numpy(
        field.window.mask
    )
    return full


def places_of(field):
    """The axes of the output that have positions."""
    return () if not field.window.position else field.axes


def example(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_the_field_is_the_support_of_the_gradient(name):
    build, shape = NETWORKS[name]
    network = positive(build())
    x = example(shape)
    middle = receptive_field(network, x)
    places = places_of(middle)
    sizes = [middle.output[a] for a in places]
    for position in {middle.window.position, tuple(0 for _ in sizes), tuple(n - 1 - n // 3 for n in sizes)}:
        field = receptive_field(network, x, position=position)
        expected = seen_by_gradient(network, x, whole, position, places, field.axes)
        assert field.status == "exact", field.not_understood
        assert torch.equal(boxed(field), expected), position


@pytest.mark.parametrize("name", NETWORKS)
def test_an_input_that_is_large_enough_shows_all_of_it(name):
    build, shape = NETWORKS[name]
    network = positive(build())
    field = receptive_field(network, torch.empty(shape, dtype=torch.float64))
    if field.notes and field.notes[0].startswith("found in an input of this size alone"):
        return
    if None in field.size:
        assert field.sees_everything
        assert field.window.mask.all()
        return
    factor = max(-(-3 * s // shape[a]) for s, a in zip(field.size, field.axes, strict=True))
    large = tuple(n * max(factor, 1) if a in field.axes else n for a, n in enumerate(shape))
    seen = receptive_field(network, torch.empty(large, dtype=torch.float64))
    position = tuple(
        n // 2 - n // 2 % max(len(p), 1) for n, p in zip((seen.output[a] for a in field.axes), field.phases, strict=True)
    )
    expected = seen_by_gradient(network, example(large), whole, position, field.axes, field.axes)
    at = receptive_field(network, torch.empty(large, dtype=torch.float64), position=position)
    assert torch.equal(boxed(at), expected)
    if None not in at.offset:
        assert (at.mask == at.window.mask).all()
        start = tuple(p * j + o for p, j, o in zip(position, at.jump, at.offset, strict=True))
        assert start == at.window.start
