"""Strides turned into dilation in whole networks: numbers at the old positions, state, copies; torchvision's and timm's."""

import copy
import pickle

import pytest
import torch
from dilated_networks import (
    NETWORKS,
    eighth,
    made,
    random_,
    taken,
)
from torch import nn

from omniconv.surgery import dilation_plan, stride_to_dilation


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
