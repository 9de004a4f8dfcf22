"""Every technique as layers and functions of the library, as torch's modules, and as plain calls of functions: the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from omniconv import _native
from omniconv.analysis import cost, flop_formulas
from omniconv.functional import causal_conv1d_fn, causal_conv1d_update
from omniconv.nn import DeformConv2d
from omniconv.techniques import parse
from omniconv.testing import make_inputs

try:
    from torchvision import ops as vision
except (ImportError, OSError, RuntimeError):  # a torchvision that was built for another torch
    vision = None


class Unfolded(nn.Module):
    """Dynamic as it is written by hand: a linear map makes the kernels, products with windows apply them."""

    def __init__(self, channels, heads, taps):
        super().__init__()
        self.projection, self.heads, self.taps = nn.Linear(channels, heads * taps), heads, taps
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        n, c, t = x.shape
        kernels = self.projection(x.transpose(1, 2)).view(n * t * self.heads, self.taps, 1).softmax(1)
        windows = F.pad(x, (self.taps // 2, self.taps // 2)).unfold(2, self.taps, 1)
        windows = windows.transpose(1, 2).reshape(n * t * self.heads, c // self.heads, self.taps)
        return torch.bmm(windows, kernels).view(n, t, c).transpose(1, 2) + self.bias[:, None]


class Repeated(nn.Module):
    """Lightweight as a depthwise convolution of kernels that are repeated."""

    def __init__(self, channels, heads, taps):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(heads, taps)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        c, (heads, taps) = x.shape[1], self.weight.shape
        kernels = self.weight.softmax(1).repeat_interleave(c // heads, 0).unsqueeze(1)
        return F.conv1d(x, kernels, self.bias, padding=taps // 2, groups=c)


def column_and_row(i, m, o, k, p):
    return nn.Sequential(nn.Conv2d(i, m, (k, 1), padding=(p, 0), bias=False), nn.Conv2d(m, o, (1, k), padding=(0, p)))


def filtered_and_mixed(i, o, k, p):
    return nn.Sequential(nn.Conv2d(i, i, k, padding=p, groups=i), nn.Conv2d(i, o, 1))


TORCHS = {
    "standard2d n2 c6-8 i9x7 k3 p1 s2": lambda: nn.Conv2d(6, 8, 3, 2, 1),
    "standard3d n1 c2-3 i5 k3 p1": lambda: nn.Conv3d(2, 3, 3, padding=1),
    "dilated2d n2 c6-8 i9 k3 d2 p2": lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2),
    "dilated1d n2 c6-8 i9 k4 d2 psame": lambda: nn.Conv1d(6, 8, 4, padding="same", dilation=2),
    "transposed2d n2 c6-8 i5 k4 s2 p1 g2": lambda: nn.ConvTranspose2d(6, 8, 4, 2, 1, groups=2),
    "transposed1d n2 c6-8 i5 k3 s2 op1 p1": lambda: nn.ConvTranspose1d(6, 8, 3, 2, 1, output_padding=1),
    "separable2d n2 c6-8 i9 k5 p2 m4": lambda: column_and_row(6, 4, 8, 5, 2),
    "depthwise2d n2 c6 i9 k3 p1 m2": lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "depthwise1d n2 c6 i9 k4 p3+0": lambda: nn.Sequential(nn.ConstantPad1d((3, 0), 0.0), nn.Conv1d(6, 6, 4, groups=6)),
    "pointwise2d n2 c6-8 i9 s2": lambda: nn.Conv2d(6, 8, 1, 2),
    "depthwise_separable2d n2 c6-8 i9 k3 p1": lambda: filtered_and_mixed(6, 8, 3, 1),
    "grouped2d n2 c6-8 i9 k3 p1 g2": lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "standard2d n2 c6-8 i9 k3 p1 mode:reflect": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "lightweight1d n2 c6 i9 k3 h2 psame": lambda: Repeated(6, 2, 3),
}


def numbers(found):
    return found.params, found.macs_dense, found.macs_valid


@pytest.mark.parametrize("text", TORCHS)
@pytest.mark.parametrize("backward", [False, True])
def test_layer_problem_and_torchs_modules(text, backward):
    technique, problem = parse(text)
    x = torch.empty(technique.operands(problem)["input"].shape, requires_grad=backward)
    ours = cost(technique.layer(problem), x, backward=backward)
    torchs = cost(TORCHS[text](), x, backward=backward)
    written = cost(text)
    record = technique.cost(problem)
    assert numbers(ours) == numbers(torchs) == numbers(written) == (record.params, record.macs_dense, record.macs_valid)
    assert not ours.coverage.unknown
    assert not torchs.coverage.unknown
    if backward:
        assert (ours.backward.macs_dense, ours.backward.macs_valid) == (torchs.backward.macs_dense, torchs.backward.macs_valid)
        assert ours.backward.macs_dense == 2 * ours.macs_dense
    if problem.padding_mode != "zeros":
        assert ours.macs_valid == ours.macs_dense
    (name,) = {row.technique for row in ours.rows if row.macs_dense}
    assert name == technique.name
    counted = {row.technique for row in torchs.rows if row.macs_dense}
    assert counted <= {technique.name, "standard", "depthwise", "pointwise"}


@pytest.mark.parametrize("text", TORCHS)
@pytest.mark.parametrize("wanted", ["input", "parameters", "first parameter", "bias"])
def test_only_the_gradients_that_are_wanted(text, wanted):
    technique, problem = parse(text)
    x = torch.empty(technique.operands(problem)["input"].shape, requires_grad=wanted == "input")
    found = []
    for layer in (technique.layer(problem), TORCHS[text]()):
        parameters = [p for _, p in sorted(layer.named_parameters(), key=lambda item: item[0].endswith("bias"))]
        for p in parameters:
            p.requires_grad_(wanted == "parameters")
        if wanted == "first parameter":
            parameters[0].requires_grad_()
        if wanted == "bias":
            parameters[-1].requires_grad_()
        found.append(cost(layer, x, backward=True))
    ours, torchs = found
    assert (ours.backward.macs_dense, ours.backward.macs_valid) == (torchs.backward.macs_dense, torchs.backward.macs_valid)
    assert (ours.backward.macs_dense > 0) == (wanted != "bias")


@pytest.mark.parametrize("text", TORCHS)
def test_functions_of_the_library(text):
    """On operands that are no parameters, as a generated weight is."""
    technique, problem = parse(text)
    operands = {name: x.requires_grad_() for name, x in make_inputs(technique, problem).items()}
    made = cost(lambda **given: technique.call(problem, given), backward=True, **operands)
    layer = technique.cost(problem)
    assert numbers(made) == (0, layer.macs_dense, layer.macs_valid)
    assert made.backward.macs_dense == 2 * made.macs_dense
    (row,) = [row for row in made.rows if row.macs_dense]
    assert (row.technique, row.op.split("::")[0]) == (technique.name, "omniconv")
    assert technique.name in row.problem.technique
    assert row.problem.technique == technique.name
    assert technique.cost(row.problem).macs_valid == made.macs_valid


@pytest.mark.parametrize("backward", [False, True])
def test_dynamic_by_hand(backward):
    technique, problem = parse("dynamic1d n2 c6 i9 k3 h2 psame")
    x = torch.empty(2, 6, 9, requires_grad=backward)
    ours, by_hand = cost(technique.layer(problem), x, backward=backward), cost(Unfolded(6, 2, 3), x, backward=backward)
    assert (ours.params, ours.macs_dense) == (by_hand.params, by_hand.macs_dense) == (6 * 6 + 6 + 6, 2 * 9 * (6 * 6 + 6 * 3))
    assert ours.macs_valid == 2 * (9 * 36 + 6 * (9 * 3 - 2))
    if backward:
        assert ours.backward.macs_dense == by_hand.backward.macs_dense == 2 * ours.macs_dense


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: x @ w.t(),
        lambda x, w: torch.einsum("ntc,oc->nto", x, w),
        lambda x, w: torch.bmm(x, w.t().expand(2, 6, 8)),
        lambda x, w: torch.baddbmm(torch.zeros(8), x, w.t().expand(2, 6, 8)),
        lambda x, w: torch.addmm(torch.zeros(8), x.reshape(18, 6), w.t()),
        lambda x, w: F.conv1d(x.transpose(1, 2), w.unsqueeze(2)),
        lambda x, w: F.unfold(x.transpose(1, 2).unsqueeze(2), 1).transpose(1, 2) @ w.t(),
    ],
)
def test_a_pointwise_product_in_many_words(product):
    x, w = torch.empty(2, 9, 6, requires_grad=True), torch.empty(8, 6, requires_grad=True)
    found = cost(product, x, w, backward=True)
    assert found.macs_dense == found.macs_valid == 2 * 9 * 6 * 8
    assert found.backward.macs_dense == 2 * found.macs_dense
    assert not found.coverage.unknown


@pytest.mark.parametrize("backward", [False, True])
def test_attention(backward):
    q, k, v = (torch.empty(2, 3, n, 8, requires_grad=backward) for n in (5, 7, 7))
    found = cost(F.scaled_dot_product_attention, q, k, v, backward=backward)
    assert found.macs_dense == 2 * 3 * 5 * 7 * (8 + 8)
    assert not found.coverage.unknown
    if backward:
        assert found.backward.macs_dense in (2 * found.macs_dense, 2 * found.macs_dense + found.macs_dense // 2)


def test_attention_layers_take_no_shortcut():
    """The fast path of evaluation is one op that hides the products."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    found = cost(layer, torch.empty(3, 5, 16))
    assert found.macs_dense == 3 * (5 * (16 * 48 + 16 * 16 + 2 * 16 * 32) + 2 * 5 * 5 * 16)
    assert not found.coverage.unknown
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.skipif(vision is None, reason="torchvision is not there, or does not load")
@pytest.mark.parametrize(("groups", "offset_groups", "masked"), [(1, 1, True), (2, 2, False), (1, 2, True)])
def test_deformable_is_torchvisions(groups, offset_groups, masked):
    x = torch.empty(2, 8, 10, 9, requires_grad=True)
    offset = torch.empty(2, 18 * offset_groups, 10, 9, requires_grad=True)
    mask = torch.empty(2, 9 * offset_groups, 10, 9, requires_grad=True) if masked else None
    theirs = cost(vision.DeformConv2d(8, 12, 3, padding=1, groups=groups), x, offset, mask, backward=True)
    layer = DeformConv2d(8, 12, 3, padding=1, groups=groups, offset_groups=offset_groups, offset="external")
    ours = cost(layer, x, offset, mask, backward=True)
    assert numbers(ours) == numbers(theirs)
    assert ours.flops == theirs.flops
    assert ours.backward.macs_dense == theirs.backward.macs_dense == 2 * ours.macs_dense
    assert [row.problem for row in ours.rows] == [row.problem for row in theirs.rows if row.problem]


def test_deformable_by_hand():
    layer = DeformConv2d(8, 12, 3, padding=1, groups=2, offset_groups=2)
    found = cost(layer, torch.empty(2, 8, 10, 9, requires_grad=True), backward=True)
    offset, main = 90 * 8 * 54 * 9, 90 * 8 * 12 * 9 // 2
    assert found.macs_dense == 2 * (offset + main)
    assert found.backward.macs_dense == 2 * found.macs_dense
    row = next(row for row in found.rows if row.technique == "deformable")
    assert row.flops == 2 * (2 * main + 9 * 90 * 8 * 9 + 90 * 12)
    assert row.status["macs_valid"] == "estimate"  # at the places of the grid
    assert row.bytes_impl > row.bytes_min


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_torchs_counter_with_our_formulas(groups, kind):
    layer, x = kind(8, 8, 3, padding=1, groups=groups), torch.ones(2, 8, 6, 6, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 36 * 8 * 8 * 9 // groups)


@pytest.mark.skipif(not _native.AVAILABLE, reason="no native ops")
def test_every_native_op_is_in_torchs_counter():
    ours = {s.name.removeprefix("omniconv::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("omniconv::")}
    counted = {str(op).removeprefix("omniconv.") for op in flop_registry if str(op).startswith("omniconv.")}
    drawn = {"dynamic_dropout_scale"}  # random bits
    assert not {name for name in ours - counted - drawn if name.startswith(("depthwise", "dynamic", "lightweight", "pointwise"))}


def test_causal_convolutions_by_hand():
    """Of 10 outputs the first three miss 3, 2 and 1 of 4 taps; with a state none is missed."""
    x, weight, state = torch.ones(2, 6, 10), torch.ones(6, 4), torch.ones(2, 6, 3)
    whole = cost(causal_conv1d_fn, x.requires_grad_(), weight.requires_grad_(), backward=True)
    step = cost(causal_conv1d_update, torch.zeros(2, 6), state, weight)
    assert (whole.macs_dense, whole.macs_valid, whole.backward.macs_dense) == (2 * 6 * 40, 2 * 6 * 34, 2 * 480)
    assert (step.macs_dense, step.macs_valid) == (2 * 6 * 4, 2 * 6 * 4)
    assert torch.equal(state, torch.ones(2, 6, 3))
