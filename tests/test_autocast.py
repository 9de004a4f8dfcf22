"""Under autocast every op is on the lower-precision list, as torch's convolutions are."""

import pytest
import torch
from cases import few_cases, layer_input, on, one_case_per_op, smooth_operands

from omniconv.testing import make_inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on(few_cases())
def test_float32_is_lowered(technique, problem, dtype):
    """The result is that of the operands rounded first."""
    operands = make_inputs(technique, problem)
    with torch.autocast("cpu", dtype=dtype):
        y = technique.call(problem, operands)
    assert y.dtype == dtype
    assert torch.equal(y, technique.call(problem, {n: x.to(dtype) for n, x in operands.items()}))


@on(one_case_per_op())
def test_float64_stays(technique, problem):
    operands = smooth_operands(technique, problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = technique.call(problem, operands)
    assert y.dtype == torch.float64
    assert torch.equal(y, technique.call(problem, operands))


@on(one_case_per_op())
def test_operands_may_be_mixed(technique, problem):
    """One operand in half precision already, the rest in float32: as a layer meets what the layer before it made."""
    operands = make_inputs(technique, problem)
    mixed = operands | {"input": operands["input"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(technique.call(problem, mixed), technique.call(problem, operands))


@on(one_case_per_op())
def test_gradients_come_back_in_float32(technique, problem):
    operands = {n: x.requires_grad_() for n, x in make_inputs(technique, problem).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = technique.call(problem, operands)
    for x, g in zip(operands.values(), torch.autograd.grad(y.float().square().sum(), list(operands.values())), strict=True):
        assert g.dtype == torch.float32
        assert g.shape == x.shape


@on(one_case_per_op())
def test_no_autocast_inside_autocast(technique, problem):
    operands = make_inputs(technique, problem)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert torch.equal(technique.call(problem, operands), technique.call(problem, operands))
        assert technique.call(problem, operands).dtype == torch.float32


@on(one_case_per_op())
def test_layers_too_and_compiled(technique, problem):
    layer, x = technique.layer(problem), layer_input(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(compiled, y)
