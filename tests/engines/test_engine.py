"""What the native engines share: reasons to leave a call to the composite path, plans, and recorded calls that round once."""

import inspect
from typing import Any

import pytest
import torch
from cases import few_cases, on
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omniconv import settings
from omniconv.engines import engine as engines
from omniconv.engines.engine import ACTIVATION_CODES, CallPlan, Engine, cache_plan, lookup_plan
from omniconv.functional import causal_conv1d_fn, depthwise_conv2d
from omniconv.geometry import Grid, grid
from omniconv.ops.activation import ACTIVATIONS
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES
from omniconv.testing import assert_within_bound, make_inputs

ENGINES = {t.engine.name: t.engine for t in TECHNIQUES if t.engine is not None}


def operands_of(name: str) -> tuple[Tensor, Tensor]:
    """An input and a weight that the engine of that name takes."""
    return {
        "depthwise": (torch.randn(1, 2, 6, 6), torch.randn(2, 1, 3, 3)),
        "pointwise": (torch.randn(1, 2, 6), torch.randn(3, 2, 1)),
        "lightweight": (torch.randn(2, 4, 9), torch.randn(2, 3)),
        "dynamic": (torch.randn(2, 4, 9), torch.randn(2, 2, 3, 1)),
    }[name]


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_each_reason_is_met_in_order(engine: Engine, monkeypatch):
    x, w = operands_of(engine.name)
    rank = x.dim() - 2
    size, kernel = x.shape[2:], (3,) * rank
    zeros, reflect = grid("", size, kernel), grid("", size, kernel, padding=1, mode="reflect")
    far = {"depthwise": Grid((65, 1), ((0, 0),) * 2, (1, 1)), "pointwise": zeros}.get(
        engine.name, Grid((1,), ((0, 0),), (1 << 20,))
    )
    met = []
    with settings.composite_only():
        met.append(engine.unsupported_reason(x, w, None, zeros))
    met.append(engine.unsupported_reason(x.to("meta"), w, None, zeros))
    met.append(engine.unsupported_reason(x[:0], w, None, zeros))
    met.append(engine.unsupported_reason(x, w, None, far))
    torch.func.vmap(lambda x: met.append(engine.unsupported_reason(x, w, None, zeros)) or x)(x.unsqueeze(0))
    w.requires_grad_()
    assert engine.unsupported_reason(x, w, None, reflect) is None
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        met.append(engine.unsupported_reason(x, w, None, reflect))
        assert engine.unsupported_reason(x, w, None, zeros) is None
        with torch.no_grad():
            assert engine.unsupported_reason(x, w, None, reflect) is None
    assert tuple(reason for reason in met if reason) == engine.reasons[1:]
    assert engine.unsupported_reason(x, w, None, zeros) is None


def test_dilation_too_far_is_a_reason_of_depthwise():
    x, w = operands_of("depthwise")
    far = Grid((1, 1), ((0, 0),) * 2, (1, 1 << 20))
    assert ENGINES["depthwise"].unsupported_reason(x, w, None, far) == ENGINES["depthwise"].reasons[4]


def test_an_absent_library_comes_first(monkeypatch):
    monkeypatch.setattr("omniconv._native.AVAILABLE", False)
    for name, engine in ENGINES.items():
        assert engine.unsupported_reason(*operands_of(name), None) == engine.reasons[0]


def test_plans_are_forgotten_before_they_grow_memory(monkeypatch):
    monkeypatch.setattr(engines, "_plans", {})
    monkeypatch.setattr(engines, "_MOST", 3)
    plans = [CallPlan(max, number) for number in range(5)]
    for number, plan in enumerate(plans):
        cache_plan(("op", number), plan)
    assert [lookup_plan(("op", n)) for n in range(5)] == [None, None, None, plans[3], plans[4]]


class _Called(TorchDispatchMode):
    """Whether a native operator is reached."""

    native = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.native |= func.namespace == "omniconv"
        return func(*args, **(kwargs or {}))


NATIVE = [(t, p) for t, p in few_cases() if t.engine is not None]
TWICE = "depthwise_activation"


@on(NATIVE)
@pytest.mark.parametrize("dtype", ["f32", "f64", "bf16", "f16"])
def test_a_recorded_call_has_the_bits_of_an_unrecorded_one(technique, problem, dtype):
    problem = problem.replace(dtype=dtype)
    for activation in (None, *ACTIVATIONS):
        given: dict[str, Any] = {"activation": activation}
        if activation is not None and TWICE in inspect.signature(technique.reference).parameters:
            given[TWICE] = activation
        if activation is None:
            given = {}
        operands = make_inputs(technique, problem)
        with torch.no_grad(), _Called() as called:
            y = technique.call(problem, operands, **given)
        if not called.native:
            return  # torch's own operators promise no such thing
        recorded = {name: x.requires_grad_() for name, x in operands.items()}
        for _ in range(2):  # the second time by its plan
            z = technique.call(problem, recorded, **given)
            assert torch.equal(y.nan_to_num(), z.detach().nan_to_num()), activation
        with torch.no_grad():
            assert_within_bound(technique, recorded | technique.arguments(problem) | given, z.detach())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_gradients_through_padding_modes_are_the_references(mode):
    """By a plan, too: its first call wants no gradient, the next do."""
    for name, engine in ENGINES.items():
        if name == "pointwise":
            continue
        technique = next(t for t in TECHNIQUES if t.engine is engine)
        rank = max(technique.ranks)
        problem = technique.variant_of(Problem("standard", 4, (7,) * rank, 2, kernel=(3,) * rank, padding="same", dtype="f64"))
        problem = problem.replace(padding_mode=mode, padding="same")
        operands = make_inputs(technique, problem)
        technique.call(problem, operands)
        leaves = {k: v.requires_grad_() for k, v in operands.items()}
        y = technique.call(problem, leaves)
        expected = technique.reference(**leaves, **technique.arguments(problem))
        weights = torch.randn_like(y)
        for got, wanted in zip(
            torch.autograd.grad(y, leaves.values(), weights), torch.autograd.grad(expected, leaves.values(), weights), strict=True
        ):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_through_an_activation(level, name, dtype):
    """Every number has the same bits wherever it stands, and those of float64 within a few roundings."""
    x = torch.cat([torch.linspace(-12, 12, 997), torch.tensor([0.0, -3.0, 3.0, 6.0, -0.0, 80.0, -80.0])]).to(dtype)
    g = torch.randn(x.shape).to(dtype)
    value = ACTIVATIONS[name].function(x) if name in ("relu", "relu6", "sigmoid") else x
    made = torch.ops.omniconv.activation_grad(g, value, ACTIVATION_CODES[name], False)
    wide = x.double().requires_grad_()
    if name == "sigmoid":  # of its result, which is rounded
        expected = g.double() * value.double() * (1 - value.double())
    else:
        (expected,) = torch.autograd.grad(ACTIVATIONS[name].function(wide), wide, g.double())
    roundoff = torch.finfo(torch.float32).eps
    error = (made.double() - expected).abs()
    bound = 16 * roundoff * g.double().abs() * x.double().abs().clamp(min=1)
    assert (error <= bound + torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).tiny).all()
    for start in (1, 2, 5, 997):
        again = torch.ops.omniconv.activation_grad(g[start:], value[start:], ACTIVATION_CODES[name], False)
        assert torch.equal(again, made[start:])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_special_numbers_pass_the_gradient_of_an_activation_as_in_torch(level, name):
    x = torch.tensor(
        [float("nan"), float("inf"), float("-inf"), 0.0, 1.0, 3.0, -3.0] * 32
    )  # whole vectors: what is left over is another code in torch
    value = ACTIVATIONS[name].function(x) if name in ("relu", "relu6", "sigmoid") else x
    made = torch.ops.omniconv.activation_grad(torch.ones_like(x), value, ACTIVATION_CODES[name], True)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[name].function(x).sum(), x)
    torch.testing.assert_close(made, expected, equal_nan=True)


def test_the_raw_gradient_of_an_activation_refuses_by_name():
    x = torch.ones(2, 3)
    for g, value, code in ((x, x[:1], 1), (x.half(), x, 1), (x, x, 9), (x.double(), x.double(), 5)):
        with pytest.raises(RuntimeError, match=r"activation_grad: .*, got "):
            torch.ops.omniconv.activation_grad(g, value, code, True)
    last = torch.randn(1, 4, 3, 3).to(memory_format=torch.channels_last)
    assert torch.ops.omniconv.activation_grad(last, last, 1, True).stride() == last.stride()
    torch.library.opcheck(torch.ops.omniconv.activation_grad.default, (last, last.contiguous(), 3, True))
    torch.library.opcheck(torch.ops.omniconv.activation_grad.default, (last, last, 3, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_calls_have_the_same_bits_for_any_number_of_threads(dtype):
    x, w = torch.randn(3, 37, 1001).to(dtype), torch.randn(37, 4).to(dtype)
    image, filters = torch.randn(2, 40, 33, 31).to(dtype), torch.randn(40, 1, 3, 3).to(dtype)
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaves = [t.clone().requires_grad_() for t in (x, w, image, filters)]
            y = causal_conv1d_fn(leaves[0], leaves[1], activation="silu")
            z = depthwise_conv2d(leaves[2], leaves[3], padding=1, activation="gelu")
            found.append([y, z, *torch.autograd.grad([y.float().square().sum(), z.float().square().sum()], leaves)])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
