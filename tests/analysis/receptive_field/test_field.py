"""The field that is computed is the support of the float64 gradient: positive weights, no nonlinearity, means for maxima."""

import pytest
import torch
from field_networks import NETWORKS
from field_support import boxed, example, positive, seen_by_gradient

from omniconv.analysis.receptive_field import receptive_field

# of families that have another member here, and as dear as all the rest
KINDRED = {
    "resnet, first version",
    "resnext",
    "mobilenet v2",
    "mnasnet",
    "efficientnet",
    "regnet",
    "shufflenet v1",
    "u-net, nearest",
}
NAMES = [pytest.param(name, marks=pytest.mark.exhaustive if name in KINDRED else ()) for name in NETWORKS]


def whole(network, x):
    return network(x)


def places_of(field):
    """The axes of the output that have positions."""
    return () if not field.window.position else field.axes


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
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
