from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from omniconv.functional import depthwise_conv1d
from omniconv.techniques import find
from omniconv.techniques.causal import causal_conv1d_fn, causal_conv1d_update
from omniconv.testing import assert_within_bound

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# the formulas that torch loads for forward-mode AD are scripted
FORWARD_AD = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
INDICES = [torch.int32, torch.int64]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_is_convolution_of(window, weight, bias, y, activation=None):
    """``y`` is the depthwise convolution of ``window`` without pads, within the derived bound."""
    operands = {"input": window, "weight": weight.unsqueeze(1), "bias": bias, "activation": activation}
    assert_within_bound(find("depthwise"), operands, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "channels", "steps", "width", "biased", "begun", "activation"),
    [
        (2, 5, 9, 4, True, False, None),
        (1, 3, 17, 2, False, True, "silu"),
        (3, 1, 1, 4, True, True, "swish"),
        (2, 4, 2, 5, True, False, "relu"),
        (1, 8, 6, 1, False, True, None),
        (0, 3, 5, 4, True, True, None),
    ],
)
def test_fn_is_the_causal_depthwise_convolution(dtype, batch, channels, steps, width, biased, begun, activation):
    x, weight = normal(batch, channels, steps, dtype=dtype), normal(channels, width, dtype=dtype, seed=1)
    bias = normal(channels, dtype=dtype, seed=2) if biased else None
    initial = normal(batch, channels, width - 1, dtype=dtype, seed=3) if begun else None
    y, final = causal_conv1d_fn(x, weight, bias, None, initial, True, activation=activation)
    before = x.new_zeros(batch, channels, width - 1) if initial is None else initial
    window = torch.cat([before, x], 2)
    assert y.dtype == dtype == final.dtype
    assert y.is_contiguous()
    assert_is_convolution_of(window, weight, bias, y, "silu" if activation == "swish" else activation)
    assert torch.equal(final, window[:, :, steps:])
    assert torch.equal(causal_conv1d_fn(x, weight, bias, initial_states=initial, activation=activation), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(dtype):
    x, weight, bias = (
        integers(2, 3, 20, dtype=dtype), integers(3, 4, dtype=dtype, seed=1), integers(3, dtype=dtype, seed=2)
    )  # fmt: skip
    expected = depthwise_conv1d(x.double(), weight.double().unsqueeze(1), bias.double(), padding="causal")
    assert torch.equal(causal_conv1d_fn(x, weight, bias).double(), expected)
    assert torch.equal(causal_conv1d_update(x, x.new_zeros(2, 3, 3), weight, bias).double(), expected)


def test_by_hand():
    x, weight = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 0.0, 1.0]]]), torch.tensor([[10.0, 1.0], [0.0, 2.0]])
    y, final = causal_conv1d_fn(x, weight, torch.tensor([0.0, 100.0]), initial_states=torch.tensor([[[5.0], [7.0]]]),
                                return_final_states=True)  # fmt: skip
    assert y.tolist() == [[[51, 12, 23], [102, 100, 102]]]
    assert final.tolist() == [[[3], [1]]]


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_states_may_have_another_dtype(dtype, weight_dtype):
    x, weight, bias = (
        normal(2, 3, 9, dtype=dtype), normal(3, 4, dtype=weight_dtype, seed=1), normal(3, dtype=weight_dtype, seed=2)
    )  # fmt: skip
    initial = normal(2, 3, 3, dtype=weight_dtype, seed=3)
    window = torch.cat([initial.double(), x.double()], 2)
    y, final = causal_conv1d_fn(x, weight, bias, initial_states=initial, return_final_states=True)
    assert y.dtype == dtype == final.dtype
    assert_is_convolution_of(window, weight, bias, y)
    if weight_dtype == torch.float64:  # then nothing is rounded but the result
        exact = depthwise_conv1d(window, weight.unsqueeze(1), bias)
        assert (
            (y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * 1.001 * exact.abs() + torch.finfo(dtype).tiny + 1e-12
        ).all()
    state = initial.clone()
    y = causal_conv1d_update(x, state, weight, bias)
    assert (y.dtype, state.dtype) == (dtype, weight_dtype)
    assert_is_convolution_of(window, weight, bias, y)
    assert torch.equal(state, window[:, :, 9:].to(weight_dtype))


def test_unbatched_and_strided_input():
    x, weight, initial = normal(2, 7, 4).mT[:, ::2], normal(3, 4, seed=1).mT[::2], normal(2, 2, 2, seed=2).mT
    y, final = causal_conv1d_fn(x, weight, initial_states=initial, return_final_states=True)
    dense = causal_conv1d_fn(x.contiguous(), weight.contiguous(), initial_states=initial.contiguous())
    assert torch.equal(y, dense)
    assert y.is_contiguous()
    assert final.is_contiguous()
    assert causal_conv1d_fn(x, weight[:, :1]).is_contiguous()
    y0, final0 = causal_conv1d_fn(x[0], weight, initial_states=initial[0], return_final_states=True)
    assert torch.equal(y0, y[0])
    assert torch.equal(final0, final[0])
    seq_idx = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert torch.equal(causal_conv1d_fn(x[0], weight, seq_idx=seq_idx), causal_conv1d_fn(x[:1], weight, seq_idx=seq_idx[None])[0])


def test_final_states_out_is_filled_and_may_be_the_initial_states():
    x, weight, initial = normal(2, 3, 2), normal(3, 4, seed=1), normal(2, 3, 3, seed=2)
    expected, final = causal_conv1d_fn(x, weight, initial_states=initial, return_final_states=True)
    out = torch.empty(2, 3, 3)
    y, returned = causal_conv1d_fn(x, weight, initial_states=initial, return_final_states=True, final_states_out=out)
    assert returned is out
    assert torch.equal(out, final)
    y = causal_conv1d_fn(x, weight, initial_states=initial, final_states_out=initial)
    assert torch.equal(y, expected)
    assert torch.equal(initial, final)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_seq_idx_keeps_sequences_apart(index, width):
    x, weight, bias = normal(2, 3, 12, dtype=torch.float64), normal(3, width, dtype=torch.float64, seed=1), normal(3).double()
    lengths = [[5, 1, 6], [2, 3, 7]]
    seq_idx = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(row)) for row in lengths]).to(index)
    y = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    for row, parts in enumerate(lengths):
        alone = [causal_conv1d_fn(part[None], weight, bias, activation="silu")[0] for part in x[row].split(parts, 1)]
        torch.testing.assert_close(y[row], torch.cat(alone, 1), rtol=1e-12, atol=1e-12)


def test_seq_idx_below_zero_is_padding_and_nothing_leaks_between_sequences():
    x = torch.tensor([[[1.0, float("nan"), 3.0, float("inf"), 5.0, 6.0]]])
    y = causal_conv1d_fn(x, torch.ones(1, 2), torch.ones(1), torch.tensor([[0, 7, 1, -1, 2, 2]]), activation="sigmoid")
    assert y.isnan().tolist() == [[[False, True, False, False, False, False]]]
    torch.testing.assert_close(
        y[0, 0, [0, 2, 3, 4, 5]], torch.tensor([2.0, 4.0, 0.0, 6.0, 12.0]).sigmoid() * torch.tensor([1, 1, 0, 1, 1])
    )
    # a sequence that is interrupted still sees its own positions
    y = causal_conv1d_fn(torch.ones(1, 1, 4), torch.tensor([[100.0, 10.0, 1.0]]), seq_idx=torch.tensor([[0, 1, 0, 1]]))
    assert y.flatten().tolist() == [1, 1, 101, 101]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", [0, 1, 4])
@pytest.mark.parametrize("circular", [False, True])
def test_chunks_give_what_the_whole_sequence_gives(dtype, extra, circular):
    x, weight, bias = normal(2, 3, 24, dtype=dtype), normal(3, 4, dtype=dtype, seed=1), normal(3, dtype=dtype, seed=2)
    whole, final = causal_conv1d_fn(x, weight, bias, return_final_states=True, activation="silu")
    state, seen, parts = x.new_zeros(2, 3, 3 + extra), torch.zeros(2, dtype=torch.int32), []
    for chunk in x.split([1, 1, 3, 2, 9, 1, 4, 3], 2):
        step = chunk.squeeze(2) if chunk.shape[2] == 1 else chunk
        y = causal_conv1d_update(step, state, weight, bias, "silu", cache_seqlens=seen.clone() if circular else None)
        assert y.shape == step.shape
        parts.append(y if y.dim() == 3 else y.unsqueeze(2))
        seen += chunk.shape[2]
    y = torch.cat(parts, 2)
    window = torch.cat([x.new_zeros(2, 3, 3), x], 2)
    assert_is_convolution_of(window, weight, bias, y, "silu")
    assert_is_convolution_of(window, weight, bias, whole, "silu")
    size = 3 + extra
    if circular:
        assert torch.equal(state[:, :, [n % size for n in range(24 - size, 24)]], x[:, :, 24 - size :])
    else:
        assert torch.equal(state, x[:, :, 24 - size :])
        assert torch.equal(state[:, :, extra:], final)


def test_chunks_through_fn_hand_the_state_on():
    x, weight = normal(1, 2, 11, dtype=torch.float64), normal(2, 4, dtype=torch.float64, seed=1)
    whole, final = causal_conv1d_fn(x, weight, return_final_states=True)
    state, parts = None, []
    for chunk in x.split([2, 1, 5, 3], 2):
        y, state = causal_conv1d_fn(chunk, weight, initial_states=state, return_final_states=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-13, atol=1e-13)
    assert torch.equal(state, final)


@pytest.mark.parametrize(("size", "steps", "width"), [(3, 1, 4), (3, 5, 4), (7, 3, 2), (5, 12, 4), (1, 3, 1), (2, 2, 1)])
def test_circular_buffer_step_by_step(size, steps, width):
    """Each sequence at its own place, against the definition written as a loop."""
    x, weight, state = (
        normal(3, 2, steps, dtype=torch.float64),
        normal(2, width, seed=1).double(),
        normal(3, 2, size, seed=2).double(),
    )
    seen = torch.tensor([0, 4, 1001])
    buffer, expected = state.clone(), torch.zeros(3, 2, steps, dtype=torch.float64)
    for b in range(3):
        for t in range(steps):
            n = int(seen[b]) + t
            values = [buffer[b, :, (n - j) % size] for j in range(width - 1, 0, -1)] + [x[b, :, t]]
            expected[b, :, t] = (torch.stack(values, 1) * weight).sum(1)
            buffer[b, :, n % size] = x[b, :, t]
    y = causal_conv1d_update(x, state, weight, cache_seqlens=seen)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(state, buffer)


def test_a_width_of_one_needs_no_state():
    x, weight = normal(2, 3, 5), normal(3, 1, seed=1)
    for seen in (None, torch.tensor([0, 2])):
        y = causal_conv1d_update(x, torch.empty(2, 3, 0), weight, cache_seqlens=seen)
        assert torch.equal(y, causal_conv1d_fn(x, weight))


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("rows", [[4, 0, 2], [-1, 3, -1], [0, -1, 5], [-1, 0, -2], [-1, -1, -1]])
def test_rows_of_the_state_by_index(index, circular, rows):
    x, weight, bias = normal(3, 2, 4), normal(2, 3, seed=1), normal(2, seed=2)
    pool = normal(6, 2, 5, seed=3)
    seen = torch.tensor([7, 0, 2], dtype=index) if circular else None
    before = pool.clone()
    y = causal_conv1d_update(x, pool, weight, bias, "silu", seen, torch.tensor(rows, dtype=index))
    expected = before.clone()
    for b, row in enumerate(rows):
        if row < 0:
            assert y[b].eq(0).all()
            continue
        state = before[row : row + 1].clone()
        alone = causal_conv1d_update(x[b : b + 1], state, weight, bias, "silu", None if seen is None else seen[b : b + 1])
        torch.testing.assert_close(y[b], alone[0])
        expected[row] = state[0]
    assert torch.equal(pool, expected)


def test_empty_batch_leaves_the_state_alone():
    pool = normal(4, 2, 3)
    before = pool.clone()
    y = causal_conv1d_update(torch.empty(0, 2), pool, normal(2, 4), conv_state_indices=torch.empty(0, dtype=torch.int32))
    assert y.shape == (0, 2)
    assert torch.equal(pool, before)


FN = partial(dict, x=torch.ones(2, 3, 5), weight=torch.ones(3, 4))
UPDATE = partial(dict, x=torch.ones(2, 3, 5), conv_state=torch.ones(2, 3, 3), weight=torch.ones(3, 4))
ROWS = torch.zeros(2, dtype=torch.int32)
NESTED = torch.nested.nested_tensor([torch.ones(3, 5), torch.ones(3, 5)], layout=torch.jagged)
REFUSED = [
    (FN(x=[1.0]), TypeError, r"x must be a Tensor, got list"),
    (FN(weight=None), TypeError, r"weight must be a Tensor, got NoneType"),
    (FN(x=torch.ones(3)), ValueError, r"x must have shape \(B, D, T\) or \(D, T\), got \(3,\)"),
    (FN(x=torch.ones(2, 3, 5).int()), TypeError, r"x must be float32, float64, bfloat16 or float16, got torch.int32"),
    (FN(x=torch.ones(2, 3, 0)), ValueError, r"x must have at least one position, got \(2, 3, 0\)"),
    (FN(weight=torch.ones(3, 1, 4)), ValueError, r"weight must have shape \(D, W\) .*, got \(3, 1, 4\)"),
    (FN(weight=torch.ones(2, 4)), ValueError, r"weight must have shape \(D, W\) with the 3 channels of x .*, got \(2, 4\)"),
    (FN(weight=torch.ones(3, 0)), ValueError, r"weight must have shape .*, got \(3, 0\)"),
    (FN(weight=torch.ones(3, 4).int()), TypeError, r"weight must be float32, .*, got torch.int32"),
    (FN(bias=torch.ones(2)), ValueError, r"bias must have shape \(3,\), got \(2,\)"),
    (FN(bias=torch.ones(3, device="meta")), ValueError, r"bias must be on the input's device cpu, got meta"),
    (FN(return_final_states="no"), TypeError, r"return_final_states must be a bool, got 'no'"),
    (FN(return_final_states=1), TypeError, r"return_final_states must be a bool, got 1"),
    (FN(x=torch.ones(2, 3, 5).to_sparse()), TypeError, r"x must be a dense Tensor, got torch.sparse_coo"),
    (FN(x=NESTED), TypeError, r"x must be a dense Tensor, got a nested one"),
    (FN(weight=NESTED), TypeError, r"weight must be a dense Tensor, got a nested one"),
    (FN(bias=NESTED), TypeError, r"bias must be a dense Tensor, got a nested one"),
    (FN(seq_idx=NESTED), TypeError, r"seq_idx must be a dense Tensor, got a nested one"),
    (FN(initial_states=NESTED), TypeError, r"initial_states must be a dense Tensor, got a nested one"),
    (FN(final_states_out=NESTED), TypeError, r"final_states_out must be a dense Tensor, got a nested one"),
    (FN(query_start_loc=NESTED, x=torch.ones(1, 3, 5)), TypeError, r"query_start_loc must be a dense Tensor, got a nested one"),
    (UPDATE(conv_state=NESTED), TypeError, r"conv_state must be a dense Tensor, got a nested one"),
    (UPDATE(cache_seqlens=NESTED), TypeError, r"cache_seqlens must be a dense Tensor, got a nested one"),
    (UPDATE(conv_state_indices=NESTED), TypeError, r"conv_state_indices must be a dense Tensor, got a nested one"),
    (FN(activation="swoosh"), ValueError, r"activation must be None or one of .*, got 'swoosh'"),
    (FN(initial_states=torch.ones(2, 3, 4)), ValueError, r"initial_states must have shape \(2, 3, 3\), got \(2, 3, 4\)"),
    (FN(x=torch.ones(3, 5), initial_states=torch.ones(2, 3, 3)), ValueError, r"initial_states must have shape \(3, 3\), got"),
    (FN(final_states_out=torch.ones(1, 3, 3)), ValueError, r"final_states_out must have shape \(2, 3, 3\), got \(1, 3, 3\)"),
    (FN(final_states_out=torch.ones(1).expand(2, 3, 3)), ValueError, r"final_states_out must have a place in memory for every"),
    (FN(seq_idx=[0]), TypeError, r"seq_idx must be a Tensor, got list"),
    (FN(seq_idx=torch.zeros(2, 5)), TypeError, r"seq_idx must be int32 or int64, got torch.float32"),
    (FN(seq_idx=torch.zeros(1, 5).int()), ValueError, r"seq_idx must have shape \(2, 5\), got \(1, 5\)"),
    (FN(seq_idx=torch.zeros(2, 5).int(), initial_states=torch.ones(2, 3, 3)), ValueError, r"states and seq_idx must not be given"),
    (FN(seq_idx=torch.zeros(2, 5).int(), return_final_states=True), ValueError, r"states and seq_idx must not be given together"),
    (UPDATE(x=torch.ones(3)), ValueError, r"x must have shape \(B, D\) or \(B, D, T\), got \(3,\)"),
    (UPDATE(x=None), TypeError, r"x must be a Tensor, got NoneType"),
    (UPDATE(conv_state=None), TypeError, r"conv_state must be a Tensor, got NoneType"),
    (UPDATE(conv_state=torch.ones(2, 3, 3).int()), TypeError, r"conv_state must be float32, .*, got torch.int32"),
    (UPDATE(conv_state=torch.ones(2, 3, 2)), ValueError, r"conv_state must have shape \(2, 3, S\) with S at least 3, got"),
    (UPDATE(conv_state=torch.ones(4, 3, 3)), ValueError, r"conv_state must have shape \(2, 3, S\) .*, got \(4, 3, 3\)"),
    (UPDATE(conv_state=torch.ones(2, 3, 3).requires_grad_()), ValueError, r"conv_state must not require a gradient"),
    (UPDATE(conv_state=torch.ones(1, 3, 3).expand(2, 3, 3)), ValueError, r"conv_state must have a place in memory for every"),
    (UPDATE(conv_state=torch.ones(0, 3, 3), conv_state_indices=ROWS), ValueError, r"conv_state must have shape \(M, 3, S\)"),
    (UPDATE(weight=torch.ones(4, 4)), ValueError, r"weight must have shape \(D, W\) with the 3 channels"),
    (UPDATE(cache_seqlens=torch.ones(2)), TypeError, r"cache_seqlens must be int32 or int64, got torch.float32"),
    (UPDATE(cache_seqlens=ROWS[:1]), ValueError, r"cache_seqlens must have shape \(2,\), got \(1,\)"),
    (UPDATE(cache_seqlens=ROWS - 1), ValueError, r"cache_seqlens must be at least 0, got \[-1, -1\]"),
    (UPDATE(conv_state_indices=[0, 1]), TypeError, r"conv_state_indices must be a Tensor, got list"),
    (UPDATE(conv_state_indices=ROWS), ValueError, r"conv_state_indices must be distinct where .*, got \[0, 0\]"),
    (UPDATE(conv_state_indices=torch.tensor([0, 2])), ValueError, r"conv_state_indices must be below the 2 rows .*, got 2"),
    (UPDATE(activation="swoosh"), ValueError, r"activation must be None or one of .*, got 'swoosh'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED, ids=[m[:40] for _, _, m in REFUSED])
def test_malformed_calls_are_refused_by_name_before_any_work(arguments, kind, message):
    op = causal_conv1d_update if "conv_state" in arguments else causal_conv1d_fn
    written = [t for t in (arguments.get("conv_state"), arguments.get("final_states_out")) if t is not None]
    written = [t for t in written if not t.is_nested]
    before = [t.detach().clone() for t in written]
    with pytest.raises(kind, match=f"{op.__name__}: {message}"):
        op(**arguments)
    assert all(torch.equal(t, b) for t, b in zip(written, before, strict=True))


def double(*shape: int, seed: int) -> torch.Tensor:
    return normal(*shape, dtype=torch.float64, seed=seed).requires_grad_()


@FORWARD_AD
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("steps", [2, 5])
def test_gradients_through_output_and_states(activation, steps):
    def op(x, weight, bias, initial):
        return causal_conv1d_fn(x, weight, bias, initial_states=initial, return_final_states=True, activation=activation)

    operands = double(2, 2, steps, seed=0), double(2, 4, seed=1), double(2, seed=2), double(2, 2, 3, seed=3)
    assert gradcheck(op, operands, check_forward_ad=True)
    assert gradgradcheck(op, operands)


@FORWARD_AD
def test_gradients_with_seq_idx_and_of_an_update():
    seq_idx = torch.tensor([[0, 0, 1, 1, 1], [0, -1, -1, 3, 3]])
    operands = double(2, 2, 5, seed=0), double(2, 3, seed=1), double(2, seed=2)
    packed = partial(causal_conv1d_fn, seq_idx=seq_idx, activation="silu")
    assert gradcheck(packed, operands, check_forward_ad=True)
    assert gradgradcheck(packed, operands)
    state = normal(2, 2, 3).double()
    assert gradcheck(lambda x, w, b: causal_conv1d_update(x, state.clone(), w, b, "silu"), operands)
    before = state.clone()
    causal_conv1d_update(operands[0], state, *operands[1:])
    assert not state.requires_grad
    assert not torch.equal(state, before)


@FORWARD_AD
def test_function_transforms():
    x, weight, bias, initial = normal(3, 2, 2, 5), normal(2, 4, seed=1), normal(2, seed=2), normal(3, 2, 2, 3, seed=3)

    def op(x, initial, weight, bias):
        return causal_conv1d_fn(x, weight, bias, initial_states=initial, return_final_states=True, activation="silu")

    mapped = torch.func.vmap(op, in_dims=(0, 0, None, None))(x, initial, weight, bias)
    single = [torch.stack(r) for r in zip(*(op(x[i], initial[i], weight, bias) for i in range(3)), strict=True)]
    torch.testing.assert_close(list(mapped), single)
    weights = torch.stack([weight, 2 * weight])
    mapped = torch.func.vmap(lambda w: causal_conv1d_fn(x[0], w, bias))(weights)
    torch.testing.assert_close(mapped, torch.stack([causal_conv1d_fn(x[0], w, bias) for w in weights]))
    seq_idx = torch.tensor([[[0, 0, 1, 1, 1]], [[0, 0, 0, 0, 1]]])
    mapped = torch.func.vmap(lambda s: causal_conv1d_fn(x[0, :1], weight, bias, s))(seq_idx)
    torch.testing.assert_close(mapped, torch.stack([causal_conv1d_fn(x[0, :1], weight, bias, s) for s in seq_idx]))
    _, tangent = torch.func.jvp(lambda x: causal_conv1d_fn(x, weight), (x[0],), (x[1],))
    torch.testing.assert_close(tangent, causal_conv1d_fn(x[1], weight))
    grad = torch.func.grad(lambda w: causal_conv1d_fn(x[0], w).sum())(weight)
    assert grad.shape == weight.shape


def test_compiles_whole_with_dynamic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d_fn, fullgraph=True, backend="aot_eager", dynamic=True)
    weight, bias = normal(3, 4, seed=1).requires_grad_(), normal(3, seed=2)
    for batch, steps in ((2, 7), (3, 12)):
        x, initial = normal(batch, 3, steps), normal(batch, 3, 3, seed=3)
        y, final = compiled(x, weight, bias, initial_states=initial, return_final_states=True, activation="silu")
        expected = causal_conv1d_fn(x, weight, bias, None, initial, True, activation="silu")
        torch.testing.assert_close((y, final), expected)
        (grad,) = torch.autograd.grad(y.sum(), weight)
        torch.testing.assert_close(grad, torch.autograd.grad(expected[0].sum(), weight)[0])
        seq_idx = torch.arange(steps).div(3, rounding_mode="floor").expand(batch, steps)
        torch.testing.assert_close(compiled(x, weight, bias, seq_idx), causal_conv1d_fn(x, weight, bias, seq_idx))


@pytest.mark.parametrize("how", ["shifted", "circular", "indexed"])
def test_update_compiles_whole_and_writes_the_state(how):
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d_update, fullgraph=True, backend="aot_eager", dynamic=True)
    weight, bias = normal(3, 4, seed=1), normal(3, seed=2)
    for batch, steps in ((2, 5), (3, 9)):
        x, ours = normal(batch, 3, steps), normal(6, 3, 5, seed=3)
        if how != "indexed":
            ours = ours[:batch].clone()
        theirs = ours.clone()
        indices = {
            "cache_seqlens": torch.arange(batch) * 3 if how != "shifted" else None,
            "conv_state_indices": torch.tensor([4, -1, 1][:batch]) if how == "indexed" else None,
        }
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(x, ours, weight, bias, "silu", **indices), causal_conv1d_update(x, theirs, weight, bias, "silu", **indices)
            )
        assert torch.equal(ours, theirs)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(normal(3, 4, seed=1))

    def forward(self, x, initial):
        return causal_conv1d_fn(x, self.weight, initial_states=initial, return_final_states=True, activation="silu")


def test_exports_with_dynamic_batch_and_length():
    batch, steps = torch.export.Dim("batch", min=1), torch.export.Dim("steps", min=1)
    block = Block()
    program = torch.export.export(block, (normal(2, 3, 7), normal(2, 3, 3)), dynamic_shapes=({0: batch, 2: steps}, {0: batch}))
    for n, t in ((2, 7), (5, 1), (1, 30)):
        operands = normal(n, 3, t), normal(n, 3, 3, seed=4)
        torch.testing.assert_close(program.module()(*operands), block(*operands))


def test_autocast_lowers_operands_and_leaves_the_state():
    x, weight = normal(2, 3, 6), normal(3, 4, seed=1)
    state = normal(2, 3, 4, seed=2)
    before = state.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = causal_conv1d_fn(x, weight, return_final_states=True)
        stepped = causal_conv1d_update(x[:, :, :3], state, weight)
    assert y.dtype == torch.bfloat16 == final.dtype == stepped.dtype
    assert torch.equal(y, causal_conv1d_fn(x.bfloat16(), weight.bfloat16()))
    assert state.dtype == torch.float32
    assert torch.equal(state[:, :, 0], before[:, :, 3])
    assert torch.equal(state[:, :, 1:], x[:, :, :3].bfloat16().float())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_update_runs_where_gradients_are_off(mode):
    weight = normal(3, 4).requires_grad_()
    with mode():
        state = torch.zeros(2, 3, 3)
        y = causal_conv1d_update(normal(2, 3), state, weight)
    assert not y.requires_grad
    assert torch.equal(state[:, :, 2], normal(2, 3))


def overlapping(*shape: int) -> torch.Tensor:
    """A state whose rows begin one number apart."""
    return torch.zeros(64).as_strided(shape, (1, shape[2], 1))


def made_in_inference_mode(*shape: int) -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(shape)


NOT_WRITABLE = [
    (overlapping, r"a place in memory for every number, .*, got shape \(2, 3, 3\) with strides \(1, 3, 1\)"),
    (lambda *s: torch.zeros(s[1:]).expand(s), r"a place in memory for every number, .*, got shape .* with strides \(0, 3, 1\)"),
    (lambda *s: torch.zeros(9).as_strided(s, (4, 1, 1)), r"a place in memory for every number"),
    (made_in_inference_mode, r"must not be an inference tensor outside inference mode, .*, got one"),
    (lambda *s: torch._neg_view(torch.zeros(s)), r"must hold its numbers as they are, .*, got a negative or conjugate view"),
]


@pytest.mark.parametrize(("make", "message"), NOT_WRITABLE, ids=["overlapping", "expanded", "crossing", "inference", "negative"])
def test_what_cannot_be_written_is_refused_before_any_work(make, message):
    x, weight, states = normal(2, 3, 5), normal(3, 4, seed=1), make(2, 3, 3)
    for index in ({}, {"cache_seqlens": ROWS}, {"conv_state_indices": torch.tensor([1, 0])}):
        with pytest.raises(ValueError, match=f"causal_conv1d_update: conv_state .*{message}"):
            causal_conv1d_update(x, states, weight, **index)
    with pytest.raises(ValueError, match=f"causal_conv1d_fn: final_states_out .*{message}"):
        causal_conv1d_fn(x, weight, final_states_out=states)
    assert states.abs().sum() == 0


@pytest.mark.parametrize("strides", [(9, 3, 1), (1, 2, 6), (20, 5, 2), (1, 4, 6), (3, 10, 2)])
def test_states_of_any_strides_that_do_not_overlap_are_written(strides):
    """The last two interleave: no axis passes over all that the faster ones reach."""
    store = torch.full((64,), 7.0)
    state, x = store.as_strided((2, 3, 3), strides), normal(2, 3, 5)
    causal_conv1d_update(x, state, normal(3, 4, seed=1))
    assert torch.equal(state, x[..., 2:])
    assert int((store == 7).sum()) == 64 - 18


@pytest.mark.parametrize("how", ["shifted", "circular", "indexed"])
def test_update_counts_as_a_change_of_the_state_and_of_what_it_is_a_view_of(how):
    """A graph that kept the state must not give gradients of what has been written over it since."""
    pool, scale = normal(4, 3, 3), torch.ones(3, requires_grad=True)
    state = pool[1:3]
    loss = (state * scale).square().sum()
    indices = {"circular": {"cache_seqlens": ROWS}, "indexed": {"conv_state_indices": torch.tensor([1, 0])}}.get(how, {})
    versions = state._version, pool._version
    causal_conv1d_update(normal(2, 3, 1), state, normal(3, 4, seed=1), **indices)
    assert state._version > versions[0]
    assert pool._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_is_rounded_to_the_dtype_of_its_own_operand(dtype, weight_dtype):
    x, weight = integers(2, 3, 300, dtype=dtype), integers(3, 4, dtype=weight_dtype, seed=1).requires_grad_()
    bias = torch.zeros(3, requires_grad=True)
    incoming = torch.ones(2, 3, 300, dtype=dtype)
    incoming[0, :, 0] = 2
    found = torch.autograd.grad(causal_conv1d_fn(x, weight, bias), (bias, weight), incoming)
    assert torch.equal(found[0], torch.full((3,), 601.0))  # of which bfloat16 makes 600
    assert found[1].dtype == weight_dtype
