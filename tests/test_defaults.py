"""torch's default device and dtype are for what a user makes: no op, gradient, layer or stream asks for them."""

from contextlib import contextmanager

import pytest
import torch
from cases import layer_input, on, one_case_per_op

import omniconv
from omniconv import settings
from omniconv.functional import causal_conv1d_fn, causal_conv1d_update, dynamic_conv1d, lightweight_conv1d
from omniconv.models import LightConvBlock
from omniconv.nn import DepthwiseConv1d
from omniconv.testing import make_inputs


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "a context of meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
}
under_other_defaults = pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.device, a.stride()) == (b.dtype, b.device, b.stride())
        assert torch.equal(a, b)


def results(technique, problem, operands):
    """The op's result, its gradients, and the reference."""
    leaves = {n: x.clone().requires_grad_() for n, x in operands.items()}
    y = technique.call(problem, leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), y.detach())
    return y, *grads, technique.reference(**operands, **technique.arguments(problem))


@under_other_defaults
@pytest.mark.parametrize("composite", [False, True])
@on(one_case_per_op())
def test_ops_and_gradients(technique, problem, composite, default):
    operands = make_inputs(technique, problem)

    def compute():
        if not composite:
            return results(technique, problem, operands)
        with settings.composite_only():
            return results(technique, problem, operands)

    expected = compute()
    with default():
        assert_equal(compute(), expected)


@under_other_defaults
@on(one_case_per_op())
def test_layers(technique, problem, default):
    layer, x = technique.layer(problem).to(problem.torch_dtype), layer_input(problem)
    expected = layer(x)
    with default():
        assert_equal([layer(x)], [expected])


@under_other_defaults
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", [dynamic_conv1d, lightweight_conv1d])
def test_dropped_weights(op, grad, default):
    x = torch.randn(2, 4, 9, requires_grad=grad)
    kernel = torch.randn((2, 2, 3, 9) if op is dynamic_conv1d else (2, 3))

    def drawn():
        torch.manual_seed(0)
        return op(x, kernel, weight_dropout=0.5, training=True)

    expected = drawn()
    assert not torch.equal(expected, op(x, kernel))
    with default():
        assert_equal([drawn()], [expected])


@under_other_defaults
def test_causal(default):
    x, weight, state = torch.randn(1, 3, 9), torch.randn(3, 4), torch.randn(1, 3, 5)
    # rows that interleave, which takes more than a look at the strides to see
    crossing = torch.arange(64.0).as_strided((1, 3, 5), (1, 3, 2))
    seen, starts, owner = torch.tensor([2]), torch.tensor([0, 4, 9]), torch.tensor([[0] * 4 + [1] * 5])

    def compute():
        states = [s.clone() for s in (state, state)]
        return (
            causal_conv1d_fn(x, weight, seq_idx=owner),
            *causal_conv1d_fn(x, weight, query_start_loc=starts, return_final_states=True),
            causal_conv1d_update(x, states[0], weight, cache_seqlens=seen),
            causal_conv1d_update(x, states[1], weight, conv_state_indices=torch.tensor([0], device="cpu")),
            *states,
        )

    def complaint():
        with pytest.raises(ValueError, match="conv_state must have a place in memory") as caught:
            causal_conv1d_update(x, crossing, weight)
        return str(caught.value)

    expected, refused = compute(), complaint()
    with default():
        assert_equal(compute(), expected)
        assert complaint() == refused


@under_other_defaults
def test_streams(default):
    layer, x = DepthwiseConv1d(3, 3, padding="causal").eval(), torch.randn(2, 3, 6)

    def compute():
        stream = omniconv.streaming(layer)
        first = stream(x)
        stream.reorder([1, 0, 1])
        second = stream(x[[1, 0, 1]])
        stream.reset_rows([0])
        return first, second, stream(x[[1, 0, 1]])

    with torch.no_grad():
        expected = compute()
        with default():
            assert_equal(compute(), expected)


@under_other_defaults
def test_models(default):
    block, x = LightConvBlock(8, 3, 2).eval(), torch.randn(2, 5, 8)
    expected = block(x)
    with default():
        assert_equal([block(x)], [expected])
