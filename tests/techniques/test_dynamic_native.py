"""The native dynamic convolution at every instruction set: exact, under the bound, chunks bit by bit, masks, gradients."""

import pytest
import torch
from torch.export import Dim

import omniconv
from omniconv import settings
from omniconv.functional import dynamic_conv1d
from omniconv.nn import DynamicConv1d
from omniconv.ops.sequence import softmax_error
from omniconv.techniques import find
from omniconv.techniques.dynamic import reference
from omniconv.testing import assert_within_bound

OPS = torch.ops.omniconv
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {"NCT": (0, 1, 2), "NTC": (0, 2, 1), "TNC": (2, 0, 1)}


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(*shape, dtype=torch.float32, seed=0):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid(x, layout):
    """(N, C, T) in a layout, contiguous."""
    return x.permute(LAYOUTS[layout]).contiguous()


def back(y, layout):
    """A layout's tensor as (N, C, T)."""
    order = LAYOUTS[layout]
    return y.permute([order.index(axis) for axis in range(3)])


# batch, heads, channels a head, length, kernel, dilation, pads: around the widths of vectors, blocks and tiles, in every layout
CASES = [
    (2, 3, 5, 7, 3, 1, (1, 1)),
    (2, 2, 32, 50, 7, 1, (3, 3)),
    (1, 2, 40, 300, 31, 1, (30, 0)),  # three tiles
    (2, 4, 8, 100, 5, 1, (4, 0)),  # heads that are packed together
    (1, 5, 6, 21, 9, 1, (4, 4)),  # bundles of heads that are not full
    (2, 6, 1, 33, 9, 1, (8, 0)),  # a head a channel
    (1, 1, 3, 1, 5, 1, (4, 0)),  # one position
    (1, 1, 70, 4, 8, 2, (9, 9)),  # a kernel longer than the sequence
    (1, 2, 19, 20, 3, 9, (9, 9)),
    (1, 1, 33, 400, 3, 150, (150, 150)),  # taps further apart than a tile is long
    (2, 2, 20, 40, 5, 1, (0, 0)),
    (1, 1, 17, 37, 1, 1, (2, 3)),
    (1, 1, 16, 20, 3, 1, (7, 9)),  # pads beyond the kernel's reach
    (2, 1, 72, 29, 31, 1, (15, 15)),  # several packs of channels
    (1, 1, 34, 90, 70, 1, (69, 0)),  # more taps than a block of three vectors
]


def drawn(case, draw, dtype, positions=None):
    """x (N, C, T), kernels, bias and the gradient of the result."""
    batch, heads, group, length, kernel, dilation, (before, after) = case
    channels, outputs = heads * group, length + before + after - dilation * (kernel - 1)
    return (
        draw(batch, channels, length, dtype=dtype, seed=1),
        draw(batch, heads, kernel, positions or outputs, dtype=dtype, seed=2),
        draw(channels, dtype=dtype, seed=3),
        draw(batch, channels, outputs, dtype=dtype, seed=4),
    )


def result_and_gradients(op, x, kernels, bias, grad_y, **kwargs):
    operands = [t.detach().requires_grad_() for t in (x, kernels, bias)]
    y = op(*operands, **kwargs)
    return y.detach(), *torch.autograd.grad(y, operands, grad_y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_are_exact_in_every_direction(dtype, layout, level):
    """With masks, dilation, one kernel for all positions; half types round once."""
    for case in CASES:
        for positions in (None, 1):
            x, kernels, bias, grad_y = drawn(case, integers, torch.float64, positions)
            mask = torch.rand(x.shape[0], x.shape[2], generator=torch.Generator().manual_seed(5)) < 0.3
            for padding_mask in (None, mask):
                kwargs = {"padding": (case[6],), "dilation": case[5], "softmax": False, "padding_mask": padding_mask}
                expected = result_and_gradients(reference, x, kernels, bias, grad_y, **kwargs)
                ours = result_and_gradients(
                    dynamic_conv1d, laid(x, layout).to(dtype), kernels.to(dtype), bias.to(dtype), laid(grad_y, layout).to(dtype),
                    layout=layout, **kwargs,
                )  # fmt: skip
                y, grad_x, *rest = ours
                assert y.is_contiguous()
                for made, wanted in zip((back(y, layout), back(grad_x, layout), *rest), expected, strict=True):
                    assert torch.equal(made, wanted.to(dtype)), (case, positions)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_softmax_stays_under_the_bound_in_every_direction(dtype, layout, level):
    for case in CASES:
        for positions in (None, 1):
            x, kernels, bias, grad_y = drawn(case, normal, dtype, positions)
            operands = {"input": laid(x, layout), "kernels": 3 * kernels, "bias": bias}
            kwargs = {"padding": (case[6],), "dilation": case[5], "layout": layout}
            for activation in (None, "relu", "silu"):
                y = dynamic_conv1d(**operands, **kwargs, activation=activation)
                assert_within_bound(find("dynamic"), operands | kwargs | {"activation": activation}, y)
            wide = [t.double() for t in operands.values()]
            expected = result_and_gradients(reference, *wide, laid(grad_y, layout).double(), **kwargs)
            ours = result_and_gradients(dynamic_conv1d, *operands.values(), laid(grad_y, layout), **kwargs)
            eps = torch.finfo(dtype).eps
            for made, wanted in zip(ours, expected, strict=True):
                torch.testing.assert_close(made.double(), wanted, rtol=4 * eps, atol=64 * max(eps, 2.0**-52) * wanted.abs().max())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_lies_outside_in_other_modes(layout, mode, level):
    for group, dilation in ((6, 2), (40, 1)):
        x, kernels, bias, _ = drawn((2, 2, group, 40, 5, dilation, (6, 3)), integers, torch.float32)
        mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(5)) < 0.3
        kwargs = {"padding": ((6, 3),), "dilation": dilation, "softmax": False, "padding_mode": mode, "padding_mask": mask}
        y = dynamic_conv1d(laid(x, layout), kernels, bias, layout=layout, **kwargs)
        assert torch.equal(back(y, layout), reference(x, kernels, bias, **kwargs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_million_logits_between_them_try_the_exponential(dtype, level):
    """The weight of tap 0 of two, seen through an input that only this tap meets, under the bound of the softmax itself."""
    count = 1 << 18
    logits = torch.zeros(1, 1, 2, count, dtype=dtype)
    logits[0, 0, 0] = -(torch.linspace(0, 120, count, dtype=dtype) ** torch.linspace(0.5, 1, count, dtype=dtype))
    x = torch.ones(1, 1, count + 1, dtype=dtype)
    x[..., 1::2] = 0  # at even positions tap 0 alone
    y = dynamic_conv1d(x, logits, padding="valid")[0, 0, ::2]
    u = 2.0**-24 if dtype == torch.float32 else 2.0**-53
    wide = logits[0, 0, :, ::2].double()
    error = softmax_error(wide, 0, u)[0]
    assert ((y.double() - wide.softmax(0)[0]).abs() <= error * (1 + (dtype == torch.float64))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_are_torchs(dtype, level):
    inf, nan = float("inf"), float("nan")
    columns = [
        [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [6e4, 6e4, -6e4], [-inf, 0.0, 1.0], [-inf, -inf, 2.0], [-inf, -inf, -inf],
        [inf, 0.0, 0.0], [nan, 0.0, 0.0], [0.0, nan, 1.0], [0.0, 0.0, nan], [0.0, -200.0, -95.0],
    ]  # fmt: skip
    kernels = torch.tensor(columns, dtype=dtype).t().reshape(1, 1, 3, len(columns))
    for group in (1, 40):
        x = torch.ones(1, group, len(columns) + 2, dtype=dtype)
        y = dynamic_conv1d(x, kernels, padding="valid")
        expected = (kernels.double().softmax(2)[0] * 1.0).sum(1).expand(group, -1)
        torch.testing.assert_close(y[0].double(), expected, equal_nan=True, rtol=torch.finfo(dtype).eps, atol=0)
        for i, column in enumerate(columns):  # one kernel for the whole sequence
            y = dynamic_conv1d(x, kernels[..., i : i + 1], padding="valid")
            (
                torch.testing.assert_close(
                    y[0, 0].double(), expected[0, i].expand(len(columns)), equal_nan=True, rtol=2e-2, atol=0
                ),
                column,
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (7, 1), (8, 3), (31, 1), (40, 2)])
def test_chunks_of_any_size_give_the_bits_of_the_whole(kernel, dilation, dtype, layout, level):
    """A position's bits depend neither on where it stands, nor on the length, nor on what else is in its tile."""
    reach, length = dilation * (kernel - 1), 270
    fused = "silu" if dtype != torch.float64 else "hardswish"  # in float64 the curved ones are torch's, whose tails differ
    for heads, group in ((2, 20), (3, 4), (1, 33)):
        x = normal(2, heads * group, length, dtype=dtype)
        kernels, bias = normal(2, heads, kernel, length, dtype=dtype, seed=1), normal(heads * group, dtype=dtype, seed=2)
        kwargs = {"dilation": dilation, "layout": layout, "activation": fused}
        whole = back(dynamic_conv1d(laid(x, layout), kernels, bias, "causal", **kwargs), layout)
        padded = torch.cat([x.new_zeros(2, heads * group, reach), x], 2)
        at = 0
        generator = torch.Generator().manual_seed(kernel + group)
        while at < length:
            steps = min(int(torch.randint(1, 90, (1,), generator=generator)) if at else 1, length - at)
            chunk = laid(padded[..., at : at + steps + reach], layout)
            y = dynamic_conv1d(chunk, kernels[..., at : at + steps], bias, "valid", **kwargs)
            assert torch.equal(back(y, layout), whole[..., at : at + steps]), (at, steps)
            at += steps


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_taps_that_meet_only_padding_count_as_if_it_were_there(layout, softmax, level):
    """They are passed over where nothing can change: a weight that is no number shows, and so does an infinite one times zero."""
    for length, kernel, group in ((1, 31, 16), (1, 5, 3), (25, 31, 32), (40, 7, 48), (3, 40, 20)):
        for special in (None, float("inf"), float("nan")):
            x, bias = normal(2, 2 * group, length), normal(2 * group, seed=2)
            before, after = kernel + 15, kernel + 9
            kernels = normal(2, 2, kernel, before + length + after - kernel + 1, seed=1)
            x[:, 1], bias[1] = -0.0, -0.0
            if special is not None:
                kernels[0, 1, 0, 0] = kernels[0, 1, -1, -1] = special  # at the first and the last position there is only padding
            kwargs = {"layout": layout, "softmax": softmax}
            y = dynamic_conv1d(laid(x, layout), kernels, bias, ((before, after),), **kwargs)
            padded = torch.nn.functional.pad(x, (before, after))
            wanted = dynamic_conv1d(laid(padded, layout), kernels, bias, "valid", **kwargs)
            assert torch.equal(y.view(torch.int32), wanted.view(torch.int32)), (length, kernel, group, special)
            assert (special is None) == bool(back(y, layout)[0, group:, 0].isfinite().all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_and_batch_leave_the_bits_alone(layout, level):
    threads = torch.get_num_threads()
    for heads, group, length in ((4, 16, 300), (6, 3, 1100)):
        x, kernels, bias, grad_y = drawn((5, heads, group, length, 7, 1, (3, 3)), normal, torch.float32)
        everything = [laid(x, layout), kernels, bias, laid(grad_y, layout)]
        try:
            made = []
            for count in (1, 2):
                torch.set_num_threads(count)
                made.append(result_and_gradients(dynamic_conv1d, *everything, layout=layout)[:3])
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
        alone = result_and_gradients(
            dynamic_conv1d, laid(x[3:4], layout), kernels[3:4], bias, laid(grad_y[3:4], layout), layout=layout
        )
        y, grad_x, grad_kernels = made[0]
        assert torch.equal(back(y, layout)[3:4], back(alone[0], layout))
        assert torch.equal(back(grad_x, layout)[3:4], back(alone[1], layout))
        assert torch.equal(grad_kernels[3:4], alone[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_under_the_mask_does_not_spread(layout, level):
    for group in (3, 24):
        x, kernels, bias, grad_y = drawn((2, 2, group, 30, 5, 1, (4, 0)), normal, torch.float32)
        mask = torch.zeros(2, 30, dtype=torch.bool)
        mask[0, 11], mask[1, 25:] = True, True
        clean = x.masked_fill(mask[:, None], 0)
        dirty = x.masked_fill(mask[:, None], float("nan"))
        kwargs = {"padding": "causal", "layout": layout, "padding_mask": mask}
        ours, expected = (
            result_and_gradients(dynamic_conv1d, laid(t, layout), kernels, bias, laid(grad_y, layout), **kwargs)
            for t in (dirty, clean)
        )
        for made, wanted in zip(ours, expected, strict=True):
            assert torch.equal(made, wanted)
        assert (back(ours[1], layout).transpose(1, 2)[mask] == 0).all()


@pytest.mark.parametrize("positions", [None, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_their_gradients(layout, positions):
    x, kernels, bias, _ = drawn((2, 2, 2, 6, 3, 2, (3, 1)), normal, torch.float64, positions)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 2] = True
    tensors = [t.requires_grad_() for t in (laid(x, layout), kernels, bias)]

    def call(x, kernels, bias):
        return dynamic_conv1d(x, kernels, bias, ((3, 1),), dilation=2, layout=layout, padding_mask=mask, activation="silu")

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("layout", range(3))
def test_opcheck(layout):
    name = list(LAYOUTS)[layout]
    x, kernels, bias, grad_y = drawn((2, 2, 9, 20, 3, 2, (3, 1)), normal, torch.float32)
    x, grad_y = laid(x, name), laid(grad_y, name)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    place = (layout, [3, 1], 2)
    torch.library.opcheck(OPS.dynamic.default, (x, kernels, bias, mask, *place, 0, True, None, 0, 3, True))
    torch.library.opcheck(OPS.dynamic.default, (x, kernels[..., :1], None, None, *place, 2, False, None, 0, 0, False))
    torch.library.opcheck(OPS.dynamic_grad_input.default, (grad_y, kernels, mask, [20], *place, True, None, 0, True))
    torch.library.opcheck(OPS.dynamic_grad_kernels.default, (grad_y, x, kernels, mask, *place, True, None, 0, True))
    torch.library.opcheck(OPS.dynamic_grad_kernels.default, (grad_y, x, kernels[..., :1], None, *place, True, None, 0, True))


def test_the_raw_ops_take_any_strides():
    x, kernels, bias, grad_y = drawn((2, 2, 9, 20, 3, 1, (1, 1)), integers, torch.float32)
    mask = torch.zeros(20, 2, dtype=torch.bool)
    mask[3, 1] = True
    strange = [t.transpose(1, -1).contiguous().transpose(1, -1) for t in (x, kernels, grad_y)]
    for settled, (a, k, g) in (([t.contiguous() for t in strange], strange),):
        place = (0, [1, 1], 1)
        assert torch.equal(
            OPS.dynamic(a, k, bias, mask.t(), *place, 0, False, None, 0, 0, True),
            OPS.dynamic(settled[0], settled[1], bias, mask.t().contiguous(), *place, 0, False, None, 0, 0, True),
        )
        assert torch.equal(
            OPS.dynamic_grad_input(g, k, None, [20], *place, True, None, 0, True),
            OPS.dynamic_grad_input(settled[2], settled[1], None, [20], *place, True, None, 0, True),
        )
        assert torch.equal(
            OPS.dynamic_grad_kernels(g, a, k, None, *place, True, None, 0, True),
            OPS.dynamic_grad_kernels(settled[2], settled[0], settled[1], None, *place, True, None, 0, True),
        )


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


X, W = zeros(2, 6, 5), zeros(2, 3, 3, 5)
PLACE = {
    "layout": 0,
    "pads": [1, 1],
    "dilation": 1,
    "mode": 0,
    "softmax": True,
    "seed": None,
    "dropped": 0,
    "activation": 0,
    "flush": True,
}
WRONG = [
    ({"x": zeros(2, 6)}, "must have 3 axes"),
    ({"x": zeros(2, 6, 0)}, "at least 1"),
    ({"x": X.int(), "kernels": W.int()}, "the dtype must be"),
    ({"kernels": W.double()}, "kernels must have the input's dtype"),
    ({"kernels": zeros(2, 3, 3)}, r"kernels must be \(N, H, K, Out\)"),
    ({"kernels": zeros(1, 3, 3, 5)}, r"kernels must be \(N, H, K, Out\)"),
    ({"kernels": zeros(2, 4, 3, 5)}, "heads of kernels must divide"),
    ({"kernels": zeros(2, 0, 3, 5)}, "heads of kernels must divide"),
    ({"kernels": zeros(2, 3, 0, 5)}, "at least 1"),
    ({"kernels": zeros(2, 3, 3, 4)}, "kernels must have 5 positions, or 1"),
    ({"kernels": zeros(2, 3, 9, 1)}, "hold one window"),
    ({"bias": zeros(5)}, "bias must be"),
    ({"bias": zeros(6).bfloat16()}, "bias must be"),
    ({"mask": zeros(2, 5)}, "mask must be bool"),
    ({"mask": zeros(2, 4, dtype=torch.bool)}, "mask must be bool"),
    ({"layout": 3}, "layout must be"),
    ({"layout": -1}, "layout must be"),
    ({"pads": [1]}, "pads must be"),
    ({"pads": [-1, 3]}, "at least 0"),
    ({"pads": [1 << 62, 1 << 62]}, "at least 0"),
    ({"dilation": 0}, "at least 1"),
    ({"dilation": 1 << 62}, "at least 1"),
    ({"mode": 4}, "mode must be known"),
    ({"mode": 1, "pads": [5, 0], "kernels": zeros(2, 3, 6, 5)}, "reflected pads"),
    ({"dropped": -1}, "dropped must be"),
    ({"dropped": (1 << 32) + 1}, "dropped must be"),
    ({"dropped": 5}, "seed must be one int64"),
    ({"dropped": 5, "seed": zeros(1)}, "seed must be one int64"),
    ({"dropped": 5, "seed": zeros(2, dtype=torch.int64)}, "seed must be one int64"),
    ({"activation": 7}, "activation must be"),
    ({"x": X.double(), "kernels": W.double(), "activation": 3}, "activation must be"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_the_raw_op_refuses_by_name(changed, message):
    arguments = {"x": X, "kernels": W, "bias": None, "mask": None} | PLACE | changed
    with pytest.raises(RuntimeError, match=f"dynamic: .*{message}"):
        OPS.dynamic(**arguments)


def test_the_raw_gradients_refuse_by_name():
    place = (0, [1, 1], 1, True, None, 0, True)
    for grad_y, kernels, length in (
        (zeros(2, 6, 4), W, [5]),
        (X.double(), W, [5]),
        (X, W, [5, 5]),
        (X, W, [0]),
        (zeros(2, 6), W, [5]),
    ):
        with pytest.raises(RuntimeError, match="dynamic_grad_input: "):
            OPS.dynamic_grad_input(grad_y, kernels, None, length, *place)
    for grad_y, x, kernels in ((zeros(2, 6, 4), X, W), (X.double(), X, W), (X, X.double(), W), (X, zeros(2, 6), W)):
        with pytest.raises(RuntimeError, match="dynamic_grad_kernels: "):
            OPS.dynamic_grad_kernels(grad_y, x, kernels, None, *place)


def test_compiles_whole_and_exports_with_any_length():
    layer = DynamicConv1d(12, 3, 3, padding="causal", bias=True, activation="silu")
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 4:] = True
    x = normal(2, 12, 9).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x, mask), layer(x, mask))
    for ours, theirs in zip(
        torch.autograd.grad(compiled(x, mask).sum(), (x, *layer.parameters())),
        torch.autograd.grad(layer(x, mask).sum(), (x, *layer.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    axes = {0: Dim("batch", min=2, max=64), 2: Dim("length", min=2, max=4096)}
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes=(axes,)).module()
    for batch, length in ((2, 9), (5, 33), (3, 300)):
        other = normal(batch, 12, length)
        torch.testing.assert_close(program(other), layer(other))


def drops(kernels, rate, **kwargs):
    """What each weight of the kernels was multiplied by in one call: inputs that one tap meets, with one seed."""
    batch, heads, taps, outputs = kernels.shape
    found = torch.empty_like(kernels)
    for i in range(taps):
        x = torch.zeros(batch, heads, outputs + taps - 1, dtype=kernels.dtype)
        for start in range(taps):  # outputs start, start + taps, … see this tap alone
            x.zero_()
            x[..., start + i :: taps] = 1
            torch.manual_seed(7)
            y = dynamic_conv1d(x, kernels, padding="valid", softmax=False, weight_dropout=rate, training=True, **kwargs)
            found[:, :, i, start::taps] = y[..., start::taps]
    return found / kernels


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_weights_are_dropped_at_the_rate_and_the_rest_scaled(rate, level):
    kernels = torch.ones(4, 4, 3, 500)
    factors = drops(kernels, rate)
    count = factors.numel()
    kept = factors != 0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - rate)))
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert abs(1 - kept.double().mean() - rate) < 5 * deviation
    # neighbours in time, between taps, heads and samples know nothing of each other
    centred = kept.double() - (1 - rate)
    for axis in range(4):
        a, b = centred.narrow(axis, 1, kept.shape[axis] - 1), centred.narrow(axis, 0, kept.shape[axis] - 1)
        assert abs((a * b).mean()) < 5 * rate * (1 - rate) / a.numel() ** 0.5
    # as the raw op tells, and for every dtype and level
    torch.manual_seed(7)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    for dtype in DTYPES:
        told = OPS.dynamic_dropout_scale(kernels.to(dtype), seed, round(rate * 2**32))
        assert torch.equal(told != 0, kept)
    torch.testing.assert_close(OPS.dynamic_dropout_scale(kernels, seed, round(rate * 2**32)), factors)


def test_calls_drop_independently_and_rate_one_drops_all():
    x, kernels = torch.ones(2, 3, 402), torch.ones(2, 3, 3, 400)
    settings = {"padding": "valid", "softmax": False, "weight_dropout": 0.5, "training": True}
    first, second = (dynamic_conv1d(x, kernels, **settings) for _ in range(2))
    a, b = first - 3, second - 3
    assert abs((a * b).mean() / (a.std() * b.std())) < 5 / a.numel() ** 0.5
    assert torch.equal(dynamic_conv1d(x, kernels, **(settings | {"weight_dropout": 1.0})), torch.zeros(2, 3, 400))
    assert torch.equal(dynamic_conv1d(x, kernels, **(settings | {"training": False})), torch.full((2, 3, 400), 3.0))


@pytest.mark.parametrize("positions", [None, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_weights_that_were_dropped(layout, positions, level):
    x, kernels, bias, grad_y = drawn((2, 2, 3, 40, 5, 1, (2, 2)), normal, torch.float64, positions)
    grad_y = laid(grad_y, layout)
    torch.manual_seed(3)
    ours = result_and_gradients(
        dynamic_conv1d, laid(x, layout), kernels, bias, grad_y, layout=layout, weight_dropout=0.4, training=True
    )
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))

    def dropped(x, kernels, bias):
        weights = kernels.softmax(2) * OPS.dynamic_dropout_scale(kernels.detach(), seed, round(0.4 * 2**32))
        return reference(x, weights, bias, softmax=False, layout=layout)

    for made, wanted in zip(ours, result_and_gradients(dropped, laid(x, layout), kernels, bias, grad_y), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-9, atol=1e-9)


def test_gradients_of_gradients_with_dropped_weights():
    x, kernels, bias, _ = drawn((1, 2, 2, 6, 3, 1, (1, 1)), normal, torch.float64)
    tensors = [t.requires_grad_() for t in (x, kernels, bias)]

    def call(x, kernels, bias):
        torch.manual_seed(11)
        return dynamic_conv1d(x, kernels, bias, weight_dropout=0.4, training=True)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_opcheck_with_dropped_weights():
    x, kernels, bias, grad_y = drawn((2, 2, 9, 20, 3, 2, (3, 1)), normal, torch.float32)
    weights = (True, torch.tensor([5]), 1 << 30)
    place = (0, [3, 1], 2)
    torch.library.opcheck(OPS.dynamic.default, (x, kernels, bias, None, *place, 0, *weights, 3, True))
    torch.library.opcheck(OPS.dynamic_grad_input.default, (grad_y, kernels, None, [20], *place, *weights, True))
    torch.library.opcheck(OPS.dynamic_grad_kernels.default, (grad_y, x, kernels, None, *place, *weights, True))
    torch.library.opcheck(OPS.dynamic_dropout_scale.default, (kernels, *weights[1:]))


def test_composite_paths_and_transforms_agree():
    x, kernels = normal(2, 6, 9), normal(2, 3, 3, 9, seed=1)
    y = dynamic_conv1d(x, kernels)
    with settings.composite_only():
        torch.testing.assert_close(dynamic_conv1d(x, kernels), y)
    batched = torch.vmap(lambda x, k: dynamic_conv1d(x, k))(x, kernels)
    torch.testing.assert_close(batched, y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flushes_denormals_unless_precise(layout, level):
    x, kernels = torch.full((1, 24, 40), 1e-40), torch.full((1, 1, 3, 40), 1.0)
    x = laid(x, layout)

    def everything():
        operands = [x.clone().requires_grad_(), kernels.clone().requires_grad_()]
        y = dynamic_conv1d(*operands, softmax=False, layout=layout)
        return y.detach(), *torch.autograd.grad(y, operands, torch.full_like(y, 1e-40))

    for made in everything()[:2]:
        assert (made == 0).all()
    with omniconv.precise():
        for made in everything()[:2]:
            assert (made > 0).any()


@pytest.mark.slow
def test_calls_of_varying_length_do_not_grow():
    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    lengths = torch.randint(1, 200, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()
    x, kernels = normal(2, 32, 200), normal(2, 4, 5, 200, seed=1)
    for i, length in enumerate(lengths):
        layout = list(LAYOUTS)[i % 3]
        dynamic_conv1d(laid(x[..., :length], layout), kernels[..., :length], layout=layout)
        if i == 1000:
            before = resident()
    assert resident() - before < 8 << 20
