"""Chunks of any sizes give the whole sequence's bits; state is copied, saved, reordered; what cannot stream is refused by name."""

import copy
import io
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import omniconv
from omniconv import settings
from omniconv.nn import (
    Conv1d,
    ConvTranspose1d,
    DepthwiseConv1d,
    DepthwiseConv2d,
    DepthwiseSeparableConv1d,
    DynamicConv1d,
    LightweightConv1d,
    PointwiseConv1d,
)
from omniconv.streaming import Causal
from omniconv.techniques import find

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHANNELS = 18
TIME = {"NCT": 2, "NTC": 1, "TNC": 0}


class Residual(nn.Module):
    """x + body(x)."""

    stream_exact = True

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)

    def stream(self, x, step):
        return x + step(self.body, x)


class Gated(nn.Module):
    """A list of children, one left out, and another layout for one of them."""

    stream_exact = True
    stream_children = ("paths",)

    def __init__(self, *paths):
        super().__init__()
        self.paths = nn.ModuleList(paths)
        self.loss_head = nn.LSTM(2, 2)

    def forward(self, x):
        return self.paths[0](x) * self.paths[1](x)

    def stream(self, x, step):
        return step(self.paths[0], x) * step(self.paths[1], x)


class Inside(nn.Module):
    """An (N, T, C) layer inside a stack of (N, C, T)."""

    stream_exact = True

    def __init__(self, body):
        super().__init__()
        self.body, self.stream_layouts = body, {"body": "NTC"}

    def forward(self, x):
        return self.body(x.transpose(1, 2)).transpose(1, 2)

    def stream(self, x, step):
        return step(self.body, x.transpose(1, 2)).transpose(1, 2)


class Difference(nn.Module):
    """y[t] = x[t] − x[t − 2], a layer of the user's own."""

    def forward(self, x):
        return x - F.pad(x, (2, 0))[..., :-2]

    def stream_reads(self):
        return Causal(past=2, layouts=("NCT",))

    def stream_step(self, window):
        return window[..., 2:] - window[..., :-2]


def filled(module, dtype=torch.float32):
    """In evaluation mode, with parameters that are not zero."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.to(dtype).eval()


def whole(module, x):
    with torch.no_grad():
        return module(x)


def pieces(x, axis, rng, sizes=(0, 1, 1, 2, 3, 5, 16, 17, 40)):
    """``x`` cut along the axis at random, empty pieces included."""
    at = 0
    while at < x.shape[axis]:
        size = min(rng.choice(sizes), x.shape[axis] - at)
        yield x.narrow(axis, at, size)
        at += size


def streamed(s, x, rng, sizes=(0, 1, 1, 2, 3, 5, 16, 17, 40)):
    axis = TIME[s.layout]
    return torch.cat([s(piece) for piece in pieces(x, axis, rng, sizes)], axis)


def assert_streams(module, x, rng, exact=True):
    s = omniconv.streaming(module)
    assert s.exact is exact, s.inexact
    y, expected = streamed(s, x, rng), whole(module, x)
    assert y.dtype == expected.dtype
    assert not y.requires_grad
    if exact:
        assert torch.equal(y, expected)
    else:
        torch.testing.assert_close(y, expected)
    return s


def sequence(layout, batch, steps, dtype=torch.float32, channels=CHANNELS):
    size = {"N": batch, "C": channels, "T": steps}
    return torch.randn([size[axis] for axis in layout]).to(dtype)


# what the layers promise

FUSED = (None, "relu", "relu6", "hardswish", "silu", "gelu", "sigmoid")  # the last three are torch's in float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_depthwise_has_the_bits_of_the_whole(seed, dtype, level):
    rng = random.Random(seed)
    channels = rng.choice([3, 16, 20, 33])
    layer = DepthwiseConv1d(
        channels, rng.choice([1, 2, 3, 4, 5, 16, 17, 31, 40]), stride=rng.choice([1, 1, 2, 3, 5]), padding="causal",
        dilation=rng.choice([1, 1, 2, 3, 8]), multiplier=rng.choice([1, 2]), bias=rng.random() < 0.5,
        activation=rng.choice(FUSED[: 4 if dtype == torch.float64 else 7]),
    )  # fmt: skip
    x = sequence("NCT", rng.choice([1, 3]), rng.choice([1, 7, 64, 150]), dtype, channels)
    assert_streams(filled(layer, dtype), x, rng)


def test_pads_by_number_are_causal_too():
    for padding, kernel in ((((4, 0),), 3), ("same", 1), (0, 1), ("same_minimal", 1)):
        layer = filled(DepthwiseConv1d(CHANNELS, kernel, padding=padding, dilation=2))
        assert_streams(layer, sequence("NCT", 2, 20), random.Random(0))


ALONE = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Softsign, lambda: nn.Threshold(0.1, 0.3),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", ALONE, ids=lambda make: make.__name__)
def test_torchs_plain_activations_have_the_same_bits_in_chunks(make, dtype):
    """In half types for every number that there is."""
    if dtype.itemsize == 2:
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        x = numbers[numbers.isfinite()].view(1, 2, -1)
    else:
        x = torch.randn(1, 2, 20_000, dtype=dtype) * 3
    module = make().eval().to(dtype)
    s = omniconv.streaming(module)
    assert s.exact
    for sizes in ((1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 100), (1, 1000, 4097)):
        s.reset()
        assert torch.equal(streamed(s, x, random.Random(0), sizes), whole(module, x))


CURVED = (
    nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.LogSigmoid, nn.Tanhshrink,
    lambda: nn.GLU(1), lambda: nn.BatchNorm1d(CHANNELS),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", CURVED, ids=lambda make: make.__name__)
def test_other_modules_of_torch_run_and_say_why_they_are_not_exact(make, dtype):
    module = nn.Sequential(make()).to(dtype).eval()
    s = assert_streams(module, sequence("NCT", 2, 90, dtype), random.Random(0), exact=False)
    assert s.inexact.keys() == {"0"}
    assert "depend on the length" in s.inexact["0"]


@pytest.mark.parametrize("layout", ["NTC", "TNC"])
def test_over_the_channels_of_the_other_layouts(layout):
    module = filled(nn.Sequential(nn.Linear(CHANNELS, 8), nn.LayerNorm(8), nn.GLU(-1), nn.RMSNorm(4), nn.PReLU()))
    s = omniconv.streaming(module, layout=layout)
    x = sequence(layout, 2, 30)
    torch.testing.assert_close(streamed(s, x, random.Random(0)), whole(module, x))
    assert s.inexact.keys() == {"0", "1", "2", "3"}
    assert omniconv.streaming(module).layout == "NTC"


def random_layer(rng, layout, dtype):
    """A causal layer that is exact, or a plain module of torch."""
    kind, kernel, dilation = rng.random(), rng.choice([2, 3, 7]), rng.choice([1, 2, 4])
    if kind < 0.3:
        return DynamicConv1d(CHANNELS, kernel, 3, "causal", dilation=dilation, layout=layout)
    if layout == "NCT" and kind < 0.6:
        return DepthwiseConv1d(CHANNELS, kernel, padding="causal", dilation=dilation)
    if layout == "NCT" and kind < 0.7:
        return PointwiseConv1d(CHANNELS, CHANNELS)
    return rng.choice([nn.ReLU, nn.LeakyReLU, nn.Hardswish, nn.Dropout])()


def random_stack(rng, layout, dtype, depth=0):
    parts = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.random()
        if depth < 2 and kind < 0.3:
            parts.append(Residual(random_stack(rng, layout, dtype, depth + 1)))
        elif depth < 2 and kind < 0.4:
            parts.append(Gated(random_stack(rng, layout, dtype, depth + 1), random_layer(rng, layout, dtype)))
        else:
            parts.append(random_layer(rng, layout, dtype))
    return nn.Sequential(*parts)


@pytest.mark.parametrize("seed", range(40))
def test_random_stacks_in_random_chunks_have_the_bits_of_the_whole(seed):
    rng = random.Random(seed)
    dtype, layout = rng.choice(DTYPES), rng.choice(["NCT", *TIME])
    module = filled(random_stack(rng, layout, dtype), dtype)
    x = sequence(layout, rng.choice([1, 2]), rng.choice([1, 33, 100]), dtype)
    s = omniconv.streaming(module, layout=layout)
    assert s.exact
    for _ in range(2):
        assert torch.equal(streamed(s, x, rng), whole(module, x))
        s.reset()


def test_strides_keep_their_phase_through_a_stack():
    layers = (DepthwiseConv1d(CHANNELS, 4, 2, "causal"), nn.ReLU(), DepthwiseConv1d(CHANNELS, 3, 3, "causal", 2))
    module = filled(nn.Sequential(*layers))
    x = sequence("NCT", 2, 50)
    s = omniconv.streaming(module)
    outputs = [s(x[..., t : t + 1]).shape[2] for t in range(14)]
    assert outputs == [1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]
    for seed in range(10):
        assert_streams(module, x, random.Random(seed))


def test_shortcut_with_a_stride():
    class Down(nn.Module):
        stream_exact = True

        def __init__(self):
            super().__init__()
            self.long, self.short = DepthwiseConv1d(CHANNELS, 5, 2, "causal"), DepthwiseConv1d(CHANNELS, 1, 2)

        def forward(self, x):
            return self.long(x) + self.short(x)

        def stream(self, x, step):
            return step(self.long, x) + step(self.short, x)

    assert_streams(filled(Down()), sequence("NCT", 2, 31), random.Random(0))


def test_one_layer_at_two_places_has_two_pasts():
    layer = DepthwiseConv1d(CHANNELS, 3, padding="causal")
    module = filled(nn.Sequential(layer, nn.ReLU(), layer))
    s = assert_streams(module, sequence("NCT", 2, 40), random.Random(0))
    assert s.state()["past"].keys() == {"0", "2"}


def test_another_layout_inside():
    module = nn.Sequential(DepthwiseConv1d(CHANNELS, 3, padding="causal"), Inside(nn.LayerNorm(CHANNELS)), nn.ReLU())
    s = assert_streams(filled(module), sequence("NCT", 2, 40), random.Random(0), exact=False)
    assert s.inexact.keys() == {"1.body"}


def test_a_layer_of_the_users_own_that_looks_back():
    assert_streams(nn.Sequential(Difference(), nn.ReLU(), Difference()).eval(), sequence("NCT", 2, 40), random.Random(0))


def test_what_is_not_declared_exact_is_not_said_to_be():
    class Plain(Residual):
        stream_exact = False

    s = assert_streams(Plain(nn.ReLU()).eval(), sequence("NCT", 1, 9), random.Random(0), exact=False)
    assert s.inexact == {"": "its stream() is not declared exact (stream_exact = True)"}


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_depthwise_weights_that_are_not_finite_are_said_not_to_be_exact(number):
    """Pads are left out of a sum, and a past of zeros is not."""
    module = filled(nn.Sequential(nn.ReLU(), DepthwiseSeparableConv1d(CHANNELS, 4, 3, padding="causal")))
    s = omniconv.streaming(module)
    assert s.exact
    module[1].depthwise.weight.data[3, 0, 1] = number
    assert "not finite" in s.inexact["1"]
    assert omniconv.streaming(filled(DepthwiseConv1d(CHANNELS, 1))).exact


@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d])
@pytest.mark.parametrize("dtype", DTYPES)
def test_depthwise_separable(norm, dtype):
    activations = {"depthwise_activation": "relu", "activation": "relu6" if dtype == torch.float64 or norm else "silu"}
    layer = DepthwiseSeparableConv1d(CHANNELS, 8, 3, 2, "causal", norm=norm, **activations)
    s = assert_streams(filled(layer, dtype), sequence("NCT", 2, 60, dtype), random.Random(0), exact=norm is None)
    assert s.inexact.keys() == (set() if norm is None else {"depthwise_norm", "pointwise_norm"})


def test_what_is_curved_after_a_normalisation_is_said_not_to_be_exact():
    for activation, exact in (("hardswish", True), ("silu", False)):
        layer = DepthwiseSeparableConv1d(4, 4, 3, padding="causal", norm=nn.BatchNorm1d, activation=activation).eval()
        assert ("" not in omniconv.streaming(layer).inexact) is exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 3])
def test_pointwise_has_the_bits_of_the_whole(stride, dtype, level):
    for channels, outputs in ((CHANNELS, 8), (70, 33), (1, 1)):
        layer = PointwiseConv1d(channels, outputs, stride, activation=None if dtype == torch.float64 else "gelu")
        assert_streams(filled(layer, dtype), sequence("NCT", 2, 130, dtype, channels), random.Random(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", TIME)
def test_lightweight_and_dynamic_several_steps_after_earlier_ones(layout, dtype, level):
    """Where fairseq's incremental decoding is wrong (its issue 3908): more than one step at a time."""
    for channels, heads, kernel, dilation, softmax, activation in (
        (18, 3, 5, 1, True, None), (18, 3, 3, 2, False, "relu"), (64, 4, 7, 1, True, "hardswish"), (5, 5, 1, 1, True, None),
        (40, 1, 31, 1, True, None if dtype == torch.float64 else "silu"), (33, 33, 4, 3, False, None),
    ):  # fmt: skip
        forms = {"layout": layout, "softmax": softmax, "dilation": dilation, "bias": softmax, "activation": activation}
        for kind in (LightweightConv1d, DynamicConv1d):
            layer = filled(kind(channels, kernel, heads, "causal", **forms), dtype)
            x = sequence(layout, 2, 75, dtype, channels)
            s, expected = omniconv.streaming(layer), whole(layer, x)
            for sizes in ([3, 4, 1, 2, 65], [1] * 75, [40, 1, 34], [17, 0, 16, 42]):
                s.reset()
                y = torch.cat([s(piece) for piece in x.split(sizes, TIME[layout])], TIME[layout])
                if s.exact:
                    assert torch.equal(y, expected), (kind, channels, kernel, sizes)
                else:
                    torch.testing.assert_close(y, expected)
            assert s.exact is (find(kind.technique).engine is not None)


# the module stays the user's


def test_the_module_is_used_as_it_is():
    module = filled(Residual(DepthwiseConv1d(CHANNELS, 3, padding="causal")))
    before = copy.deepcopy(module.state_dict())
    seen = []
    handle = module.body.register_forward_hook(lambda m, args, y: seen.append((args[0].shape[2], y.shape[2])))
    module.body.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs), with_kwargs=True)
    hooks = dict(module.body._forward_hooks)
    s, x = omniconv.streaming(module), sequence("NCT", 2, 10)
    assert torch.equal(torch.cat([s(x[..., :4]), s(x[..., 4:])], 2), whole(module, x))
    assert seen == [(4, 4), (6, 6), (10, 10)]
    assert dict(module.body._forward_hooks) == hooks
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    handle.remove()
    s.reset()
    module.body.weight.data.mul_(2)
    assert torch.equal(s(x), whole(module, x))
    module.body.weight = nn.Parameter(torch.ones_like(module.body.weight))
    s.reset()
    assert torch.equal(s(x), whole(module, x))


def test_hooks_may_change_what_goes_in_and_comes_out():
    module = filled(DepthwiseConv1d(CHANNELS, 3, padding="causal"))
    module.register_forward_pre_hook(lambda m, args: args[0] * 2)
    module.register_forward_hook(lambda m, args, kwargs, y: -y, with_kwargs=True)
    assert_streams(module, sequence("NCT", 2, 30), random.Random(0))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_reparametrised_weights():
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        module = nn.Sequential(norm(DepthwiseConv1d(CHANNELS, 3, padding="causal")), nn.ReLU())
        filled(module)
        assert_streams(module, sequence("NCT", 2, 30), random.Random(0))


def test_a_module_that_changes_is_refused_and_the_state_kept():
    module = filled(nn.Sequential(DepthwiseConv1d(CHANNELS, 3, padding="causal"), nn.Dropout()))
    s, x = omniconv.streaming(module), sequence("NCT", 2, 10)
    first = s(x[..., :4])
    module[1].train()
    with pytest.raises(ValueError, match=r"streaming: '1' \(Dropout\): the module must be in evaluation mode, got training mode"):
        s(x[..., 4:])
    module.eval()
    assert torch.equal(torch.cat([first, s(x[..., 4:])], 2), whole(module, x))
    module[1] = nn.ReLU()
    with pytest.raises(ValueError, match=r"the module \(Sequential\): its children must be those"):
        s(x)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_no_gradient_is_recorded_in_any_mode(context):
    module, x = filled(DepthwiseConv1d(CHANNELS, 3, padding="causal")), sequence("NCT", 2, 10).requires_grad_()
    s = omniconv.streaming(module)
    with context():
        first = s(x[..., :4])
        s.reset_rows([])
    y = s(x[..., 4:])
    assert not first.requires_grad
    assert not y.requires_grad
    assert torch.equal(torch.cat([first, y], 2), whole(module, x))


def test_autocast():
    module, x = filled(nn.Sequential(DepthwiseConv1d(CHANNELS, 3, 2, "causal"), nn.ReLU())), sequence("NCT", 2, 20)
    s = omniconv.streaming(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.cat([s(x[..., t : t + 1]) for t in range(20)], 2)
        assert s(x[..., :0]).dtype == y.dtype == torch.bfloat16
        assert torch.equal(y, whole(module, x))


def test_without_the_kernels_equality_is_under_the_bound_and_said_so():
    module = filled(nn.Sequential(DepthwiseConv1d(CHANNELS, 3, padding="causal"), nn.ReLU()))
    s = omniconv.streaming(module)
    assert s.exact
    with settings.composite_only():
        assert s.inexact == {"0": "composite paths were asked for"}
        assert_streams(module, sequence("NCT", 2, 40), random.Random(0), exact=False)
    assert s.exact


def test_curved_activations_in_float64_are_torchs():
    module = filled(DepthwiseConv1d(CHANNELS, 3, padding="causal", activation="silu"), torch.float64)
    s = assert_streams(module, sequence("NCT", 2, 40, torch.float64), random.Random(0), exact=False)
    assert "silu" in s.inexact[""]


# state


@pytest.fixture
def stack():
    body = nn.Sequential(DepthwiseConv1d(CHANNELS, 3, padding="causal", dilation=2), nn.ReLU())
    return filled(nn.Sequential(Residual(body), DepthwiseConv1d(CHANNELS, 4, padding="causal")))


def test_state_is_a_snapshot(stack):
    x = sequence("NCT", 3, 30)
    s = omniconv.streaming(stack)
    assert s.state() == {"layout": "NCT", "rows": None, "dtype": None, "past": {}, "phase": {}}
    s(x[..., :7])
    state = s.state()
    assert (state["rows"], state["dtype"]) == (3, torch.float32)
    assert {name: past.shape[2] for name, past in state["past"].items()} == {"0.body.0": 4, "1": 3}
    for past in s.state()["past"].values():
        past.zero_()
    copies = [copy.deepcopy(state), {**state, "past": {k: v.clone() for k, v in state["past"].items()}}]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=True))
    expected = s(x[..., 7:])
    assert torch.equal(expected, whole(stack, x)[..., 7:])
    for same in (state, *copies):
        s.load_state(same)
        assert torch.equal(s(x[..., 7:]), expected)
        fresh = omniconv.streaming(stack)
        fresh.load_state(same)
        for past in same["past"].values():
            past.zero_()
        assert torch.equal(fresh(x[..., 7:]), expected)


def test_an_empty_state_begins_anew(stack):
    x = sequence("NCT", 2, 9)
    s = omniconv.streaming(stack)
    empty = s.state()
    first = s(x)
    s.load_state(empty)
    assert torch.equal(s(x.double().float()), first)
    s.reset()
    assert torch.equal(s(x[:1]), first[:1])


@pytest.mark.parametrize("rows", [[1, 1, 0], [2], [], [2, 1, 0, 0, 1]])
def test_rows_are_reordered(stack, rows):
    x, later = sequence("NCT", 3, 11), sequence("NCT", len(rows), 9)
    s = omniconv.streaming(stack)
    s(x)
    s.reorder(torch.tensor(rows, dtype=torch.int64))
    expected = whole(stack, torch.cat([x[rows], later], 2))[..., 11:]
    assert torch.equal(s(later), expected)


@pytest.mark.parametrize("layout", TIME)
def test_rows_in_every_layout(layout):
    module = filled(LightweightConv1d(CHANNELS, 4, 3, "causal", layout=layout))
    x, later = sequence(layout, 3, 11), sequence(layout, 3, 9)
    batch, time = layout.index("N"), TIME[layout]
    s = omniconv.streaming(module)
    s(x)
    s.reorder([2, 0, 0])
    s.reset_rows([1])
    sources = x.index_select(batch, torch.tensor([2, 0, 0]))
    sources.narrow(batch, 1, 1).zero_()
    torch.testing.assert_close(s(later), whole(module, torch.cat([sources, later], time)).narrow(time, 11, 9))


def test_rows_begin_anew_and_are_replaced(stack):
    x, later = sequence("NCT", 4, 11), sequence("NCT", 4, 9)
    s, other = omniconv.streaming(stack), omniconv.streaming(stack)
    s(x)
    other(x[:2].flip(1))
    s.reset_rows([3])
    s.replace_rows((2, 0), other.state())
    y = s(later)
    assert torch.equal(y[3:], whole(stack, later[3:]))
    assert torch.equal(y[1:2], whole(stack, torch.cat([x, later], 2))[1:2, :, 11:])
    assert torch.equal(y[[2, 0]], whole(stack, torch.cat([x[:2].flip(1), later[[2, 0]]], 2))[..., 11:])


def test_the_state_of_some_rows(stack):
    x, later = sequence("NCT", 4, 11), sequence("NCT", 2, 9)
    s, other = omniconv.streaming(stack), omniconv.streaming(stack)
    s(x)
    other.load_state(s.state([3, 1]))
    assert torch.equal(other(later), whole(stack, torch.cat([x[[3, 1]], later], 2))[..., 11:])


def test_rows_between_two_outputs_of_a_stride_stay_in_step():
    module = filled(nn.Sequential(DepthwiseConv1d(CHANNELS, 3, 2, "causal")))
    s, other, x = omniconv.streaming(module), omniconv.streaming(module), sequence("NCT", 2, 4)
    s(x[..., :3])
    with pytest.raises(ValueError, match=r"streaming.reset_rows: the rows must be in step: 0 inputs .* of 2 of '0' \(Dep.*, got 1"):
        s.reset_rows([0])
    other(x[:1])
    with pytest.raises(ValueError, match=r"streaming.replace_rows: the rows must be in step"):
        s.replace_rows([0], other.state())
    s(x[..., 3:])
    s.reset_rows([0])
    s.replace_rows([1], other.state())
    assert torch.equal(s(x), torch.cat([whole(module, x[:1]), whole(module, torch.cat([x[:1], x[1:]], 2))[..., 2:]]))


def test_malformed_rows(stack):
    s, x = omniconv.streaming(stack), sequence("NCT", 2, 5)
    for act in (s.reorder, s.reset_rows, s.state):
        with pytest.raises(ValueError, match="got none before the first chunk"):
            act([0])
    s(x)
    for act in (s.reorder, s.reset_rows, s.state):
        for rows, error in (([2], ValueError), ([-1], ValueError), ([0.5], TypeError), ([True], TypeError), (1, TypeError)):
            with pytest.raises(error, match="streaming: rows must be"):
                act(rows)
        with pytest.raises(TypeError, match=r"int32 or int64, got torch.bool"):
            act(torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"replace_rows: rows must be distinct, got \[0, 0\]"):
        s.replace_rows([0, 0], s.state())
    with pytest.raises(ValueError, match=r"replace_rows: the state must have \(rows, dtype, device\) \(1, torch.float32"):
        s.replace_rows([0], s.state())


def test_malformed_states(stack):
    s, x = omniconv.streaming(stack), sequence("NCT", 2, 5)
    y = s(x)
    good = s.state()
    bad = [
        (None, TypeError, "with layout, rows, dtype, past, phase, got NoneType"),
        ({"past": {}}, TypeError, "got dict of 'past'"),
        (good | {"layout": "NTC"}, ValueError, "the layout must be 'NCT', got 'NTC'"),
        (good | {"dtype": "float32"}, TypeError, "dtype one of torch's"),
        (good | {"past": {"1": good["past"]["1"]}}, ValueError, r"must be of '0.body.0', '1', got '1'"),
        (good | {"rows": 3}, ValueError, r"the past of '0.body.0' \(DepthwiseConv1d\) must have the sizes"),
        (good | {"past": good["past"] | {"1": torch.zeros(2, CHANNELS, 2)}}, ValueError, "the past of '1'"),
        (good | {"past": good["past"] | {"1": torch.zeros(2, CHANNELS + 1, 3)}}, ValueError, "the past of '1'"),
        (good | {"past": good["past"] | {"1": [0.0]}}, TypeError, "got list, 0"),
        (good | {"phase": good["phase"] | {"1": 1}}, ValueError, "the phase of '1'"),
    ]
    for state, error, message in bad:
        with pytest.raises(error, match=f"streaming.load_state: .*{message}"):
            s.load_state(state)
    expected = whole(stack, torch.cat([x, x], 2))[..., 5:]
    assert torch.equal(s(x), expected)
    assert torch.equal(y, whole(stack, x))


def test_memory_stays_the_same():
    module = filled(nn.Sequential(*(DepthwiseConv1d(4, 4, padding="causal", dilation=2**i) for i in range(3))))
    s, rng = omniconv.streaming(module), random.Random(0)
    x = sequence("NCT", 1, 400, channels=4)

    def held():
        return sum(h.past.untyped_storage().nbytes() for h in s._held.values())

    s(x)
    before = held()
    assert before == 4 * 4 * 3 * (1 + 2 + 4)
    for _ in range(10_000):
        s(x[..., : rng.choice([0, 1, 1, 1, 2, 3, 50])])
        assert held() == before


# refusals


class Unknown(nn.Module):
    def forward(self, x):
        return x


class Overridden(Residual):
    def forward(self, x):
        return x - self.body(x)


class OverriddenLayer(DepthwiseConv1d):
    def forward(self, input):
        return super().forward(input).flip(2)


class OverriddenSequence(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x


C = CHANNELS
REFUSED = [
    (DepthwiseConv1d(C, 3, padding="same"), ValueError, "which is 2 before and 0 after, got 'same': 1 and 1"),
    (DepthwiseConv1d(C, 3, padding=((2, 1),)), ValueError, "padding must be 'causal'"),
    (DepthwiseConv1d(C, 3), ValueError, "padding must be 'causal'"),
    (DepthwiseConv1d(C, 3, 2, "same_minimal"), ValueError, "pads must be known before the length is"),
    (DepthwiseConv1d(C, 3, padding="causal", padding_mode="reflect"), ValueError, "padding_mode must be 'zeros', got 'reflect'"),
    (DepthwiseConv2d(C, 3), ValueError, "must have one spatial axis, got 2"),
    (LightweightConv1d(C, 3, 3), ValueError, "padding must be 'causal'"),
    (DynamicConv1d(C, 3, 3), ValueError, "padding must be 'causal'"),
    (DynamicConv1d(C, 3, 3, "causal", context="mean"), ValueError, "context must be 'position', got 'mean'"),
    (DepthwiseSeparableConv1d(C, C, 3, padding=1), ValueError, "padding must be 'causal'"),
    (Conv1d(C, C, 3, padding="causal"), ValueError, "must not depend on the length, got a standard layer"),
    (ConvTranspose1d(C, C, 3, padding="causal"), ValueError, "must not depend on the length, got a transposed layer"),
    (nn.Conv1d(C, C, 1), ValueError, "must not depend on the length, got a dense convolution of torch"),
    (nn.GroupNorm(2, C), ValueError, "a normalisation over time"),
    (nn.InstanceNorm1d(C), ValueError, "a normalisation over time"),
    (nn.BatchNorm1d(C, track_running_stats=False), ValueError, "running statistics must be kept"),
    (nn.LayerNorm((C, 5)), ValueError, "normalized_shape must be the channels alone"),
    (nn.GLU(0), ValueError, "dim must be the channels' axis"),
    (nn.LSTM(C, C), TypeError, "must be known, or say how it streams"),
    (nn.ModuleList([nn.ReLU()]), TypeError, "must be known, or say how it streams"),
    (Unknown(), TypeError, "must be known, or say how it streams"),
    (Overridden(nn.ReLU()), TypeError, "must be known, or say how it streams"),
    (OverriddenSequence(nn.ReLU()), TypeError, "must be known, or say how it streams"),
    (OverriddenLayer(C, 3, padding="causal"), TypeError, "must have the layer's own forward"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "error", "message"), REFUSED, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None
)
def test_what_cannot_stream_is_refused_by_its_name(module, error, message):
    outer = nn.Sequential(nn.ReLU(), Residual(nn.Sequential(module))).eval()
    with pytest.raises(error, match=rf"^streaming: '1\.body\.0' \({type(module).__name__}\): .*{message}"):
        omniconv.streaming(outer)
    with pytest.raises(error, match=rf"^streaming: the module \({type(module).__name__}\): "):
        omniconv.streaming(module.eval())


def test_a_forward_of_an_instance_is_refused():
    layer = filled(DepthwiseConv1d(C, 3, padding="causal"))
    layer.forward = lambda x: x
    with pytest.raises((TypeError, ValueError), match="streaming: the module"):
        omniconv.streaming(layer)


def test_training_mode_is_refused_by_name():
    module = nn.Sequential(Residual(nn.Sequential(nn.ReLU(), nn.Dropout()))).eval()
    module[0].body[1].train()
    with pytest.raises(ValueError, match=r"'0.body.1' \(Dropout\): the module must be in evaluation mode, got training mode"):
        omniconv.streaming(module)


def test_layouts_that_do_not_agree_are_refused_by_name():
    stack = nn.Sequential(DepthwiseConv1d(C, 3, padding="causal"), nn.ReLU(), LightweightConv1d(C, 3, 3, "causal", layout="NTC"))
    with pytest.raises(
        ValueError, match=r"'2' \(LightweightConv1d\): the layout must be NCT, as '0' \(DepthwiseConv1d\) has it, got NTC"
    ):
        omniconv.streaming(stack.eval())
    with pytest.raises(ValueError, match=r"the layout must be TNC, as the argument layout has it, got NCT"):
        omniconv.streaming(stack[0], layout="TNC")
    with pytest.raises(ValueError, match="layout must be None or one of NCT, NTC, TNC, got 'NHWC'"):
        omniconv.streaming(stack[0], layout="NHWC")


def test_declarations_are_checked():
    module = Gated(nn.ReLU(), nn.ReLU()).eval()
    module.stream_children = ("path",)
    with pytest.raises(ValueError, match="must name children, one of paths, loss_head, got 'path'"):
        omniconv.streaming(module)
    module = Inside(nn.ReLU()).eval()
    module.stream_layouts = {"body": "CNT"}
    with pytest.raises(ValueError, match="the layout of 'body' in stream_layouts must be one of NCT, NTC, TNC, got 'CNT'"):
        omniconv.streaming(module)
    shared = nn.ReLU()
    with pytest.raises(ValueError, match=r"every child must stand at one place, got one module at 'paths.0' .* and 'paths.1'"):
        omniconv.streaming(Gated(shared, shared).eval())


def test_every_child_that_looks_back_is_stepped_once_a_chunk():
    class Wrong(Residual):
        def stream(self, x, step):
            return self.way(x, step)

    module = Wrong(filled(DepthwiseConv1d(C, 3, padding="causal"))).eval()
    s, x = omniconv.streaming(module), sequence("NCT", 1, 4)
    for way, error in (
        (lambda x, step: x, "must be stepped once a chunk, got none"),
        (lambda x, step: step(module.body, step(module.body, x)), "must be stepped once a chunk, got twice"),
        (lambda x, step: step(nn.ReLU(), x), "must step modules that are its children, got ReLU"),
    ):
        module.way = way
        with pytest.raises(ValueError, match=f"streaming: .*{error}"):
            s(x)
    module.way = lambda x, step: step(module.body, x)
    assert torch.equal(s(x), whole(module.body, x))


def test_malformed_chunks(stack):
    s, x = omniconv.streaming(stack), sequence("NCT", 2, 5)
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got int"):
        omniconv.streaming(1)
    with pytest.raises(TypeError, match="the chunk must be a Tensor, got list"):
        s([1.0])
    with pytest.raises(TypeError, match=r"the chunk must be float32, .* got torch.int64"):
        s(x.long())
    with pytest.raises(ValueError, match=r"the chunk must have 3 axes, N, C, T, got shape \(18, 5\)"):
        s(x[0])
    with pytest.raises(ValueError, match="padding_mask must be None"):
        s(x, torch.zeros(2, 5, dtype=torch.bool))
    first = s(x)
    for wrong, message in (
        (x[:1], "the rows of the first, 2; .* got 1"),
        (x.double(), "the dtype of the first, torch.float32; .* got torch.float64"),
        (x.to("meta"), "the device of the first, cpu; .* got meta"),
        (
            x[:, :5],
            r"'0.body.0' \(DepthwiseConv1d\): the input must be as its past, .* got .* of shape \(2, 5, 5\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            s(wrong)
    assert torch.equal(torch.cat([first, s(x)], 2), whole(stack, torch.cat([x, x], 2)))


def test_a_failure_midway_leaves_the_state_alone():
    class Fragile(nn.Module):
        def forward(self, x):
            return x

        def stream(self, x, step):
            if self.broken:
                raise RuntimeError("broken")
            return x

    fragile = Fragile()
    module = filled(nn.Sequential(DepthwiseConv1d(C, 3, padding="causal"), fragile))
    s, x = omniconv.streaming(module), sequence("NCT", 2, 10)
    fragile.broken = False
    first = s(x[..., :4])
    fragile.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        s(x)
    fragile.broken = False
    assert torch.equal(torch.cat([first, s(x[..., 4:])], 2), whole(module, x))


def test_nothing_at_all():
    module = filled(nn.Sequential(DepthwiseConv1d(C, 3, 2, "causal", multiplier=2), nn.ReLU()))
    s = omniconv.streaming(module)
    assert s(sequence("NCT", 2, 0)).shape == (2, 2 * C, 0)
    assert s(sequence("NCT", 2, 1)).shape == (2, 2 * C, 1)
    assert s(sequence("NCT", 2, 1)).shape == (2, 2 * C, 0)
    s.reset()
    assert s(sequence("NCT", 0, 4)).shape == (0, 2 * C, 2)
    assert omniconv.streaming(nn.Sequential().eval())(sequence("NCT", 2, 3)).shape == (2, C, 3)
    assert "layout='NCT', exact=True, 0 rows" in repr(s)
