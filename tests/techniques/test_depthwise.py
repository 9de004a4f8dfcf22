from typing import Any

import pytest
import torch
import torch.nn.functional as F

from omniconv.functional import depthwise_conv1d, depthwise_conv2d
from omniconv.nn import DepthwiseConv2d
from omniconv.settings import composite_only
from omniconv.techniques import parse
from omniconv.techniques.depthwise import reference


def test_reference_is_torchs_grouped_convolution():
    x, w, b = torch.randn(2, 3, 8, 7).double(), torch.randn(6, 1, 3, 2).double(), torch.randn(6).double()
    expected = F.conv2d(x, w, b, stride=2, padding=1, dilation=2, groups=3)
    torch.testing.assert_close(reference(x, w, b, 2, 1, 2), expected, rtol=1e-12, atol=1e-12)


def test_output_cm_plus_m_reads_channel_c():
    x = torch.tensor([1.0, 10.0]).view(1, 2, 1)
    w = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    assert depthwise_conv1d(x, w).flatten().tolist() == [1, 2, 30, 40]


def test_channels_do_not_mix():
    x = torch.zeros(1, 3, 4, 4)
    x[0, 1] = 1
    y = depthwise_conv2d(x, torch.ones(3, 1, 3, 3), padding=1)
    assert y[0, 0].abs().sum() == 0 == y[0, 2].abs().sum()
    assert y[0, 1].sum() == 100  # (3 + 3 + 2 + 2)² taps that land


def test_state_dict_is_that_of_a_grouped_convolution_both_ways():
    theirs, ours = torch.nn.Conv2d(4, 8, 3, groups=4), DepthwiseConv2d(4, 3, multiplier=2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_needs_one_cth_of_the_standard_layer():
    technique, problem = parse("depthwise2d c64 i56 k3 psame")
    assert technique.cost(problem, bias=False).macs_dense == 64 * 9 * 56 * 56


def known_call(**changed: Any) -> torch.Tensor:
    called: dict[str, Any] = {"input": torch.ones(1, 2, 5), "weight": torch.ones(2, 1, 3), "bias": torch.ones(2), "padding": 1}
    return depthwise_conv1d(**called | changed)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"stride": True}, TypeError),
        ({"stride": 1.0}, TypeError),
        ({"dilation": (True,)}, TypeError),
        ({"padding": ((1, 1.0),)}, TypeError),
        ({"padding": None}, TypeError),
        ({"activation": []}, ValueError),
        ({"weight": torch.ones(2, 1, 3).to_sparse()}, TypeError),
        ({"input": torch.ones(1, 2, 5).to_sparse()}, TypeError),
        ({"bias": torch.ones(2).to_sparse()}, TypeError),
        ({"weight": torch.ones(2, 1, 3, dtype=torch.float64)}, ValueError),
        ({"bias": torch.ones(2, dtype=torch.float64)}, ValueError),
        ({"bias": torch.ones(2, device="meta")}, ValueError),
        ({"bias": torch.ones(1)}, ValueError),
        ({"bias": [1.0, 1.0]}, TypeError),
    ],
)
def test_a_known_call_admits_nothing_that_is_equal_to_it(changed: dict[str, Any], error: type[Exception]) -> None:
    known_call()
    known_call()
    with pytest.raises(error, match="depthwise_conv1d: "):
        known_call(**changed)


def test_a_known_call_heeds_what_has_changed_around_it() -> None:
    known_call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert known_call().dtype == torch.bfloat16
    assert known_call(input=torch.ones(1, 2, 5, device="meta"), weight=torch.ones(2, 1, 3, device="meta"), bias=None).is_meta
    assert torch.func.vmap(lambda x: known_call(input=x))(torch.ones(3, 1, 2, 5)).shape == (3, 1, 2, 5)
    reflected = known_call(padding_mode="reflect")
    x = torch.ones(1, 2, 5, requires_grad=True)
    y = known_call(input=x, padding_mode="reflect")
    assert torch.equal(y, reflected)
    y.sum().backward()
    assert x.grad is not None
    with composite_only():
        assert torch.equal(known_call(), known_call(stride=[1]))
