"""Strides turned into dilation, layer by layer: pooling, patches, axes, paddings, gates and branches."""

import pytest
import torch
import torch.nn.functional as F
from dilated_networks import Own, Standardised, exact_, random_, taken, unit
from torch import nn

import omniconv.nn as ours
from omniconv.models import drn_d_22
from omniconv.surgery import dilation_plan, stride_to_dilation


class Averages(nn.Module):
    """What torch counts in an average, written down: zeros of the pads or not, windows beyond the end."""

    def __init__(self, **settings):
        super().__init__()
        self.shrink, self.pool = nn.MaxPool2d(1, 2), nn.AvgPool2d(**settings)

    def forward(self, x):
        return self.pool(self.shrink(x))


AVERAGES = [
    {"kernel_size": k, "stride": s, "padding": p}
    for k, s, p in ((2, 2, 0), (3, 2, 1), (3, 1, 1), ((3, 2), (1, 3), 0), (4, 4, 0), (3, 3, 0), (5, 2, 2))
]


@pytest.mark.parametrize("size", [(30, 30), (31, 33), (28, 37)])
@pytest.mark.parametrize(("include", "ceil", "divisor"), [(True, False, None), (False, False, None), (True, True, None),
                                                          (False, True, None), (True, False, 7)])  # fmt: skip
@pytest.mark.parametrize("settings", AVERAGES, ids=str)
@pytest.mark.parametrize("output_stride", [1, 2])
def test_average_pooling_to_the_bit(settings, include, ceil, divisor, size, output_stride):
    net = Averages(**settings, count_include_pad=include, ceil_mode=ceil, divisor_override=divisor)
    dilated = stride_to_dilation(net, output_stride, example_input=torch.empty(1, 2, 30, 30))
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    old, new = net(x), dilated(x)
    grows = [2 // output_stride * s for s in (settings["stride"],) * 2] if isinstance(settings["stride"], int) else [
        2 // output_stride * s for s in settings["stride"]
    ]  # fmt: skip
    seen = taken(new, grows)
    assert seen.shape == old.shape
    assert torch.equal(seen, old)
    for n, g, k in zip(new.shape[2:], grows, old.shape[2:], strict=True):
        assert g * (k - 1) < n <= g * k


@pytest.mark.parametrize("size", [28, 29, 30, 31])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil"),
    [
        (2, 2, 0, False), (3, 2, 0, True), (2, 2, 0, True), (3, 2, 1, True), (3, 1, 1, False), (3, 3, 0, False), (5, 2, 2, False)
    ],
)  # fmt: skip
def test_max_pooling_to_the_bit(kernel, stride, padding, ceil, size):
    net = nn.Sequential(nn.MaxPool2d(1, 2), nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil), nn.MaxPool2d(3, 1, 1))
    dilated = stride_to_dilation(net, 1, example_input=torch.empty(1, 2, 30, 30))
    x = torch.randn(1, 2, size, size, dtype=torch.float64) - 5
    assert torch.equal(taken(dilated(x), 2 * stride), net(x))


@pytest.mark.parametrize("size", [40, 41, 42, 47])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (4, 4), (4, 2), (3, 3)])
def test_patches_are_read_densely(kernel, stride, size):
    net = nn.Sequential(nn.Conv2d(1, 2, kernel, stride), nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, padding=1))
    for p in net.parameters():
        p.data = torch.randint(-3, 4, p.shape).double()
    x = torch.randint(-8, 9, (1, 1, size, size)).double()
    for output_stride in (1, 2, stride):
        kept = max(d for d in range(1, stride + 1) if stride % d == 0 and d <= output_stride)
        last = 2 if kept * 2 <= output_stride else 1
        new = stride_to_dilation(net, output_stride)(x)
        assert torch.equal(taken(new, 2 * stride // (kept * last)), net(x))


def test_a_stride_may_be_taken_out_in_part():
    net = nn.Sequential(nn.Conv2d(1, 1, 4, 4), nn.Conv2d(1, 1, 3, padding=1))
    (patches, behind) = dilation_plan(net, 2).changes
    assert (patches.stride, patches.extended, behind.dilation) == (((4, 4), (2, 2)), True, ((1, 1), (2, 2)))


def test_one_and_three_axes_and_axes_that_differ():
    one = nn.Sequential(nn.Conv1d(2, 2, 5, 2, 2), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.Conv1d(2, 2, 3, padding=1)).double()
    pools = nn.MaxPool3d(3, (2, 1, 2), 1), nn.AvgPool3d(2, (1, 2, 2))
    three = nn.Sequential(nn.Conv3d(2, 2, 3, (1, 2, 2), 1), *pools, nn.Conv3d(2, 2, (1, 3, 3))).double()
    x1, x3 = torch.randn(1, 2, 63, dtype=torch.float64), torch.randn(1, 2, 9, 22, 35, dtype=torch.float64)
    for net, x, grows in ((one, x1, (8,)), (three, x3, (2, 4, 8))):
        new = stride_to_dilation(net, 1, example_input=x)(x)
        torch.testing.assert_close(taken(new, grows), net(x), rtol=1e-12, atol=1e-12)


class Patches(nn.Module):
    """ConvNeXt's way: channels last for norms and linear layers, patches to shrink."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 8, 2, 2)
        self.mix, self.norm, self.linear = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = self.down(self.stem(x))
        y = self.mix(x).permute(0, 2, 3, 1)
        return x + (F.gelu(self.linear(self.norm(y))) * self.scale).permute(0, 3, 1, 2)


class Shuffled(nn.Module):
    """ShuffleNet's way: halves of channels, cut, joined and shuffled."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = unit(3, 8, 3, 2), unit(4, 4, 3, 2), unit(4, 4, 5, 2, groups=4)
        self.last = unit(8, 8, 3)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat((self.left(a), self.right(b)), 1)
        n, c, h, w = x.shape
        return self.last(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


@pytest.mark.parametrize("net", [Patches, Shuffled])
def test_channels_may_be_moved_about(net):
    torch.manual_seed(0)
    net = random_(net().double().eval())
    dilated = stride_to_dilation(net, 2)
    x = torch.randn(1, 3, 48, 57, dtype=torch.float64)
    with torch.no_grad():
        old, new = net(x), dilated(x)
    torch.testing.assert_close(taken(new, 4 if isinstance(net, Patches) else 2), old, rtol=1e-12, atol=1e-12)


def test_our_layers_and_our_networks():
    net = nn.Sequential(
        ours.Conv2d(3, 4, 3, 2, "same"), ours.PointwiseConv2d(4, 4, 2), ours.DilatedConv2d(4, 4, 3, 2),
        ours.DepthwiseConv2d(4, 2, 1, "same"), ours.DepthwiseSeparableConv2d(4, 4, 3, 2, 1),
        ours.SeparableConv2d(4, 4, 3, 1, ((2, 0), (1, 1))), ours.GroupedConv2d(4, 4, 3, 2, padding=1),
        ours.DepthwiseSeparableConv2d(4, 4, 3, 2, 1, norm=nn.BatchNorm2d), ours.Conv2d(4, 4, 3, 1, "same"),
    ).double().eval()  # fmt: skip
    x = torch.randn(1, 3, 65, 58, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(taken(stride_to_dilation(net, 2)(x), 8), net(x), rtol=1e-12, atol=1e-12)
        drn = exact_(drn_d_22(0).double().eval())
        x = torch.randint(-8, 9, (1, 3, 41, 30)).double()
        assert torch.equal(taken(stride_to_dilation(drn, 2)(x), 4), drn(x))
        assert dilation_plan(drn_d_22()).changes == ()


def test_uneven_sides_and_numbers_that_torch_lets_be_words():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), nn.Conv2d(1, 1, 5, padding="same"), nn.Conv2d(1, 1, 3, padding="valid")).double()
    x = torch.randn(1, 1, 40, 31, dtype=torch.float64)
    torch.testing.assert_close(taken(stride_to_dilation(net, 1)(x), 2), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mode", "size"), [("circular", 32), ("reflect", 33), ("replicate", 33)])
def test_other_padding_modes_where_size_and_mode_fit(mode, size):
    net = nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode)).double()
    x = torch.randn(1, 1, size, size, dtype=torch.float64)
    plan = dilation_plan(net, 1)
    assert plan.notes == (f"Conv2d '1' pads by {mode}: at the end of an axis values may differ",)
    dilated = stride_to_dilation(net, 1)
    torch.testing.assert_close(taken(dilated(x), 2), net(x), rtol=1e-12, atol=1e-12)
    other = torch.randn(1, 1, 65 - size, 65 - size, dtype=torch.float64)
    new, old = taken(dilated(other), 2), net(other)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(new[inside], old[inside], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(new, old)


def test_classes_of_their_own_are_tried_out():
    net = nn.Sequential(Standardised(1, 2, 3, 2, 1), Standardised(2, 2, 3, 1, 1)).double()
    x = torch.randn(1, 1, 33, 40, dtype=torch.float64)
    torch.testing.assert_close(taken(stride_to_dilation(net, 1)(x), 2), net(x), rtol=1e-12, atol=1e-12)


def test_what_pools_over_positions_is_named():
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.gate, self.norm = nn.Conv2d(3, 4, 3, 2, 1), gate, nn.GroupNorm(2, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.norm(x * self.gate(x)).mean((2, 3))

    plan = dilation_plan(Gated(), 1)
    more = "pools more positions than before: what it gives, and what follows from that, differs"
    assert plan.notes == (
        f"AdaptiveAvgPool2d 'gate.0' {more}", "GroupNorm 'norm' normalises by more positions than before: what it gives differs",
        f"aten::mean in the model's own forward {more}",
    )  # fmt: skip
    assert [c.module for c in plan.changes] == ["stem"]
    stride_to_dilation(Gated(), 1)(torch.randn(1, 3, 16, 16))


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(True), nn.ReLU6(True), nn.Hardtanh(), nn.SiLU(), nn.SiLU(True), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid(),
    nn.Tanh(), nn.Hardswish(), nn.Hardswish(True), nn.Hardsigmoid(True), nn.LeakyReLU(0.1, True), nn.ELU(1.0, True), nn.CELU(),
    nn.SELU(True), nn.Mish(True), nn.Softplus(), nn.PReLU(4), nn.Threshold(0.1, 0.2, True), nn.LogSigmoid(), nn.Softmax(1),
    nn.Softmax2d(), nn.Dropout(),
    nn.Dropout2d(), nn.Identity(), nn.RReLU(), nn.Tanhshrink(), nn.Hardshrink(), nn.LocalResponseNorm(2), nn.BatchNorm2d(4),
    nn.BatchNorm2d(4, affine=False), nn.ChannelShuffle(2), nn.GLU(1),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_what_treats_every_position_alike_is_passed(activation):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), activation, nn.Conv2d(2 if isinstance(activation, nn.GLU) else 4, 2, 3, 1, 1))
    net = net.double().eval()
    x = torch.randn(1, 1, 13, 10, dtype=torch.float64)
    torch.testing.assert_close(taken(stride_to_dilation(net, 1)(x), 2), net(x), rtol=1e-12, atol=1e-12)


def test_a_gate_that_is_spread_over_the_map_grows_with_it():
    def gated(m, x):
        gate = m.mix(x.mean((2, 3)).unsqueeze(1)).sigmoid().view(x.shape[0], -1, 1, 1)
        return m.last(x * gate.expand_as(x))

    net = Own(gated, mix=nn.Conv1d(1, 1, 3, padding=1), last=nn.Conv2d(4, 4, 3, padding=1))
    plan = dilation_plan(net, 1)
    assert [c.module for c in plan.changes] == ["stem", "last"]
    assert stride_to_dilation(net, 1)(torch.randn(1, 3, 9, 8)).shape == (1, 4, 9, 8)


def test_branches_may_be_stacked_and_summed():
    def selected(m, x):
        both = torch.stack([m.near(x), m.far(x)], 1)
        return m.last((both * both.sum(1, keepdim=True).mean((3, 4), keepdim=True).softmax(1)).sum(1))

    wide = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
    net = Own(selected, near=nn.Conv2d(4, 4, 3, padding=1), far=wide, last=nn.Conv2d(4, 4, 3, padding=1))
    assert {c.module: c.dilation[1] for c in dilation_plan(net, 1).changes}["far"] == (4, 4)
    with pytest.raises(ValueError, match=r"^stride_to_dilation: maps that are joined must lie at the same positions"):
        stride_to_dilation(Own(lambda m, x: torch.stack([x, torch.ones(2, 4, 112, 112)])), 1)
