"""What holds for the native kernels of lightweight and dynamic alike: lengths that differ, and calls that are looked up."""

from itertools import product

import pytest
import torch
from native_cases import in_layout, integers

from omniconv.functional import dynamic_conv1d, lightweight_conv1d
from omniconv.ops.sequence import LAYOUTS
from omniconv.settings import composite_only
from omniconv.techniques import find

BATCH = 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["lightweight", "dynamic", "dynamic, one kernel"])
@pytest.mark.parametrize("channels", [1, 2, 16, 20, 48])
def test_outputs_may_be_more_or_fewer_than_positions(form, layout, channels, level):
    op = lightweight_conv1d if form == "lightweight" else dynamic_conv1d
    for heads, length, taps, pads in product((1, 2), (1, 2, 17), (1, 2, 5), ((0, 1), (3, 3), (2, 0), (4, 0))):
        outputs = length + sum(pads) - (taps - 1)
        if outputs < 1 or channels % heads:
            continue
        shape = (heads, taps) if form == "lightweight" else (BATCH, heads, taps, outputs if form == "dynamic" else 1)
        x = in_layout(integers(BATCH, channels, length), layout).requires_grad_()
        operands = (x, integers(*shape, seed=1).requires_grad_(), integers(channels, seed=2).requires_grad_())
        grad_y = in_layout(integers(BATCH, channels, outputs, seed=3), layout)

        def everything(operands=operands, pads=pads, grad_y=grad_y):
            y = op(*operands, (pads,), softmax=False, layout=layout)
            return [y, *torch.autograd.grad(y, operands, grad_y)]

        made = everything()
        with composite_only():
            expected = everything()
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True)), (heads, length, taps, pads)
        with torch.no_grad():
            assert torch.equal(op(*operands, (pads,), softmax=False, layout=layout), expected[0])


CHANGES = [
    {"softmax": False}, {"layout": "NTC"}, {"padding": "causal"}, {"padding": ((2, 0),)}, {"padding_mode": "reflect"},
    {"activation": "relu"}, {"dilation": 2}, {"padding_mask": torch.arange(12).view(2, 6) % 5 == 0},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
@pytest.mark.parametrize("name", ["lightweight", "dynamic"])
def test_a_call_that_is_looked_up_is_told_from_those_beside_it(name, change):
    x, kernel = torch.randn(2, 6, 6), torch.randn((3, 3) if name == "lightweight" else (2, 3, 3, 6))
    for settings in ({}, change, {}, change):
        expected = find(name).reference(x.double(), kernel.double(), **{"padding": "same"} | settings)
        torch.testing.assert_close(find(name).ops[1](x, kernel, **settings).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"dilation": True}, {"dilation": 1.0}, {"padding": ((1.0, 1),)}, {"softmax": 1}, {"softmax": 2}, {"padding_mask": 1}]
)
@pytest.mark.parametrize("name", ["lightweight", "dynamic"])
def test_a_call_that_is_looked_up_admits_nothing_that_is_equal_to_it(name, change):
    kernel = torch.randn((3, 3) if name == "lightweight" else (2, 3, 3, 6))
    find(name).ops[1](torch.randn(2, 6, 6), kernel, padding=1)
    with pytest.raises((TypeError, ValueError), match=f"{name}_conv1d: "):
        find(name).ops[1](torch.randn(2, 6, 6), kernel, **{"padding": 1} | change)
