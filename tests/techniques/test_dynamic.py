import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omniconv.functional import dynamic_conv1d, lightweight_conv1d
from omniconv.nn import DynamicConv1d
from omniconv.techniques import find, parse
from omniconv.techniques.dynamic import reference
from omniconv.testing import assert_within_bound

LAYOUTS = {"NCT": (0, 1, 2), "NTC": (0, 2, 1), "TNC": (2, 0, 1)}
MODES = ("zeros", "reflect", "replicate", "circular")


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def paper(x, projection, bias, heads, k):
    """Wu et al. 2019, section 4, counting from 1: the kernel of position t is the softmax of f(X_t) = W·X_t + b, for odd k."""
    n, channels, length = x.shape
    y = torch.zeros_like(x)
    for t in range(1, length + 1):
        logits = (x[:, :, t - 1] @ projection.t() + bias).view(n, heads, k)
        normal = logits.exp() / logits.exp().sum(2, keepdim=True)
        for c in range(1, channels + 1):
            for j in range(1, k + 1):
                position = t + j - math.ceil((k + 1) / 2)
                if 1 <= position <= length:
                    y[:, c - 1, t - 1] += normal[:, math.ceil(c * heads / channels) - 1, j - 1] * x[:, c - 1, position - 1]
    return y


@pytest.mark.parametrize(
    ("channels", "heads", "k", "length"),
    [(6, 3, 3, 7), (4, 1, 5, 6), (4, 4, 3, 5), (4, 2, 1, 5), (4, 2, 7, 3), (4, 2, 5, 1)],
    ids=["heads of two", "one head", "a head a channel", "one tap", "kernel larger than the input", "one position"],
)
def test_is_the_papers_definition(channels, heads, k, length):
    layer, x = DynamicConv1d(channels, k, heads, dtype=torch.float64), double(2, channels, length)
    expected = paper(x, layer.projection.weight, layer.projection.bias, heads, k)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference(**layer.operands(x)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
@pytest.mark.parametrize("padding", ["same", "causal", "valid", ((0, 4),)])
def test_the_same_kernel_everywhere_is_lightweight(k, padding):
    x, w, b = double(2, 6, 9), double(3, k), double(6)
    expected = lightweight_conv1d(x, w, b, padding, dilation=2)
    for positions in (1, expected.shape[2]):
        kernels = w[None, :, :, None].expand(2, 3, k, positions)
        torch.testing.assert_close(dynamic_conv1d(x, kernels, b, padding, dilation=2), expected)


def test_one_kernel_a_sample_is_lightweight_of_that_sample():
    x, kernels = double(3, 4, 8), double(3, 2, 5, 1)
    expected = torch.cat([lightweight_conv1d(x[i : i + 1], kernels[i, :, :, 0]) for i in range(3)])
    torch.testing.assert_close(dynamic_conv1d(x, kernels), expected)


def test_six_channels_and_three_heads_pair_as_01_23_45():
    kernels = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    for layout, order in LAYOUTS.items():
        y = dynamic_conv1d(torch.ones(1, 6, 1).permute(order), kernels, softmax=False, layout=layout)
        assert y.flatten().tolist() == [1, 1, 2, 2, 3, 3]


def test_the_kernel_belongs_to_the_output_position():
    kernels = torch.zeros(1, 1, 3, 4)
    kernels[0, 0, 0, 1] = 1  # output 1 reads input 0, output 2 reads input 3
    kernels[0, 0, 2, 2] = 1
    y = dynamic_conv1d(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), kernels, softmax=False)
    assert y.flatten().tolist() == [0, 1, 4, 0]


def test_softmax_runs_over_the_taps_of_a_head():
    x = torch.full((1, 4, 9), 3.0, dtype=torch.float64)
    torch.testing.assert_close(dynamic_conv1d(x, 4 * double(1, 2, 5, 9))[..., 2:-2], x[..., 2:-2], rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["same", "valid", "causal", ((2, 1),)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout, padding, mode):
    order = LAYOUTS[layout]
    x, b, mask = double(2, 6, 7), double(6), torch.rand(2, 7) < 0.3
    length = lightweight_conv1d(x, double(3, 4), padding=padding, padding_mode=mode).shape[2]
    kernels, settings = double(2, 3, 4, length), {"padding": padding, "padding_mode": mode}
    expected = dynamic_conv1d(x, kernels, b, padding_mask=mask, **settings).permute(order)
    y = dynamic_conv1d(x.permute(order), kernels, b, padding_mask=mask, layout=layout, **settings)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y = reference(x.permute(order), kernels, b, padding_mask=mask, layout=layout, **settings)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    sample = (x[0] if layout == "NCT" else x[0].t(), kernels[0], b)
    one = dynamic_conv1d(*sample, padding_mask=mask[0], layout=layout, **settings)
    torch.testing.assert_close(one, expected.select(order.index(0), 0))


@pytest.mark.parametrize("context", ["position", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_of_every_layout_agree(layout, context):
    order, x, mask = LAYOUTS[layout], double(2, 6, 7), torch.rand(2, 7) < 0.3
    plain = DynamicConv1d(6, 4, 3, context=context, bias=True, dtype=torch.float64)
    layer = DynamicConv1d(6, 4, 3, context=context, bias=True, layout=layout, dtype=torch.float64)
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(x.permute(order)), plain(x).permute(order))
    expected = plain(x, mask)
    torch.testing.assert_close(layer(x.permute(order), padding_mask=mask), expected.permute(order))
    sample = x[0] if layout == "NCT" else x[0].t()
    torch.testing.assert_close(layer(sample, mask[0]), expected[0] if layout == "NCT" else expected[0].t())


def test_causal_layer_sees_no_future():
    layer = DynamicConv1d(2, 3, 1, "causal", dtype=torch.float64)
    x = double(1, 2, 8).requires_grad_()
    y = layer(x)
    for t in range(8):
        (grad,) = torch.autograd.grad(y[0, :, t].sum(), x, retain_graph=True)
        assert grad[0].abs().sum(0).nonzero().flatten().tolist() == list(range(max(t - 2, 0), t + 1))


def test_mean_context_is_the_mean_of_what_the_mask_leaves():
    layer, x = DynamicConv1d(4, 3, 2, context="mean", dtype=torch.float64), double(3, 4, 6)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1, 4:] = mask[2] = True
    x[1, :, 4:] = math.nan
    kernels = layer.operands(x, mask)["kernels"]
    assert kernels.shape == (3, 2, 3, 1)
    weight, bias = layer.projection.weight, layer.projection.bias
    means = torch.stack([x[0].mean(1), x[1, :, :4].mean(1), torch.zeros(4, dtype=torch.float64)])
    torch.testing.assert_close(kernels.flatten(1), means @ weight.t() + bias)
    y = layer(x, mask)
    torch.testing.assert_close(y[1, :, :4], layer(x[1, :, :4]))
    assert y[2].abs().sum() == 0


@pytest.mark.parametrize("context", ["position", "mean"])
def test_masked_positions_count_as_zeros_before_everything(context):
    layer, x = DynamicConv1d(4, 3, 2, dtype=torch.float64, context=context), double(2, 4, 6)
    mask = torch.rand(2, 6) < 0.4
    dirty = x.masked_fill(mask[:, None], math.nan)
    torch.testing.assert_close(layer(dirty, mask), layer(x, mask))
    if context == "position":
        torch.testing.assert_close(layer(dirty, mask), layer(x * ~mask[:, None]))


def test_weight_dropout_is_drawn_for_every_kernel_in_training_only():
    x, kernels = torch.ones(1, 1, 60), torch.zeros(1, 1, 4, 57)
    y = dynamic_conv1d(x, kernels, padding="valid", weight_dropout=0.5, training=True)
    assert set(y.flatten().tolist()) == {0.0, 0.5, 1.0, 1.5, 2.0}  # 0 to 4 of 4 weights of 1/4, scaled by 2
    assert 0.7 < y.mean() < 1.3
    layer, x = DynamicConv1d(4, 3, 2, weight_dropout=0.5), torch.randn(1, 4, 20)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_state_dict():
    layer = DynamicConv1d(8, 5, 4, bias=True)
    shapes = {name: tuple(p.shape) for name, p in layer.state_dict().items()}
    assert shapes == {"bias": (8,), "projection.weight": (20, 8), "projection.bias": (20,)}
    assert set(DynamicConv1d(8, 5, 4, projection_bias=False).state_dict()) == {"projection.weight"}
    assert layer.bias.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("context", ["position", "mean"])
def test_projection_is_a_pointwise_layer_within_its_bound(context, dtype):
    layer = DynamicConv1d(16, 5, 4, context=context, layout="NTC", dtype=dtype)
    seen = []
    layer.projection.register_forward_hook(lambda module, args, y: seen.append((module.operands(*args), y)))
    with torch.no_grad():
        y = layer(torch.randn(2, 9, 16).to(dtype))
        assert isinstance(layer.projection, nn.Linear)
        assert_within_bound(find(layer.projection.technique), *seen[0])
        assert y.dtype == dtype


def test_mean_context_sums_half_types_in_float32():
    layer = DynamicConv1d(1, 3, 1, context="mean", dtype=torch.float16)
    x = torch.full((1, 1, 4000), 100.0, dtype=torch.float16)  # the sum is beyond float16
    seen = []
    layer.projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].item()))
    layer(x)
    assert seen == [100.0]


def test_cost_is_the_papers():
    technique, problem = parse("dynamic1d n8 c512 i512 k31 h16 pcausal")
    cost = technique.cost(problem)
    assert cost.params == 512 * 16 * 31 + 16 * 31 + 512
    assert cost.macs_dense == 8 * 512 * 512 * (16 * 31 + 31)
    biases, softmax = 8 * 512 * (16 * 31 + 512), 8 * 512 * 4 * 16 * 31
    assert cost.flops == 2 * cost.macs_dense + biases + softmax
    assert cost.receptive_field == (31,)
    mean = technique.cost(problem, context="mean")
    assert mean.params == cost.params
    assert mean.macs_dense == 8 * (512 * 16 * 31 + 512 * 512 * 31)
    biases, softmax = 8 * (16 * 31 + 512 * 512), 8 * 4 * 16 * 31
    assert mean.flops == 2 * mean.macs_dense + biases + softmax + 8 * 512 * 512  # and the additions of the mean
    with pytest.raises(ValueError, match="dynamic: context must be one of position, mean, got 'max'"):
        technique.stages(problem, context="max")


@pytest.mark.parametrize(
    ("text", "context"),
    [
        ("dynamic1d c4 i9 k3 h2 pcausal d2", "position"),
        ("dynamic1d c4 i9 k4 h2 p1+2", "position"),
        ("dynamic1d c4 i9 k3 h2", "mean"),
    ],
)
def test_layer_of_a_problem_has_its_parameters(text, context):
    technique, problem = parse(text)
    layer = technique.layer(problem)
    assert layer.context == context
    assert sum(p.numel() for p in layer.parameters()) == technique.cost(problem).params
    assert layer(torch.ones(1, 4, 9)).shape == technique.output_shape(problem)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peers_compute_the_same(layout):
    x, b, mask = torch.randn(2, 6, 9), torch.randn(6), torch.rand(2, 9) < 0.3
    operands = {"input": x.permute(LAYOUTS[layout]), "bias": b, "padding": ((2, 3),), "dilation": 2}
    operands |= {"layout": layout, "padding_mask": mask, "activation": "relu", "padding_mode": "replicate"}
    for positions in (8, 1):
        kernels = torch.randn(2, 3, 4, positions)
        expected = dynamic_conv1d(**operands, kernels=kernels)
        for peer in find("dynamic").peers:
            if positions > 1 and peer.name.startswith(("torch depthwise", "torch folded")):
                with pytest.raises(ValueError, match="one kernel for all positions"):
                    peer.run(**operands, kernels=kernels)
            else:
                torch.testing.assert_close(peer.run(**operands, kernels=kernels), expected)


X, KERNELS = torch.ones(2, 6, 5), torch.ones(2, 3, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"kernels": torch.ones(2, 4, 3, 5)},
            ValueError,
            r"kernels must be \(N, H, K, Out\) with H heads that divide the input's 6",
        ),
        ({"kernels": torch.ones(3, 3, 5)}, ValueError, r"kernels must be \(N, H, K, Out\), got shape \(3, 3, 5\)"),
        ({"kernels": torch.ones(1, 3, 3, 5)}, ValueError, "kernels must have the input's 2 samples in axis 0, got shape"),
        ({"kernels": torch.ones(2, 3, 3, 4)}, ValueError, "kernels must have 5 positions, as the result has, or 1"),
        ({"padding": "valid"}, ValueError, "kernels must have 3 positions"),
        ({"input": X[0]}, ValueError, r"kernels must be \(H, K, Out\), got shape \(2, 3, 3, 5\)"),
        ({"kernels": torch.ones(2, 3, 0, 5)}, ValueError, "every kernel size must be at least 1"),
        ({"kernels": KERNELS.half()}, ValueError, "kernels must have the input's dtype"),
        ({"kernels": None}, TypeError, "kernels must be a Tensor, got None"),
        ({"input": X.long()}, TypeError, "input must be float32"),
        ({"input": torch.ones(6)}, ValueError, "input must have 3 axes"),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \(6,\)"),
        ({"layout": "BTC"}, ValueError, "layout must be one of NCT, NTC, TNC, got 'BTC'"),
        ({"padding": 1, "dilation": 9}, ValueError, "the padded input must hold one window"),
        ({"padding_mask": torch.zeros(2, 5)}, TypeError, "padding_mask must be bool"),
        ({"padding_mask": torch.zeros(2, 4).bool()}, ValueError, r"padding_mask must have shape \(2, 5\)"),
        ({"weight_dropout": 2}, ValueError, "weight_dropout must be at least 0 and at most 1, got 2"),
        ({"weight_dropout": True}, TypeError, "weight_dropout must be a number"),
        ({"activation": "tanh"}, ValueError, "activation must be None or one of"),
    ],
)
def test_malformed_calls_raise_by_name(arguments, error, message):
    with pytest.raises(error, match="^dynamic_conv1d: .*" + message):
        dynamic_conv1d(**({"input": X, "kernels": KERNELS} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": 4}, ValueError, "heads must divide channels, got 4 and 6"),
        ({"context": "max"}, ValueError, "context must be one of position, mean, got 'max'"),
        (
            {"padding": "valid"},
            ValueError,
            r"context 'position' needs pads of dilation·\(kernel_size − 1\) = 2 in all, got 'valid'",
        ),
        ({"padding": 1, "dilation": 2}, ValueError, "needs pads of .* = 4 in all, got 1"),
        ({"weight_dropout": None}, TypeError, "weight_dropout must be a number"),
    ],
)
def test_malformed_layers_raise_by_name(arguments, error, message):
    with pytest.raises(error, match="^DynamicConv1d: .*" + message):
        DynamicConv1d(**({"channels": 6, "kernel_size": 3, "heads": 3} | arguments))


def test_layer_refuses_what_is_not_its_input():
    layer = DynamicConv1d(6, 3, 3)
    with pytest.raises(ValueError, match=r"DynamicConv1d: input must have 6 channels in layout NCT, got shape \(2, 5, 6\)"):
        layer(torch.ones(2, 5, 6))
    with pytest.raises(TypeError, match="DynamicConv1d: padding_mask must be bool"):
        layer(torch.ones(2, 6, 5), torch.zeros(2, 5))


class AsWritten(nn.Module):
    """The example of the text that the library grew from; ``taps`` picks one tap of the kernel (B, G, K)."""

    def __init__(self, channels, kernel_size, groups, taps):
        super().__init__()
        self.channels, self.kernel_size, self.groups, self.taps = channels, kernel_size, groups, taps
        self.proj = nn.Linear(channels, groups * kernel_size)

    def forward(self, x):
        B, C, T = x.size()
        context = x.mean(dim=2)
        w = self.proj(context)
        w = w.view(B, self.groups, self.kernel_size)
        w = F.softmax(w, dim=-1)
        pad = self.kernel_size // 2
        x_pad = F.pad(x, (pad, pad), mode="reflect")
        x_grp = x_pad.view(B, self.groups, -1, T + 2 * pad)
        out = []
        for i in range(self.kernel_size):
            out.append(x_grp[:, :, :, i : i + T] * self.taps(w, i))
        return sum(out).view(B, C, T)


def as_printed(w, i):
    return w[:, :, i : i + 1]


def corrected(w, i):
    return w[:, :, i, None, None]


def of_the_text(theirs):
    ours = DynamicConv1d(theirs.channels, theirs.kernel_size, theirs.groups, context="mean", padding_mode="reflect")
    ours.projection.load_state_dict(theirs.proj.state_dict())
    return ours.to(theirs.proj.weight.dtype)


@pytest.mark.parametrize(("batch", "channels", "groups"), [(8, 64, 8), (2, 6, 3), (1, 16, 4), (3, 4, 4)])
def test_the_corrected_example_of_the_text_is_ours(batch, channels, groups):
    theirs = AsWritten(channels, 5, groups, corrected).double()
    x = double(batch, channels, 20)
    torch.testing.assert_close(of_the_text(theirs)(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("batch", "channels", "groups"), [(8, 64, 8), (1, 16, 4)], ids=["the text's own sizes", "one sample"])
def test_the_example_as_printed_is_silently_wrong_where_it_broadcasts(batch, channels, groups):
    theirs = AsWritten(channels, 5, groups, as_printed).double()
    x = double(batch, channels, 100)
    y = theirs(x)  # runs, and has the right shape
    assert y.shape == x.shape
    assert (y - of_the_text(theirs)(x)).abs().max() > 0.1
    # what it computes: head c % (C/G) of sample g for channel c of group g, whatever the sample
    w = theirs.proj(x.mean(2)).view(batch, groups, 5).softmax(2)
    mixed = w.expand(groups, -1, -1) if batch == 1 else w
    kernels = mixed.reshape(1, channels, 5, 1).expand(batch, -1, -1, -1)
    torch.testing.assert_close(dynamic_conv1d(x, kernels, softmax=False, padding_mode="reflect"), y)


@pytest.mark.parametrize(("batch", "channels", "groups"), [(4, 64, 8), (8, 32, 8), (2, 6, 3)])
def test_the_example_as_printed_raises_elsewhere(batch, channels, groups):
    with pytest.raises(RuntimeError, match="must match the size"):
        AsWritten(channels, 5, groups, as_printed)(torch.randn(batch, channels, 20))
