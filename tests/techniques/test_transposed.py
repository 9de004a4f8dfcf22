from itertools import product
from math import gcd

import pytest
import torch
import torch.nn.functional as F

from omniconv.functional import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from omniconv.geometry import Grid, adjoint
from omniconv.nn import ConvTranspose1d, ConvTranspose2d
from omniconv.techniques import parse
from omniconv.techniques.transposed import reference

TORCH = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
OURS = {1: (conv1d, conv_transpose1d), 2: (conv2d, conv_transpose2d), 3: (conv3d, conv_transpose3d)}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "padding", "extra", "groups", "dilation"),
    [(1, 0, 0, 1, 1), (2, 1, 1, 2, 1), (3, 2, 2, 4, 2), (1, 1, 1, 1, 2), (4, 0, 0, 1, 1)],
)
def test_reference_is_torchs(rank, stride, padding, extra, groups, dilation):
    x, w, b = normal(2, 4, *(4, 3, 5)[:rank]), normal(4, 8 // groups, *(3, 2, 3)[:rank], seed=1), normal(8, seed=2)
    expected = TORCH[rank](x, w, b, stride, padding, extra, groups, dilation)
    torch.testing.assert_close(reference(x, w, b, stride, padding, extra, groups, dilation), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "pads", "dilation", "groups"), [(1, (1, 1), 1, 1), (2, (1, 0), 1, 2), (3, (2, 1), 2, 1), (2, (0, 3), 3, 2)]
)
def test_is_the_adjoint_of_the_convolution(rank, stride, pads, dilation, groups):
    """⟨conv(x), y⟩ = ⟨x, conv_transpose(y)⟩, with the weight as it is, for every geometry."""
    size, kernel = (9, 8, 10)[:rank], (3, 2, 3)[:rank]
    conv, transposed = OURS[rank]
    x, w = normal(2, 4, *size), normal(6, 4 // groups, *kernel, seed=1)
    windows = Grid((stride,) * rank, (pads,) * rank, (dilation,) * rank)
    y = conv(x, w, stride=stride, padding=windows.pads, dilation=dilation, groups=groups)
    v = normal(*y.shape, seed=2)
    back = adjoint(size, kernel, windows)
    xt = transposed(v, w, None, stride, back.crops, back.output_padding, groups, dilation)
    assert xt.shape == x.shape
    torch.testing.assert_close((y * v).sum(), (x * xt).sum(), rtol=1e-12, atol=1e-9)


def test_three_by_three_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    y = conv_transpose2d(x, torch.ones(1, 1, 3, 3), stride=2)
    rows = [[1, 1, 3, 2, 2], [1, 1, 3, 2, 2], [4, 4, 10, 6, 6], [3, 3, 7, 4, 4], [3, 3, 7, 4, 4]]
    assert y[0, 0].tolist() == rows


@pytest.mark.parametrize(("kernel", "stride", "dilation"), list(product((1, 2, 3, 4, 5), (1, 2, 3), (1, 2))))
def test_same_is_stride_times_the_input(kernel, stride, dilation):
    x, w = normal(1, 1, 5), normal(1, 1, kernel, seed=1)
    y = conv_transpose1d(x, w, stride=stride, dilation=dilation, padding="same")
    assert y.shape[2] == 5 * stride
    whole = F.conv_transpose1d(x, w, stride=stride, dilation=dilation)
    surplus = dilation * (kernel - 1) + 1 - stride
    if surplus >= 0:  # ⌊surplus/2⌋ cropped before, the rest after
        torch.testing.assert_close(y, whole[:, :, surplus // 2 : surplus // 2 + 5 * stride])
    else:
        torch.testing.assert_close(y, F.pad(whole, (0, -surplus)))


def test_causal_crops_all_after():
    x, w = normal(1, 1, 5), normal(1, 1, 4, seed=1)
    torch.testing.assert_close(conv_transpose1d(x, w, stride=2, padding="causal"), F.conv_transpose1d(x, w, stride=2)[:, :, :10])


def test_crops_may_differ_between_the_sides_and_take_from_the_output_padding():
    x, w, b = normal(1, 1, 5), normal(1, 1, 4, seed=1), normal(1, seed=2)
    whole = F.conv_transpose1d(x, w, b, stride=3, output_padding=2)
    y = conv_transpose1d(x, w, b, stride=3, padding=((0, 1),), output_padding=2)
    torch.testing.assert_close(y, whole[:, :, : whole.shape[2] - 1])
    y = conv_transpose1d(x, w, b, stride=3, padding=((2, 3),), output_padding=1)
    torch.testing.assert_close(y, whole[:, :, 2 : whole.shape[2] - 4])


def test_output_size_is_torchs():
    theirs, ours = torch.nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), ConvTranspose2d(2, 3, 3, stride=2, padding=1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 2, 5, 6)
    for size in ((10, 12), (9, 11), (10, 11)):
        torch.testing.assert_close(ours(x, output_size=size), theirs(x, output_size=size))
    torch.testing.assert_close(ours(x, output_size=(1, 3, 10, 12)), theirs(x, output_size=(1, 3, 10, 12)))
    with pytest.raises(
        ValueError, match=r"conv_transpose2d: output_size must lie between \(9, 11\) and \(10, 12\), got \(11, 12\)"
    ):
        ours(x, output_size=(11, 12))
    assert ours(x[0], output_size=(10, 12)).shape == (3, 10, 12)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), list(product((2, 3, 4, 6), (1, 2, 3), (1, 2))))
def test_overlap_is_even_exactly_where_the_stride_divides_the_kernel(kernel, stride, dilation):
    """The map conv_transpose(1, 1) shows checkerboards: even inside iff S | K and gcd(D, S) = 1."""
    overlap = conv_transpose1d(torch.ones(1, 1, 40), torch.ones(1, 1, kernel), stride=stride, dilation=dilation)[0, 0]
    interior = overlap[20:-20]
    assert (interior.unique().numel() == 1) == (kernel % stride == 0 and gcd(dilation, stride) == 1)


def test_macs_are_counted_by_input_positions():
    technique, problem = parse("transposed2d c128-64 i28 k4 s2 p1")
    assert technique.cost(problem).macs_dense == 28 * 28 * 128 * 64 * 16
    assert technique.output_shape(problem) == (1, 64, 56, 56)


def test_other_padding_modes_are_refused_by_name():
    with pytest.raises(ValueError, match="ConvTranspose1d: padding_mode must be 'zeros'"):
        ConvTranspose1d(1, 1, 3, padding_mode="reflect")
    with pytest.raises(ValueError, match="'same_minimal' is not defined"):
        conv_transpose1d(torch.ones(1, 1, 4), torch.ones(1, 1, 3), padding="same_minimal")
    with pytest.raises(ValueError, match="'causal' is defined for one spatial axis"):
        conv_transpose2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), padding="causal")
