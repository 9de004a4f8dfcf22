"""The native causal filter at every instruction set: what runs, chunks bit by bit, sequences in one row, states by row."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from native_cases import DTYPES, OPS, integers, normal

from omniconv import settings
from omniconv.functional import causal_conv1d_fn, causal_conv1d_update


def by_definition(x, weight, bias, before):
    """Σ_i weight[d, i]·past[b, d, t + i] in float64."""
    whole = torch.cat([before, x], 2).double()
    return F.conv1d(whole, weight.double().unsqueeze(1), bias.double(), groups=x.shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "width", "size", "steps"), [(5, 4, 3, 1), (70, 4, 6, 1), (33, 3, 2, 5), (16, 1, 0, 2), (19, 9, 8, 150)]
)
def test_update_is_the_definition_and_moves_the_state_on(dtype, channels, width, size, steps, level):
    x, state = integers(3, channels, steps, dtype=dtype), integers(3, channels, size, dtype=dtype, seed=1)
    weight, bias = integers(channels, width, dtype=dtype, seed=2), integers(channels, dtype=dtype, seed=3)
    expected = by_definition(x, weight, bias, state[..., size - width + 1 :])
    after = torch.cat([state, x], 2)[..., steps:]
    y = causal_conv1d_update(x, state, weight, bias)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(state, after)


def test_update_takes_rows_and_any_strides_of_the_state(level):
    x, weight, bias = integers(4, 21, 2), integers(21, 4, seed=1), integers(21, seed=2)
    states = integers(9, 6, 21, seed=3).transpose(1, 2)  # steps lie slowest
    before = states.clone()
    rows = torch.tensor([7, -1, 0, 3], dtype=torch.int32)
    y = causal_conv1d_update(x, states, weight, bias, "relu", conv_state_indices=rows)
    for b, row in enumerate(rows.tolist()):
        if row < 0:
            assert y[b].abs().sum() == 0
            continue
        alone = before[row : row + 1].clone()
        assert torch.equal(y[b : b + 1], causal_conv1d_update(x[b : b + 1], alone, weight, bias, "relu"))
        assert torch.equal(states[row : row + 1], alone)
    assert torch.equal(states[[1, 2, 4, 5, 6, 8]], before[[1, 2, 4, 5, 6, 8]])


@pytest.mark.parametrize("width", [1, 2, 4, 7, 13, 31, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_any_size_give_the_bits_of_the_whole(dtype, width, level):
    """By update and by fn with states: the order of a sum depends neither on where it stands nor on the length of its chunk."""
    x, weight, bias = normal(2, 19, 150, dtype=dtype), normal(19, width, dtype=dtype, seed=1), normal(19, dtype=dtype, seed=2)
    whole = causal_conv1d_fn(x, weight, bias)
    state, states, at = x.new_zeros(2, 19, width - 1), None, 0
    for steps in (1, 2, 3, 17, 64, 63):
        chunk = x[..., at : at + steps]
        assert torch.equal(causal_conv1d_update(chunk, state, weight, bias), whole[..., at : at + steps])
        y, states = causal_conv1d_fn(chunk, weight, bias, initial_states=states, return_final_states=True)
        assert torch.equal(y, whole[..., at : at + steps])
        assert torch.equal(state, states)
        at += steps


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_seq_idx_natively_and_by_the_composite_path(dtype, activation, level):
    owner = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 2, -1, -1, 3, 3, 3, 3, 3], [5] * 20])
    x, weight, bias = normal(2, 18, 20, dtype=dtype), normal(18, 4, dtype=dtype, seed=1), normal(18, dtype=dtype, seed=2)
    x[0, :, 3] = float("nan")  # stays within its sequence
    y = causal_conv1d_fn(x, weight, bias, owner, activation=activation)
    with settings.composite_only():
        expected = causal_conv1d_fn(x, weight, bias, owner, activation=activation)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y[0, :, 5:].isnan().sum() == 0


STARTS = [[0, 20], [0, 1, 3, 20], [0, 5, 5, 11, 20], [0, 0, 20, 20]]


@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_query_start_loc_is_each_sequence_by_itself(starts, begun, index, level):
    x, weight, bias = normal(6, 20), normal(6, 4, seed=1), normal(6, seed=2)
    count = len(starts) - 1
    initial = normal(count, 6, 3, seed=3) if begun else None
    y, final = causal_conv1d_fn(
        x, weight, bias, None, initial, True, activation="silu", query_start_loc=torch.tensor(starts, dtype=index)
    )
    assert y.shape == x.shape
    assert final.shape == (count, 6, 3)
    for i, (first, last) in enumerate(pairwise(starts)):
        before = x.new_zeros(6, 3) if initial is None else initial[i]
        assert torch.equal(final[i], torch.cat([before, x[:, first:last]], 1)[:, last - first :])
        if first < last:
            alone = causal_conv1d_fn(x[:, first:last], weight, bias, initial_states=before, activation="silu")
            assert torch.equal(y[:, first:last], alone)


def test_query_start_loc_has_gradients_and_keeps_the_batch_axis():
    x, weight, initial = (
        normal(1, 3, 7, dtype=torch.float64),
        normal(3, 3, dtype=torch.float64, seed=1),
        normal(2, 3, 2, dtype=torch.float64, seed=2),
    )
    starts = torch.tensor([0, 3, 7])

    def call(x, weight, initial):
        return causal_conv1d_fn(x, weight, initial_states=initial, return_final_states=True, query_start_loc=starts)

    assert call(x, weight, initial)[0].shape == x.shape
    tensors = [t.requires_grad_() for t in (x, weight, initial)]
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"query_start_loc": [0, 5]}, TypeError, "query_start_loc must be a Tensor"),
        ({"query_start_loc": torch.tensor([0])}, ValueError, r"must have shape \(S \+ 1,\)"),
        ({"query_start_loc": torch.tensor([0.0, 8.0])}, TypeError, "must be int32 or int64"),
        ({"query_start_loc": torch.tensor([0, 9])}, ValueError, "must rise from 0 to the 8 positions"),
        ({"query_start_loc": torch.tensor([1, 8])}, ValueError, "must rise from 0"),
        ({"query_start_loc": torch.tensor([0, 5, 3, 8])}, ValueError, "must rise from 0"),
        ({"query_start_loc": torch.tensor([0, 8]), "seq_idx": torch.zeros(8).int()}, ValueError, "must not be given together"),
        ({"query_start_loc": torch.tensor([0, 3, 8]), "initial_states": torch.zeros(4, 2)}, ValueError, r"shape \(2, 4, 2\)"),
    ],
)
def test_query_start_loc_is_refused_by_name(arguments, kind, message):
    with pytest.raises(kind, match=f"causal_conv1d_fn: .*{message}"):
        causal_conv1d_fn(torch.zeros(4, 8), torch.zeros(4, 3), **arguments)


def test_query_start_loc_needs_one_row():
    with pytest.raises(ValueError, match="one row"):
        causal_conv1d_fn(torch.zeros(2, 4, 8), torch.zeros(4, 3), query_start_loc=torch.tensor([0, 8]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_float32_beside_half_inputs(dtype, level):
    x, state, weight, bias = (
        normal(2, 20, 9, dtype=dtype),
        normal(2, 20, 3, dtype=dtype, seed=1),
        normal(20, 4, seed=2),
        normal(20, seed=3),
    )
    expected = by_definition(x, weight, bias, state).to(dtype)
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, initial_states=state), expected)
    torch.testing.assert_close(causal_conv1d_update(x, state, weight, bias), expected)


def test_opcheck():
    x, weight, bias = normal(2, 20, 3), normal(20, 4, seed=1), normal(20, seed=2)
    rows = torch.tensor([4, 1])
    torch.library.opcheck(OPS.causal_update.default, (x, normal(2, 20, 3, seed=3), weight, bias, None, 3, True))
    torch.library.opcheck(OPS.causal_update.default, (x, normal(5, 20, 6, seed=3), weight, None, rows, 0, True))
    torch.library.opcheck(
        OPS.causal_fixup_boundaries.default, (x.clone(), x, weight, bias, torch.tensor([[0, 0, 1], [2, 2, 2]]), 1, True)
    )


WRONG_UPDATES = [
    (torch.zeros(2, 4), torch.zeros(2, 4, 3), torch.zeros(4, 4), None),
    (torch.zeros(2, 4, 1), torch.zeros(2, 4, 2), torch.zeros(4, 4), None),
    (torch.zeros(2, 4, 1), torch.zeros(3, 4, 3), torch.zeros(4, 4), None),
    (torch.zeros(2, 4, 1), torch.zeros(2, 4, 3).double(), torch.zeros(4, 4), None),
    (torch.zeros(2, 4, 1), torch.zeros(2, 4, 3), torch.zeros(5, 4), None),
    (torch.zeros(2, 4, 1), torch.zeros(2, 4, 3), torch.zeros(4, 4), torch.tensor([0, 2])),
    (torch.zeros(2, 4, 1), torch.zeros(2, 4, 3), torch.zeros(4, 4), torch.tensor([0, 1]).int()),
    (torch.zeros(2, 4, 1).int(), torch.zeros(2, 4, 3).int(), torch.zeros(4, 4).int(), None),
]


@pytest.mark.parametrize("operands", WRONG_UPDATES)
def test_the_raw_update_refuses_by_name(operands):
    x, state, weight, rows = operands
    with pytest.raises(RuntimeError, match="causal_update: "):
        OPS.causal_update(x, state, weight, None, rows, 0, True)
