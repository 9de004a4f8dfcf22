"""Cost against oracles: with ones for inputs and weights, the sum of a convolution is the number of its multiply-accumulates."""

from itertools import product
from math import prod
from operator import add

import pytest
import torch
import torch.nn.functional as F
from cases import all_cases, on, parameters_of, zero_offsets

from omniconv.analysis.cost.omniconv_ops import op_cost
from omniconv.ops.technique import Stage, chained_receptive_field
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, find, find_convolution, parse
from omniconv.testing import make_inputs

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SPREAD = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def counted(stage: Stage, real: bool) -> float:
    """The MACs of one sample by torch alone: all taps, or those on real inputs and kept outputs."""
    rank = len(stage.size)
    x = torch.ones(1, stage.in_channels, *stage.size, dtype=torch.float64)
    flat = [p for pair in reversed(stage.pads) for p in pair]
    if not stage.transposed:
        weight = torch.ones(stage.out_channels, stage.in_channels // stage.groups, *stage.kernel, dtype=torch.float64)
        x = F.pad(x, flat, value=0.0 if real else 1.0)
        return float(CONVOLVE[rank](x, weight, None, stage.stride, 0, stage.dilation, stage.groups).sum())
    weight = torch.ones(stage.in_channels, stage.out_channels // stage.groups, *stage.kernel, dtype=torch.float64)
    y = SPREAD[rank](x, weight, None, stage.stride, 0, 0, stage.groups, stage.dilation)
    if real:
        for axis, ((before, _), out) in enumerate(zip(stage.pads, stage.out, strict=True), start=2):
            y = y.narrow(axis, before, min(out, y.shape[axis] - before))
    return float(y.sum())


@on(all_cases())
def test_macs_stage_by_stage(technique, problem):
    for stage in technique.stages(problem):
        assert stage.macs_dense == counted(stage, real=False)
        assert stage.macs_valid == counted(stage, real=stage.padding_mode == "zeros")


@on(all_cases())
def test_stages_lead_from_the_input_to_the_output(technique, problem):
    """Those on the path: each takes what the one before it made, and their sizes are torch's."""
    path = [s for s in technique.stages(problem) if not s.side]
    at = (problem.channels, problem.size)
    for stage in path:
        assert (stage.in_channels + stage.bypass, stage.size) == at
        at = (stage.out_channels + stage.bypass, stage.out)
        assert not stage.bypass or stage.size == stage.out
    assert (problem.batch, at[0], *at[1]) == technique.output_shape(problem)
    for stage in technique.stages(problem):
        if not stage.transposed:
            sides = zip(stage.size, stage.pads, stage.kernel, stage.stride, stage.dilation, strict=True)
            assert stage.out == tuple(len(range(0, i + a + b - d * (k - 1), s)) for i, (a, b), k, s, d in sides)


@on([case for case in all_cases() if len([s for s in case[0].stages(case[1]) if not s.side]) == 1])
def test_the_op_does_what_is_counted(technique, problem):
    """Where one stage is the whole path: the op itself, linear, on ones, without offsets and bias."""
    ones = {n: torch.ones_like(x) for n, x in make_inputs(technique, problem.replace(dtype="f64")).items() if n != "bias"}
    y = technique.call(problem, zero_offsets(technique, problem, ones), **technique.linear)
    (stage,) = [s for s in technique.stages(problem) if not s.side]
    assert y.sum() == problem.batch * (stage.macs_valid + stage.bypassed)


@on(all_cases())
def test_totals_are_over_the_batch(technique, problem):
    stages, cost, bare = technique.stages(problem), technique.cost(problem), technique.cost(problem, bias=False)
    assert cost.macs_dense == problem.batch * sum(s.macs_dense for s in stages)
    assert cost.macs_valid == problem.batch * sum(s.macs_valid for s in stages)
    layer = technique.layer(problem)
    assert cost.params == sum(p.numel() for p in layer.parameters())
    assert bare.params == cost.params - sum(s.biases for s in stages)
    adds = problem.batch * sum(prod(s.out) * s.out_channels for s in stages if s.biases)
    assert cost.flops - bare.flops == adds
    extras = sum(problem.batch * s.flops + s.batch_flops for s in stages)
    assert cost.flops == 2 * cost.macs_dense + adds + extras
    size = torch.empty((), dtype=problem.torch_dtype).element_size()
    x = problem.batch * problem.channels * prod(problem.size)
    assert cost.bytes == size * (x + cost.params + prod(technique.output_shape(problem)))


@on([case for case in all_cases() if case[1].batch and case[1].padding_mode == "zeros"])
def test_receptive_field_is_the_support_of_the_gradient(technique, problem):
    """At an output inside a large input, with positive weights and no offsets: from the first input seen to the last."""
    cost = technique.cost(problem)
    wide = {
        "size": tuple(4 * f + 4 * s + 9 for f, s in zip(cost.receptive_field, problem.stride, strict=True)),
        "dtype": "f64",
        "batch": 1,
    }
    large = technique.check(problem.replace(**wide))
    operands = zero_offsets(technique, large, {n: x.abs() + 0.1 for n, x in make_inputs(technique, large).items()})
    x = operands["input"].requires_grad_()
    y = technique.call(large, operands)
    middle = tuple(n // 2 for n in y.shape[2:])
    widest = [0] * large.rank
    # neighbouring outputs of a transposed convolution differ in phase: the widest counts
    for shift in product(*map(range, large.stride)):
        (support,) = torch.autograd.grad(y[(0, 0, *map(add, middle, shift))], x, retain_graph=True)
        seen = support[0].abs().sum(0).nonzero()
        if len(seen):
            extent = (seen.max(0).values - seen.min(0).values + 1).tolist()
            widest = [max(a, b) for a, b in zip(widest, extent, strict=True)]
    assert tuple(widest) == cost.receptive_field


@on(all_cases())
def test_a_calls_arguments_make_its_problem(technique, problem):
    """With all arguments, and without those that are the op's own defaults."""
    arguments = {**make_inputs(technique, problem), **technique.arguments(problem)}
    defaults = {name: p.default for name, p in parameters_of(technique.ops[problem.rank]).items()}
    stages = technique.stages(problem)
    for given in (arguments, {n: v for n, v in arguments.items() if isinstance(v, torch.Tensor) or v != defaults[n]}):
        made = technique.check(technique.problem(problem.rank, given))
        assert technique.stages(made) == stages
        assert (made.batch, made.channels, made.dtype, made.rank) == (problem.batch, problem.channels, problem.dtype, problem.rank)
        assert technique.output_shape(made) == technique.output_shape(problem)
    assert len(technique.stage_arguments) == len([stage for stage in stages if not stage.side])


@on(all_cases())
def test_a_calls_cost_is_that_of_its_stages(technique, problem):
    """Without a bias, forward and backward by definition: a gradient of every operand costs the forward's MACs again."""
    biases = {stage.bias for stage in technique.stage_arguments}
    inputs = {n: x.requires_grad_() for n, x in make_inputs(technique, problem).items() if n not in biases}
    found = op_cost(technique.ops[problem.rank], {**inputs, **technique.arguments(problem)})
    path = [stage for stage in technique.stages(problem, **technique.cost_options(inputs)) if not stage.side]
    assert found.forward.macs_dense == problem.batch * sum(stage.macs_dense for stage in path)
    assert found.forward.macs_valid == problem.batch * sum(stage.macs_valid for stage in path)
    assert found.forward.extra == sum(problem.batch * stage.flops + stage.batch_flops for stage in path)
    assert (found.backward.macs_dense, found.backward.macs_valid) == (2 * found.forward.macs_dense, 2 * found.forward.macs_valid)


PLAIN = [
    Stage("", c, o, (9,) * len(k), (1,) * len(k), k, (1,) * len(k), ((p, p),) * len(k), (d,) * len(k), g, "zeros", transposed)
    for k in ((1,), (3,), (1, 3), (1, 1, 1))
    for c, o, g in ((4, 8, 1), (4, 8, 2), (4, 4, 4), (1, 1, 1))
    for p, d, transposed in product((0, 1), (1, 2), (False, True))
]


@pytest.mark.parametrize(
    "stage", PLAIN, ids=lambda s: f"{s.in_channels}-{s.out_channels} {s.kernel} {s.pads} {s.dilation} {s.groups}"
)
def test_every_plain_convolution_has_one_name(stage):
    named = [technique for technique in TECHNIQUES if technique.names_convolution(stage)]
    assert named == [find_convolution(stage)]
    made = named[0].problem_of(stage)
    assert (made.channels, made.size, made.kernel) == (stage.in_channels, stage.size, stage.kernel)
    if named[0].check(made):
        (again,) = named[0].stages(made)
        assert (again.macs_dense // prod(again.out if not again.transposed else again.size), again.groups) == (
            stage.in_channels * stage.out_channels * prod(stage.kernel) // stage.groups, stage.groups
        )  # fmt: skip


# params (no bias) and macs_dense per sample, written out from the definitions
TABLE = [
    ("standard2d c3-5 i7x6 k3x2 p1", 3 * 5 * 6, 7 * 7 * 3 * 5 * 6),
    ("dilated2d c3-5 i7 k3 d2 psame", 3 * 5 * 9, 49 * 3 * 5 * 9),
    ("transposed2d c4-6 i5 k4 s2 p1 g2", 4 * 6 * 16 // 2, 25 * 4 * 6 * 16 // 2),
    ("separable2d c3-5 i8x6 k3x5 psame m4", 3 * 4 * 3 + 4 * 5 * 5, 48 * 3 * 4 * 3 + 48 * 4 * 5 * 5),
    ("separable2d c3 i9x8 k3 s2", 3 * 3 * 3 * 2, 4 * 8 * 3 * 3 * 3 + 4 * 3 * 3 * 3 * 3),
    ("depthwise2d c3 i7 k3 p1 m2", 3 * 2 * 9, 49 * 3 * 2 * 9),
    ("pointwise3d c3-5 i4 s2", 15, 8 * 15),
    ("depthwise_separable2d c3-5 i7 k3 p1 m2", 3 * 2 * 9 + 3 * 2 * 5, 49 * (3 * 2 * 9 + 3 * 2 * 5)),
    ("grouped1d c4-6 i9 k3 p1 g2", 4 * 6 * 3 // 2, 9 * 4 * 6 * 3 // 2),
    ("deformable2d c4-6 i5 k3 p1 o2 g2", 4 * 6 * 9 // 2 + 3 * 2 * 9 * 4 * 9, 25 * (4 * 6 * 9 // 2 + 3 * 2 * 9 * 4 * 9)),
    ("lightweight1d c6 i9 k4 h3", 12, 6 * 6 * 4),
    ("lightweight1d c6 i9 k4 h3 psame", 12, 9 * 6 * 4),
    ("dynamic1d c6 i9 k4 h3 pcausal", 6 * 3 * 4, 9 * 6 * 3 * 4 + 9 * 6 * 4),
]


@pytest.mark.parametrize(("text", "params", "macs"), TABLE)
def test_the_table(text, params, macs):
    technique, problem = parse(text)
    cost = technique.cost(problem, bias=False)
    assert (cost.params, cost.macs_dense) == (params, macs)
    assert technique.cost(problem.replace(batch=3), bias=False).macs_dense == 3 * macs


def test_context_mean_projects_once():
    technique, problem = parse("dynamic1d c6 i9 k4 h3 psame")
    assert technique.cost(problem, context="mean").macs_dense == 6 * 3 * 4 + 9 * 6 * 4


def test_ratio_of_depthwise_separable_to_standard():
    base = Problem.parse("standard2d c32-1024 i14 k3 psame")
    technique = find("depthwise_separable")
    ours, standard = technique.cost(technique.variant_of(base), bias=False), find("standard").cost(base, bias=False)
    assert ours.macs_dense * 9 * 1024 == standard.macs_dense * (9 + 1024)


@pytest.mark.parametrize(
    ("layers", "field"),
    [
        (("k3", "k3 d2"), 7),
        (("k3", "k3 d2", "k3 d4"), 15),
        (("k3 s2", "k3"), 7),  # rf ← rf + D(K − 1)·jump, jump ← jump·S
        (("k7 s2", "k3 s2", "k3", "k3 d2"), 7 + 2 * 2 + 2 * 4 + 4 * 4),
    ],
)
def test_receptive_field_of_a_chain(layers, field):
    stages = [s for t, p in (parse(f"standard1d c1 i99 {text}") for text in layers) for s in t.stages(p)]
    assert chained_receptive_field(stages) == (field,)
