"""Strides turned into dilation: where the network as it was has a position, the dilated one has the same numbers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import omniconv.nn as ours
from omniconv.models import drn_d_22
from omniconv.surgery import dilation_plan, stride_to_dilation


def unit(into, out, kernel=3, stride=1, groups=1, dilation=1, act=True):
    layers = [
        nn.Conv2d(into, out, kernel, stride, (kernel - 1) // 2 * dilation, dilation, groups, bias=False), nn.BatchNorm2d(out)
    ]  # fmt: skip
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


class Residual(nn.Module):
    """Convolutions beside a shortcut, which is 1×1 where channels or stride change; "D" pools before it."""

    def __init__(self, body, into, out, stride, pooled=False):
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity()
        if pooled and stride > 1:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
            self.shortcut = nn.Sequential(pool, unit(into, out, 1, act=False))
        elif stride > 1 or into != out:
            self.shortcut = unit(into, out, 1, stride, act=False)

    def forward(self, x):
        y = self.body(x)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


def basic(into, width, stride, **_):
    return nn.Sequential(unit(into, width, 3, stride), unit(width, width, act=False)), width


def wide(into, width, stride, groups=1):
    body = unit(into, width, 1), unit(width, width, 3, stride, groups), unit(width, 2 * width, 1, act=False)
    return nn.Sequential(*body), 2 * width


def resnet(kind, repeats, *, groups=1, pooled=False, width=8, first=1):
    """The topology of He et al. 2016, with few channels; with ``first`` = 2 that of RegNet: no pooling, every stage shrinks."""
    layers = [unit(3, width, 3 if first == 2 else 7, 2)]
    if first == 1:
        layers.append(nn.MaxPool2d(3, 2, 1))
    into = width
    for i, times in enumerate(repeats):
        for j in range(times):
            stride = (first if i == 0 else 2) if j == 0 else 1
            body, out = kind(into, width * 2 ** min(i, 2), stride, groups=groups)
            layers.append(Residual(body, into, out, stride, pooled))
            into = out
    return nn.Sequential(*layers)


class Inverted(nn.Module):
    def __init__(self, into, out, stride, expand):
        super().__init__()
        hidden = into * expand
        self.body = nn.Sequential(
            *([unit(into, hidden, 1)] if expand > 1 else []),
            unit(hidden, hidden, 3, stride, hidden),
            unit(hidden, out, 1, act=False),
        )
        self.same = stride == 1 and into == out

    def forward(self, x):
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_v2():
    """Sandler et al. 2018, table 2, an eighth of the channels."""
    layers, into = [unit(3, 4, 3, 2)], 4
    rows = (1, 2, 1, 1), (6, 3, 2, 2), (6, 4, 3, 2), (6, 8, 4, 2), (6, 12, 3, 1), (6, 20, 3, 2), (6, 40, 1, 1)
    for expand, out, times, stride in rows:
        for j in range(times):
            layers.append(Inverted(into, out, stride if j == 0 else 1, expand))
            into = out
    return nn.Sequential(*layers, unit(into, 160, 1))


NETWORKS = {
    "resnet18": lambda: resnet(basic, (2, 2, 2, 2)),
    "resnet34": lambda: resnet(basic, (3, 4, 6, 3)),
    "resnet50": lambda: resnet(wide, (3, 4, 6, 3)),
    "resnext50": lambda: resnet(wide, (3, 4, 6, 3), groups=4),
    "resnet50d": lambda: resnet(wide, (3, 4, 6, 3), pooled=True),
    "regnet": lambda: resnet(wide, (1, 2, 4, 2), groups=2, first=2),
    "mobilenet_v2": mobilenet_v2,
}


def exact_(net):
    """Weights with which every number is an integer (over a power of two), so that no order of summing can round."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            weight = torch.zeros_like(module.weight)
            for row in weight.flatten(1):
                row[torch.randint(row.numel(), ())] = (-1) ** int(torch.randint(2, ()))
            module.weight.data = weight
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
            module.bias.data = torch.randint(-2, 3, module.bias.shape).to(module.bias)
    return net


def random_(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def made(name, dense=False):
    torch.manual_seed(0)
    net = NETWORKS[name]().double().eval()
    return random_(net) if dense else exact_(net)


def taken(y, grows):
    return y[(..., *(slice(None, None, g) for g in ((grows,) * (y.dim() - 2) if isinstance(grows, int) else grows)))]


def eighth(size, s=8):
    return -(-size // s)


@pytest.mark.parametrize("size", [(224, 224), (257, 225), (97, 130), (33, 40), (5, 1)])
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_numbers_are_the_same_to_the_bit(name, output_stride, size):
    """Integers in float64, so that equality does not depend on the order in which ATen sums; to the borders, at any size."""
    net = made(name)
    dilated = stride_to_dilation(net, output_stride)
    x = torch.randint(-8, 9, (1, 3, *size)).double()
    with torch.no_grad():
        old, new = net(x), dilated(x)
    assert old.abs().max() > 0
    assert tuple(new.shape[2:]) == tuple(eighth(n, output_stride) for n in size)
    assert torch.equal(taken(new, 32 // output_stride), old)


@pytest.mark.parametrize("output_stride", [1, 2, 4])
@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "mobilenet_v2"])
def test_pooling_is_dilated_too(name, output_stride):
    net = made(name)
    dilated = stride_to_dilation(net, output_stride)
    x = torch.randint(-8, 9, (1, 3, 65, 52)).double()
    with torch.no_grad():
        old, new = net(x), dilated(x)
    assert tuple(new.shape[2:]) == (eighth(65, output_stride), eighth(52, output_stride))
    assert torch.equal(taken(new, 32 // output_stride), old)


@pytest.mark.parametrize("name", NETWORKS)
def test_with_weights_as_they_come_they_differ_by_rounding_alone(name):
    """float64 in ATen is a matrix product over all positions: their number decides on the order of its sums."""
    net = made(name, dense=True)
    dilated = stride_to_dilation(net, 8)
    x = torch.randn(2, 3, 97, 64, dtype=torch.float64)
    with torch.no_grad():
        old, new = net(x), taken(dilated(x), 4)
    assert (new - old).abs().max() <= 1e-12 * old.abs().max()
    assert not torch.equal(old[..., 0, 0], old[..., 1, 1])


def test_the_settings_are_those_of_the_algorithm():
    plan = dilation_plan(made("resnet18"), 8)
    of = {c.module: (c.stride, c.dilation, c.padding) for c in plan.changes}
    one, two, four = (1, 1), (2, 2), (4, 4)
    assert of == {
        "6.body.0.0": ((two, one), (one, one), (one, one)),  # its own stride goes, its taps stay
        "6.shortcut.0": ((two, one), (one, one), ((0, 0), (0, 0))),
        "6.body.1.0": ((one, one), (one, two), (one, two)),
        "7.body.0.0": ((one, one), (one, two), (one, two)),
        "7.body.1.0": ((one, one), (one, two), (one, two)),
        "8.body.0.0": ((two, one), (one, two), (one, two)),
        "8.shortcut.0": ((two, one), (one, one), ((0, 0), (0, 0))),
        "8.body.1.0": ((one, one), (one, four), (one, four)),
        "9.body.0.0": ((one, one), (one, four), (one, four)),
        "9.body.1.0": ((one, one), (one, four), (one, four)),
    }
    assert plan.notes == ()
    assert dilation_plan(made("resnet18"), 32).changes == ()


def test_a_network_is_left_as_it_was_and_its_copy_keeps_its_state():
    net = made("resnet50d").train()
    net[3].eval()
    before = copy.deepcopy(net)
    dilated = stride_to_dilation(net, 4)
    assert repr(net) == repr(before)
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.modules())
    state, kept = dilated.state_dict(), net.state_dict()
    assert list(state) == list(kept)
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(dilated.parameters(), net.parameters(), strict=True))
    assert dilated.training
    assert not dilated[3].training
    dilated.load_state_dict(kept, strict=True)


def test_in_place_it_is_the_model_itself():
    net = made("resnet18")
    expected = stride_to_dilation(net, 8)
    parameters = list(net.parameters())
    assert stride_to_dilation(net, 8, inplace=True) is net
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert repr(net) == repr(expected)


def test_twice_is_as_once():
    net = made("resnet18")
    x = torch.randint(-8, 9, (1, 3, 70, 65)).double()
    with torch.no_grad():
        assert torch.equal(stride_to_dilation(stride_to_dilation(net, 16), 8)(x), stride_to_dilation(net, 8)(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet50d"])
def test_it_is_pickled_exported_and_compiled(name):
    dilated = stride_to_dilation(made(name), 2)  # resnet50d: with average pooling and hooks
    x = torch.randint(-8, 9, (1, 3, 33, 46)).double()
    torch.compiler.reset()  # what other tests compiled of the same blocks counts against the limit of recompilations
    with torch.no_grad():
        y = dilated(x)
        assert torch.equal(pickle.loads(pickle.dumps(dilated))(x), y)
        assert torch.equal(copy.deepcopy(dilated)(x), y)
        assert torch.equal(torch.compile(dilated, backend="aot_eager", fullgraph=True)(x), y)
        sizes = ({2: torch.export.Dim("h", min=17), 3: torch.export.Dim("w", min=17)},)
        exported = torch.export.export(dilated, (x,), dynamic_shapes=sizes).module()
        x = torch.randint(-8, 9, (1, 3, 50, 29)).double()
        assert torch.equal(exported(x), dilated(x))


def test_it_trains():
    dilated = stride_to_dilation(made("resnet50d", dense=True).float().train(), 4)
    dilated(torch.randn(2, 3, 33, 30)).square().mean().backward()
    assert all(p.grad is not None for p in dilated.parameters())


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


class Standardised(nn.Conv2d):
    """A class of its own that follows its settings."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PadsItself(nn.Conv2d):
    """TensorFlow's SAME: the pads depend on the size."""

    def forward(self, x):
        pads = []
        for n in reversed(x.shape[2:]):
            need = max((-(-n // self.stride[0]) - 1) * self.stride[0] + (self.kernel_size[0] - 1) * self.dilation[0] + 1 - n, 0)
            pads += [need // 2, need - need // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


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


class Own(nn.Module):
    """A stem whose stride is taken out, and a function of what comes from it."""

    def __init__(self, function, **modules):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, self.stem(x))


def hooked(change):
    layer = nn.Conv2d(4, 4, 1)
    layer.register_forward_pre_hook(lambda m, inputs: (change(inputs[0]),))
    return layer


REFUSED = {
    "flattened": (
        Own(lambda m, x: m.fc(x.flatten(1)), fc=nn.Linear(4 * 112 * 112, 2)),
        "a map that grows must be pooled to one position before it is flattened or cut up, "
        "got aten::view in the model's own forward",
    ),
    "function": (
        Own(lambda m, x: F.max_pool2d(x, 3)),
        "what looks at neighbours on a map that grows must be a module, whose dilation can be set, not a function, "
        "got aten::max_pool2d_with_indices in the model's own forward",
    ),
    "convolution": (
        Own(lambda m, x: F.conv2d(x, torch.ones(4, 4, 3, 3))),
        "what looks at neighbours on a map that grows must be a module, whose dilation can be set, not a function, "
        "got aten::convolution in the model's own forward",
    ),
    "resized": (
        Own(lambda m, x: F.interpolate(x, scale_factor=2)),
        "a map that grows must not be resized, got aten::upsample_nearest2d in the model's own forward",
    ),
    "Upsample": (
        Own(lambda m, x: m.up(x), up=nn.Upsample(scale_factor=2)),
        "Upsample 'up' must not come behind a stride that is taken out, got a map that grows",
    ),
    "transposed": (
        Own(lambda m, x: m.up(x), up=nn.ConvTranspose2d(4, 4, 2, 2)),
        "ConvTranspose2d 'up' must not come behind a stride that is taken out, got a map that grows",
    ),
    "twice": (
        Own(lambda m, x: m.pool(m.pool(x)), pool=nn.MaxPool2d(2)),
        "MaxPool2d 'pool' must be called at one stride, got calls at several",
    ),
    "padded": (
        Own(lambda m, x: F.pad(x, (1, 1))),
        "what pads a map that grows must be a module, whose padding can be set, not a function, "
        "got aten::constant_pad_nd in the model's own forward",
    ),
    "cropped": (
        Own(lambda m, x: x[..., 1:, 1:]), "a map that grows must not be cropped, got aten::slice in the model's own forward"
    ),
    "every second": (
        Own(lambda m, x: x + x[..., :1]), "a map that grows must not be cropped, got aten::slice in the model's own forward"
    ),
    "softmax": (
        Own(lambda m, x: x.softmax(-1)),
        "an op along a map that grows must be one of channels, got aten::_softmax in the model's own forward",
    ),
    "attention": (
        Own(lambda m, x: x @ x.transpose(-1, -2)),
        "an op on a map that grows must be known to treat every position alike, got aten::bmm in the model's own forward",
    ),
    "unknown": (
        Own(lambda m, x: x.roll(1, -1)),
        "an op on a map that grows must be known to treat every position alike, got aten::roll in the model's own forward",
    ),
    "table": (
        Own(lambda m, x: x + torch.ones(112, 112)),
        "what meets a map that grows must grow with it, got aten::add in the model's own forward",
    ),
    "linear": (
        Own(lambda m, x: m.fc(x), fc=nn.Linear(112, 112)),
        "what Linear 'fc' reads must be channels, not positions, got a map that grows",
    ),
    "lp": (
        Own(lambda m, x: m.pool(x), pool=nn.LPPool2d(2, 2)), "LPPool2d 'pool' must not come behind a stride that is taken out"
    ),
    "indices": (
        Own(lambda m, x: m.pool(x)[0], pool=nn.MaxPool2d(2, return_indices=True)),
        "MaxPool2d 'pool' must not give the indices of positions, got return_indices=True",
    ),
    "own class": (
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), PadsItself(4, 4, 3, 2)),
        "PadsItself '1' must follow its stride, padding and dilation, got other values where tried",
    ),
    "same_minimal": (
        ours.Conv2d(3, 4, 3, 2, "same_minimal"),
        "the padding of Conv2d '' must not depend on the size of the map, got 'same_minimal'",
    ),
    "one side": (
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 2, padding="same")),
        "the pads of Conv2d '1' must be alike on both sides, got 0 and 1",
    ),
    "wide pads": (
        nn.Conv2d(3, 4, 1, 2, 1), "the pads of Conv2d '' must not be wider than its window, where its stride is taken out, got 1"
    ),
    "mode": (
        nn.Conv2d(3, 4, 4, 2, 1, padding_mode="reflect"),
        "Conv2d '' must pad by zeros, as its pads do not keep the size of the map, got reflect",
    ),
    "crop to the whole map": (
        Own(lambda m, x: m.last(x[:, :, :112, :112]), last=nn.Conv2d(4, 4, 1)),
        "what Conv2d 'last' gives must grow with the map, got (2, 4, 112, 112) from (2, 4, 112, 112)",
    ),
    "crop of what the model gives": (
        Own(lambda m, x: [x[:, :, :112]]), "what the model gives must grow with the map, got (2, 4, 112, 224) from (2, 4, 112, 112)"
    ),
    "gate spread by numbers": (
        Own(lambda m, x: x * x.mean((2, 3), keepdim=True).expand(-1, -1, 112, 112)),
        "the dilated model must run on example_input, got RuntimeError: ",
    ),
    "copied into zeros": (
        Own(lambda m, x: torch.zeros(2, 4, 112, 112).copy_(x)),
        "what meets a map that grows must grow with it, got aten::copy_ in the model's own forward",
    ),
    "flipped": (
        Own(lambda m, x: x.flip(1, 2)), "an op along a map that grows must be one of channels, got aten::flip"
    ),
    "lengthened already": (
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), stride_to_dilation(nn.Conv2d(4, 4, 2, 2), 1)),
        "what pads a map that grows must be a module, whose padding can be set, not a function, got aten::constant_pad_nd in '1'",
    ),
    "hook": (
        Own(lambda m, x: m.last(x), last=hooked(lambda x: F.max_pool2d(x, 3, 1, 1))),
        "what looks at neighbours on a map that grows must be a module, whose dilation can be set, not a function, "
        "got aten::max_pool2d_with_indices in 'last'",
    ),
    "meeting": (
        Own(lambda m, x: x[:, :, :56, :56] + m.down(x), down=nn.Conv2d(4, 4, 3, 2, 1)),
        "a map that grows must not be cropped",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_follow_is_refused_by_name(name):
    net, said = REFUSED[name]
    before = repr(net), [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    state = {key: value.clone() for key, value in net.state_dict().items()}
    for call in (stride_to_dilation, dilation_plan):
        with pytest.raises(ValueError, match=r"^stride_to_dilation: ") as refused:
            call(net, 1)
        assert said in str(refused.value)
        assert ", got " in str(refused.value)
    with pytest.raises(ValueError, match=r"^stride_to_dilation: "):
        stride_to_dilation(net, 1, inplace=True)
    assert before == (repr(net), [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()])
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


def test_a_branch_whose_positions_are_unknown_may_not_meet_one_that_grows():
    class Unshuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 3, 2, 1)

        def forward(self, x):
            return F.pixel_unshuffle(x, 2) + self.stem(x)

    said = "what meets a map that grows must lie at positions that are known, got aten::add in the model's own forward"
    with pytest.raises(ValueError, match=f"^stride_to_dilation: {said}"):
        stride_to_dilation(Unshuffled(), 1)


def test_a_layer_that_is_lengthened_already_is_not_changed_again():
    once = stride_to_dilation(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 2, 8)), 4)
    assert once[1].stride == (2, 2)
    with pytest.raises(ValueError, match=r"^stride_to_dilation: Conv2d '1' must come from the network as it was before any"):
        stride_to_dilation(once, 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    ("net", "said"),
    [
        (
            lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1))),
            "the model must run on example_input",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.LazyConv2d(4, 3)), "the model must be one that copy.deepcopy can copy"),
    ],
)
def test_what_takes_no_hooks_or_no_copy_is_refused(net, said):
    with pytest.raises(ValueError, match=f"^stride_to_dilation: {said}.*, got "):
        stride_to_dilation(net(), example_input=torch.ones(1, 3, 8, 8))


def test_a_layer_with_two_names_changes_under_both():
    pool = nn.AvgPool2d(3, 1, 1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), pool, nn.Conv2d(4, 4, 3, padding=1), nn.Sequential(pool)).double()
    x = torch.randn(1, 3, 21, 18).double()
    dilated = stride_to_dilation(net, 1)
    assert dilated[1] is dilated[3][0]
    torch.testing.assert_close(taken(dilated(x), 2), net(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "dressed",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: nn.utils.weight_norm(Standardised(layer.in_channels, layer.out_channels, 3, layer.stride, 1)),
    ],
)
def test_weights_that_are_computed(dressed, inplace):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(*map(dressed, layers)).double().eval()
    x = torch.randn(1, 3, 21, 18).double()
    expected = net(x)
    torch.testing.assert_close(taken(stride_to_dilation(net, 2, inplace=inplace)(x), 2), expected)


def test_indices_of_channels_and_flipped_colours():
    net = nn.Conv2d(3, 5, 3, 2, 1).double()
    x = torch.randn(1, 3, 21, 18).double()

    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.flip(1)).argmax(1, keepdim=True)

    assert torch.equal(taken(stride_to_dilation(Labels(), 1)(x), 2), Labels()(x))


def test_what_training_alone_calls_is_named():
    net = Own(lambda m, x: (m.last(x), m.auxiliary(x)) if m.training else m.last(x), last=nn.Conv2d(4, 4, 1))
    net.auxiliary = nn.Sequential(nn.Conv2d(4, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1))
    assert dilation_plan(net, 1).notes == ("not called in evaluation, and left as they are: auxiliary.0, auxiliary.2",)
    assert dilation_plan(net, 2).notes == ()
    separable = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), ours.DepthwiseSeparableConv2d(4, 4, 3, padding=1))
    assert dilation_plan(separable, 1).notes == ()


def test_branches_that_would_part_are_refused():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.three, self.two = nn.Conv2d(3, 4, 3, 3, 1), nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, x):
            return self.three(x)[..., :8, :8] + self.two(x)[..., :8, :8]

    said = "the maps that meet in aten::add in the model's own forward must lie at the same positions, got strides"
    with pytest.raises(ValueError, match=f"^stride_to_dilation: {said}"):
        stride_to_dilation(Fork(), 4)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: stride_to_dilation("net"), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: stride_to_dilation(nn.Identity(), 8.0), TypeError, r"output_stride must be an int, got 8\.0"),
        (lambda: stride_to_dilation(nn.Identity(), 0), ValueError, "output_stride must be at least 1, got 0"),
        (lambda: stride_to_dilation(nn.Linear(3, 3)), ValueError, "example_input must be given for a model without convolution"),
        (lambda: stride_to_dilation(nn.Conv2d(3, 3, 1), example_input=3), TypeError, "example_input must be a Tensor or a tuple"),
        (
            lambda: stride_to_dilation(nn.Conv2d(3, 3, 1), example_input=torch.ones(1, 4, 8, 8)), ValueError,
            "the model must run on example_input, got RuntimeError",
        ),
    ],
)  # fmt: skip
def test_a_wrong_call_is_said(call, error, said):
    with pytest.raises(error, match=f"^stride_to_dilation: {said}"):
        call()


def test_several_inputs_and_words():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, 2, 1)

        def forward(self, x, scale, *, shift=0):
            return self.conv(x) * scale + shift

    x = torch.randn(1, 2, 9, 9)
    dilated = stride_to_dilation(Both(), 1, example_input=(x, 2.0))
    assert dilated(x, 2.0).shape == (1, 2, 9, 9)


def torchvision_models():
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # a build for another torch raises RuntimeError
        pytest.skip(f"torchvision: {error}")
    return torchvision.models


def test_settings_are_torchvisions_where_it_has_them():
    models = torchvision_models()
    with torch.device("meta"):
        net, theirs = models.resnet50(), models.resnet50(replace_stride_with_dilation=[False, True, True])
    mine = stride_to_dilation(net, 8)
    for (name, a), (other, b) in zip(mine.named_modules(), theirs.named_modules(), strict=True):
        assert name == other
        if isinstance(a, (nn.Conv2d, nn.MaxPool2d)):
            assert (a.stride, a.dilation, a.padding) == (b.stride, b.dilation, b.padding), name


@pytest.mark.parametrize(
    "name", ["resnet18", "resnext50_32x4d", "mobilenet_v2", "regnet_x_400mf", "densenet121", "shufflenet_v2_x0_5"]
)
def test_torchvisions_networks(name):
    torch.manual_seed(0)
    net = random_(getattr(torchvision_models(), name)().double().eval())
    net.fc = net.classifier = nn.Identity()
    tapped = "avgpool" if hasattr(net, "avgpool") else "features" if hasattr(net, "features") else "conv5"
    check_hidden(net, net.get_submodule(tapped), "input" if tapped == "avgpool" else "output")


@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "convnext_atto", "regnetx_002", "mobilenetv2_100"])
def test_timms_networks(name):
    torchvision_models()  # timm imports it
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = random_(timm.create_model(name, num_classes=0, global_pool="").double().eval())
    check_hidden(net, net, "output")


def check_hidden(net, module, which):
    name = next(key for key, m in net.named_modules() if m is module)
    dilated = stride_to_dilation(net, 8)
    found = {}
    for which_net in (net, dilated):
        layer = which_net.get_submodule(name)
        handle = layer.register_forward_hook(lambda m, x, y, n=which_net: found.update({n: x[0] if which == "input" else y}))
        with torch.no_grad():
            torch.manual_seed(1)
            which_net(torch.randn(1, 3, 97, 64, dtype=torch.float64))
        handle.remove()
    old, new = found[net], taken(found[dilated], 4)
    assert (new - old).abs().max() <= 1e-11 * old.abs().max()
