"""Every op and layer through torch.compile and torch.export, with sizes that change."""

import shutil
from functools import partial

import pytest
import torch
from cases import (
    calling,
    few_cases,
    layer_input,
    on,
    on_few_cases,
    one_case_per_op,
    smooth_operands,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from omniconv.techniques import find
from omniconv.testing import make_inputs, widened

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def strides_that_count(x):
    return [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def assert_same_forward_and_backward(technique, problem, backend, dtype=torch.float64):
    call = calling(technique, problem)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    operands = [x.to(dtype) for x in smooth_operands(technique, problem).values()]
    results = []
    for function in (call, compiled):
        tracked = [x.clone().requires_grad_() for x in operands]
        y = function(*tracked)
        results.append([y, *torch.autograd.grad(y.square().sum(), tracked)])
    eps = torch.finfo(dtype).eps
    for made, expected in zip(results[1], results[0], strict=True):
        assert made.dtype == expected.dtype
        torch.testing.assert_close(made, expected, rtol=1e3 * eps, atol=1e3 * eps)
    assert strides_that_count(results[1][0]) == strides_that_count(results[0][0])


@pytest.mark.slow
@on_few_cases()
def test_compiles_to_one_graph(technique, problem):
    assert_same_forward_and_backward(technique, problem, "aot_eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on(one_case_per_op())
def test_half_types_compile(technique, problem, dtype):
    call = calling(technique, problem)
    operands = [x.to(dtype) for x in smooth_operands(technique, problem).values()]
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*operands), call(*operands))


@pytest.mark.slow
@needs_compiler
@on(list({t.name: (t, p) for t, p in one_case_per_op()}.values()))
def test_inductor(technique, problem):
    assert_same_forward_and_backward(technique, problem, "inductor", torch.float32)


@pytest.mark.slow
@on(one_case_per_op())
def test_one_more_compilation_serves_every_batch_and_size(technique, problem):
    """The first call compiles for its sizes, the second for any; no call after that compiles."""
    counter = CompileCounterWithBackend("aot_eager")
    arguments = technique.arguments(problem)
    op = technique.ops[problem.rank]
    compiled = torch.compile(lambda operands: op(**operands, **arguments), fullgraph=True, backend=counter)
    size = tuple(i + 5 for i in problem.size)
    counts = []
    for batch, more in ((2, 0), (3, 1), (4, 2), (7, 5), (5, 3)):
        sized = problem.replace(batch=batch, size=tuple(i + more for i in size))
        operands = make_inputs(technique, sized)
        torch.testing.assert_close(compiled(operands), technique.call(sized, operands))
        counts.append(counter.frame_count)
    assert counts[1] == counts[-1] == 2


def dynamic(x):
    """Batch and every spatial axis may change."""
    return {axis: Dim.DYNAMIC for axis in range(x.dim()) if axis != 1}


@pytest.mark.slow
@on_few_cases()
def test_exports_with_dynamic_batch_and_size(technique, problem):
    """The layer's exported program is right at sizes other than those it was traced with."""
    problem = problem.replace(batch=2, size=tuple(i + 5 for i in problem.size))
    layer = technique.layer(problem)
    x = layer_input(problem)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: Dim.DYNAMIC} | dynamic(x),)).module()
    for batch, more in ((2, 0), (3, 1), (5, 2), (4, 7)):
        x = layer_input(problem.replace(batch=batch, size=tuple(i + more for i in problem.size)))
        y = program(x)
        assert y.shape[0] == batch
        torch.testing.assert_close(y, layer(x))


@on(one_case_per_op())
def test_exports_with_named_dimensions(technique, problem):
    """Named dimensions, which torch checks not to have been pinned."""
    problem = problem.replace(batch=2, size=tuple(i + 5 for i in problem.size))
    layer = technique.layer(problem)
    x = layer_input(problem)
    axes = {0: Dim("batch", min=2, max=1024)} | {a: Dim(f"size{a}", min=4, max=4096) for a in range(2, x.dim())}
    program = torch.export.export(layer, (x,), dynamic_shapes=(axes,))
    x = layer_input(problem.replace(batch=6, size=tuple(i + 9 for i in problem.size)))
    torch.testing.assert_close(program.module()(x), layer(x))


@on([(t, p) for t, p in few_cases() if p.padding == "same_minimal" and max(p.stride) > 1])
def test_exported_same_minimal_fits_its_pads_to_the_size(technique, problem):
    """At every size from the traced one on: the pads of TensorFlow's SAME depend on the size modulo the stride."""
    problem = problem.replace(batch=2, size=tuple(i + 5 for i in problem.size))
    layer = technique.layer(problem).double()
    x = layer_input(problem).double()
    program = torch.export.export(layer, (x,), dynamic_shapes=(dynamic(x),)).module()
    for more in range(2 * max(problem.stride)):
        x = layer_input(problem.replace(size=tuple(i + more for i in problem.size))).double()
        operands = layer.operands(x)
        torch.testing.assert_close(program(x), technique.reference(**widened(operands)), rtol=1e-10, atol=1e-10)


def _padded_once(op, x, weight):
    return op(x, weight, padding=1)


def test_one_compiled_function_takes_ops_of_every_rank():
    """A rank is never a number that a tracer lets vary."""
    block = torch.compile(_padded_once, fullgraph=True, backend="eager")
    for rank, op in find("standard").ops.items():
        x, weight = torch.randn(1, 2, *(5,) * rank), torch.randn(3, 2, *(3,) * rank)
        torch.testing.assert_close(block(op, x, weight), op(x, weight, padding=1))


@pytest.mark.parametrize("name", ["standard", "depthwise", "pointwise", "transposed"])
def test_ops_compile_directly_and_through_partial_with_every_size_dynamic(name):
    for rank, op in find(name).ops.items():
        x = torch.randn(2, 4, *(6,) * rank)
        weight = torch.randn(4, 1 if name == "depthwise" else 4, *(1 if name == "pointwise" else 3,) * rank)
        for function in (op, partial(op, stride=2)):
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
            torch.testing.assert_close(compiled(x, weight), function(x, weight))
