"""Chunks of any sizes give the whole sequence's bits, and the module stays the user's."""

import copy
import random

import pytest
import torch
from streaming_networks import (
    CHANNELS,
    DTYPES,
    TIME,
    Difference,
    Gated,
    Inside,
    Residual,
    assert_streams,
    filled,
    sequence,
    streamed,
    whole,
)
from torch import nn

import omniconv
from omniconv import settings
from omniconv.nn import (
    DepthwiseConv1d,
    DepthwiseSeparableConv1d,
    DynamicConv1d,
    LightweightConv1d,
    PointwiseConv1d,
)
from omniconv.techniques import find

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
