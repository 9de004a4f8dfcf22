import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from omniconv.functional import conv2d, deform_conv2d
from omniconv.geometry import grid
from omniconv.nn import Conv2d, DeformConv2d
from omniconv.techniques import parse
from omniconv.techniques.deformable import convolve, reference
from omniconv.testing import verify_gradients

BOTH = pytest.mark.parametrize("f", [reference, deform_conv2d], ids=["reference", "op"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@BOTH
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), ((2, 1), 1, (1, 2), 2), (1, ((1, 0), (2, 1)), 2, 4)]
)
def test_zero_offsets_are_a_standard_convolution(f, stride, padding, dilation, groups):
    x, w, b = normal(2, 4, 7, 8), normal(8, 4 // groups, 3, 2, seed=1), normal(8, seed=2)
    expected = conv2d(x, w, b, stride, padding, dilation, groups)
    offset = torch.zeros(2, 2 * 2 * 6, *expected.shape[2:], dtype=torch.float64)
    torch.testing.assert_close(f(x, offset, w, b, stride, padding, dilation), expected, rtol=1e-12, atol=1e-12)
    mask = torch.full((2, 2 * 6, *expected.shape[2:]), 0.5, dtype=torch.float64)
    torch.testing.assert_close(f(x, offset, 2 * w, b, stride, padding, dilation, mask), expected, rtol=1e-12, atol=1e-12)


@BOTH
def test_offsets_are_dy_then_dx_per_tap(f):
    x = torch.arange(9.0).view(1, 1, 3, 3)
    taps = torch.tensor([1.0, 100.0]).view(1, 1, 1, 2)
    # tap 0 one down, tap 1 (which stands one to the right) one to the left: both read column 0
    offset = torch.tensor([1.0, 0.0, 0.0, -1.0]).view(1, 4, 1, 1).expand(1, 4, 3, 2)
    assert f(x, offset, taps)[0, 0].tolist() == [[3, 104], [306, 407], [600, 700]]


@BOTH
def test_half_way_is_the_mean_and_outside_fades_to_zero(f):
    x = torch.tensor([[0.0, 2.0], [4.0, 10.0]]).view(1, 1, 2, 2)
    one = torch.ones(1, 1, 1, 1)

    def at(dy: float, dx: float) -> float:
        """What output (0, 0) reads."""
        return f(x, torch.tensor([float(dy), float(dx)]).view(1, 2, 1, 1).expand(1, 2, 2, 2), one)[0, 0, 0, 0].item()

    assert at(0.5, 0.5) == 4
    assert at(0, 0.25) == 0.5
    assert at(1, 1.5) == 5  # half of the last column
    assert at(-0.5, 1) == 1  # half of the first row
    assert at(-1, 1) == at(2, 0) == at(1, -1) == at(0, 2) == 0
    assert at(1e9, 0) == at(-1e9, 1) == at(float("inf"), 0) == at(0, float("-inf")) == 0


@BOTH
def test_an_offset_that_is_no_number_shows_in_its_output_alone(f):
    offset = torch.zeros(1, 4, 3, 2)
    offset[0, 2, 1, 1] = float("nan")
    y = f(torch.ones(1, 1, 3, 3), offset, torch.ones(1, 1, 1, 2))
    assert y.isnan().nonzero().tolist() == [[0, 0, 1, 1]]


@BOTH
def test_an_infinite_input_is_not_seen_from_far_away(f):
    x = torch.tensor([[float("inf"), 1.0], [1.0, 1.0]]).view(1, 1, 2, 2)
    for distance in (-1.5, -2.0, -7.0, float("-inf"), 2.0, 2.5, float("inf")):
        for axis in (0, 1):
            offset = torch.zeros(1, 2, 2, 2)
            offset[:, axis] = distance
            assert f(x, offset, torch.ones(1, 1, 1, 1))[0, 0, 0, 0] == 0, (distance, axis)


@BOTH
def test_at_whole_places_the_gradient_is_the_slope_to_the_right(f):
    """Every fresh layer stands there, its padded taps at −1; checked against torchvision 0.28, which does the same."""
    x = torch.tensor([[1.0, 4.0], [9.0, 25.0]]).view(1, 1, 2, 2)
    offset = torch.zeros(1, 2, 4, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(f(x, offset, torch.ones(1, 1, 1, 1), padding=1).sum(), offset)
    assert slope[0, 0].tolist() == [[0, 1, 4, 0], [0, 8, 21, 0], [0, -9, -25, 0], [0, 0, 0, 0]]
    assert slope[0, 1].tolist() == [[0, 0, 0, 0], [1, 3, -4, 0], [9, 16, -25, 0], [0, 0, 0, 0]]


def test_a_fresh_layer_has_the_gradients_of_the_reference():
    layer = DeformConv2d(4, 6, 3, padding=1, offset_groups=2)
    assert verify_gradients(layer, torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))) < 1


def test_half_types_that_are_not_widened_still_find_their_places():
    """bfloat16 has no 257: a device without widening must not count positions in it."""
    x = (torch.arange(600) % 7).to(torch.bfloat16).view(1, 1, 1, 600)
    offset = torch.zeros(1, 2, 1, 600, dtype=torch.bfloat16)
    windows = grid("test", (1, 600), (1, 1), 1, 0, 1)
    y = convolve(x, offset, torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), None, None, windows, 1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x)


def test_each_offset_group_moves_its_own_channels():
    x = normal(1, 4, 5, 5)
    w = torch.zeros(4, 4, 1, 1, dtype=torch.float64)
    w[range(4), range(4)] = 1
    offset = torch.zeros(1, 4, 5, 5, dtype=torch.float64)
    offset[:, 3] = 1  # the second group looks one to the right
    y = deform_conv2d(x, offset, w)
    torch.testing.assert_close(y[:, :2], x[:, :2])
    torch.testing.assert_close(y[:, 2:, :, :-1], x[:, 2:, :, 1:])


@pytest.mark.parametrize("masked", [True, False])
def test_every_operand_has_its_gradient_twice(masked):
    leaves = [
        t.requires_grad_()
        for t in (normal(1, 2, 4, 4), normal(1, 2 * 2 * 2, 3, 4, seed=3) * 0.3 + 0.4, normal(2, 1, 2, 1, seed=1), normal(2, seed=2))
    ]
    if masked:
        leaves.append(torch.rand(1, 4, 3, 4, dtype=torch.float64).requires_grad_())

    def f(x, offset, w, b, mask=None):
        return deform_conv2d(x, offset, w, b, mask=mask)

    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


@BOTH
def test_places_far_away_send_no_gradient_and_no_nan(f):
    x, w = normal(1, 1, 3, 3).requires_grad_(), normal(1, 1, 1, 1, seed=1).requires_grad_()
    for distance in (float("inf"), float("-inf"), -3.5, 1e9):
        offset = torch.full((1, 2, 3, 3), distance, dtype=torch.float64).requires_grad_()
        mask = torch.ones(1, 1, 3, 3, dtype=torch.float64).requires_grad_()
        for gradient in torch.autograd.grad(f(x, offset, w, mask=mask).sum(), [x, offset, w, mask]):
            assert gradient.abs().sum() == 0


def test_a_fresh_layer_is_a_standard_convolution():
    layer, standard = DeformConv2d(4, 6, 3, stride=2, padding=1, groups=2, offset_groups=2), Conv2d(4, 6, 3, 2, 1, groups=2)
    standard.load_state_dict({k: v for k, v in layer.state_dict().items() if "offset" not in k}, strict=True)
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(layer(x), standard(x))
    torch.testing.assert_close(layer(x[0]), standard(x[0]))
    halved = DeformConv2d(4, 6, 3, mask_scale=1.0, bias=False)
    torch.testing.assert_close(halved(x), conv2d(x, halved.weight) / 2)


def test_offsets_come_first_then_mask_logits():
    layer = DeformConv2d(1, 1, (1, 2))
    assert layer.offset_conv.weight.shape == (6, 1, 1, 2)
    with torch.no_grad():
        layer.offset_conv.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 50.0]))
    offset, mask = layer.offsets(torch.zeros(1, 1, 2, 3))
    assert offset[0, :, 0, 0].tolist() == [1, 2, 3, 4]
    assert mask[0, :, 0, 0].tolist() == [1, 2]
    assert DeformConv2d(1, 1, 3, modulated=False).offset_conv.out_channels == 18


def test_external_offsets_and_torchvisions_state_dict():
    layer = DeformConv2d(2, 3, 3, padding=1, offset="external")
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {"weight": (3, 2, 3, 3), "bias": (3,)}
    x, offset, mask = torch.randn(1, 2, 4, 4), torch.randn(1, 18, 4, 4), torch.rand(1, 9, 4, 4)
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, padding=(1, 1), mask=mask)
    torch.testing.assert_close(layer(x, offset, mask), expected)
    with pytest.raises(ValueError, match="DeformConv2d: forward must be given an offset"):
        layer(x)
    with pytest.raises(ValueError, match="DeformConv2d: an offset is only given where"):
        DeformConv2d(2, 3, 3)(x, offset)
    with pytest.raises(ValueError, match="DeformConv2d: a mask is only given where"):
        DeformConv2d(2, 3, 3)(x, mask=mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": torch.zeros(1, 17, 3, 3)}, "offset must have 2·Go·9 channels"),
        ({"offset": torch.zeros(1, 54, 3, 3)}, "Go a divisor of the 2 input channels, got 54"),
        ({"offset": torch.zeros(1, 18, 3, 4)}, r"offset must have shape \(1, 18, 3, 3\), got \(1, 18, 3, 4\)"),
        ({"offset": torch.zeros(2, 18, 3, 3)}, "offset must have shape"),
        ({"offset": torch.zeros(18, 3, 3)}, "offset must have 4 axes"),
        ({"mask": torch.zeros(1, 18, 3, 3)}, r"mask must have shape \(1, 9, 3, 3\)"),
        ({"mask": torch.zeros(9, 3, 3)}, "mask must have 4 axes"),
        ({"weight": torch.zeros(1, 3, 3, 3)}, r"weight must be \(O, C/G, Kh, Kw\) for 2 input channels"),
        ({"padding_mode": "reflect"}, "padding_mode must be 'zeros'"),
        ({"padding": "causal"}, "'causal' is defined for one spatial axis"),
    ],
)
def test_malformed_calls(change, message):
    call = {"input": torch.zeros(1, 2, 5, 5), "offset": torch.zeros(1, 18, 3, 3), "weight": torch.zeros(1, 2, 3, 3)}
    with pytest.raises(ValueError, match=message):
        deform_conv2d(**(call | change))


def test_cost_counts_the_offset_convolution():
    technique, problem = parse("deformable2d c64-128 i28 k3 p1 o2")
    cost, places, taps = technique.cost(problem, bias=False), 28 * 28, 9
    assert cost.params == 64 * 128 * taps + 3 * 2 * taps * 64 * taps
    assert cost.macs_dense == places * (64 * 128 * taps + 3 * 2 * taps * 64 * taps)
    assert cost.flops == 2 * cost.macs_dense + places * taps * 64 * 9
    assert technique.cost(problem, bias=False, modulated=False).params == 64 * 128 * taps + 2 * 2 * taps * 64 * taps
