"""Lightweight and dynamic, natively, with results longer or shorter than the input: one length is not taken for the other."""

from itertools import product

import pytest
import torch

from omniconv.functional import dynamic_conv1d, lightweight_conv1d
from omniconv.settings import composite_only
from omniconv.techniques._sequence import LAYOUTS

BATCH = 2


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


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
        order = LAYOUTS[layout].order
        x = integers(BATCH, channels, length, seed=0).permute(order).contiguous().requires_grad_()
        operands = (x, integers(*shape, seed=1).requires_grad_(), integers(channels, seed=2).requires_grad_())
        grad_y = integers(BATCH, channels, outputs, seed=3).permute(order).contiguous()

        def everything(operands=operands, pads=pads, grad_y=grad_y):
            y = op(*operands, (pads,), softmax=False, layout=layout)
            return [y, *torch.autograd.grad(y, operands, grad_y)]

        made = everything()
        with composite_only():
            expected = everything()
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True)), (heads, length, taps, pads)
        with torch.no_grad():
            assert torch.equal(op(*operands, (pads,), softmax=False, layout=layout), expected[0])
