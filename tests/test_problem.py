import re

import pytest
import torch
from cases import all_cases, on
from hypothesis import given, settings
from hypothesis import strategies as st

from omniconv.geometry import PADDING_MODES, PADDING_NAMES
from omniconv.problem import DTYPES, Problem
from omniconv.techniques import TECHNIQUES, find, parse

EXAMPLES = [
    "standard2d n1 c64-128 i56 k3 p1", "dilated2d n1 c256 i28 k3 psame d2", "transposed2d n1 c128-64 i28 k4 s2 p1",
    "separable2d n1 c64 i56 k7 p3 m64", "depthwise1d n8 c512 i512 k31 p30+0", "pointwise2d n1 c32-64 i112",
    "depthwise_separable2d n1 c32-64 i112 k3 p1", "grouped2d n1 c128 i56 k3 p1 g32", "deformable2d n1 c64 i56 k3 p1 o1",
    "lightweight1d n8 c512 i512 k31 psame h16", "dynamic1d n8 c512 i512 k31 pcausal h16",
]  # fmt: skip


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_example_of_every_technique(text):
    technique, problem = parse(text)
    assert str(problem) == text.replace(" o1", "")
    assert technique.output_shape(problem)[0] == problem.batch


@on(all_cases())
def test_text_and_value_are_the_same(technique, problem):
    assert Problem.parse(str(problem)) == problem
    assert parse(str(problem)) == (technique, problem)


@st.composite
def any_problem(draw):
    """Every field of every rank, whether or not a technique takes them together."""
    rank = draw(st.integers(1, 3))
    count = st.integers(1, 10**9 - 1)
    maybe = st.one_of(st.none(), count)

    def axes(low):
        return draw(st.tuples(*[st.integers(low, 999)] * rank))

    sides = st.tuples(st.integers(0, 99), st.integers(0, 99))
    return Problem(
        draw(st.sampled_from(TECHNIQUES)).name, draw(count), axes(1), draw(st.integers(0, 99)), draw(maybe), axes(1), axes(1),
        draw(st.one_of(st.sampled_from(PADDING_NAMES), st.tuples(*[sides] * rank))), axes(1), draw(count), draw(maybe),
        draw(maybe), draw(count), axes(0), draw(st.sampled_from(PADDING_MODES)), draw(st.sampled_from(sorted(DTYPES))),
        draw(st.booleans()),
    )  # fmt: skip


@settings(derandomize=True, deadline=None)
@given(any_problem(), st.randoms(use_true_random=False))
def test_any_problem_comes_back(problem, random):
    """Tokens may stand in any order."""
    assert Problem.parse(str(problem)) == problem
    head, *tokens = str(problem).split()
    random.shuffle(tokens)
    assert Problem.parse(" ".join([head, *tokens])) == problem


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.text("0123456789cnikspdgmhox+-:. abfrt", max_size=8), max_size=4))
def test_any_text_is_read_or_refused_by_name(tokens):
    text = " ".join(["standard2d c3 i4", *tokens])
    try:
        assert Problem.parse(str(Problem.parse(text))) == Problem.parse(text)
    except ValueError as error:
        message = str(error)
        assert re.fullmatch(r"Problem: .+, got .+", message)
        assert any(repr(word) in message for word in text.split())


def test_order_comments_and_axes():
    problem = Problem.parse("standard3d k1x2x3 i4x5x6 c2 cl p0+1x2x3+0 dt:bf16 s2 mode:circular g2 n0  # a comment c9")
    assert problem == Problem.parse(str(problem))
    assert (problem.kernel, problem.stride, problem.padding) == ((1, 2, 3), (2, 2, 2), ((0, 1), (2, 2), (3, 0)))
    assert (problem.batch, problem.torch_dtype, problem.channels_last, problem.groups) == (0, torch.bfloat16, True, 2)


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("", "''"), ("# nothing", "'# nothing'"), ("standard c3 i4", "'standard'"), ("standard4d c3 i4", "'standard4d'"),
        ("Standard2d c3 i4", "'Standard2d'"), ("standard2d c3 i4 q7", "'q7'"), ("standard2d c0 i4", "'c0'"),
        ("standard2d c3- i4", "'c3-'"), ("standard2d c3-x i4", "'c3-x'"), ("standard2d c3 i4x5x6", "'i4x5x6'"),
        ("standard2d c3 i4x", "'i4x'"), ("standard2d c3 i4 k-1", "'k-1'"), ("standard2d c3 i4 k3.5", "'k3.5'"),
        ("standard2d c3 i4 p1+2+3", "'p1+2+3'"), ("standard2d c3 i4 psome", "'psome'"), ("standard2d c3 i4 p1x2x3", "'p1x2x3'"),
        ("standard2d c3 i4 mode:mirror", "'mode:mirror'"), ("standard2d c3 i4 dt:f8", "'dt:f8'"), ("standard2d c3 i4 k", "'k'"),
        ("standard2d c3 i4 k3 k5", "'k5'"), ("standard2d c3 i4 k9999999999", "'k9999999999'"), ("standard2d c3 i4 cl cl", "'cl'"),
        ("standard2d i4", "c<channels>"), ("standard2d c4", "i<size>"), ("standard2d c3 i4 k\u0663", "'k\u0663'"),
    ],
)  # fmt: skip
def test_malformed_text_names_the_token(text, token):
    with pytest.raises(ValueError, match=r"Problem: .+, got .+") as caught:
        Problem.parse(text)
    assert token in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense2d c3 i4", "the name must be one of standard, dilated"), ("separable1d c3 i4", "the rank must be one of 2"),
        ("lightweight2d c3 i4", "the rank must be one of 1"), ("pointwise2d c3 i4 k3", "the problem must not set kernel"),
        ("depthwise2d c3-6 i4", "must not set out_channels"), ("transposed2d c3 i4 mode:reflect", "must not set padding_mode"),
        ("grouped2d c3 i4 g2", "must be divisible"), ("grouped2d c4-3 i4 g2", "groups must divide the 3 output channels"),
        ("lightweight1d c4 i9 k3 h3", "must be divisible"), ("standard2d c3 i4 k5", "the padded input must hold one window"),
        ("standard2d c3 i4 k3 pcausal", "'causal' is defined for one spatial axis"),
        ("transposed2d c3 i4 k3 psame_minimal", "'same_minimal' is not defined"),
        ("standard1d c3 i4 k3 p4 mode:reflect", "'reflect' needs pads below the size"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_technique_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_values_are_checked_too():
    for wrong in ({"size": ()}, {"size": (1, 2, 3, 4)}, {"kernel": (3,)}, {"padding_mode": "x"}, {"dtype": "f8"}):
        with pytest.raises(ValueError, match=r"Problem: .+, got .+"):
            Problem("standard", 3, (4, 4)).replace(**wrong)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda t: t.name)
def test_every_technique_has_a_version_of_a_standard_layer(technique):
    rank = 2 if 2 in technique.ranks else 1
    base = Problem.parse(f"standard{rank}d c64 i56 k3 p1")
    problem = technique.variant_of(base)
    assert find(problem.technique) is technique
    assert technique.output_shape(problem) == find("standard").output_shape(base)
