"""fairseq is not installed here: its three modules and what their forward passes compute are written down from its source."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from omniconv.convert import InterleavedLightweightConv1d, from_fairseq, state_from_fairseq, state_to_fairseq
from omniconv.nn import DynamicConv1d, LightweightConv1d


class Theirs(nn.Module):
    """The attributes of fairseq's modules."""

    def __init__(self, input_size, kernel_size, num_heads, weight_softmax=True):
        super().__init__()
        self.input_size, self.kernel_size, self.num_heads = input_size, kernel_size, num_heads
        self.weight_softmax = weight_softmax

    def normal(self, weight):
        return F.softmax(weight, dim=-1) if self.weight_softmax else weight


class BatchFirst(Theirs):
    """LightweightConv1d: C/H channels are folded into the batch, which leaves the H fastest ones."""

    def __init__(self, *sizes, padding=0, bias=False, weight_dropout=0.0, **settings):
        super().__init__(*sizes, **settings)
        self.padding, self.weight_dropout = padding, weight_dropout
        self.weight = nn.Parameter(torch.randn(self.num_heads, 1, self.kernel_size))
        self.bias = nn.Parameter(torch.randn(self.input_size)) if bias else None

    def forward(self, x):
        batch, channels, length = x.shape
        folded = x.reshape(-1, self.num_heads, length)
        y = F.conv1d(folded, self.normal(self.weight), padding=self.padding, groups=self.num_heads)
        y = y.view(batch, channels, -1)
        return y if self.bias is None else y + self.bias.view(1, -1, 1)


class TimeFirst(Theirs):
    """LightweightConv1dTBC: a band matrix (T, T) for every sample and head."""

    def __init__(self, *sizes, padding_l=None, bias=False, weight_dropout=0.0, **settings):
        super().__init__(*sizes, **settings)
        self.padding_l, self.weight_dropout = padding_l, weight_dropout
        self.weight = nn.Parameter(torch.randn(self.num_heads, 1, self.kernel_size))
        self.bias = nn.Parameter(torch.randn(self.input_size)) if bias else None

    def forward(self, x):
        length, batch, _ = x.shape
        weight = self.normal(self.weight).view(1, 1, self.num_heads, self.kernel_size)
        y = banded(x, weight.expand(length, batch, -1, -1), self.padding_l)
        return y if self.bias is None else y + self.bias


class Dynamic(Theirs):
    """DynamicConv1dTBC: the same with weights that a linear layer makes of every position."""

    def __init__(self, *sizes, padding_l=None, bias=False, conv_bias=False, rate=0.0, features=None, query=None, **settings):
        super().__init__(*sizes, **settings)
        self.padding_l, self.renorm_padding = padding_l, False
        self.weight_dropout_module = nn.Dropout(rate)
        self.weight_linear = nn.Linear(query or self.input_size, features or self.num_heads * self.kernel_size, bias=bias)
        self.conv_bias = nn.Parameter(torch.randn(self.input_size)) if conv_bias else None

    def forward(self, x):
        length, batch, _ = x.shape
        weight = self.weight_linear(x).view(length, batch, self.num_heads, self.kernel_size)
        y = banded(x, self.normal(weight), self.padding_l)
        return y if self.conv_bias is None else y + self.conv_bias


def banded(x, weight, padding_l):
    """x (T, B, C), weight (T, B, H, K): row t of the band holds the K weights from column t on; padding_l columns are cut."""
    length, batch, channels = x.shape
    heads, taps = weight.shape[2:]
    band = torch.zeros(batch * heads, length, length + taps - 1, dtype=x.dtype)
    for t in range(length):
        band[:, t, t : t + taps] = weight[t].reshape(batch * heads, taps)
    left = padding_l[0] if isinstance(padding_l, tuple) else padding_l
    y = torch.bmm(band.narrow(2, left, length), x.reshape(length, batch * heads, channels // heads).transpose(0, 1))
    return y.transpose(0, 1).reshape(length, batch, channels)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


SIZES = [(6, 3, 3), (6, 3, 2), (8, 5, 1), (4, 4, 4), (4, 1, 2)]


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("sizes", SIZES)
def test_batch_first_lightweight(sizes, padding, softmax):
    theirs = BatchFirst(*sizes, padding=padding, bias=True, weight_softmax=softmax).double()
    ours, x = from_fairseq(theirs), double(2, sizes[0], 9)
    close(ours(x), theirs(x))
    close(ours(x[0]), theirs(x[:1])[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("module", [TimeFirst, Dynamic])
def test_time_first(module, sizes, length, bias):
    for padding_l in {sizes[1] - 1, (sizes[1] - 1) // 2, 0}:
        settings = {"bias": bias} | ({"conv_bias": not bias} if module is Dynamic else {})
        theirs = module(*sizes, padding_l=padding_l, **settings).double()
        ours, x = from_fairseq(theirs), double(length, 2, sizes[0])
        close(ours(x), theirs(x))


def test_even_kernels_of_fairseqs_models_are_padded_as_same_is():
    theirs = TimeFirst(6, 4, 3, padding_l=(1, 2)).double()
    ours, x = from_fairseq(theirs), double(7, 2, 6)
    close(ours(x), theirs(x))
    same = LightweightConv1d(6, 4, 3, "same", layout="TNC", dtype=torch.float64)
    same.load_state_dict(state_from_fairseq(theirs.state_dict()))
    close(same(x), theirs(x))


def test_the_two_lightweight_modules_order_heads_differently():
    weight = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    settings = {"weight_softmax": False}
    batch_first, time_first = BatchFirst(6, 1, 3, **settings), TimeFirst(6, 1, 3, padding_l=0, **settings)
    for theirs, heads in ((batch_first, [1, 2, 3, 1, 2, 3]), (time_first, [1, 1, 2, 2, 3, 3])):
        theirs.load_state_dict({"weight": weight})
        ones = torch.ones(1, 6, 1) if theirs is batch_first else torch.ones(1, 1, 6)
        assert theirs(ones).flatten().tolist() == from_fairseq(theirs)(ones).flatten().tolist() == heads


@pytest.mark.parametrize("module", [TimeFirst, Dynamic])
def test_masked_inputs_are_what_fairseqs_encoder_zeroes(module):
    theirs, mask = module(6, 3, 3, padding_l=1).double(), torch.rand(2, 7) < 0.4
    x = double(7, 2, 6)
    close(from_fairseq(theirs)(x, mask), theirs(x.masked_fill(mask.t()[:, :, None], 0)))


def test_settings_dtype_and_mode_come_along():
    theirs = TimeFirst(6, 3, 3, padding_l=2, weight_dropout=0.1, weight_softmax=False).double().eval()
    ours = from_fairseq(theirs)
    assert (type(ours), ours.layout, ours.padding, ours.weight_dropout) == (LightweightConv1d, "TNC", ((2, 0),), 0.1)
    assert not ours.softmax
    assert not ours.training
    assert ours.weight.dtype == torch.float64
    theirs = Dynamic(6, 3, 3, padding_l=1, rate=0.2)
    ours = from_fairseq(theirs)
    assert (type(ours), ours.weight_dropout, ours.softmax, ours.training) == (DynamicConv1d, 0.2, True, True)
    assert ours.projection.bias is None
    theirs.weight_linear.weight.data.zero_()
    assert ours.projection.weight.abs().sum() > 0  # a copy


@pytest.mark.parametrize(
    "theirs",
    [BatchFirst(6, 3, 2, bias=True), TimeFirst(6, 3, 2, padding_l=1), Dynamic(6, 3, 2, padding_l=2, bias=True, conv_bias=True)],
    ids=lambda module: type(module).__name__,
)
def test_weights_go_there_and_back(theirs):
    back = state_to_fairseq(from_fairseq(theirs).state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.pop(name), value)
    assert not back
    theirs.load_state_dict(state_to_fairseq(from_fairseq(theirs).state_dict()), strict=True)
    model = {f"decoder.conv.{name}": value for name, value in theirs.state_dict().items()} | {"decoder.norm.weight": torch.ones(6)}
    ours = state_from_fairseq(model, prefix="decoder.conv.")
    from_fairseq(theirs).load_state_dict(ours, strict=True)
    assert set(state_to_fairseq(ours, "decoder.conv.")) == set(model) - {"decoder.norm.weight"}


def test_the_cuda_layers_weight_has_two_axes():
    assert state_from_fairseq({"weight": torch.ones(2, 5)})["weight"].shape == (2, 5)


@pytest.mark.parametrize("softmax", [True, False])
def test_interleaved_layer_drops_weights_once_for_a_head(softmax):
    layer = InterleavedLightweightConv1d(6, 200, 2, weight_dropout=0.5, softmax=softmax)
    x = torch.ones(1, 6, 1).requires_grad_()
    y = layer(x).flatten()
    assert torch.equal(y[0::2], y[0].expand(3))
    assert torch.equal(y[1::2], y[1].expand(3))
    kernel = layer.operands(x)["weight"]
    assert 0.3 < (kernel == 0).float().mean() < 0.7
    normal = layer.weight.softmax(1) if softmax else layer.weight
    kept = kernel[:2] != 0
    torch.testing.assert_close(kernel[:2][kept], 2 * normal[kept])
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_gradients_reach_the_shared_weights():
    theirs = BatchFirst(6, 3, 3, padding=1).double()
    ours, x = from_fairseq(theirs), double(2, 6, 5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    close(ours.weight.grad.unsqueeze(1), theirs.weight.grad)


def renormalising():
    module = Dynamic(6, 3, 3, padding_l=2)
    module.renorm_padding = True
    return module


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.Conv1d(4, 4, 3), TypeError, "module must be fairseq's LightweightConv1d, LightweightConv1dTBC or .*, got Conv1d"),
        (nn.Identity(), TypeError, "got Identity"),
        (renormalising(), ValueError, "renorm_padding must be False"),
        (Dynamic(6, 3, 3, padding_l=2, features=6 + 9), ValueError, "in_proj must be False, .* = 9 features alone, got 15"),
        (Dynamic(6, 3, 3, padding_l=2, query=4), ValueError, "query_size must be input_size, .* got 4 and 6"),
        (TimeFirst(6, 3, 3), ValueError, "padding_l must lie between 0 and kernel_size − 1 = 2, got None"),
        (TimeFirst(6, 3, 3, padding_l=3), ValueError, "padding_l must lie between .*, got 3"),
        (TimeFirst(6, 4, 3, padding_l=(1, 1)), ValueError, r"padding_l must lie between .*, got \(1, 1\)"),
    ],
)
def test_what_has_no_counterpart_raises_by_name(module, error, message):
    with pytest.raises(error, match="^from_fairseq: .*" + message):
        from_fairseq(module)


@pytest.mark.parametrize(
    ("convert", "state", "message"),
    [
        (state_from_fairseq, {}, "the entries must be weight and at most weight, bias, got none"),
        (state_from_fairseq, {"weight": torch.ones(2, 1, 3), "version": torch.ones(1)}, "got weight, version"),
        (
            state_from_fairseq,
            {"weight_linear.weight": torch.ones(6, 4), "bias": torch.ones(4)},
            "the entries must be weight_linear",
        ),
        (state_from_fairseq, {"weight": torch.ones(2, 2, 3)}, r"weight must be \(H, 1, K\) or \(H, K\), got shape \(2, 2, 3\)"),
        (state_to_fairseq, {"bias": torch.ones(4)}, "the entries must be weight and at most weight, bias, got bias"),
        (
            state_to_fairseq,
            {"projection.weight": torch.ones(6, 4), "weight": torch.ones(4)},
            "the entries must be projection.weight",
        ),
    ],
)
def test_states_of_other_modules_raise_by_name(convert, state, message):
    with pytest.raises(ValueError, match=f"^{convert.__name__}: .*{message}"):
        convert(state)
