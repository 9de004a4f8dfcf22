"""The state of a stream: copied, saved, reordered, row by row; refused where it is malformed."""

import copy
import io
import random

import pytest
import torch
from streaming_networks import (
    CHANNELS,
    TIME,
    filled,
    sequence,
    whole,
)
from torch import nn

import omniconv
from omniconv.nn import (
    DepthwiseConv1d,
    LightweightConv1d,
)


def test_state_is_a_snapshot(stack):
    x = sequence("NCT", 3, 30)
    s = omniconv.streaming(stack)
    assert s.state() == {"layout": "NCT", "rows": None, "dtype": None, "past": {}, "phase": {}}
    s(x[..., :7])
    state = s.state()
    assert (state["rows"], state["dtype"]) == (3, torch.float32)
    assert {name: past.shape[2] for name, past in state["past"].items()} == {"0.body.0": 4, "1": 3}
    for past in s.state()["past"].values():
        past.zero_()
    copies = [copy.deepcopy(state), {**state, "past": {k: v.clone() for k, v in state["past"].items()}}]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=True))
    expected = s(x[..., 7:])
    assert torch.equal(expected, whole(stack, x)[..., 7:])
    for same in (state, *copies):
        s.load_state(same)
        assert torch.equal(s(x[..., 7:]), expected)
        fresh = omniconv.streaming(stack)
        fresh.load_state(same)
        for past in same["past"].values():
            past.zero_()
        assert torch.equal(fresh(x[..., 7:]), expected)


def test_an_empty_state_begins_anew(stack):
    x = sequence("NCT", 2, 9)
    s = omniconv.streaming(stack)
    empty = s.state()
    first = s(x)
    s.load_state(empty)
    assert torch.equal(s(x.double().float()), first)
    s.reset()
    assert torch.equal(s(x[:1]), first[:1])


@pytest.mark.parametrize("rows", [[1, 1, 0], [2], [], [2, 1, 0, 0, 1]])
def test_rows_are_reordered(stack, rows):
    x, later = sequence("NCT", 3, 11), sequence("NCT", len(rows), 9)
    s = omniconv.streaming(stack)
    s(x)
    s.reorder(torch.tensor(rows, dtype=torch.int64))
    expected = whole(stack, torch.cat([x[rows], later], 2))[..., 11:]
    assert torch.equal(s(later), expected)


@pytest.mark.parametrize("layout", TIME)
def test_rows_in_every_layout(layout):
    module = filled(LightweightConv1d(CHANNELS, 4, 3, "causal", layout=layout))
    x, later = sequence(layout, 3, 11), sequence(layout, 3, 9)
    batch, time = layout.index("N"), TIME[layout]
    s = omniconv.streaming(module)
    s(x)
    s.reorder([2, 0, 0])
    s.reset_rows([1])
    sources = x.index_select(batch, torch.tensor([2, 0, 0]))
    sources.narrow(batch, 1, 1).zero_()
    torch.testing.assert_close(s(later), whole(module, torch.cat([sources, later], time)).narrow(time, 11, 9))


def test_rows_begin_anew_and_are_replaced(stack):
    x, later = sequence("NCT", 4, 11), sequence("NCT", 4, 9)
    s, other = omniconv.streaming(stack), omniconv.streaming(stack)
    s(x)
    other(x[:2].flip(1))
    s.reset_rows([3])
    s.replace_rows((2, 0), other.state())
    y = s(later)
    assert torch.equal(y[3:], whole(stack, later[3:]))
    assert torch.equal(y[1:2], whole(stack, torch.cat([x, later], 2))[1:2, :, 11:])
    assert torch.equal(y[[2, 0]], whole(stack, torch.cat([x[:2].flip(1), later[[2, 0]]], 2))[..., 11:])


def test_the_state_of_some_rows(stack):
    x, later = sequence("NCT", 4, 11), sequence("NCT", 2, 9)
    s, other = omniconv.streaming(stack), omniconv.streaming(stack)
    s(x)
    other.load_state(s.state([3, 1]))
    assert torch.equal(other(later), whole(stack, torch.cat([x[[3, 1]], later], 2))[..., 11:])


def test_rows_between_two_outputs_of_a_stride_stay_in_step():
    module = filled(nn.Sequential(DepthwiseConv1d(CHANNELS, 3, 2, "causal")))
    s, other, x = omniconv.streaming(module), omniconv.streaming(module), sequence("NCT", 2, 4)
    s(x[..., :3])
    with pytest.raises(ValueError, match=r"streaming.reset_rows: the rows must be in step: 0 inputs .* of 2 of '0' \(Dep.*, got 1"):
        s.reset_rows([0])
    other(x[:1])
    with pytest.raises(ValueError, match=r"streaming.replace_rows: the rows must be in step"):
        s.replace_rows([0], other.state())
    s(x[..., 3:])
    s.reset_rows([0])
    s.replace_rows([1], other.state())
    assert torch.equal(s(x), torch.cat([whole(module, x[:1]), whole(module, torch.cat([x[:1], x[1:]], 2))[..., 2:]]))


def test_malformed_rows(stack):
    s, x = omniconv.streaming(stack), sequence("NCT", 2, 5)
    for act in (s.reorder, s.reset_rows, s.state):
        with pytest.raises(ValueError, match="got none before the first chunk"):
            act([0])
    s(x)
    for act in (s.reorder, s.reset_rows, s.state):
        for rows, error in (([2], ValueError), ([-1], ValueError), ([0.5], TypeError), ([True], TypeError), (1, TypeError)):
            with pytest.raises(error, match="streaming: rows must be"):
                act(rows)
        with pytest.raises(TypeError, match=r"int32 or int64, got torch.bool"):
            act(torch.tensor([True, False]))
    with pytest.raises(ValueError, match=r"replace_rows: rows must be distinct, got \[0, 0\]"):
        s.replace_rows([0, 0], s.state())
    with pytest.raises(ValueError, match=r"replace_rows: the state must have \(rows, dtype, device\) \(1, torch.float32"):
        s.replace_rows([0], s.state())


def test_malformed_states(stack):
    s, x = omniconv.streaming(stack), sequence("NCT", 2, 5)
    y = s(x)
    good = s.state()
    bad = [
        (None, TypeError, "with layout, rows, dtype, past, phase, got NoneType"),
        ({"past": {}}, TypeError, "got dict of 'past'"),
        (good | {"layout": "NTC"}, ValueError, "the layout must be 'NCT', got 'NTC'"),
        (good | {"dtype": "float32"}, TypeError, "dtype one of torch's"),
        (good | {"past": {"1": good["past"]["1"]}}, ValueError, r"must be of '0.body.0', '1', got '1'"),
        (good | {"rows": 3}, ValueError, r"the past of '0.body.0' \(DepthwiseConv1d\) must have the sizes"),
        (good | {"past": good["past"] | {"1": torch.zeros(2, CHANNELS, 2)}}, ValueError, "the past of '1'"),
        (good | {"past": good["past"] | {"1": torch.zeros(2, CHANNELS + 1, 3)}}, ValueError, "the past of '1'"),
        (good | {"past": good["past"] | {"1": [0.0]}}, TypeError, "got list, 0"),
        (good | {"phase": good["phase"] | {"1": 1}}, ValueError, "the phase of '1'"),
    ]
    for state, error, message in bad:
        with pytest.raises(error, match=f"streaming.load_state: .*{message}"):
            s.load_state(state)
    expected = whole(stack, torch.cat([x, x], 2))[..., 5:]
    assert torch.equal(s(x), expected)
    assert torch.equal(y, whole(stack, x))


def test_memory_stays_the_same():
    module = filled(nn.Sequential(*(DepthwiseConv1d(4, 4, padding="causal", dilation=2**i) for i in range(3))))
    s, rng = omniconv.streaming(module), random.Random(0)
    x = sequence("NCT", 1, 400, channels=4)

    def held():
        return sum(h.past.untyped_storage().nbytes() for h in s._held.values())

    s(x)
    before = held()
    assert before == 4 * 4 * 3 * (1 + 2 + 4)
    for _ in range(10_000):
        s(x[..., : rng.choice([0, 1, 1, 1, 2, 3, 50])])
        assert held() == before
