"""The grid reference is proved here: against torch, a sum written out by hand, and einsum over unfolded windows."""

import pytest
import torch
import torch.nn.functional as F

from omniconv import nn as onn
from omniconv.analysis.layers import formatted
from omniconv.engines import engine
from omniconv.functional import conv1d, conv2d, conv3d
from omniconv.techniques.standard import reference

TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 2), (3, 2, 2, 4), (1, 3, 3, 1), (2, 4, 1, 2)]
)
def test_reference_is_torchs_convolution(rank, stride, padding, dilation, groups):
    x, w, b = normal(2, 4, *(9, 8, 7)[:rank]), normal(8, 4 // groups, *(3, 2, 3)[:rank], seed=1), normal(8, seed=2)
    expected = TORCH[rank](x, w, b, stride, padding, dilation, groups)
    torch.testing.assert_close(reference(x, w, b, stride, padding, dilation, groups), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_reference_pads_like_torch(rank, mode):
    x, w = normal(1, 2, *(5, 4, 6)[:rank]), normal(3, 2, *(3, 3, 3)[:rank], seed=1)
    pads = ((2, 1), (0, 3), (1, 2))[:rank]
    flat = [p for pair in reversed(pads) for p in pair]
    expected = TORCH[rank](F.pad(x, flat, mode=mode), w)
    torch.testing.assert_close(reference(x, w, None, padding=pads, padding_mode=mode), expected, rtol=1e-12, atol=1e-12)


def test_three_by_three_by_hand():
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    w = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]).view(1, 1, 3, 3)
    # centre: (1 − 3) + 2·(4 − 6) + (7 − 9) = −8; a corner, top left: 0·… − 2·2 − 1·5 = −9
    y = conv2d(x, w, padding=1)
    assert y[0, 0, 1, 1] == -8
    assert y[0, 0, 0, 0] == -9
    assert torch.equal(y.double(), reference(x.double(), w.double(), padding=1))


def test_is_einsum_over_windows():
    x, w = normal(2, 3, 6, 5), normal(4, 3, 3, 2, seed=1)
    windows = x.unfold(2, 3, 1).unfold(3, 2, 1)
    torch.testing.assert_close(reference(x, w), torch.einsum("nchwij,ocij->nohw", windows, w), rtol=1e-12, atol=1e-12)


def test_same_depends_on_the_kernel_alone_and_same_minimal_on_the_size():
    x, w = torch.arange(1.0, 6.0).view(1, 1, 5), torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 1, 4)
    # "same": D(K − 1) = 3 pads, 1 before and 2 after
    assert conv1d(x, w, padding="same").flatten().tolist() == [3210.0, 4321.0, 5432.0, 543.0, 54.0]
    assert conv1d(x, w, stride=2, padding="same").flatten().tolist() == [3210.0, 5432.0, 54.0]
    # "same_minimal": (⌈5/2⌉ − 1)·2 + 4 − 5 = 3 pads for In = 5, (⌈6/2⌉ − 1)·2 + 4 − 6 = 2 for In = 6
    assert conv1d(x, w, stride=2, padding="same_minimal").flatten().tolist() == [3210.0, 5432.0, 54.0]
    x = torch.arange(1.0, 7.0).view(1, 1, 6)
    assert conv1d(x, w, stride=2, padding="same_minimal").flatten().tolist() == [3210.0, 5432.0, 654.0]
    assert conv1d(x, w, stride=2, padding="same").flatten().tolist() == [3210.0, 5432.0, 654.0]
    w = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 3)
    # K = 3, In = 6, S = 2: TensorFlow pads only after, torch's "same" on both sides
    assert conv1d(x, w, stride=2, padding="same_minimal").flatten().tolist() == [321.0, 543.0, 65.0]
    assert conv1d(x, w, stride=2, padding="same").flatten().tolist() == [210.0, 432.0, 654.0]


def test_causal_sees_no_future():
    w = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 3)
    y = conv1d(torch.arange(1.0, 5.0).view(1, 1, 4), w, padding="causal", dilation=1)
    assert y.flatten().tolist() == [100.0, 210.0, 321.0, 432.0]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64, torch.int32])
def test_other_numbers_are_handed_to_torch(dtype):
    x, w = torch.arange(16).view(1, 1, 4, 4).to(dtype), torch.arange(9).view(1, 1, 3, 3).to(dtype)
    assert torch.equal(conv2d(x, w, stride=1), F.conv2d(x, w))


def test_no_pad_is_copied_where_torch_pads_itself():
    """A symmetric zero padding reaches torch as an argument: the graph holds one convolution and no pad."""
    graph = torch.export.export(onn.Conv3d(2, 2, 3, padding=1), (torch.ones(1, 2, 4, 4, 4),)).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.aten.conv3d.default]
    assert conv3d(torch.ones(1, 1, 3, 3, 3), torch.ones(1, 1, 3, 3, 3), padding=1).sum() == 7**3


def test_half_types_are_rounded_once():
    """2048 ones and a half: float16 sums stop at 2048, a float32 sum rounded once does not."""
    x = torch.ones(1, 4096, 1, dtype=torch.float16)
    assert conv1d(x, torch.ones(1, 4096, 1, dtype=torch.float16)).item() == 4096
    x = torch.ones(1, 300, 1, dtype=torch.bfloat16)
    assert conv1d(x, torch.ones(1, 300, 1, dtype=torch.bfloat16)).item() == 300


def test_layer_is_torchs_and_says_so():
    layer = onn.Conv2d(2, 4, 3, padding=((1, 0), (0, 2)), activation="relu")
    assert isinstance(layer, torch.nn.Conv2d)
    assert "padding=((1, 0), (0, 2))" in repr(layer)
    assert "activation='relu'" in repr(layer)
    assert (layer(torch.randn(1, 2, 6, 6)) >= 0).all()


def test_torch_fx_traces_the_op_as_one_call():
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(onn.Conv2d(2, 3, 3), torch.nn.ReLU(), onn.DepthwiseConv2d(3, 3)))
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"][:1] == [conv2d]
    x = torch.randn(1, 2, 7, 7)
    assert traced(x).shape == (1, 3, 3, 3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e5m2])
def test_numbers_that_torch_does_not_convolve_are_refused_by_name(dtype):
    x = torch.ones(1, 1, 3, 3).to(dtype)
    with pytest.raises(TypeError, match=r"conv2d: input must be float32, .* got torch\."):
        conv2d(x, x)


def test_activation_needs_a_floating_input():
    x = torch.ones(1, 1, 3, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"conv2d: activation must be None for an input of torch.int64, got 'relu'"):
        conv2d(x, x, activation="relu")


@pytest.mark.parametrize("stride", [(1, 2), (2, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("last", [(True, True), (True, False), (False, True)], ids=str)
def test_one_channel_in_ambiguous_strides(last, stride):
    """Strides that could be channels-last: torch's own convolution is silently wrong for some of these on AVX-512."""
    x, w = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 3, 3)
    expected = reference(x.double(), w.double(), stride=stride)
    x, w = (t.to(memory_format=torch.channels_last) if as_last else t for t, as_last in zip((x, w), last, strict=True))
    torch.testing.assert_close(conv2d(x, w, stride=stride).double(), expected, rtol=1e-5, atol=1e-5)
    sliced = torch.randn(2, 1, 4, 8).to(memory_format=torch.channels_last)[..., :4]
    torch.testing.assert_close(
        conv2d(sliced, w, stride=stride).double(), reference(sliced.double(), w.double(), stride=stride), rtol=1e-5, atol=1e-5
    )
    layer = onn.Conv3d(1, 2, (1, 3, 3), stride=(1, *stride)).to(memory_format=torch.channels_last_3d)
    volume = torch.randn(2, 1, 1, 4, 4).to(memory_format=torch.channels_last_3d)
    expected = reference(volume.double(), layer.weight.double(), layer.bias.double(), layer.stride)
    torch.testing.assert_close(layer(volume).double(), expected, rtol=1e-5, atol=1e-5)


def known_call(**changed):
    called = {"input": normal(1, 2, 5, 4), "weight": normal(3, 2, 3, 3, seed=1), "bias": normal(3, seed=2), "padding": 1}
    return conv2d(**called | changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"stride": True}, {"stride": 1.0}, {"dilation": (True, 1)}, {"padding": (1, 1.0)}, {"groups": True}, {"groups": 1.0},
        {"weight": torch.ones(3, 2, 3, 3)}, {"bias": torch.ones(3)}, {"bias": torch.ones(3, device="meta")},
        {"input": torch.ones(1, 2, 5, 4, dtype=torch.float64).to_sparse()}, {"activation": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_known_call_admits_nothing_that_is_equal_to_it(changed):
    known_call()
    known_call()
    with pytest.raises((TypeError, ValueError), match="conv2d: "):
        known_call(**changed)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"stride": 2}, {"padding": ((0, 1), (2, 0))}, {"padding": "same_minimal", "stride": 2}, {"padding_mode": "circular"},
        {"activation": "relu"}, {"groups": 2, "weight": normal(4, 1, 3, 3), "bias": None}, {"dilation": 2, "padding": "same"},
        {"input": normal(2, 5, 4)}, {"input": normal(1, 1, 5, 4), "weight": normal(3, 1, 3, 3)},
        {"input": normal(1, 2, 3, 3), "padding": 0},
    ],
    ids=str,
)  # fmt: skip
def test_the_second_call_gives_what_the_first_gave(settings, monkeypatch):
    monkeypatch.setattr(engine, "_plans", {})
    x = settings.get("input", normal(1, 2, 5, 4))
    last = x.unsqueeze(0).contiguous(memory_format=torch.channels_last).squeeze(0) if x.dim() == 3 else formatted(x, True)
    leaf = x.clone().requires_grad_()
    for given in (x, x, last, last, x.mT.contiguous().mT, leaf):
        y = known_call(**settings | {"input": given})
        monkeypatch.setattr(engine, "_plans", {})
        first = known_call(**settings | {"input": given})
        known_call(**settings | {"input": given})
        again = known_call(**settings | {"input": given})
        assert torch.equal(again, first)
        assert torch.equal(y, first)
        assert again.stride() == y.stride() == first.stride()
        assert again.requires_grad == given.requires_grad


def test_a_known_call_heeds_what_has_changed_around_it():
    single = {"input": torch.ones(1, 2, 5, 4), "weight": torch.ones(3, 2, 3, 3), "bias": None}
    for _ in range(2):
        assert known_call(**single).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert known_call(**single).dtype == torch.bfloat16
    assert known_call(**{k: v if v is None else v.to("meta") for k, v in single.items()}).is_meta
    batched = torch.func.vmap(lambda x: conv2d(x, single["weight"], padding=1))(torch.ones(3, 1, 2, 5, 4))
    assert batched.shape == (3, 1, 3, 5, 4)
