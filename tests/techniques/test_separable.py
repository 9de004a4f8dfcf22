import pytest
import torch

from omniconv.functional import conv2d, depthwise_conv2d, separable_conv2d
from omniconv.nn import SeparableConv2d
from omniconv.techniques import find, parse
from omniconv.techniques.separable import reference


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 0, 1), ((2, 1), ((1, 0), (2, 1)), (1, 2)), (2, "same", 2), (3, "same_minimal", 1)]
)
def test_is_the_convolution_with_the_product_of_its_kernels(mode, stride, padding, dilation):
    """Σ_m row[o, m] ∘ column[m, c] is a (O, C, Ky, Kx) weight: rank Cm, and rank 1 for Cm = 1."""
    x, column, row, bias = normal(2, 3, 9, 8), normal(4, 3, 3, 1, seed=1), normal(5, 4, 1, 2, seed=2), normal(5, seed=3)
    whole = torch.einsum("omj,mci->ocij", row[:, :, 0], column[..., 0])
    expected = conv2d(x, whole, bias, stride, padding, dilation, padding_mode=mode)
    for f in (reference, separable_conv2d):
        y = f(x, column, row, bias, stride, padding, dilation, padding_mode=mode)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_one_channel_is_a_kernel_of_rank_one():
    x, ky, kx = normal(1, 1, 7, 7), normal(5, seed=1), normal(3, seed=2)
    y = separable_conv2d(x, ky.view(1, 1, 5, 1), kx.view(1, 1, 1, 3), padding="same")
    torch.testing.assert_close(y, conv2d(x, torch.outer(ky, kx).view(1, 1, 5, 3), padding="same"), rtol=1e-12, atol=1e-12)


def test_sobel():
    """Sobel-x = [1 2 1]ᵀ ∘ [−1 0 1]: on a ramp along x it answers 8, on one along y 0."""
    column, row = torch.tensor([1.0, 2.0, 1.0]).view(1, 1, 3, 1), torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)
    ramp = torch.arange(5.0).expand(1, 1, 5, 5)
    assert separable_conv2d(ramp, column, row).unique().tolist() == [8]
    assert separable_conv2d(ramp.mT, column, row).unique().tolist() == [0]


def test_groups_of_one_channel_filter_pictures():
    gauss = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float64) / 16
    x = normal(2, 3, 8, 8)
    column, row = gauss.view(1, 1, 5, 1).repeat(3, 1, 1, 1), gauss.view(1, 1, 1, 5).repeat(3, 1, 1, 1)
    y = separable_conv2d(x, column, row, padding="same", groups=3, padding_mode="reflect")
    whole = torch.outer(gauss, gauss).repeat(3, 1, 1, 1)
    torch.testing.assert_close(y, depthwise_conv2d(x, whole, padding="same", padding_mode="reflect"), rtol=1e-12, atol=1e-12)


def test_costs_two_kths_at_equal_channels():
    base = parse("standard2d c16 i64 k7 psame")[1]
    standard, separable = (
        find("standard").cost(base, bias=False),
        find("separable").cost(base.replace(technique="separable"), bias=False),
    )
    assert separable.params * 7 == standard.params * 2
    assert separable.macs_dense * 7 == standard.macs_dense * 2
    assert separable.receptive_field == (7, 7)


def test_layer_owns_both_weights():
    layer = SeparableConv2d(4, 6, (5, 3), mid_channels=2, groups=2)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {
        "weight_column": (2, 2, 5, 1), "weight_row": (6, 1, 1, 3), "bias": (6,)
    }  # fmt: skip
