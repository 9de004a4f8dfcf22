"""``torch.jit.trace``: the bits of a call, for another batch and another size too; saved where no gradient is recorded."""

import io
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
from cases import all_cases, calling, covering, layer_input, on, one_case_per_op
from torch import nn

from omniconv import settings
from omniconv.functional import causal_conv1d_fn, causal_conv1d_update, conv1d, depthwise_conv2d
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES
from omniconv.testing import make_inputs


@contextmanager
def deprecated():
    """A trace may say that it is deprecated, but not that it may be wrong."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=".*torch.jit.* is deprecated", category=category)
        yield


def trace(function, *inputs):
    with deprecated():
        return torch.jit.trace(function, inputs, check_trace=False)


def saved_and_loaded(traced):
    buffer = io.BytesIO()
    with deprecated():
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)


def is_fitted(problem):
    return problem.padding == "same_minimal" and max(problem.stride) > 1


CASES = [
    case
    for technique in TECHNIQUES
    for case in covering([(t, p) for t, p in all_cases() if t is technique and p.batch and not is_fitted(p)])
]
LAYERS = [(t, p.replace(padding="same") if is_fitted(p) else p) for t, p in one_case_per_op()]


@pytest.mark.parametrize("composite", [False, True])
@on(CASES)
def test_ops(technique, problem, composite):
    with settings.composite_only() if composite else nullcontext():
        operands, function = make_inputs(technique, problem), calling(technique, problem)
        traced = trace(function, *operands.values())
        larger = problem.replace(size=tuple(s + 3 for s in problem.size))
        for other in (problem, problem.replace(batch=problem.batch + 2), larger):
            given = tuple(make_inputs(technique, other, seed=1).values())
            assert torch.equal(traced(*given), function(*given))


@on(LAYERS)
def test_layers(technique, problem):
    layer = technique.layer(problem).to(problem.torch_dtype)
    traced = trace(layer, layer_input(problem))
    with torch.no_grad():
        saved = saved_and_loaded(trace(layer, layer_input(problem)))
    for other in (problem, problem.replace(batch=5), problem.replace(size=tuple(s + 3 for s in problem.size))):
        x = layer_input(other, seed=1).requires_grad_()
        y, found = layer(x), traced(x)
        assert torch.equal(found, y)
        with torch.no_grad():
            assert torch.equal(saved(x), layer(x))
        wanted = x, *layer.parameters()
        for g, expected in zip(torch.autograd.grad(found.sum(), wanted), torch.autograd.grad(y.sum(), wanted), strict=True):
            assert torch.equal(g, expected)


@on(LAYERS)
def test_a_traced_call_without_a_batch(technique, problem):
    layer, x = technique.layer(problem).to(problem.torch_dtype), layer_input(problem)[0]
    with torch.no_grad():
        assert torch.equal(trace(layer, x)(x), layer(x))


def test_networks():
    """Techniques behind one another, each of which a trace must leave as it was."""
    x, base = torch.randn(2, 4, 12), Problem("standard", 4, (12,), batch=2, kernel=(3,), padding=((1, 1),))
    layers = [t.layer(p) for t, p in ((t, t.variant_of(base)) for t in TECHNIQUES if 1 in t.ranks)]
    network = nn.Sequential(*(m for m in layers if m(x).shape == x.shape)).eval()
    assert len(network) >= 6
    with torch.no_grad():
        traced = saved_and_loaded(trace(network, x))
        for other in (x, torch.randn(5, 4, 12), torch.randn(1, 4, 30)):
            assert torch.equal(traced(other), network(other))


@pytest.mark.parametrize("op", [causal_conv1d_fn, causal_conv1d_update])
def test_causal_filters_are_refused(op):
    x, weight, state = torch.randn(2, 3, 7), torch.randn(3, 4), torch.zeros(2, 3, 3)
    state_of = {} if op is causal_conv1d_fn else {"conv_state": state}
    with pytest.raises(TypeError, match=f"{op.__name__}: torch.jit.trace must not record this op, use torch.export, got a call"):
        trace(lambda x: op(x, weight=weight, **state_of), x)
    assert state.abs().sum() == 0


@pytest.mark.parametrize(("op", "rank"), [(conv1d, 1), (depthwise_conv2d, 2)])
def test_pads_that_depend_on_the_size_are_refused(op, rank):
    x, weight = torch.randn(1, 4, *(7,) * rank), torch.randn(4, 4 if op is conv1d else 1, *(3,) * rank)
    message = rf"{op.__name__}: torch.jit.trace needs pads .*, use torch.export, got padding 'same_minimal' with stride 2"
    with pytest.raises(ValueError, match=message):
        trace(lambda x: op(x, weight, stride=2, padding="same_minimal"), x)
    y = trace(lambda x: op(x, weight, padding="same_minimal"), x)(x)
    assert torch.equal(y, op(x, weight, padding="same"))
