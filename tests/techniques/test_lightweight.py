import math

import pytest
import torch
import torch.nn.functional as F

from omniconv.functional import depthwise_conv1d, lightweight_conv1d
from omniconv.nn import LightweightConv1d
from omniconv.ops.sequence import softmax_error
from omniconv.techniques import find, parse
from omniconv.techniques.lightweight import reference

LAYOUTS = {"NCT": (0, 1, 2), "NTC": (0, 2, 1), "TNC": (2, 0, 1)}
MODES = ("zeros", "reflect", "replicate", "circular")


def paper(x, weight, bias=None):
    """Wu et al. 2019, sections 2 and 3, counting from 1: the sum over j = 1 … k at position t + j − ⌈(k + 1)/2⌉, for odd k."""
    (channels, length), (heads, k) = x.shape[1:], weight.shape
    normal = weight.exp() / weight.exp().sum(1, keepdim=True)
    y = torch.zeros_like(x)
    for c in range(1, channels + 1):
        head = math.ceil(c * heads / channels)
        for t in range(1, length + 1):
            for j in range(1, k + 1):
                position = t + j - math.ceil((k + 1) / 2)
                if 1 <= position <= length:
                    y[:, c - 1, t - 1] += normal[head - 1, j - 1] * x[:, c - 1, position - 1]
    return y if bias is None else y + bias[:, None]


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("channels", "heads", "k", "length"),
    [(6, 3, 3, 7), (4, 1, 5, 6), (4, 4, 3, 5), (4, 2, 1, 5), (4, 2, 7, 3), (4, 2, 5, 1)],
    ids=["heads of two", "one head", "a head a channel", "one tap", "kernel larger than the input", "one position"],
)
def test_is_the_papers_definition(channels, heads, k, length):
    x, w, b = double(2, channels, length), double(heads, k), double(channels)
    expected = paper(x, w, b)
    torch.testing.assert_close(reference(x, w, b), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lightweight_conv1d(x, w, b), expected, rtol=1e-12, atol=1e-12)


def test_six_channels_and_three_heads_pair_as_01_23_45():
    w = torch.tensor([[1.0], [2.0], [3.0]])
    y = lightweight_conv1d(torch.ones(1, 6, 1), w, softmax=False)
    assert y.flatten().tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("k", "dilation"), [(2, 1), (4, 1), (4, 3), (5, 2)])
def test_same_looks_floor_of_half_the_window_back(k, dilation):
    x, w = double(1, 2, 16), double(1, k)
    before = dilation * (k - 1) // 2
    pads = (before, dilation * (k - 1) - before)
    expected = F.conv1d(F.pad(x, pads), w.softmax(1).expand(2, 1, k), dilation=dilation, groups=2)
    torch.testing.assert_close(lightweight_conv1d(x, w, dilation=dilation), expected)
    torch.testing.assert_close(lightweight_conv1d(x, w, padding="same_minimal", dilation=dilation), expected)
    torch.testing.assert_close(lightweight_conv1d(x, w, padding=(pads,), dilation=dilation), expected)


def test_kernels_are_averages():
    x = torch.full((1, 4, 9), 3.0, dtype=torch.float64)
    y = lightweight_conv1d(x, 4 * double(2, 5))
    torch.testing.assert_close(y[..., 2:-2], x[..., 2:-2], rtol=1e-14, atol=0)
    assert (y[..., 0] < 3).all()
    for mode in MODES[1:]:
        torch.testing.assert_close(lightweight_conv1d(x, 4 * double(2, 5), padding_mode=mode), x, rtol=1e-14, atol=0)


def test_without_softmax_and_with_a_head_a_channel_it_is_depthwise():
    x, w, b = double(2, 4, 9), double(4, 3), double(4)
    for padding in ("same", "valid", "causal", 2, ((0, 3),)):
        for mode in MODES:
            ours = lightweight_conv1d(x, w, b, padding, dilation=2, softmax=False, padding_mode=mode)
            theirs = depthwise_conv1d(x, w.unsqueeze(1), b, padding=padding, dilation=2, padding_mode=mode)
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["same", "valid", "causal", ((2, 1),)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout, padding, mode):
    order = LAYOUTS[layout]
    x, w, b, mask = double(2, 6, 7), double(3, 4), double(6), torch.rand(2, 7) < 0.3
    settings = {"padding": padding, "padding_mode": mode}
    expected = lightweight_conv1d(x, w, b, padding_mask=mask, **settings).permute(order)
    y = lightweight_conv1d(x.permute(order), w, b, padding_mask=mask, layout=layout, **settings)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y = reference(x.permute(order), w, b, padding_mask=mask, layout=layout, **settings)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    sample = (x[0] if layout == "NCT" else x[0].t(), w, b)
    one = lightweight_conv1d(*sample, padding_mask=mask[0], layout=layout, **settings)
    torch.testing.assert_close(one, expected.select(order.index(0), 0))


def test_padding_mask_zeroes_the_input():
    x, w = double(2, 4, 6), double(2, 3)
    mask = torch.tensor([[False] * 4 + [True] * 2, [True] + [False] * 5])
    expected = lightweight_conv1d(x * ~mask[:, None], w)
    x[mask[:, None].expand_as(x)] = math.nan  # whatever padding holds, it must not come through
    torch.testing.assert_close(lightweight_conv1d(x, w, padding_mask=mask), expected)
    layer = LightweightConv1d(4, 3, 2).double()
    torch.testing.assert_close(layer(x, mask), lightweight_conv1d(x, layer.weight, padding_mask=mask))


@pytest.mark.parametrize("dilation", [1, 2])
def test_causal_sees_no_future(dilation):
    x = double(1, 2, 9).requires_grad_()
    y = lightweight_conv1d(x, double(1, 3), padding="causal", dilation=dilation)
    for t in range(9):
        (grad,) = torch.autograd.grad(y[0, :, t].sum(), x, retain_graph=True)
        seen = grad[0, 0].nonzero().flatten().tolist()
        assert seen == [p for p in (t - 2 * dilation, t - dilation, t) if p >= 0]


def test_weight_dropout_drops_normalised_weights_and_scales_the_rest():
    x, w = torch.ones(1, 1, 400), torch.zeros(1, 400)
    y = lightweight_conv1d(x, w, padding="valid", weight_dropout=0.25, training=True)
    kept = y.item() * 400 * 0.75
    assert abs(kept - round(kept)) < 1e-2
    assert 250 < kept < 350  # 300 are expected, 8.7 is the standard deviation
    assert torch.equal(lightweight_conv1d(x, w, weight_dropout=0.25), lightweight_conv1d(x, w))
    assert lightweight_conv1d(x, w, weight_dropout=1.0, training=True).abs().sum() == 0


def test_layer_drops_weights_in_training_only():
    layer, x = LightweightConv1d(4, 31, 2, weight_dropout=0.5), torch.randn(1, 4, 50)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_half_types_are_normalised_in_float32():
    x, w = torch.ones(1, 1, 64), torch.zeros(1, 64) + torch.arange(64) % 2 * 0.01
    for dtype in (torch.bfloat16, torch.float16):
        assert lightweight_conv1d(x.to(dtype), w.to(dtype), padding="valid").item() == 1


def test_extreme_logits_stay_finite():
    w = torch.tensor([[3e38, -3e38, 0.0], [-1e4, -1e4, -1e4]])
    y = lightweight_conv1d(torch.arange(1.0, 4.0).repeat(1, 2, 1), w, padding="valid")
    assert y.flatten().tolist() == [1, 2]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 60.0, 1e5])
@pytest.mark.parametrize("k", [1, 2, 31])
def test_softmax_error_holds_and_is_not_idle(k, scale):
    logits = torch.randn(500, k) * scale
    error = (logits.softmax(1).double() - logits.double().softmax(1)).abs()
    allowed = softmax_error(logits.double(), 1, 2.0**-24)
    assert (error <= allowed).all()
    assert k == 1 or scale > 100 or (error / allowed).max() > 0.05


def test_state_dict_and_first_weights_are_fairseqs():
    torch.manual_seed(3)
    layer = LightweightConv1d(8, 5, 4, bias=True)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {"bias": (8,), "weight": (4, 5)}
    torch.manual_seed(3)
    torch.testing.assert_close(layer.weight.data.unsqueeze(1), torch.nn.init.xavier_uniform_(torch.empty(4, 1, 5)))
    assert layer.bias.abs().sum() == 0
    assert LightweightConv1d(8, 5, 4).bias is None


def test_cost_is_the_papers():
    technique, problem = parse("lightweight1d n8 c512 i512 k31 h16 psame")
    cost = technique.cost(problem, bias=False)
    assert cost.params == 16 * 31
    assert cost.macs_dense == 8 * 512 * 512 * 31
    assert cost.flops == 2 * cost.macs_dense + 4 * 16 * 31  # the softmax, once for the batch
    assert cost.receptive_field == (31,)
    assert technique.cost(parse("lightweight1d c6 i5 k3")[1]).params == 6 * 3 + 6  # heads default to channels


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("standard1d c64-96 i20 k5 p2 g4 s2", "lightweight1d n1 c64 i20 k5 psame h16"),
        ("standard1d n2 c12 i20 k4 pcausal d2", "lightweight1d n2 c12 i20 k4 pcausal d2 h4"),
        ("standard1d c7 i20 k3 dt:f64", "lightweight1d n1 c7 i20 k3 psame h1 dt:f64"),
    ],
)
def test_variant_has_up_to_16_heads(base, expected):
    variant = find("lightweight").variant_of(parse(base)[1])
    assert variant == parse(expected)[1]


def test_variant_of_an_image_is_refused():
    with pytest.raises(ValueError, match="lightweight: the rank must be one of 1, got 2"):
        find("lightweight").variant_of(parse("standard2d c8 i8 k3")[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peers_compute_the_same(layout):
    x, w, b, mask = torch.randn(2, 6, 9), torch.randn(3, 4), torch.randn(6), torch.rand(2, 9) < 0.3
    operands = {"input": x.permute(LAYOUTS[layout]), "weight": w, "bias": b, "padding": ((2, 3),), "dilation": 2}
    operands |= {"layout": layout, "padding_mask": mask, "activation": "relu", "padding_mode": "replicate"}
    for peer in find("lightweight").peers:
        torch.testing.assert_close(peer.run(**operands), lightweight_conv1d(**operands))


X, W = torch.ones(2, 6, 5), torch.ones(3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.ones(4, 3)}, ValueError, r"weight must be \(H, K\) with H heads that divide the input's 6 channels, got"),
        ({"weight": torch.ones(0, 3)}, ValueError, r"with H heads that divide"),
        ({"weight": torch.ones(3, 1, 3)}, ValueError, r"weight must be \(H, K\), got shape \(3, 1, 3\)"),
        ({"weight": torch.ones(3, 0)}, ValueError, "every kernel size must be at least 1"),
        ({"weight": W.double()}, ValueError, "weight must have the input's dtype"),
        ({"weight": None}, TypeError, "weight must be a Tensor, got None"),
        ({"weight": [[1.0]]}, TypeError, "weight must be a Tensor, got list"),
        ({"input": X.int()}, TypeError, "input must be float32"),
        ({"input": torch.ones(2, 3, 6, 5)}, ValueError, "input must have 3 axes"),
        ({"input": torch.ones(2, 0, 5)}, ValueError, "at least one channel"),
        ({"input": torch.ones(2, 6, 0)}, ValueError, "every spatial size must be at least 1"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \(6,\), got \(3,\)"),
        ({"layout": "NLC"}, ValueError, "layout must be one of NCT, NTC, TNC, got 'NLC'"),
        ({"layout": 3}, ValueError, "layout must be one of"),
        ({"layout": "NTC"}, ValueError, "divide the input's 5 channels"),
        ({"padding": "full"}, ValueError, "padding must be one of valid, same, same_minimal, causal"),
        ({"padding": -1}, ValueError, "padding must be at least 0"),
        ({"padding": 1.5}, TypeError, "padding must be an int"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1"),
        ({"padding": "valid", "dilation": 3}, ValueError, "the padded input must hold one window"),
        ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of"),
        ({"padding": 5, "padding_mode": "reflect"}, ValueError, "'reflect' needs pads below the size 5"),
        ({"padding_mask": torch.zeros(2, 5)}, TypeError, "padding_mask must be bool, True where"),
        ({"padding_mask": [[True]]}, TypeError, "padding_mask must be a Tensor, got list"),
        ({"padding_mask": torch.zeros(5, 2).bool()}, ValueError, r"padding_mask must have shape \(2, 5\), got shape \(5, 2\)"),
        ({"input": X[0], "padding_mask": torch.zeros(2, 5).bool()}, ValueError, r"padding_mask must have shape \(5,\)"),
        ({"weight_dropout": 1.5}, ValueError, "weight_dropout must be at least 0 and at most 1, got 1.5"),
        ({"weight_dropout": math.nan}, ValueError, "weight_dropout must be at least 0"),
        ({"weight_dropout": "0.1"}, TypeError, "weight_dropout must be a number, got '0.1'"),
        ({"activation": "tanh"}, ValueError, "activation must be None or one of"),
    ],
)
def test_malformed_calls_raise_by_name(arguments, error, message):
    with pytest.raises(error, match="^lightweight_conv1d: .*" + message):
        lightweight_conv1d(**({"input": X, "weight": W} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": 4}, ValueError, "heads must divide channels, got 4 and 6"),
        ({"heads": 0}, ValueError, "heads must be at least 1"),
        ({"channels": 6.0}, TypeError, "channels must be an int"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1"),
        ({"kernel_size": "3"}, TypeError, "kernel_size must be an int"),
        ({"layout": "CNT"}, ValueError, "layout must be one of"),
        ({"weight_dropout": -0.1}, ValueError, "weight_dropout must be at least 0"),
        ({"padding_mode": "wrap"}, ValueError, "padding_mode must be one of"),
        ({"padding": "full"}, ValueError, "padding must be one of"),
        ({"activation": "tanh"}, ValueError, "activation must be None or one of"),
    ],
)
def test_malformed_layers_raise_by_name(arguments, error, message):
    with pytest.raises(error, match="^LightweightConv1d: .*" + message):
        LightweightConv1d(**({"channels": 6, "kernel_size": 3, "heads": 3} | arguments))


def test_layer_refuses_another_number_of_channels():
    with pytest.raises(ValueError, match=r"LightweightConv1d: input must have 6 channels in layout NTC, got shape \(2, 5, 3\)"):
        LightweightConv1d(6, 3, 3, layout="NTC")(torch.ones(2, 5, 3))
    with pytest.raises(ValueError, match="LightweightConv1d: input must have 3 axes"):
        LightweightConv1d(6, 3, 3)(torch.ones(6))
    with pytest.raises(TypeError, match="LightweightConv1d: input must be a Tensor, got list"):
        LightweightConv1d(6, 3, 3)([1.0])
