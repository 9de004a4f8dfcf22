"""What cannot be dilated is refused by name and left as it was; what needs care: names, hooks, computed weights."""

import pytest
import torch
import torch.nn.functional as F
from dilated_networks import Own, PadsItself, Standardised, taken
from torch import nn
from torch.nn.utils import prune

import omniconv.nn as ours
from omniconv.surgery import dilation_plan, stride_to_dilation


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
