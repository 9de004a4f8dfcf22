"""What cannot stream is refused by its name; what a module declares is checked."""

import pytest
import torch
from streaming_networks import CHANNELS, Gated, Inside, Residual, filled, sequence, whole
from torch import nn

import omniconv
from omniconv.nn import (
    Conv1d,
    ConvTranspose1d,
    DepthwiseConv1d,
    DepthwiseConv2d,
    DepthwiseSeparableConv1d,
    DynamicConv1d,
    LightweightConv1d,
)


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
