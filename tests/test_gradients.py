"""Derivatives of every op: numerically, against the reference, forward mode, torch.func, half types."""

import pytest
import torch
from cases import (
    all_cases,
    batched_operands,
    calling,
    few_cases,
    on,
    one_case_per_op,
    referring,
    smooth_operands,
)
from torch.autograd import gradcheck, gradgradcheck

from omniconv.problem import DTYPES
from omniconv.techniques import TECHNIQUES

TINY = 60  # numbers in all operands, up to which every single derivative is checked; beyond, random combinations of them


def is_tiny(operands):
    return sum(x.numel() for x in operands) <= TINY


def leaves(technique, problem, fill="normal", dtype=torch.float64):
    return [x.to(dtype).requires_grad_() for x in smooth_operands(technique, problem, fill).values()]


def gradients(function, operands, seed=1):
    """Of the sum of the result times small whole numbers."""
    y = function(*operands)
    weights = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    return torch.autograd.grad(y, operands, weights)


def test_every_op_has_tiny_cases():
    names = {t.name for t, p in few_cases() if is_tiny(smooth_operands(t, p).values())}
    assert names == {t.name for t in TECHNIQUES}


@on(few_cases())
def test_first_derivatives(technique, problem):
    """Backward and forward mode against finite differences, and backward under vmap."""
    operands = leaves(technique, problem)
    assert gradcheck(
        calling(technique, problem), operands, check_forward_ad=True, check_batched_grad=True, fast_mode=not is_tiny(operands)
    )


@on(few_cases())
def test_second_derivatives(technique, problem):
    assert gradgradcheck(calling(technique, problem), leaves(technique, problem), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@on(all_cases())
def test_gradients_are_exactly_the_references(technique, problem, dtype):
    """With whole numbers (offsets at quarters) sums are exact, so that half types are the reference rounded once."""
    narrow = problem.replace(dtype=dtype).torch_dtype
    made = gradients(calling(technique, problem, **technique.linear), leaves(technique, problem, "integers", narrow))
    expected = gradients(referring(technique, problem, **technique.linear), leaves(technique, problem, "integers"))
    for name, g, e in zip(technique.operands(problem), made, expected, strict=True):
        assert g.dtype == narrow, name
        assert torch.equal(g, e.to(narrow)), name


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@on(few_cases())
def test_half_gradients_are_float32s_rounded(technique, problem, dtype):
    """Two roundings apart at the most: float32 sums may be taken in another order."""
    narrow = problem.replace(dtype=dtype).torch_dtype
    operands = [x.detach().to(narrow) for x in leaves(technique, problem)]
    made = gradients(calling(technique, problem), [x.clone().requires_grad_() for x in operands])
    wide = gradients(calling(technique, problem), [x.float().requires_grad_() for x in operands])
    kind = torch.finfo(narrow)
    for name, g, w in zip(technique.operands(problem), made, wide, strict=True):
        assert g.dtype == narrow, name
        assert ((g.float() - w).abs() <= kind.eps * w.abs() + kind.tiny * kind.eps).all(), name


@on(few_cases())
def test_every_operand_alone(technique, problem):
    """A gradient asked of one operand only is the one that is made when all are asked."""
    together = gradients(calling(technique, problem), leaves(technique, problem))
    for i, name in enumerate(technique.operands(problem)):
        operands = [x.detach() for x in leaves(technique, problem)]
        operands[i].requires_grad_()
        y = calling(technique, problem)(*operands)
        weights = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        (alone,) = torch.autograd.grad(y, [operands[i]], weights)
        torch.testing.assert_close(alone, together[i], rtol=1e-12, atol=1e-12, msg=name)


@on(few_cases())
def test_func_grad(technique, problem):
    operands = [x.detach() for x in leaves(technique, problem)]
    call = calling(technique, problem)
    made = torch.func.grad(lambda *xs: call(*xs).square().sum(), argnums=tuple(range(len(operands))))(*operands)
    tracked = [x.clone().requires_grad_() for x in operands]
    expected = torch.autograd.grad(call(*tracked).square().sum(), tracked)
    for g, e in zip(made, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@on(few_cases())
def test_func_jvp_is_the_adjoint_of_vjp(technique, problem):
    """⟨J·v, u⟩ = ⟨v, Jᵀ·u⟩ for every operand at once."""
    operands = tuple(x.detach() for x in leaves(technique, problem))
    tangents = tuple(torch.randn_like(x) for x in operands)
    y, forward = torch.func.jvp(calling(technique, problem), operands, tangents)
    _, backward = torch.func.vjp(calling(technique, problem), *operands)
    u = torch.randn_like(y)
    reverse = sum((v * g).sum() for v, g in zip(tangents, backward(u), strict=True))
    torch.testing.assert_close((forward * u).sum(), reverse, rtol=1e-10, atol=1e-10)


@on(few_cases())
def test_vmap_over_each_operand(technique, problem):
    """Three of one operand, mapped over, are three calls."""
    operands = [x.detach() for x in leaves(technique, problem, "integers")]
    call = calling(technique, problem, **technique.linear)
    for i, name in enumerate(technique.operands(problem)):
        many = torch.stack([operands[i], -operands[i], operands[i] + 1])
        mapped = torch.func.vmap(call, in_dims=tuple(0 if j == i else None for j in range(len(operands))))
        y = mapped(*operands[:i], many, *operands[i + 1 :])
        looped = torch.stack([call(*operands[:i], x, *operands[i + 1 :]) for x in many])
        assert torch.equal(y, looped), name


@on(few_cases())
def test_vmap_over_all_operands_and_any_axis(technique, problem):
    operands = [x.detach() for x in leaves(technique, problem, "integers")]
    call = calling(technique, problem, **technique.linear)
    many = [torch.stack([x, x + 1], -1) for x in operands]
    y = torch.func.vmap(call, in_dims=-1, out_dims=1)(*many)
    looped = torch.stack([call(*(x[..., i] for x in many)) for i in range(2)], 1)
    assert torch.equal(y, looped)


@on(one_case_per_op())
def test_per_sample_gradients(technique, problem):
    """vmap of grad over the batch: the recipe of per-sample gradients, on inputs without a batch axis."""
    operands, batched = smooth_operands(technique, problem), batched_operands(technique, problem)
    names = tuple(operands)
    call = calling(technique, problem)
    dims = tuple(0 if n in batched else None for n in names)
    free = tuple(i for i, n in enumerate(names) if n not in batched)

    def loss(*tensors):
        return call(*tensors).square().sum()

    made = torch.func.vmap(torch.func.grad(loss, argnums=free), in_dims=dims)(*operands.values())
    for i in range(problem.batch):
        single = [x[i] if n in batched else x for n, x in operands.items()]
        for g, e in zip(made, torch.func.grad(loss, argnums=free)(*single), strict=True):
            torch.testing.assert_close(g[i], e, rtol=1e-10, atol=1e-10)
