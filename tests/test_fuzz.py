"""Random problems over all techniques, ranks, dtypes, layouts, paddings and modes, against the references under the derived bounds.

OMNICONV_FUZZ sets how many (`make fuzz`: 2,000).
"""

import os
from math import lcm

import torch
from cases import VIEWS, smooth_operands
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from omniconv.geometry import PADDING_MODES, PADDING_NAMES
from omniconv.problem import DTYPES, Problem
from omniconv.techniques import TECHNIQUES
from omniconv.testing import assert_matches_reference, make_inputs, widened

EXAMPLES = int(os.environ.get("OMNICONV_FUZZ", "150"))


@st.composite
def problems(draw):
    """A problem that its technique takes; settings it does not take keep their defaults."""
    technique = draw(st.sampled_from(TECHNIQUES))
    rank = draw(st.sampled_from(technique.ranks))
    small = {1: 12, 2: 7, 3: 4}[rank]

    def axes(low, high):
        return st.tuples(*[st.integers(low, high)] * rank)

    pads = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * rank)
    parts = {"groups": st.sampled_from([1, 2, 3]), "heads": st.sampled_from([1, 2, 3]), "offset_groups": st.sampled_from([1, 2])}
    chosen = {name: draw(strategy) for name, strategy in parts.items() if name in technique.takes}
    whole = lcm(*chosen.values())
    others = {
        "kernel": axes(1, 4),
        "stride": axes(1, 3),
        "dilation": axes(1, 3),
        "output_padding": axes(0, 2),
        "padding": st.one_of(pads, st.sampled_from(PADDING_NAMES)),
        "padding_mode": st.sampled_from(PADDING_MODES),
        "multiplier": st.integers(1, 2).map(lambda m: m * chosen.get("groups", 1)),
        "out_channels": st.integers(1, 4).map(lambda c: c * chosen.get("groups", 1)),
    }
    chosen |= {name: draw(strategy) for name, strategy in others.items() if name in technique.takes}
    problem = Problem(
        technique.name,
        whole * draw(st.integers(1, 3)),
        draw(axes(1, small)),
        batch=draw(st.integers(0, 2)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        channels_last=draw(st.booleans()),
        **chosen,
    )
    try:
        return technique, technique.check(problem)
    except ValueError:
        assume(False)
        raise


RANDOM = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@RANDOM
@given(problems(), st.data(), st.integers(0, 2**16))
def test_random_problems_agree_with_the_reference(case, data, seed):
    """Random numbers under the bound and whole ones exactly; any operand may be any kind of view."""
    technique, problem = case
    note(str(problem))
    assert Problem.parse(str(problem)) == problem
    views = {name: data.draw(st.sampled_from(VIEWS), name) for name in technique.operands(problem)}
    for fill in ("normal", "integers"):
        operands = {name: views[name](x) for name, x in make_inputs(technique, problem, fill=fill, seed=seed).items()}
        assert technique.call(problem, operands).shape == technique.output_shape(problem)
        assert_matches_reference(technique, problem, operands)
    y = technique.call(problem, operands, **technique.linear)
    expected = technique.reference(**widened(operands), **(technique.arguments(problem) | technique.linear))
    assert torch.equal(y, expected.to(y.dtype))


def gradients(f, operands, settings, grad_y):
    leaves = {name: x.detach().requires_grad_() for name, x in operands.items()}
    return torch.autograd.grad(f(**leaves, **settings), list(leaves.values()), grad_y)


@RANDOM
@given(problems(), st.integers(0, 2**16))
def test_gradients_of_random_problems_are_exact(case, seed):
    """Whole numbers (offsets at quarters) through the linear ops in float32, the incoming gradient in either memory format."""
    technique, problem = case
    problem = problem.replace(dtype="f32")
    note(str(problem))
    wide = smooth_operands(technique, problem, "integers", seed)
    operands = {name: x.float() for name, x in wide.items()}
    settings = technique.arguments(problem) | dict(technique.linear)
    grad_y = torch.randint(-3, 4, technique.output_shape(problem), generator=torch.Generator().manual_seed(seed)).float()
    expected = gradients(technique.reference, wide, settings, grad_y.double())
    if problem.channels_last and problem.rank > 1:
        grad_y = grad_y.to(memory_format=torch.channels_last if problem.rank == 2 else torch.channels_last_3d)
    made = gradients(technique.ops[problem.rank], operands, settings, grad_y)
    for name, g, g64 in zip(wide, made, expected, strict=True):
        assert torch.equal(g.double(), g64), name
