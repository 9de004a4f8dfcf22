"""Every op against its reference: whole numbers exactly, random ones under the derived bound; any strides, any batch."""

import pytest
import torch
from cases import (
    VIEWS,
    all_cases,
    batched_operands,
    calling,
    few_cases,
    integer_operands,
    on,
    one_case_per_op,
    parameters_of,
    referring,
    smooth_operands,
)

from omniconv.layout import is_channels_last
from omniconv.ops.activation import ACTIVATIONS
from omniconv.problem import DTYPES
from omniconv.testing import assert_matches_reference, assert_within_bound, error_bound, make_inputs, widened


def exact(technique, problem, operands):
    """The float64 reference with the op made linear."""
    return technique.reference(**widened(operands), **(technique.arguments(problem) | technique.linear))


@pytest.mark.parametrize("dtype", DTYPES)
@on(all_cases())
def test_whole_numbers_are_exact(technique, problem, dtype):
    problem = problem.replace(dtype=dtype)
    operands = integer_operands(technique, problem)
    y = technique.call(problem, operands, **technique.linear)
    assert y.dtype == problem.torch_dtype
    assert y.shape == technique.output_shape(problem)
    assert torch.equal(y, exact(technique, problem, operands).to(y.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@on(all_cases())
def test_random_numbers_stay_under_the_bound(technique, problem, dtype):
    problem = problem.replace(dtype=dtype)
    assert_matches_reference(technique, problem, make_inputs(technique, problem))


@on(one_case_per_op())
def test_the_bound_is_no_wider_than_it_must_be(technique, problem):
    """A result that is off by a thousandth of its terms is outside in float32: the bound can fail."""
    operands = make_inputs(technique, problem)
    arguments = technique.arguments(problem)
    y = technique.call(problem, operands)
    with pytest.raises(AssertionError, match=f"{technique.name}: every error must stay under its bound"):
        assert_within_bound(technique, {**operands, **arguments}, y + 1e-3 * y.abs().max())


@pytest.mark.parametrize("name", ACTIVATIONS)
@on(one_case_per_op())
def test_activations(technique, problem, name):
    """Those arguments of an op that are called an activation, each under the bound."""
    arguments = [a for a in parameters_of(technique.ops[problem.rank]) if a.endswith("activation")]
    for dtype in ("f32", "bf16"):
        operands = make_inputs(technique, problem.replace(dtype=dtype))
        for argument in arguments:
            y = technique.call(problem, operands, **{argument: name})
            assert_within_bound(technique, {**operands, **technique.arguments(problem), argument: name}, y)
            assert not torch.equal(y, technique.call(problem, operands))


@on(one_case_per_op())
def test_every_bias_may_be_left_out(technique, problem):
    optional = {name for name, p in parameters_of(technique.ops[problem.rank]).items() if p.default is None}
    operands = integer_operands(technique, problem)
    without = {name: x for name, x in operands.items() if name not in optional}
    assert without.keys() != operands.keys()
    y = technique.call(problem, without, **technique.linear)
    assert torch.equal(y.double(), exact(technique, problem, without))


@pytest.mark.parametrize("view", VIEWS)
@on(few_cases())
def test_any_strides_give_the_same_numbers(technique, problem, view):
    """Each operand by itself, then all of them; the output's memory format is that of layout.py."""
    operands = {name: x.contiguous() for name, x in integer_operands(technique, problem).items()}
    call = calling(technique, problem, **technique.linear)
    for changed in [{name} for name in operands] + [set(operands)]:
        viewed = {name: view(x) if name in changed else x for name, x in operands.items()}
        dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in viewed.items()}
        y = call(*viewed.values())
        assert torch.equal(y, call(*dense.values())), changed
        if is_channels_last(viewed["input"]):
            assert y.movedim(1, -1).is_contiguous()
        else:
            assert y.is_contiguous()


@on(few_cases())
def test_without_a_batch_axis(technique, problem):
    """(C, …) gives what a batch of one gives, without its axis."""
    problem = problem.replace(batch=1)
    operands, batched = integer_operands(technique, problem), batched_operands(technique, problem)
    y = technique.call(problem, operands)
    single = {name: x[0] if name in batched else x for name, x in operands.items()}
    assert torch.equal(technique.call(problem, single), y[0])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@on(few_cases())
def test_a_sample_does_not_depend_on_its_batch(technique, problem, dtype):
    problem = problem.replace(batch=3, dtype=dtype)
    operands, batched = make_inputs(technique, problem), batched_operands(technique, problem)
    y = technique.call(problem, operands)
    _, allowed = error_bound(technique, {**operands, **technique.arguments(problem)}, y.dtype)
    for i in range(3):
        alone = technique.call(problem, {n: x[i : i + 1] if n in batched else x for n, x in operands.items()})
        assert ((alone - y[i : i + 1]).double().abs() <= 2 * allowed[i : i + 1]).all()


@on([(t, p.replace(batch=0)) for t, p in one_case_per_op()])
def test_no_samples(technique, problem):
    """An empty batch gives an empty result, and gradients of zeros for the weights."""
    operands = {n: x.requires_grad_() for n, x in make_inputs(technique, problem).items()}
    y = technique.call(problem, operands)
    assert y.shape == technique.output_shape(problem)
    assert y.numel() == 0
    grads = torch.autograd.grad(y.sum(), list(operands.values()))
    for x, g in zip(operands.values(), grads, strict=True):
        assert g.shape == x.shape
        assert not g.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@on(few_cases())
def test_nan_and_infinity_propagate(technique, problem, value):
    """To the outputs that read them, as in the reference, and to no other.

    Where zeros are padded, a weight that is no number may or may not meet them (torch's own kernels differ): not asked here.
    """
    operands = {n: x.float() for n, x in smooth_operands(technique, problem).items()}
    sampled = {name for name, operand in technique.operands(problem).items() if name == "input" or operand.fill == "offset"}
    zeros = any(any(sum(s.pads, ())) and s.padding_mode == "zeros" for s in technique.stages(problem))
    for name, x in operands.items():
        if zeros and name not in sampled:
            continue
        changed = operands | {name: x.clone()}
        changed[name][(0,) * x.dim()] = value
        y = technique.call(problem, changed)
        expected = technique.reference(**widened(changed), **technique.arguments(problem))
        assert torch.equal(y.isnan(), expected.isnan()), name
        assert torch.equal(y.isinf(), expected.isinf()), name
        assert torch.equal(y[y.isinf()].sign().double(), expected[expected.isinf()].sign()), name


@on(few_cases())
def test_operands_are_only_read(technique, problem):
    for dtype in ("f32", "f16"):
        operands = {n: x.requires_grad_() for n, x in make_inputs(technique, problem.replace(dtype=dtype)).items()}
        before = {n: (x.detach().clone(), x._version, x.stride()) for n, x in operands.items()}
        technique.call(problem, operands).sum().backward()
        for name, x in operands.items():
            values, version, stride = before[name]
            assert torch.equal(x, values), name
            assert (x._version, x.stride()) == (version, stride), name


@on(few_cases())
def test_the_result_is_a_tensor_of_its_own(technique, problem):
    """Writing into the result changes no operand."""
    operands = make_inputs(technique, problem)
    before = {n: x.clone() for n, x in operands.items()}
    technique.call(problem, operands).zero_()
    assert all(torch.equal(operands[n], before[n]) for n in operands)


@on(few_cases())
def test_the_reference_agrees_with_itself_in_float32(technique, problem):
    """The oracle runs in any dtype, and its own float32 numbers stay under the bound too."""
    operands = make_inputs(technique, problem)
    y = referring(technique, problem)(*operands.values())
    assert_within_bound(technique, {**operands, **technique.arguments(problem)}, y)


@pytest.mark.parametrize("kind", ["negative", "conjugate"])
@on(one_case_per_op())
def test_negative_and_conjugate_views(technique, problem, kind):
    """Tensors whose numbers are not what lies in memory: they count as what they say."""
    operands = make_inputs(technique, problem)
    if kind == "conjugate":
        operands = {n: torch.complex(x, x.flip(0)) for n, x in operands.items()}
    try:
        expected = technique.call(problem, operands)
    except TypeError:
        assert kind == "conjugate"  # complex numbers are for torch's drop-ins alone
        return
    for name, x in operands.items():
        view = torch._neg_view(-x) if kind == "negative" else x.conj().resolve_conj().conj()
        assert view.is_neg() or view.is_conj()
        assert torch.equal(technique.call(problem, operands | {name: view}), expected)
