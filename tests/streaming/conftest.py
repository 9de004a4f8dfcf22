import pytest
from streaming_networks import CHANNELS, Residual, filled
from torch import nn

from omniconv.nn import (
    DepthwiseConv1d,
)


@pytest.fixture
def stack():
    body = nn.Sequential(DepthwiseConv1d(CHANNELS, 3, padding="causal", dilation=2), nn.ReLU())
    return filled(nn.Sequential(Residual(body), DepthwiseConv1d(CHANNELS, 4, padding="causal")))
