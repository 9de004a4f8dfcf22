import torch

from omniconv.functional import conv2d, grouped_conv2d
from omniconv.nn import GroupedConv1d, GroupedConv2d
from omniconv.techniques import find, parse


def test_is_a_standard_convolution_with_a_block_diagonal_weight():
    x, w = torch.randn(2, 6, 5, 5, dtype=torch.float64), torch.randn(9, 2, 3, 3, dtype=torch.float64)
    whole = torch.zeros(9, 6, 3, 3, dtype=torch.float64)
    for g in range(3):
        whole[3 * g : 3 * g + 3, 2 * g : 2 * g + 2] = w[3 * g : 3 * g + 3]
    torch.testing.assert_close(grouped_conv2d(x, w, padding=1, groups=3), conv2d(x, whole, padding=1), rtol=1e-12, atol=1e-12)


def test_costs_one_gth():
    grouped, problem = parse("grouped2d c32-64 i14 k3 psame g4")
    dense = find("standard").cost(problem.replace(technique="standard", groups=1), bias=False)
    cost = grouped.cost(problem, bias=False)
    assert (4 * cost.params, 4 * cost.macs_dense, 4 * cost.macs_valid) == (dense.params, dense.macs_dense, dense.macs_valid)


def test_shuffle_deals_the_channels_round_the_groups():
    layer = GroupedConv1d(6, 6, 1, groups=3, shuffle=True, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2).repeat(3, 1).unsqueeze(-1))  # every group passes its two channels through
    x = torch.arange(6.0).view(1, 6, 1)
    assert layer(x).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert layer(x[0]).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_two_shuffled_layers_see_every_group():
    x = torch.ones(1, 4, 3, 3, requires_grad=True)
    for shuffle, seen in ((False, 2), (True, 4)):
        layers = torch.nn.Sequential(*(GroupedConv2d(4, 4, 1, groups=2, shuffle=shuffle) for _ in range(2)))
        with torch.no_grad():
            for p in layers.parameters():
                p.fill_(1.0)
        (gradient,) = torch.autograd.grad(layers(x)[0, 0, 0, 0], x)
        assert int((gradient[0, :, 0, 0] != 0).sum()) == seen


def test_state_dict_is_torchs():
    torch.nn.Conv2d(4, 8, 3, groups=2).load_state_dict(GroupedConv2d(4, 8, 3, groups=2).state_dict(), strict=True)
