"""Receptive fields against numbers from papers and by hand; phases, paths, gridding; what is not understood; what is left alone."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from field_networks import NETWORKS, Gated, Residual, Unruled, bottleneck, chain, conv, pool, unit
from torch import nn
from typer.testing import CliRunner

from omniconv import nn as house
from omniconv.analysis.receptive_field import field_report, overlap, receptive_field, receptive_fields
from omniconv.analysis.receptive_field.seen import Seen, TooLargeError
from omniconv.cli import app
from omniconv.functional import conv_transpose1d, deform_conv2d


def resnet(blocks, at_first=False, basic=False):
    """ResNet's map before its pooling."""

    def basic_block(i, o, s=1):
        skip = nn.Conv2d(i, o, 1, s) if s > 1 or i != o else None
        return lambda: Residual(nn.Sequential(unit(i, o, 3, s), unit(o, o)), skip)

    layers, channels = [conv(3, 4, 7, 2), pool(3, 2, 1)], 4
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage and not block else 1
            layers.append(basic_block(channels, 4, stride) if basic else bottleneck(channels, 8, stride, at_first=at_first))
            channels = 4 if basic else 8
    return chain(*layers)()


def vgg16():
    """VGG-16's features."""
    layers, channels = [], 3
    for count in (2, 2, 3, 3, 3):
        for _ in range(count):
            layers += [nn.Conv2d(channels, 2, 3, padding=1), nn.ReLU()]
            channels = 2
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


# Araujo, Norris, Sim 2019, "Computing receptive fields of convolutional neural networks", Distill: table of fields and strides
PUBLISHED = {
    "vgg 16": (vgg16, 212, 32),
    "resnet 50, first version": (lambda: resnet((3, 4, 6, 3), at_first=True), 483, 32),
    "resnet 101, first version": (lambda: resnet((3, 4, 23, 3), at_first=True), 1027, 32),
    "resnet 18": (lambda: resnet((2, 2, 2, 2), basic=True), 435, 32),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.exhaustive if "101" in n else ()) for n in PUBLISHED])
def test_published_fields_are_reproduced(name):
    build, size, stride = PUBLISHED[name]
    field = receptive_field(build().eval(), torch.empty(1, 3, 224, 224))
    assert (field.size, field.jump, field.status) == ((size, size), (stride, stride), "exact")
    assert field.window.mask.shape == (224, 224) or size < 224  # clipped to what is there


def test_a_layer_and_its_window_by_hand():
    """k3 s2 p1: output p sees 2p − 1, 2p, 2p + 1; the first one's left neighbour is a pad."""
    field = receptive_field(nn.Conv1d(1, 1, 3, 2, 1), torch.empty(1, 1, 9), position=(0,))
    assert (field.size, field.jump, field.offset, field.centre) == ((3,), (2.0,), (-1.0,), (0.0,))
    assert (field.window.start, field.window.stop) == ((0,), (2,))


@pytest.mark.parametrize(("kernel", "stride", "sizes"), [(4, 2, (2, 2)), (3, 2, (2, 1)), (5, 3, (2, 2, 1)), (2, 2, (1, 1))])
def test_every_phase_of_a_transposed_convolution(kernel, stride, sizes):
    """By hand: output p is reached by the taps t with p ≡ t (mod S)."""
    field = receptive_field(nn.ConvTranspose1d(1, 1, kernel, stride), torch.empty(1, 1, 9))
    assert field.jump == (float(Fraction(1, stride)),)
    assert tuple(p.size for p in field.phases[0]) == sizes
    assert field.size == (max(sizes),)
    for phase, found in enumerate(field.phases[0]):
        reads = [(phase + 9 * stride - t) // stride for t in range(kernel) if (phase - t) % stride == 0]
        assert min(reads) == phase / stride + 9 + found.offset


def test_a_u_net_has_as_many_phases_as_its_floor_is_coarse():
    build, shape = NETWORKS["u-net, nearest"]
    field = receptive_field(build().eval(), torch.empty(shape))
    assert [len(axis) for axis in field.phases] == [4, 4]
    assert field.jump == (1.0, 1.0)
    assert field.size == tuple(max(p.size for p in axis) for axis in field.phases)


def test_paths_are_counted_exactly():
    """Three 3×3 in a row: the trinomial coefficients (1 + x + x²)³ along each axis; a shortcut adds its own."""
    field = receptive_field(chain(*[conv(1, 3), conv(3, 2), conv(2, 1)])(), torch.empty(1, 1, 16, 16))
    row = np.array([1, 3, 6, 7, 6, 3, 1], float)
    assert np.array_equal(field.paths, np.outer(row, row))
    added = receptive_field(Residual(conv(2, 2)()), torch.empty(1, 2, 9, 9))
    assert added.paths.tolist() == [[1, 1, 1], [1, 2, 1], [1, 1, 1]]
    assert np.array_equal(field.mask, field.paths > 0)


def test_deep_counts_do_not_overflow_nor_vanish():
    """3^400 paths to all, about 10^189 to the middle and one to the end; in an input of 8 · 65 positions it would be cut."""
    field = receptive_field(chain(*[conv(1, 1, rank=1)] * 400)(), torch.empty(1, 1, 8))
    assert field.size == (801,)
    assert field.mask.all()
    assert np.isfinite(field.paths).all()


def dilations(*steps):
    return chain(*[conv(1, 1, d=d) for d in steps])()


def test_holes_and_their_score():
    """FORMULAS: dilations (2, 2, 2) touch 49 of 169 positions, (1, 2, 5) all 289."""
    x = torch.empty(1, 1, 40, 40)
    bad, good = receptive_field(dilations(2, 2, 2), x), receptive_field(dilations(1, 2, 5), x)
    assert (int(bad.mask.sum()), bad.mask.size, int(good.mask.sum()), good.mask.size) == (49, 169, 289, 289)
    assert bad.gridding == pytest.approx(1 - 49 / 169)
    assert (bad.unevenness, good.gridding) == (1.0, 0.0)
    assert good.unevenness < 0.2
    # layers of less dilation behind even it out (Yu et al. 2017)
    assert receptive_field(dilations(2, 4, 2, 1), x).unevenness < receptive_field(dilations(2, 4), x).unevenness


def test_unevenness_by_hand():
    """Paths 1 2 1 | 1 2 1 of a 2×3 box: neighbours differ by 1 four times, sum to 3 four times, and to 2, 4, 2 across."""
    field = receptive_field(Cross23(), torch.empty(1, 1, 12, 12))
    assert field.paths.tolist() == [[1, 2, 1], [1, 2, 1]]
    assert field.unevenness == pytest.approx(4 / (12 + 8))


class Cross23(nn.Module):
    """A 2×3 window and a 2×1 window on its middle."""

    def __init__(self):
        super().__init__()
        self.wide, self.tall = nn.Conv2d(1, 1, (2, 3), padding=(0, 1)), nn.Conv2d(1, 1, (2, 1))

    def forward(self, x):
        return self.wide(x) + self.tall(x)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "extra", "dilation"),
    [(5, 4, 2, 1, 0, 1), (5, 3, 2, 1, 1, 1), (4, 5, 3, 1, 2, 1), (6, 3, 2, 0, 0, 2), (4, 2, 3, 0, 0, 1), (5, 6, 3, 2, 0, 1)],
)
def test_overlap_is_a_transposed_convolution_of_ones(size, kernel, stride, padding, extra, dilation):
    found = overlap(size, kernel, stride, padding, extra, dilation)
    ones = torch.ones(1, 1, size, size), torch.ones(1, 1, kernel, kernel)
    expected = F.conv_transpose2d(*ones, None, stride, padding, extra, 1, dilation)[0, 0]
    assert found.counts.tolist() == expected.int().tolist()
    middle = F.conv_transpose2d(torch.ones(1, 1, 30, 30), ones[1], None, stride, 0, 0, 1, dilation)[0, 0, 40:46, 40:46]
    assert (found.fewest, found.most) == (int(middle.min()), int(middle.max()))
    assert found.even == (found.fewest == found.most)


def test_overlap_with_the_paddings_by_name():
    x, weight = torch.ones(1, 1, 6), torch.ones(1, 1, 5)
    for padding in ("same", "causal", "valid"):
        expected = conv_transpose1d(x, weight, None, 2, padding)[0, 0]
        assert overlap(6, 5, 2, padding, rank=1).counts.tolist() == expected.int().tolist()


# what sees everything, and what does not


def test_what_sees_everything_is_named_and_can_be_left_out():
    network = nn.Sequential(conv(1, 4)(), Gated(4), conv(4, 4)()).eval()
    field = receptive_field(network, torch.empty(1, 1, 20, 20))
    assert field.size == (None, None)
    assert [(p.op, p.module) for p in field.sees_everything] == [("aten::mean", "1.squeeze.0")]
    local = receptive_field(network, torch.empty(1, 1, 20, 20), local=True)
    assert (local.size, local.sees_everything) == ((5, 5), ())
    assert local.notes == ("1 ops that see everything are left out",)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)])
def test_normalisations(norm):
    network = nn.Sequential(conv(1, 4)(), norm, conv(4, 4)())
    x = torch.empty(2, 1, 20, 20)
    assert receptive_field(network.train(), x).size == (None, None)
    assert receptive_field(network.eval(), x).size == ((5, 5) if isinstance(norm, nn.BatchNorm2d) else (None, None))
    assert receptive_field(network.train(), x, local=True).size == (5, 5)


def test_training_batch_norm_equals_the_gradient():
    network = nn.Sequential(conv(1, 2, s=2)(), nn.BatchNorm2d(2), conv(2, 2)()).double().train()
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64, requires_grad=True)
    y = network(x)
    (y[:1, :, 3, 3] * torch.randn(1, 2, dtype=torch.float64)).sum().backward()
    field = receptive_field(network, x.detach(), position=(3, 3))
    assert np.array_equal(field.window.mask, (x.grad.abs().sum((0, 1)) > 0).numpy()[: field.window.stop[0], : field.window.stop[1]])


def test_attention_over_one_axis_leaves_the_other_local():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            t = self.conv(x).permute(0, 2, 3, 1)  # N, H, W, C: every row attends to itself
            return (t @ t.transpose(-2, -1)).softmax(-1) @ t

    field = receptive_field(Rows(), torch.empty(1, 1, 12, 12))
    assert (field.size, field.status) == ((3, None), "exact")


# deformable


def test_a_fresh_deformable_layer_sees_what_its_gradient_reaches():
    """Offsets are zero until trained: the least that it can see, and said to be that."""
    layer = house.DeformConv2d(2, 3, 3, 2, 1, 2, offset_groups=2).double()
    x = torch.rand(1, 2, 17, 15, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
    field = receptive_field(layer, x.detach(), position=(3, 4))
    layer(x)[:, :, 3, 4].sum().backward()
    expected = (x.grad.abs().sum((0, 1)) > 0).nonzero()
    assert field.status == "lower_bound"
    assert [(p.op, p.what) for p in field.not_understood] == [
        ("omniconv::deform_conv2d", "its taps are taken where they lie with offsets of zero")
    ]
    assert (np.argwhere(field.window.mask) + field.window.start).tolist() == expected.tolist()
    assert (field.size, field.jump) == ((5, 5), (2.0, 2.0))


def test_offsets_are_seen_through():
    """Offsets made by a wide convolution widen the field of a narrow one; given from outside, they are another input."""

    def network(x, offset):
        return deform_conv2d(x, offset, torch.ones(1, 1, 3, 3), padding=1)

    x, offset = torch.empty(1, 1, 20, 20), torch.empty(1, 18, 20, 20)
    assert receptive_field(network, x, offset).size == (3, 3)
    assert receptive_field(network, x, offset, wrt=1).size == (1, 1)
    wide = nn.Conv2d(1, 18, 7, padding=3)
    assert receptive_field(lambda x: network(x, wide(x)), x).size == (7, 7)


# what is not understood


@torch.library.custom_op("fieldtest::blur", mutates_args=())
def blur(x: torch.Tensor) -> torch.Tensor:
    return x + x.roll(1, -1)


@blur.register_fake
def _(x):
    return torch.empty_like(x)


class Unknown(nn.Module):
    """One path is a convolution, the other an op that nobody knows."""

    def __init__(self):
        super().__init__()
        self.conv, self.blur = nn.Conv2d(1, 1, 3, padding=1), Blur()

    def forward(self, x):
        return self.conv(x) + self.blur(x)


class Blur(nn.Module):
    def forward(self, x):
        return blur(x)


def test_an_unknown_op_is_named_and_the_rest_a_lower_bound():
    field = receptive_field(Unknown(), torch.empty(1, 1, 12, 12))
    assert field.status == "lower_bound"
    assert [(p.op, p.module) for p in field.not_understood] == [("fieldtest::blur", "blur")]
    assert field.size == (3, 3)


def test_an_unknown_op_off_the_way_does_no_harm():
    network = nn.ModuleDict({"a": nn.Conv2d(1, 1, 3), "b": Blur()})
    assert receptive_field(lambda x: (network["a"](x), network["b"](x)), torch.empty(1, 1, 9, 9)).status == "exact"


def test_indices_of_the_data_are_not_understood():
    field = receptive_field(lambda x: x.gather(-1, x.argsort(-1)), torch.empty(1, 1, 9, 9))
    assert field.status == "lower_bound"


def test_a_network_that_asks_for_numbers_runs_with_data():
    def network(x):
        return F.avg_pool2d(x, 3) * (2.0 if x.sum().item() > 0 else 1.0)

    field = receptive_field(network, torch.empty(1, 1, 30, 30))
    assert field.size == (3, 3)
    assert any("run with data" in note for note in field.notes)


def test_what_does_not_depend_on_the_input_sees_nothing():
    field = receptive_field(lambda x: torch.zeros_like(x), torch.empty(1, 1, 9, 9))
    assert (field.size, field.coverage) == ((0, 0), 0.0)
    assert "the output does not depend on the input" in field.notes


# errors, and what is left alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"of": "nowhere"}, "must have the module asked for, got 'nowhere'"),
        ({"of": "0.bod"}, r"got '0.bod' \(near: '0.body'\)"),
        ({"of": 3}, "the output must have tensor 3, got 1"),
        ({"position": (1, 2, 3)}, r"one index for each of the output's sizes \(9, 9\), got \(1, 2, 3\)"),
        ({"position": (9, 0)}, r"one index for each of the output's sizes \(9, 9\), got \(9, 0\)"),
        ({"wrt": 2}, "wrt must name one of 1 input tensors, got 2"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=f"receptive_field: .*{message}"):
        receptive_field(nn.Sequential(Residual(conv(1, 1)())), torch.empty(1, 1, 9, 9), **settings)


class Fails(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


@pytest.mark.parametrize("last", [Fails, nn.Identity])
def test_the_model_is_left_as_it_was(last):
    network = nn.Sequential(conv(1, 2)(), nn.BatchNorm2d(2), nn.Dropout(), last()).train()
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    try:
        receptive_field(network, torch.empty(2, 1, 9, 9))
    except KeyboardInterrupt:
        assert last is Fails
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert torch.is_grad_enabled()


def test_only_what_is_asked_for_need_run():
    network = nn.Sequential(conv(1, 2)(), Fails())
    assert receptive_field(network, torch.empty(1, 1, 9, 9), of="0").size == (3, 3)


def test_layers_of_a_network_that_takes_one_size():
    network = nn.Sequential(conv(1, 2)(), pool()(), nn.Flatten(), nn.Linear(32, 3))
    fields = receptive_fields(network, torch.empty(1, 1, 8, 8))
    assert [f.size for f in fields] == [(3, 3), (4, 4), (4, 4), (8, 8)]
    assert fields[-1].status == "exact"
    assert "in an input of this size alone" in fields[-1].notes[0]


# the axes of counts


def test_counts_move_through_reshapes_as_numbers_do():
    """Every pair of shapes of 24 elements, counts anywhere: as if written out."""
    shapes = [(24,), (1, 24), (4, 6), (6, 4), (2, 3, 4), (4, 3, 2), (2, 2, 6), (3, 8), (1, 3, 1, 8), (24, 1), (2, 12)]
    generator = np.random.default_rng(0)
    for old, new in itertools.product(shapes, shapes):
        counts = generator.integers(0, 2, old).astype(float)
        seen = Seen.of(old, [0] * len(old), [False] * len(old), counts).trimmed()
        assert np.array_equal(seen.reshaped(new).dense().reshape(-1), counts.reshape(-1)), (old, new)
        lead = tuple(generator.integers(0, n) for n in old)
        one = Seen.at(old, [int(p) if generator.random() < 0.5 else None for p in lead])
        assert np.array_equal(one.reshaped(new).dense().reshape(-1), one.dense().reshape(-1)), (old, new)


def test_counts_of_very_different_size_add_up():
    def counts(*values):
        return Seen.of((2,), (0,), (False,), np.array(values))

    large, one = counts(2.0**700, 0.0), counts(0.0, 1.0)
    assert large.exponent > 0
    for total in (large.plus(one), one.plus(large)):
        assert (total.dense() > 0).all()
        assert total.dense()[0] * 2.0**total.exponent == 2.0**700
    assert large.plus(large).dense()[0] * 2.0 ** large.plus(large).exponent == 2.0**701
    far = Seen.of((2,), (0,), (False,), np.array([1.0, 0.0]), 2000)
    for total in (far.plus(one), one.plus(far)):
        assert total.exponent == 2000
        assert (total.dense() > 0).all()
        assert np.isfinite(total.dense()).all()
    larger = counts(2.0**700, 1e-300)
    assert (larger.dense() > 0).all()


def test_swapped_axes_have_no_jump():
    build, shape = NETWORKS["axes swapped"]
    field = receptive_field(build(), torch.empty(shape))
    assert (field.size, field.jump, field.offset) == ((3, 5), (None, None), (None, None))
    assert "depends on the position" in field.notes[0]


def test_a_roll_without_axes_moves_elements_from_row_to_row():
    field = receptive_field(lambda x: torch.roll(x, 7), torch.empty(1, 1, 9, 11), position=(4, 3))
    assert (field.window.start, field.window.stop) == ((3, 7), (4, 8))


def test_nothing_is_said_of_what_an_unknown_op_hides():
    field = receptive_field(Unruled(), torch.empty(1, 1, 9, 9))
    assert (field.status, [part.op for part in field.not_understood]) == ("lower_bound", ["aten::tril"])
    assert not any("does not depend" in note for note in field.notes)


def test_counts_too_large_for_memory_are_refused():
    with pytest.raises(TooLargeError, match="do not fit into memory"):
        Seen.at((1, 2**14, 2**14), (None, None, None)).boxed(1, 2)


# the command line


def run(*arguments):
    return CliRunner(env={"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}).invoke(app, ["receptive-field", *arguments])


def test_the_command_shows_every_layer(tmp_path):
    result = run("field_networks:small", "--input", "1x1x16x16")
    assert result.exit_code == 0, result.output
    assert "3 × 3" in result.output
    assert "output 0" in result.output
    for suffix in ("png", "svg", "json", "csv", "md"):
        assert run("field_networks:small", "--input", "1x1x16x16", "-o", str(tmp_path / f"a.{suffix}")).exit_code == 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dilated2d c1 i9 k3 d2", "--layer", "conv"], "receptive_field: the network must have the module asked for, got 'conv'"),
        (
            ["field_networks:Refusing", "--input", "1x1x9x9"],
            "receptive-field: the network must run on its example inputs, got RuntimeError: no way\n",
        ),
        (["dilated2d c1 i9 k3 d2", "--position", "3,4"], "receptive-field: the position must be one index per axis joined by x"),
        (["dilated2d c1 i9 k3 d2", "-o", "a.gif"], "receptive-field: the output file must end in"),
        (["dilated2d c1 i9 k3 d2", "--effective", "--samples", "-1"], "receptive-field: the samples must be at least 1, got -1"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_report_of_a_problem():
    report = field_report("separable2d c1 i20 k5 p2")
    assert report.layers[-1].size == (5, 5)
    assert report.effective is None
