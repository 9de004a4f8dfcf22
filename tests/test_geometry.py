"""Integers against brute force, and against torch."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from omniconv import geometry
from omniconv.geometry import grid, landings, pads_of, source, span, spread, taps, transposed_receptive_field

AXES = list(product((1, 2, 5, 8), (1, 2, 3, 4), (1, 2, 3), (1, 2), ((0, 0), (1, 0), (2, 3))))


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation", "pads"), AXES)
def test_windows_by_brute_force(size, kernel, stride, dilation, pads):
    if size + sum(pads) < span(kernel, dilation):
        with pytest.raises(ValueError, match="op: the padded input must hold one window"):
            grid("op", (size,), (kernel,), stride, (pads,), dilation)
        return
    windows = grid("op", (size,), (kernel,), stride, (pads,), dilation)
    (outputs,) = windows.output_size((size,), (kernel,))
    assert outputs == F.conv1d(F.pad(torch.ones(1, 1, size), pads), torch.ones(1, 1, kernel), None, stride, 0, dilation).shape[2]
    table = taps(size, kernel, stride, pads, dilation)
    assert len(table) == outputs
    x = F.pad(torch.arange(1, size + 1), pads)
    for o, row in enumerate(table):
        read = [int(x[o * stride + t * dilation]) for t in range(kernel)]
        assert [0 if i is None else i + 1 for i in row] == read
    assert landings(size, kernel, stride, pads[0], dilation, outputs) == sum(i is not None for row in table for i in row)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_sources_are_torchs_padding(mode):
    x = torch.arange(5.0)
    expected = F.pad(x[None], (4, 3), mode=mode)[0].int().tolist()
    assert [source(p, 5, mode) for p in range(-4, 8)] == expected


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation"), list(product(range(1, 12), (1, 2, 3, 5), (1, 2, 3, 4), (1, 2))))
def test_same_minimal_is_tensorflows(size, kernel, stride, dilation):
    out = -(-size // stride)
    total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    assert pads_of("same_minimal", (size,), (kernel,), (stride,), (dilation,)) == ((total // 2, total - total // 2),)
    for padding in ("same", "same_minimal"):
        assert grid("op", (size,), (kernel,), stride, padding, dilation).output_size((size,), (kernel,)) == (out,)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "extra"), list(product((1, 3, 4), (1, 2, 3), (1, 2, 3), (1, 2), (0, 1)))
)
def test_transposed_sizes_are_torchs(size, kernel, stride, dilation, extra):
    if extra >= max(stride, dilation):
        with pytest.raises(ValueError, match="op: output_padding must be below the stride or the dilation"):
            spread("op", (size,), (kernel,), stride, 0, extra, dilation)
        return
    windows = spread("op", (size,), (kernel,), stride, 0, extra, dilation)
    y = F.conv_transpose1d(torch.ones(1, 1, size), torch.ones(1, 1, kernel), None, stride, 0, extra, 1, dilation)
    assert windows.output_size((size,), (kernel,)) == (y.shape[2],)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), list(product((1, 2, 3, 4, 5), (1, 2, 3, 4), (1, 2, 3))))
def test_transposed_field_is_the_widest_phase(kernel, stride, dilation):
    x = torch.ones(1, 1, 40, requires_grad=True)
    y = F.conv_transpose1d(x, torch.ones(1, 1, kernel), None, stride, 0, 0, 1, dilation)
    widest = 0
    for o in range(20 * stride, 21 * stride):
        (g,) = torch.autograd.grad(y[0, 0, o], x, retain_graph=True)
        seen = g[0, 0].nonzero()
        widest = max(widest, int(seen.max() - seen.min()) + 1 if len(seen) else 0)
    assert transposed_receptive_field(kernel, stride, dilation) == widest


def test_numpys_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    assert geometry.per_axis("op", "stride", numpy.int64(2), 2) == (2, 2)
    assert geometry.normal_padding("op", ((numpy.int32(1), 2),), 1) == ((1, 2),)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1.5], torch.tensor(1), {1}])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match="op: stride must be an int or a tuple of 2 ints, got"):
        geometry.per_axis("op", "stride", value, 2)
