"""The native lightweight convolution at every instruction set: what runs, its bits, its gradients, and what its raw ops refuse."""

import gc
import resource
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from omniconv import settings
from omniconv.convert.fairseq import InterleavedLightweightConv1d
from omniconv.functional import lightweight_conv1d
from omniconv.geometry import grid
from omniconv.nn import LightweightConv1d
from omniconv.ops.sequence import LAYOUTS
from omniconv.techniques import find
from omniconv.techniques.lightweight import reference
from omniconv.testing import assert_within_bound

OPS = torch.ops.omniconv
TECHNIQUE = find("lightweight")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MODES = ("zeros", "reflect", "replicate", "circular")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(*shape, dtype=torch.float32, seed=0):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid(x, layout):
    """(N, C, T) contiguous in a layout."""
    return x.permute(LAYOUTS[layout].order).contiguous()


def padding_mask(batch, length, seed=9):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.3


# (channels, heads, taps, positions, dilation): sizes around the widest vector, few taps and many, windows beyond input and tile
SIZES = [
    (16, 4, 3, 16, 1), (17, 17, 4, 17, 1), (15, 1, 5, 31, 1), (48, 2, 7, 33, 1), (33, 3, 8, 40, 1), (40, 5, 6, 47, 1),
    (16, 16, 1, 5, 1), (18, 2, 2, 1, 1), (24, 3, 31, 64, 1), (20, 4, 31, 9, 1), (130, 2, 15, 35, 1), (34, 17, 9, 50, 2),
    (16, 2, 3, 40, 5), (21, 3, 12, 30, 3), (20, 2, 5, 700, 300), (18, 3, 3, 5, 400), (17, 1, 31, 900, 1),
    (35, 5, 3, 600, 1),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_whole_numbers_are_exact_in_every_direction(sizes, dtype, layout, level):
    """Sums of few small products fit in every type, so that the order of additions cannot hide a mistake."""
    channels, heads, taps, length, dilation = sizes
    x, w, b = integers(2, channels, length), integers(heads, taps, seed=1), integers(channels, seed=2)
    if dtype in (torch.bfloat16, torch.float16):
        x, w, b = x.clamp(-1, 1), w.clamp(-1, 1), b.clamp(-1, 1)
    mask = padding_mask(2, length)
    arguments = {"padding": "same", "dilation": dilation, "softmax": False, "layout": layout, "padding_mask": mask}
    reach = dilation * (taps - 1)
    if reach:
        arguments["padding"] = ((reach // 3, reach - reach // 3),)
    x = laid(x, layout).double().requires_grad_()
    w, b = w.double().requires_grad_(), b.double().requires_grad_()
    expected = reference(x, w, b, **arguments)
    grad_y = integers(*expected.shape, dtype=torch.float64, seed=3).clamp(-1, 1)
    wanted = torch.autograd.grad(expected, (x, w, b), grad_y)
    operands = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
    y = lightweight_conv1d(*operands, **arguments)
    assert y.is_contiguous()
    assert torch.equal(y, expected.to(dtype))
    with torch.no_grad():
        assert torch.equal(lightweight_conv1d(*operands, **arguments), y)
    found = torch.autograd.grad(y, operands, grad_y.to(dtype))
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs.to(dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "heads", "taps", "length"), [(48, 3, 7, 41), (20, 5, 31, 33), (17, 1, 12, 90), (32, 32, 4, 9)]
)
def test_stays_under_the_bound(channels, heads, taps, length, dtype, layout, masked, mode, level):
    x, w, b = (
        laid(normal(2, channels, length), layout).to(dtype),
        2 * normal(heads, taps, dtype=dtype, seed=1),
        normal(channels, dtype=dtype),
    )
    mask = padding_mask(2, length) if masked else None
    for activation in (None, "silu", "relu6"):
        arguments = {"layout": layout, "padding": "same", "padding_mode": mode, "padding_mask": mask, "activation": activation}
        operands = {"input": x, "weight": w, "bias": b}
        y = lightweight_conv1d(**operands, **arguments)
        assert TECHNIQUE.engine.unsupported_reason(x, w, b, grid("", (length,), (taps,), 1, "same", 1, mode)) is None
        assert_within_bound(TECHNIQUE, {**operands, **arguments}, y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "heads", "taps", "dilation"), [(33, 3, 7, 1), (32, 2, 31, 1), (20, 20, 12, 1), (17, 1, 9, 3), (18, 2, 8, 1)]
)
def test_chunks_of_any_size_give_the_bits_of_the_whole(channels, heads, taps, dilation, dtype, layout, level):
    x, w, b = normal(2, channels, 300, dtype=dtype), normal(heads, taps, seed=1, dtype=dtype), normal(channels, dtype=dtype)
    time, past = LAYOUTS[layout].time, dilation * (taps - 1)
    run = partial(lightweight_conv1d, weight=w, bias=b, dilation=dilation, layout=layout, activation="relu")
    whole = run(laid(x, layout), padding="causal")
    before = torch.cat([x.new_zeros(2, channels, past), x], 2)
    generator, at = torch.Generator().manual_seed(taps), 0
    while at < 300:
        steps = min(int(torch.randint(1, 40, (), generator=generator)), 300 - at)
        chunk = run(laid(before[..., at : at + past + steps], layout), padding="valid")
        assert torch.equal(chunk, whole.narrow(time, at, steps))
        at += steps


@pytest.mark.parametrize("layout", ["NTC", "TNC"])
@pytest.mark.parametrize("taps", [9, 12, 19, 31])
@pytest.mark.parametrize(("channels", "heads"), [(16, 1), (35, 5), (80, 2), (24, 24)])
def test_every_length_of_a_block_of_outputs(channels, heads, taps, layout, level):
    """Blocks of 16, 12, 8 and 4 outputs, whose taps beyond the input are left out; vectors of one head and of several."""
    for length in (1, 3, 4, 5, 8, 9, 12, 13, 16, 17, 20, 24, 25, 28, 33, 41):
        for pads in ((taps - 1, 0), (0, taps - 1), (taps // 2, taps + 3)):
            x, w, b = integers(2, channels, length), integers(heads, taps, seed=1), integers(channels, seed=2)
            expected = reference(x.double(), w.double(), b.double(), (pads,), softmax=False)
            y = lightweight_conv1d(laid(x, layout), w, b, (pads,), softmax=False, layout=layout)
            assert torch.equal(LAYOUTS[layout].channel_first(y).double(), expected), (length, pads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("taps", [3, 12])
def test_padding_meets_weights_that_are_not_finite(taps, number, layout, level):
    """Zeros of padding are multiplied by them, as in the definition; a tap is left out only where that changes nothing."""
    x, w = normal(1, 32, 5), normal(2, taps, seed=1)
    w[0, 0] = number
    y = lightweight_conv1d(laid(x, layout), w, None, "causal", softmax=False, layout=layout)
    y = LAYOUTS[layout].channel_first(y)
    assert torch.equal(y.isnan(), reference(x, w, None, "causal", softmax=False).isnan())
    assert y[:, :16, : min(5, taps - 1)].isnan().all()
    assert y[:, 16:].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "taps"), [(1, 7), (4, 31), (64, 3)])
def test_threads_and_batch_leave_the_bits_alone(heads, taps, layout, level):
    x, w, b = normal(5, 64, 500), normal(heads, taps, seed=1), normal(64)
    mask, before = padding_mask(5, 500), torch.get_num_threads()

    def everything():
        operands = [t.detach().requires_grad_() for t in (laid(x, layout), w, b)]
        y = lightweight_conv1d(*operands, layout=layout, padding_mask=mask)
        return y, *torch.autograd.grad(y, operands, y.detach())

    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        two = everything()
    finally:
        torch.set_num_threads(before)
    for a, c in zip(one, two, strict=True):
        assert torch.equal(a, c)
    alone = lightweight_conv1d(laid(x[3:4], layout), w, b, layout=layout, padding_mask=mask[3:4])
    assert torch.equal(alone, one[0].narrow(LAYOUTS[layout].batch, 3, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", [3, 12])
def test_what_the_mask_hides_does_not_come_through(taps, layout, level):
    x, w, mask = normal(2, 20, 40), normal(4, taps, seed=1), padding_mask(2, 40)
    filled = laid(x.masked_fill(mask[:, None], 0), layout)
    hidden = laid(x.masked_fill(mask[:, None], float("nan")), layout)
    found = []
    for value in (filled, hidden):
        operands = [value.requires_grad_(), w.clone().requires_grad_()]
        y = lightweight_conv1d(*operands, layout=layout, padding_mask=mask)
        found.append((y, *torch.autograd.grad(y, operands, torch.ones_like(y))))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert not LAYOUTS[layout].channel_first(found[0][1])[mask[:, None].expand(-1, 20, -1)].any()


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_twice(layout, softmax):
    x, w, b = (
        laid(normal(2, 6, 7, dtype=torch.float64), layout),
        normal(3, 4, dtype=torch.float64, seed=1),
        normal(6, dtype=torch.float64),
    )
    operands = tuple(t.requires_grad_() for t in (x, w, b))
    run = partial(lightweight_conv1d, layout=layout, softmax=softmax, padding_mask=padding_mask(2, 7), activation="silu")
    assert torch.autograd.gradcheck(run, operands)
    assert torch.autograd.gradgradcheck(run, operands)


def test_softmax_of_special_logits_is_torchs(level):
    w = torch.tensor([[0.0, float("-inf"), 1.0], [float("nan"), 0, 0], [float("inf"), 0, 0], [-1e30, 1e30, 0]])
    y = lightweight_conv1d(torch.ones(1, 4, 1), w, padding="causal")
    torch.testing.assert_close(y.flatten(), w.softmax(1)[:, 2] + 0 * w.softmax(1).sum(1), equal_nan=True)


def test_dropout_draws_what_the_composite_path_draws():
    x, w = normal(2, 6, 9), normal(3, 5, seed=1).requires_grad_()
    found = []
    for composite in (False, True):
        torch.manual_seed(3)
        with settings.composite_only() if composite else torch.enable_grad():
            y = lightweight_conv1d(x, w, weight_dropout=0.5, training=True)
        found.append((y, torch.autograd.grad(y, w, torch.ones_like(y))[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert (found[0][0] == 0).any() or not torch.equal(found[0][0], lightweight_conv1d(x, w))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_orders_of_heads(layout, level):
    x = normal(2, 12, 20)
    for kind, head in ((LightweightConv1d, lambda c: c // 4), (InterleavedLightweightConv1d, lambda c: c % 3)):
        layer = kind(12, 5, 3, layout=layout)
        y = LAYOUTS[layout].channel_first(layer(laid(x, layout)))
        for c in range(12):
            alone = lightweight_conv1d(x[:, c : c + 1].contiguous(), layer.weight[head(c) : head(c) + 1])
            assert torch.equal(y[:, c], alone[:, 0])


@pytest.mark.parametrize("flush", [False, True])
def test_denormals_are_flushed_unless_precise(flush, level):
    x = torch.full((1, 16, 20), 1e-40)
    with torch.no_grad() if flush else settings.precise():
        y = lightweight_conv1d(x, torch.ones(2, 1), softmax=False)
    assert (y == (0 if flush else x)).all()


@pytest.mark.parametrize("layout", range(3))
def test_opcheck(layout):
    size = [[2, 6, 9], [2, 9, 6], [9, 2, 6]][layout]
    x, w, b, mask = normal(*size), normal(3, 4), normal(6), padding_mask(2, 9)
    torch.library.opcheck(OPS.lightweight.default, (x, w, b, mask, layout, [2, 1], 1, 0, True, 1, True))
    torch.library.opcheck(OPS.lightweight_grad_input.default, (x, w, mask, [9], layout, [2, 1], 1, True, True))
    torch.library.opcheck(OPS.lightweight_grad_weight.default, (x, x, w, mask, layout, [2, 1], 1, True, True, True))


def test_raw_ops_take_any_strides():
    x, w, b = normal(9, 6, 2).permute(2, 1, 0), normal(4, 3).t(), normal(12)[::2]
    mask = padding_mask(18, 2)[::2].t()
    given = (x, w, b, mask)
    settled = tuple(t.contiguous() for t in given)
    rest = (0, [2, 1], 1, 0, True, 0, True)
    assert torch.equal(OPS.lightweight(*given, *rest), OPS.lightweight(*settled, *rest))
    back = ([9], 0, [2, 1], 1, True, True)
    assert torch.equal(
        OPS.lightweight_grad_input(x, w, mask, *back), OPS.lightweight_grad_input(settled[0], settled[1], settled[3], *back)
    )
    rest = (0, [2, 1], 1, True, True, True)
    for a, c in zip(
        OPS.lightweight_grad_weight(x, x, w, mask, *rest),
        OPS.lightweight_grad_weight(settled[0], settled[0], settled[1], settled[3], *rest),
        strict=True,
    ):
        assert torch.equal(a, c)


WRONG = [
    {"x": torch.zeros(2, 6)},
    {"x": torch.zeros(2, 6, 9).int()},
    {"x": torch.zeros(2, 6, 0)},
    {"weight": torch.zeros(4, 4)},
    {"weight": torch.zeros(3, 0)},
    {"weight": torch.zeros(0, 4)},
    {"weight": torch.zeros(3, 4, 1)},
    {"weight": torch.zeros(3, 4).double()},
    {"bias": torch.zeros(5)},
    {"bias": torch.zeros(6).double()},
    {"mask": torch.zeros(2, 8, dtype=torch.bool)},
    {"mask": torch.zeros(2, 9)},
    {"layout": 3},
    {"layout": -1},
    {"pads": [1]},
    {"pads": [-1, 4]},
    {"pads": [0, 1 << 40]},
    {"dilation": 0},
    {"dilation": 4},
    {"dilation": 1 << 40},
    {"dilation": 1 << 25, "pads": [1 << 30, 1 << 30]},
    {"mode": 4},
    {"mode": 1, "pads": [9, 0]},
    {"mode": 3, "pads": [10, 0]},
    {"activation": 7},
    {"activation": -1},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_the_raw_op_refuses_by_name(change):
    call = {
        "x": torch.zeros(2, 6, 9), "weight": torch.zeros(3, 4), "bias": torch.zeros(6), "mask": None, "layout": 0, "pads": [0, 0],
        "dilation": 1, "mode": 0, "softmax": True, "activation": 0, "flush": True,
    }  # fmt: skip
    OPS.lightweight(**call)
    with pytest.raises(RuntimeError, match=r"lightweight: .*, got "):
        OPS.lightweight(**(call | change))


def test_the_raw_gradients_refuse_by_name():
    gy, x, w = torch.zeros(2, 6, 6), torch.zeros(2, 6, 9), torch.zeros(3, 4)
    back, gather = (0, [0, 0], 1, True, True), (0, [0, 0], 1, True, True, True)
    OPS.lightweight_grad_input(gy, w, None, [9], *back)
    OPS.lightweight_grad_weight(gy, x, w, None, *gather)
    for wrong in (
        (gy[..., :5], w, None, [9]),
        (gy, w, None, [9, 1]),
        (gy[0], w, None, [9]),
        (gy, w.double(), None, [9]),
        (gy, w, None, [1 << 40]),
    ):
        with pytest.raises(RuntimeError, match=r"lightweight_grad_input: .*, got "):
            OPS.lightweight_grad_input(*wrong, *back)
    for wrong in ((gy[..., :5], x, w), (gy.double(), x, w), (gy, x[0], w), (gy, x, torch.zeros(4, 4)), (gy, x, w[:, :0])):
        with pytest.raises(RuntimeError, match=r"lightweight_grad_weight: .*, got "):
            OPS.lightweight_grad_weight(*wrong, None, *gather)


def test_flops_are_counted():
    x, w = normal(2, 6, 9).requires_grad_(), normal(3, 4).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        lightweight_conv1d(x, w).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 6 * 9 * 4 + (4 + 4 + 8) * 12


def test_compiles_once_for_all_lengths():
    compiled = torch.compile(
        lambda x, w: lightweight_conv1d(x, w, padding="causal"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for length in (5, 9, 14):
        x, w = normal(2, 6, length).requires_grad_(), normal(3, 4).requires_grad_()
        y = compiled(x, w)
        assert torch.equal(y, lightweight_conv1d(x, w, padding="causal"))
        y.sum().backward()


def test_exports_with_any_batch_and_length():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LightweightConv1d(6, 3, 3, layout="NTC")

        def forward(self, x):
            return self.layer(x)

    model, dims = Model(), {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=4)}
    program = torch.export.export(model, (normal(3, 8, 6),), dynamic_shapes=(dims,))
    assert "omniconv.lightweight" in str(program.graph)
    x = normal(5, 21, 6)
    assert torch.equal(program.module()(x), model(x))


def test_many_calls_of_varying_length_do_not_grow_memory():
    def calls(count):
        for i in range(count):
            x = torch.zeros(2, 16, 1 + i * 37 % 400)
            with torch.no_grad():
                lightweight_conv1d(x if i % 2 else x.mT, w, layout="NCT" if i % 2 else "NTC")

    w = torch.zeros(4, 7)
    calls(2000)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(10_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # kB
