"""The blocks beside what is published, written down again in plain torch; their forms, types and refusals."""

import copy
import io
import math
from functools import partial

import pytest
import torch
from torch import nn

from omniconv.convert import block_state_from_fairseq, block_state_to_fairseq
from omniconv.models import DynamicConvBlock, LightConvBlock
from omniconv.nn import DynamicConv1d, LightweightConv1d
from omniconv.streaming import streaming

BLOCKS = [LightConvBlock, DynamicConvBlock]
C, K, H, T, S, N = 8, 3, 4, 6, 5, 3


def affine(x, state, name):
    return x @ state[f"{name}.weight"].t() + state[f"{name}.bias"]


def normal(x, state, name):
    mean = x.mean(-1, keepdim=True)
    deviation = ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (x - mean) / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def convolved(x, state, heads, before, softmax):
    """x (T, N, C), position by position and tap by tap."""
    length, batch, channels = x.shape
    if "conv.weight" in state:
        logits = state["conv.weight"].view(1, 1, heads, -1).expand(length, batch, -1, -1)
    else:
        logits = x @ state["conv.weight_linear.weight"].t()
        if "conv.weight_linear.bias" in state:
            logits = logits + state["conv.weight_linear.bias"]
        logits = logits.view(length, batch, heads, -1)
    kernel = logits.exp() / logits.exp().sum(-1, keepdim=True) if softmax else logits
    rows = []
    for t in range(length):
        row = x.new_zeros(batch, channels)
        for i in range(kernel.shape[-1]):
            if 0 <= t + i - before < length:
                row = row + kernel[t, :, :, i].repeat_interleave(channels // heads, 1) * x[t + i - before]
        rows.append(row)
    return torch.stack(rows)


def attended(x, memory, ignored, state, heads):
    """x (T, N, C), memory (S, N, C): softmax(q·k / √d)·v for every head."""
    q, k, v = (affine(y, state, f"encoder_attn.{p}_proj") for y, p in ((x, "q"), (memory, "k"), (memory, "v")))
    q, k, v = (y.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for y in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if ignored is not None:
        scores = scores.masked_fill(ignored[:, None, None, :], -math.inf)
    return affine((scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2), state, "encoder_attn.out_proj")


def published(
    state, x, mask=None, memory=None, ignored=None, *, heads, decoder=False, before=False, glu=True, softmax=True, reach=None
):  # fmt: skip
    """The layer of Wu et al. 2019 as fairseq has it, on fairseq's state dict: x (T, N, C)."""
    norms = ("conv_layer_norm", "final_layer_norm") if decoder else ("layer_norms.0", "layer_norms.1")

    def beside(x, norm, branch):
        return x + branch(normal(x, state, norm)) if before else normal(x + branch(x), state, norm)

    def convolution(x):
        x = affine(x, state, "linear1")
        if glu:
            half = x.shape[-1] // 2
            x = x[..., :half] / (1 + (-x[..., half:]).exp())
        if mask is not None:
            x = x * (~mask).t()[:, :, None]
        taps = reach + 1 if decoder else reach
        return affine(convolved(x, state, heads, reach if decoder else (taps - 1) // 2, softmax), state, "linear2")

    def feed_forward(x):
        return affine(affine(x, state, "fc1").clamp(min=0), state, "fc2")

    x = beside(x, norms[0], convolution)
    if memory is not None:
        x = beside(x, "encoder_attn_layer_norm", lambda x: attended(x, memory, ignored, state, heads))
    return beside(x, norms[1], feed_forward)


def theirs(kind, *, conv=C, hidden=4 * C, glu=True, decoder=False, attention=False, fused=False, bias=False, taps=K):
    """The state dict of fairseq's layer, of random numbers, the norms' among them."""

    def linear(name, made, read):
        return {f"{name}.weight": torch.randn(made, read) / math.sqrt(read), f"{name}.bias": torch.randn(made)}

    def norm(name):
        return {f"{name}.weight": torch.rand(C) + 0.5, f"{name}.bias": torch.randn(C)}

    state = linear("linear1", conv * (2 if glu else 1), C) | linear("linear2", C, conv) | linear("fc1", hidden, C)
    state |= linear("fc2", C, hidden)
    if kind is LightConvBlock:
        state["conv.weight"] = torch.randn(H, 1, taps)
    else:
        made = linear("conv.weight_linear", H * taps, conv)
        state |= made if bias else {"conv.weight_linear.weight": made["conv.weight_linear.weight"]}
    state |= norm("conv_layer_norm") | norm("final_layer_norm") if decoder else norm("layer_norms.0") | norm("layer_norms.1")
    if attention:
        state |= linear("encoder_attn.out_proj", C, C) | norm("encoder_attn_layer_norm")
        if fused:
            made = linear("encoder_attn.in_proj", 3 * C, C)
            state |= {name.replace("in_proj.", "in_proj_"): value for name, value in made.items()}
        else:
            for which in "qkv":
                state |= linear(f"encoder_attn.{which}_proj", C, C)
    return {name: value.double() for name, value in state.items()}


def loaded(block, state):
    block.load_state_dict(block_state_from_fairseq(state), strict=True)
    return block.eval()


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


FORMS = [
    {},
    {"normalize_before": True},
    {"glu": False, "softmax": False},
    {"conv_channels": 12, "feed_forward_channels": 10},
    {"normalize_before": True, "conv_channels": 4, "glu": False},
]


@pytest.mark.parametrize("taps", [1, 3, 4, 9])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_encoder_form_is_the_published_one(kind, form, taps):
    glu, softmax = form.get("glu", True), form.get("softmax", True)
    state = theirs(kind, conv=form.get("conv_channels", C), hidden=form.get("feed_forward_channels", 4 * C), glu=glu, taps=taps)
    block = loaded(kind(C, taps, H, layout="TNC", dtype=torch.float64, **form), state)
    x, mask = torch.randn(T, N, C).double(), torch.arange(T) >= torch.tensor([[T], [4], [0]])
    expect = partial(
        published, state, x, heads=H, before=block.normalize_before, glu=glu, softmax=softmax, reach=taps,
    )  # fmt: skip
    close(block(x), expect())
    close(block(x, mask), expect(mask))
    assert not torch.allclose(block(x, mask), block(x))


@pytest.mark.parametrize("attention", ["none", "apart", "fused"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_decoder_form_is_the_published_one(kind, form, attention):
    glu, softmax, attends = form.get("glu", True), form.get("softmax", True), attention != "none"
    sizes = {"conv": form.get("conv_channels", C), "hidden": form.get("feed_forward_channels", 4 * C), "glu": glu}
    state = theirs(kind, **sizes, decoder=True, attention=attends, fused=attention == "fused")
    block = loaded(kind(C, K, H, layout="TNC", causal=True, attention=attends, dtype=torch.float64, **form), state)
    if attention == "fused":
        for part in ("weight", "bias"):
            for which, value in zip("qkv", state.pop(f"encoder_attn.in_proj_{part}").chunk(3), strict=True):
                state[f"encoder_attn.{which}_proj.{part}"] = value
    expect = partial(
        published, state, heads=H, decoder=True, before=block.normalize_before, glu=glu, softmax=softmax, reach=K - 1,
    )  # fmt: skip
    x = torch.randn(T, N, C).double()
    if attends:
        memory, ignored = torch.randn(S, N, C).double(), torch.arange(S) >= torch.tensor([[S], [2], [1]])
        close(block(x, memory=memory), expect(x, memory=memory))
        close(block(x, None, memory, ignored), expect(x, None, memory, ignored))
        assert not torch.allclose(block(x, None, memory, ignored), block(x, memory=memory))
    else:
        close(block(x), expect(x))
        close(block(x)[:4], block(x[:4]))  # what comes later changes nothing


def test_the_projection_of_a_dynamic_block_may_have_a_bias():
    state = theirs(DynamicConvBlock, bias=True)
    block = loaded(DynamicConvBlock(C, K, H, projection_bias=True, layout="TNC", dtype=torch.float64), state)
    x = torch.randn(T, N, C).double()
    close(block(x), published(state, x, heads=H, reach=K))
    assert DynamicConvBlock(C, K, H).conv.projection.bias is None


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_layouts_and_a_missing_batch_are_the_same_block(kind, attention):
    block = kind(C, K, H, causal=attention, attention=attention, dtype=torch.float64)
    x, memory = torch.randn(N, T, C).double(), torch.randn(N, S, C).double() if attention else None
    mask, ignored = torch.arange(T) >= torch.tensor([[T], [4], [2]]), torch.arange(S) >= torch.tensor([[S], [3], [1]])
    expected = block(x, mask, memory, ignored if attention else None)
    for layout, order in (("NTC", (0, 1, 2)), ("NCT", (0, 2, 1)), ("TNC", (1, 0, 2))):
        other = kind(C, K, H, causal=attention, attention=attention, layout=layout, dtype=torch.float64)
        other.load_state_dict(block.state_dict())
        there = other(
            x.permute(order), mask, memory.permute(order) if attention else None, ignored if attention else None
        )  # fmt: skip
        close(there, expected.permute(order))
        assert there.is_contiguous() or layout == "TNC"
        n = 1
        swap = (1, 0) if layout == "NCT" else (0, 1)
        alone = other(
            x[n].permute(swap), mask[n], memory[n].permute(swap) if attention else None, ignored[n] if attention else None
        )
        close(alone, expected[n].permute(swap))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_type_trains(kind, dtype):
    block = kind(C, K, H, causal=True, attention=True, dtype=dtype)
    x, memory = torch.randn(N, T, C, dtype=dtype, requires_grad=True), torch.randn(N, S, C, dtype=dtype)
    y = block(x, memory=memory)
    y.square().sum().backward()
    assert y.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *block.parameters()])
    wide = copy.deepcopy(block).double()(x.double(), memory=memory.double())
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]  # layer norms at either end: numbers around 1
    assert (y.double() - wide).abs().max() < bound


@pytest.mark.parametrize("kind", BLOCKS)
def test_autocast(kind):
    block, x = kind(C, K, H), torch.randn(N, T, C)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert (y - block(x)).abs().max() < 0.15


@pytest.mark.parametrize("kind", BLOCKS)
def test_gradients(kind):
    block = kind(4, K, 2, causal=True, attention=True, feed_forward_channels=6, dtype=torch.float64)
    x, memory = torch.randn(1, 3, 4).double().requires_grad_(), torch.randn(1, 2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, m: block(x, memory=m), (x, memory))


@pytest.mark.parametrize("kind", BLOCKS)
def test_compile_and_export(kind):
    block, x, memory = kind(C, K, H, causal=True, attention=True), torch.randn(N, T, C), torch.randn(N, S, C)
    mask = torch.arange(T) >= torch.tensor([[T], [4], [2]])
    expected = block(x, mask, memory)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask, memory), expected)
    compiled(x, mask, memory).sum().backward()
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    encoder = kind(C, K, H).eval()
    exported = torch.export.export(encoder, (x,), dynamic_shapes={"input": {0: batch, 1: length}})
    longer = torch.randn(2, 11, C)
    torch.testing.assert_close(exported.module()(longer), encoder(longer))


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKS)
def test_inductor(kind):
    block, x = kind(C, K, H), torch.randn(N, T, C)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BLOCKS)
def test_copies_pickles_and_empty_batches(kind):
    block, x = kind(C, K, H), torch.randn(N, T, C)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(block), again):
        assert torch.equal(other(x), block(x))
    assert block(x[:0]).shape == (0, T, C)


@pytest.mark.parametrize("name", ["dropout", "input_dropout", "activation_dropout", "attention_dropout", "weight_dropout"])
def test_each_dropout_acts_in_training_alone(name):
    block = LightConvBlock(C, K, H, causal=True, attention=True, **{name: 0.5})
    x, memory = torch.randn(N, T, C), torch.randn(N, S, C)
    assert not torch.equal(block(x, memory=memory), block(x, memory=memory))
    plain = LightConvBlock(C, K, H, causal=True, attention=True).eval()
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(x, memory=memory), plain(x, memory=memory))


def test_parameters_are_those_published():
    """2·C·D + D·C of the projections, H·K of the kernel (or D·H·K that make it), 2·C·F of the feed-forward part; the rest."""
    small = sum(p.numel() for p in LightConvBlock(C, K, H, conv_channels=12, feed_forward_channels=10).parameters())
    assert small == (24 * C + 24) + (12 * C + C) + H * K + (10 * C + 10) + (10 * C + C) + 4 * C
    assert sum(p.numel() for p in DynamicConvBlock(C, K, H, conv_channels=12, feed_forward_channels=10).parameters()) == (
        small + 12 * H * K - H * K
    )
    assert isinstance(LightConvBlock(C, K, H).conv, LightweightConv1d)
    assert isinstance(DynamicConvBlock(C, K, H).conv, DynamicConv1d)


def test_fresh_weights_are_as_in_fairseq():
    torch.manual_seed(0)
    block = LightConvBlock(64, 31, 8)
    for linear in (block.input_projection, block.output_projection, block.feed_forward_in, block.feed_forward_out):
        limit = math.sqrt(6 / sum(linear.weight.shape))
        assert 0.97 * limit < linear.weight.abs().max() <= limit
        assert not linear.bias.any()
    nn.init.ones_(block.conv_norm.bias)
    nn.init.ones_(block.conv.weight)
    block.reset_parameters()
    assert not block.conv_norm.bias.any()
    assert block.conv.weight.abs().max() <= math.sqrt(6 / (31 + 8 * 31))


# weights there and back


@pytest.mark.parametrize("form", [{}, {"decoder": True}, {"decoder": True, "attention": True}], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_weights_go_there_and_back(kind, form):
    state = theirs(kind, **form)
    model = {f"part.layers.1.{name}": value for name, value in state.items()} | {"part.layers.10.fc1.weight": torch.ones(1)}
    ours = block_state_from_fairseq(model, "part.layers.1.")
    block = kind(C, K, H, causal="decoder" in form, attention="attention" in form, dtype=torch.float64)
    block.load_state_dict(ours, strict=True)
    back = block_state_to_fairseq(block.state_dict(), "part.layers.1.", decoder="decoder" in form)
    assert set(back) == set(model) - {"part.layers.10.fc1.weight"}
    assert all(torch.equal(value, model[name]) for name, value in back.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.clear(), "the entries must be those of a LightConvEncoderLayer, got them without .*conv$"),
        (lambda s: s.pop("fc1.bias"), "LightConvEncoderLayer, got them without fc1.bias$"),
        (lambda s: s.pop("conv.weight"), "got them without conv$"),
        (lambda s: s.update(extra=torch.ones(1)), "got them also extra$"),
        (
            lambda s: s.update({"conv_layer_norm.weight": torch.ones(C)}),
            "LightConvDecoderLayer, got them without .*; also layer_norms",
        ),
    ],
)
def test_states_that_are_no_blocks(change, words):
    state = theirs(LightConvBlock)
    change(state)
    with pytest.raises(ValueError, match=f"^block_state_from_fairseq: .*{words}"):
        block_state_from_fairseq(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("encoder_attn.k_proj.weight"), "must have .*in_proj_weight or .*, got .*q_proj.weight, .*v_proj.weight$"),
        (lambda s: s.update({"encoder_attn.in_proj_bias": torch.ones(3 * C)}), "must have encoder_attn.in_proj_bias or"),
        (lambda s: s.update({"encoder_attn.k_proj.weight": torch.ones(C, 5)}), r"as many channels, got shapes \(8, 8\), \(8, 5\)"),
    ],
)
def test_attention_that_has_no_counterpart(change, words):
    state = theirs(LightConvBlock, decoder=True, attention=True)
    change(state)
    with pytest.raises(ValueError, match=f"^block_state_from_fairseq: .*{words}"):
        block_state_from_fairseq(state)


def test_states_that_are_none_of_ours():
    state = LightConvBlock(C, K, H, causal=True, attention=True).state_dict()
    with pytest.raises(ValueError, match=r"^block_state_to_fairseq: decoder must be True where there is attention, got False"):
        block_state_to_fairseq(state, decoder=False)
    del state["attention.in_proj_bias"]
    with pytest.raises(ValueError, match=r"^block_state_to_fairseq: .*got them without attention.in_proj_bias"):
        block_state_to_fairseq(state)


# chunk by chunk


CHUNKS = [1, 0, 3, 2, 5]


@pytest.mark.parametrize("layout", ["NTC", "NCT", "TNC"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_causal_blocks_stream(kind, before, layout):
    blocks = [kind(C, k, H, causal=True, normalize_before=before, layout=layout, dtype=torch.float64) for k in (K, 1, 7)]
    stack = nn.Sequential(*blocks).eval()
    time = layout.index("T")
    x = torch.randn(*{"N": (N, sum(CHUNKS), C), "T": (sum(CHUNKS), N, C)}[layout[0]]).double()
    x = x.transpose(1, 2) if layout == "NCT" else x
    streamed = streaming(stack, layout=layout)
    made = torch.cat([streamed(chunk) for chunk in x.split(CHUNKS, time)], time)
    close(made, stack(x))
    assert not streamed.exact
    assert {"0", "0.conv_norm", "2.feed_forward_out"} <= set(streamed.inexact)
    streamed.reset()
    close(streamed(x), stack(x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_that_cannot_stream_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"^streaming: 'conv' \(.*Conv1d\): .*"):
        streaming(kind(C, K, H).eval())
    with pytest.raises(TypeError, match=r"^streaming: 'attention' \(MultiheadAttention\): "):
        streaming(kind(C, K, H, causal=True, attention=True).eval())


# refusals


@pytest.mark.parametrize(
    ("sizes", "settings", "error", "words"),
    [
        ((8.0, 3, 2), {}, TypeError, "channels must be an int, got 8.0"),
        ((8, True, 2), {}, TypeError, "kernel_size must be an int, got True"),
        ((8, 3, 0), {}, ValueError, "heads must be at least 1 and at most .*, got 0"),
        ((8, 3, 2), {"feed_forward_channels": 0}, ValueError, "feed_forward_channels must be at least 1"),
        ((8, 3, 2), {"conv_channels": "8"}, TypeError, "conv_channels must be an int"),
        ((8, 3, 3), {}, ValueError, "heads must divide the channels of the convolution, got 3 and 8"),
        (
            (8, 3, 3),
            {"conv_channels": 9, "causal": True, "attention": True},
            ValueError,
            "heads must divide channels where .*, got 3",
        ),
        ((8, 3, 2), {"attention": True}, ValueError, "attention must be False where causal is False"),
        ((8, 3, 2), {"dropout": 1.5}, ValueError, "dropout must be at least 0 and at most 1, got 1.5"),
        ((8, 3, 2), {"activation_dropout": None}, TypeError, "activation_dropout must be a number, got None"),
        ((8, 3, 2), {"weight_dropout": True}, TypeError, "weight_dropout must be a number, got True"),
        ((8, 3, 2), {"glu": "no"}, TypeError, "glu must be a bool, got 'no'"),
        ((8, 3, 2), {"causal": 1}, TypeError, "causal must be a bool, got 1"),
        ((8, 3, 2), {"layout": "CNT"}, ValueError, "layout must be one of NCT, NTC, TNC, got 'CNT'"),
    ],
)
@pytest.mark.parametrize("kind", BLOCKS)
def test_settings_that_are_refused(kind, sizes, settings, error, words):
    with pytest.raises(error, match=f"^{kind.__name__}: {words}"):
        kind(*sizes, **settings)


@pytest.mark.parametrize(
    ("attention", "operands", "error", "words"),
    [
        (False, ([1.0],), TypeError, "input must be a Tensor, got list"),
        (False, (torch.ones(C),), ValueError, "input must have 3 axes, or 2 without the batch, got shape"),
        (False, (torch.ones(N, C, T),), ValueError, "input must have 8 channels in layout NTC, got shape"),
        (False, (torch.ones(N, T, C).double(),), TypeError, "input must have the block's dtype torch.float32, got torch.float64"),
        (False, (torch.ones(N, T, C, device="meta"),), ValueError, "input must be on the block's device cpu, got meta"),
        (False, (torch.ones(N, T, C), torch.ones(N, T)), TypeError, "padding_mask must be bool"),
        (False, (torch.ones(N, T, C), torch.ones(N, S) > 0), ValueError, "padding_mask must have shape"),
        (False, (torch.ones(N, T, C), None, torch.ones(N, S, C)), ValueError, "memory must be None in a block without attention"),
        (False, (torch.ones(N, T, C), None, None, torch.ones(N, S) > 0), ValueError, "memory_padding_mask must be None in"),
        (True, (torch.ones(N, T, C),), ValueError, "memory must be given to a block with attention, got None"),
        (True, (torch.ones(N, T, C), None, torch.ones(N, S, 4)), ValueError, "memory must have 8 channels"),
        (True, (torch.ones(N, T, C), None, torch.ones(2, S, C)), ValueError, "memory must have the input's batch axis, got shapes"),
        (True, (torch.ones(N, T, C), None, torch.ones(S, C)), ValueError, "memory must have the input's batch axis, got shapes"),
        (True, (torch.ones(N, T, C), None, torch.ones(N, S, C), torch.ones(N, S)), TypeError, "memory_padding_mask must be bool"),
        (True, (torch.ones(N, T, C), None, torch.ones(N, S, C), torch.ones(N, T) > 0), ValueError, "memory_padding_mask must have"),
    ],
)
@pytest.mark.parametrize("kind", BLOCKS)
def test_operands_that_are_refused(kind, attention, operands, error, words):
    block = kind(C, K, H, causal=attention, attention=attention)
    with pytest.raises(error, match=f"^{kind.__name__}: {words}"):
        block(*operands)


def test_what_is_shown():
    shown = repr(LightConvBlock(C, K, H, causal=True, normalize_before=True, layout="TNC"))
    assert "8, causal=True, glu=True, normalize_before=True, layout='TNC'" in shown
