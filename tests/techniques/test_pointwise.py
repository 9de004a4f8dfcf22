import torch

from omniconv.functional import conv2d, pointwise_conv2d, pointwise_conv3d
from omniconv.nn import PointwiseConv1d
from omniconv.techniques.pointwise import reference


def test_is_a_linear_layer_at_every_position():
    linear = torch.nn.Linear(5, 7).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    expected = linear(x.movedim(1, -1)).movedim(-1, 1)
    y = reference(x, linear.weight[..., None, None], linear.bias)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pointwise_conv2d(x, linear.weight[..., None, None], linear.bias), y, rtol=1e-12, atol=1e-12)


def test_stride_keeps_every_sth_position():
    x, w = torch.randn(1, 3, 5, 6, 7, dtype=torch.float64), torch.randn(2, 3, 1, 1, 1, dtype=torch.float64)
    y = pointwise_conv3d(x, w, stride=(1, 2, 3))
    torch.testing.assert_close(y, pointwise_conv3d(x, w)[:, :, :, ::2, ::3])
    assert y.shape == (1, 2, 5, 3, 3)


def test_is_the_standard_convolution_with_a_kernel_of_one():
    x, w, b = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 1, 1), torch.randn(4)
    torch.testing.assert_close(pointwise_conv2d(x, w, b, stride=2), conv2d(x, w, b, stride=2))


def test_state_dict_is_torchs():
    torch.nn.Conv1d(3, 4, 1).load_state_dict(PointwiseConv1d(3, 4).state_dict(), strict=True)
