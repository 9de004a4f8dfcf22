import pytest
import torch

from omniconv import TECHNIQUES
from omniconv.functional import conv2d, dilated_conv2d
from omniconv.nn import Conv2d, DilatedConv2d
from omniconv.techniques import find, parse


def test_is_a_standard_convolution_with_holes_in_its_kernel():
    x, w = torch.randn(1, 2, 9, 9, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    with_holes = torch.zeros(3, 2, 7, 7, dtype=torch.float64)
    with_holes[:, :, ::3, ::3] = w
    torch.testing.assert_close(dilated_conv2d(x, w, dilation=3), conv2d(x, with_holes), rtol=1e-12, atol=1e-12)


def test_is_the_same_function():
    assert dilated_conv2d is conv2d


@pytest.mark.parametrize(("dilation", "field"), [(1, 3), (2, 5), (4, 9)])
def test_one_layer_covers(dilation, field):
    technique, problem = parse(f"dilated2d c1 i32 k3 d{dilation} psame")
    assert technique.cost(problem).receptive_field == (field, field)


@pytest.mark.parametrize(
    ("dilations", "field", "touched"), [((1, 2), 7, 49), ((1, 2, 4), 15, 225), ((2, 2, 2), 13, 49), ((1, 2, 5), 17, 289)]
)
def test_a_stack_covers_and_may_leave_holes(dilations, field, touched):
    """7×7 and 15×15 are stacks; the lattice of (2, 2, 2) touches 49 of 169 positions, that of (1, 2, 5) all 289."""
    x = torch.zeros(1, 1, 33, 33, dtype=torch.float64, requires_grad=True)
    y = x
    for d in dilations:
        y = conv2d(y, torch.ones(1, 1, 3, 3, dtype=torch.float64), dilation=d, padding="same")
    (support,) = torch.autograd.grad(y[0, 0, 16, 16], x)
    seen = support[0, 0].nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [field, field]
    assert len(seen) == touched


def test_layer_dilates_and_keeps_the_size_by_default():
    layer = DilatedConv2d(4, 8, 3)
    assert layer.dilation == (2, 2)
    assert layer(torch.ones(1, 4, 7, 5)).shape == (1, 8, 7, 5)
    layer.load_state_dict(Conv2d(4, 8, 3).state_dict(), strict=True)


def test_costs_what_the_dense_layer_costs():
    base = parse("standard2d c16-32 i28 k3 psame")[1]
    dense, dilated = find("standard").cost(base), find("dilated").cost(find("dilated").variant_of(base))
    assert (dense.params, dense.macs_dense) == (dilated.params, dilated.macs_dense)
    assert dilated.macs_valid < dense.macs_valid  # more taps fall into the padding
    assert any(t.name == "dilated" for t in TECHNIQUES)
