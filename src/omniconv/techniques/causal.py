"""Causal depthwise convolution with state: the interface of the causal-conv1d package, which state-space models are built on.

    y[b, d, t] = f(bias[d] + Σ_i weight[d, i] · x[b, d, t + i − (W − 1)])

Before its first position x continues with the state: the W − 1 inputs that came before, zeros at the start. So a sequence may
come whole or in chunks. It is a depthwise convolution with ``padding="causal"``; what is added is the state.

Paper   Gu & Dao 2023 (Mamba), arXiv:2312.00752
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from omniconv.engines.causal import fixup_boundaries, is_native, update
from omniconv.engines.depthwise import plan_of, run_depthwise
from omniconv.geometry import Grid
from omniconv.ops.activation import activate, check_activation
from omniconv.ops.in_place import check_writable
from omniconv.ops.operator import (
    accumulated_in,
    check_bias,
    check_dense,
    check_flags,
    fail,
    intercepted,
    interceptors,
    is_intercepted,
    prepare_operands,
)
from omniconv.ops.sequence import shift_and_add
from omniconv.ops.technique import Arguments
from omniconv.ops.tracing import check_not_traced
from omniconv.problem import DTYPE_NAMES, Problem


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    *,
    query_start_loc: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolves each channel of a sequence with its own short filter that sees the present and the past alone.

        y[b, d, t] = f(bias[d] + Σ_i weight[d, i] · x[b, d, t + i − (W − 1)])

    Arguments mean what they mean in the causal-conv1d package. What is added: any width and any strides, float64, activations
    besides SiLU, unbatched input. Half types accumulate in float32 and round once; the weight and the states may have another
    dtype than ``x``. Differentiable in every floating operand and in both results.

    Args:
        x: (B, D, T) or (D, T).
        weight: (D, W).
        bias: (D,).
        seq_idx: (B, T) int32 or int64: which sequence a position belongs to, where several are packed in one row. Positions of
            another sequence contribute nothing; below 0 is padding, whose result is 0. Not together with states.
        initial_states: (B, D, W − 1), the inputs that came before; None: zeros.
        return_final_states: Whether to return the last W − 1 inputs too, with which the next chunk begins.
        final_states_out: (B, D, W − 1), filled with them in place; it may be ``initial_states`` itself.
        activation: None, "silu" or "swish" (the same), "relu", "relu6", "hardswish", "gelu" or "sigmoid".
        query_start_loc: (S + 1,) int32 or int64, from 0 to T: where each of S sequences packed in the one row of ``x`` begins,
            and where the last ends. The states are then (S, D, W − 1), one for each sequence. Not together with ``seq_idx``.

    Returns:
        (B, D, T), contiguous; with ``return_final_states`` also the final states (B, D, W − 1).

    Raises:
        TypeError: An operand is not a dense floating tensor, or ``seq_idx`` not one of int32 or int64.
        ValueError: Shapes, devices or settings do not fit together.

    Example:
        >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.ones(1, 3)
        >>> causal_conv1d_fn(x, weight).flatten().tolist()
        [1.0, 3.0, 6.0, 9.0]
        >>> y, state = causal_conv1d_fn(x, weight, return_final_states=True)
        >>> causal_conv1d_fn(x, weight, initial_states=state).flatten().tolist()
        [8.0, 7.0, 6.0, 9.0]

    Source: Gu & Dao 2023 (Mamba), arXiv:2312.00752.
    """
    if interceptors and is_intercepted():
        return intercepted(causal_conv1d_fn, locals())
    op = "causal_conv1d_fn"
    check_not_traced(op)
    _check_given(op, "(B, D, T) or (D, T)", x, weight=weight)
    sequences, weight, bias, initial, _ = prepare_operands(
        op, 1, x, mixed=True, called="x", weight=weight, bias=bias, initial_states=initial_states, final_states_out=final_states_out
    )
    past = _check_filter(op, sequences, weight, bias) - 1
    activation = _known(op, activation)
    check_flags(op, return_final_states=return_final_states)
    batch = x.dim() == 3
    kept = (*sequences.shape[:2], past)[0 if batch else 1 :]
    if query_start_loc is not None:
        _check_starts(op, query_start_loc, x, sequences, seq_idx)
        kept = (query_start_loc.shape[0] - 1, sequences.shape[1], past)
    for name, states in (("initial_states", initial), ("final_states_out", final_states_out)):
        if states is not None and states.shape != kept:
            fail(op, f"{name} must have shape {tuple(kept)}", tuple(states.shape))
    if final_states_out is not None:
        check_writable(op, "final_states_out", final_states_out)
    if seq_idx is not None:
        _check_indices(op, "seq_idx", seq_idx, x, x.shape[:-2] + x.shape[-1:])
        if initial is not None or return_final_states or final_states_out is not None:
            raise ValueError(f"{op}: states and seq_idx must not be given together, got both")
        seq_idx = seq_idx if batch else seq_idx.unsqueeze(0)
    wants_final = return_final_states or final_states_out is not None
    if query_start_loc is None:
        before = initial if initial is None or batch else initial.unsqueeze(0)
        y = _convolved(sequences, before, weight, bias, seq_idx, activation)
        final = _latest(sequences, before, past) if wants_final else None
        final = final if batch or final is None else final.squeeze(0)
    else:
        y, final = _packed(sequences, query_start_loc.long(), initial, weight, bias, activation)
    y = y if batch else y.squeeze(0)
    if not wants_final:
        return y
    assert final is not None
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return (y, final) if return_final_states else y


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The next step, or the next chunk, of :func:`causal_conv1d_fn`, with its state updated in place.

        y[b, d, t] = f(bias[d] + Σ_i weight[d, i] · past[b, d, t + i]),    past = the last W − 1 numbers of the state, then x

    Chunks of any sizes give what one call on the whole sequence gives, and exactly its state. The state keeps its own dtype,
    which need not be that of ``x``; no gradient flows through it.

    Args:
        x: (B, D): one step; or (B, D, T): a chunk.
        conv_state: (B, D, S) with S ≥ W − 1, the inputs that came before, the latest last; or (M, D, S) with
            ``conv_state_indices``. Updated in place.
        weight: (D, W).
        bias: (D,).
        activation: None, "silu" or "swish" (the same), "relu", "relu6", "hardswish", "gelu" or "sigmoid".
        cache_seqlens: (B,) int32 or int64: how many steps each sequence has seen. Then the state is a circular buffer: step n
            is stored at n mod S and nothing is moved.
        conv_state_indices: (B,) int32 or int64, distinct: the row of ``conv_state`` that holds each sequence's state. Below 0
            is padding: its result is 0 and no state is touched.

    Returns:
        (B, D) or (B, D, T) as ``x``, contiguous.

    Raises:
        TypeError: An operand is not a dense floating tensor, or an index tensor not one of int32 or int64.
        ValueError: Shapes, devices, indices or settings do not fit together; ``conv_state`` is then as it was.

    Example:
        >>> state, weight = torch.zeros(1, 1, 2), torch.ones(1, 3)
        >>> [causal_conv1d_update(torch.tensor([[step]]), state, weight).item() for step in (1.0, 2.0, 3.0, 4.0)]
        [1.0, 3.0, 6.0, 9.0]
        >>> state.flatten().tolist()
        [3.0, 4.0]

    Source: Gu & Dao 2023 (Mamba), arXiv:2312.00752.
    """
    if interceptors and is_intercepted():
        return intercepted(causal_conv1d_update, locals())
    op = "causal_conv1d_update"
    check_not_traced(op)
    _check_given(op, "(B, D) or (B, D, T)", x, weight=weight, conv_state=conv_state)
    chunk = x if x.dim() == 3 else x.unsqueeze(2)
    chunk, weight, bias, _ = prepare_operands(op, 1, chunk, mixed=True, called="x", weight=weight, bias=bias, conv_state=conv_state)
    past = _check_filter(op, chunk, weight, bias) - 1
    activation = _known(op, activation)
    _check_state(op, conv_state, chunk, past, conv_state_indices)
    batch = chunk.shape[:1]
    if cache_seqlens is not None:
        _check_indices(op, "cache_seqlens", cache_seqlens, x, batch)
        if _readable(cache_seqlens) and (cache_seqlens < 0).any():
            fail(op, "cache_seqlens must be at least 0", cache_seqlens.tolist())
    if conv_state_indices is not None:
        _check_indices(op, "conv_state_indices", conv_state_indices, x, batch)
        _check_rows(op, conv_state_indices, conv_state)
    if cache_seqlens is None and conv_state.dtype == chunk.dtype and is_native(chunk, weight, bias, differentiable=False):
        y = update(chunk, conv_state, weight, bias, conv_state_indices, activation)
        return y if x.dim() == 3 else y.squeeze(2)
    state, rows, live = conv_state, None, None
    if conv_state_indices is not None:
        live = (conv_state_indices >= 0).unsqueeze(1).unsqueeze(2)
        rows = conv_state_indices.long().clamp(min=0)
        state = state.index_select(0, rows)
    if cache_seqlens is None:
        window, updated = _shifted(state, chunk, past)
    else:
        window, updated = _circular(state, chunk, past, cache_seqlens.long())
    y = _filtered(window, weight, bias, None, activation, chunk)
    if live is not None:
        y, updated = y.masked_fill(~live, 0), torch.where(live, updated, state)
    with torch.no_grad():
        _store(conv_state, updated.to(conv_state.dtype), rows, live)
    return y if x.dim() == 3 else y.squeeze(2)


def _convolved(
    x: Tensor, initial: Tensor | None, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, activation: str | None
) -> Tensor:
    """The filter over x (B, D, T) after what came before it."""
    past = weight.shape[1] - 1
    if (initial is None or initial.dtype == x.dtype) and is_native(x, weight, bias, differentiable=seq_idx is None):
        whole = x if initial is None else torch.cat([initial, x], 2)
        windows = Grid((1,), ((past if initial is None else 0, 0),), (1,))
        y = run_depthwise(plan_of(windows), activation, whole, weight.unsqueeze(1), bias)
        if seq_idx is None:
            return y
        fixed = fixup_boundaries(y, x, weight, bias, seq_idx, activation)
        if fixed is not None:
            return fixed
    window = F.pad(x, (past, 0)) if initial is None else torch.cat([initial, x], 2)
    return _filtered(window, weight, bias, seq_idx, activation, x)


def _latest(x: Tensor, initial: Tensor | None, past: int) -> Tensor:
    """The last ``past`` inputs of every sequence, those before x included."""
    steps = x.shape[2]
    if not torch.compiler.is_compiling() and steps >= past:  # to ask would pin a length that is being traced
        return x.narrow(2, steps - past, past).clone(memory_format=torch.contiguous_format)
    whole = F.pad(x, (past, 0)) if initial is None else torch.cat([initial.to(x.dtype), x], 2)
    return whole.narrow(2, steps, past).clone(memory_format=torch.contiguous_format)


def _packed(
    x: Tensor, starts: Tensor, initial: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """The filter over S sequences in one row x (1, D, T), and their latest inputs (S, D, W − 1).

    W − 1 positions are put before each: its state, or zeros, so that no window reaches into another sequence.
    """
    row, past = x.squeeze(0), weight.shape[1] - 1
    sequences, steps = starts.shape[0] - 1, row.shape[1]
    number, gap = torch.arange(sequences, device=x.device), torch.arange(past, device=x.device)
    owner = torch.repeat_interleave(number, starts.diff(), output_size=steps)
    places = torch.arange(steps, device=x.device) + (owner + 1) * past
    gaps = ((starts[:-1] + number * past).unsqueeze(1) + gap).flatten()
    dtype = x.dtype if initial is None else torch.promote_types(x.dtype, initial.dtype)
    whole = row.new_zeros((row.shape[0], steps + sequences * past), dtype=dtype).index_copy(1, places, row.to(dtype))
    if initial is not None:
        whole = whole.index_copy(1, gaps, initial.to(dtype).movedim(0, 1).flatten(1))
    y = _convolved(whole.unsqueeze(0), None, weight, bias, None, activation).squeeze(0)
    latest = whole.index_select(1, ((starts[1:] + number * past).unsqueeze(1) + gap).flatten())
    final = latest.unflatten(1, (sequences, past)).movedim(1, 0).to(x.dtype)
    return y.index_select(1, places).to(x.dtype).unsqueeze(0), final


def _filtered(
    window: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, activation: str | None, x: Tensor
) -> Tensor:
    """f(bias + Σ_i weight[:, i] · window[:, :, t + i]), in the widest dtype of the operands and rounded once to that of ``x``."""
    wide = accumulated_in(x)
    for operand in (window, weight, bias):
        wide = wide if operand is None else torch.promote_types(wide, operand.dtype)
    taps = weight.to(wide).unsqueeze(2).unbind(1)
    shift = None if bias is None else bias.to(wide).unsqueeze(1)
    if seq_idx is None:
        y = activate(shift_and_add(window.to(wide), taps, shift, 2, 1), activation)
    else:
        y = activate(_within_sequences(window.to(wide), taps, shift, seq_idx), activation)
        y = y.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    return y.to(x.dtype).contiguous()


def _within_sequences(window: Tensor, taps: tuple[Tensor, ...], bias: Tensor | None, seq_idx: Tensor) -> Tensor:
    """Σ_i taps[i] · window[:, :, t + i] over the positions of the sequence that t belongs to, plus the bias."""
    outputs = seq_idx.shape[1]
    owners = F.pad(seq_idx, (len(taps) - 1, 0), value=-1)
    y = window.new_zeros(()) if bias is None else bias
    for i, tap in enumerate(taps):
        foreign = (owners.narrow(1, i, outputs) != seq_idx).unsqueeze(1)
        # filled rather than multiplied: another sequence's NaN stays there
        y = torch.addcmul(y, window.narrow(2, i, outputs).masked_fill(foreign, 0), tap)
    return y


def _shifted(state: Tensor, x: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """What the taps read, and the state after it: the latest inputs last."""
    size, steps = state.shape[2], x.shape[2]
    whole = torch.cat([state, x], 2)
    return whole.narrow(2, size - past, past + steps), whole.narrow(2, steps, size)


def _circular(state: Tensor, x: Tensor, past: int, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a circular buffer that has seen ``seen`` (B,) steps."""
    size, steps = state.shape[2], x.shape[2]
    seen = seen.unsqueeze(1)
    recent = (seen + torch.arange(-past, 0, device=x.device)).remainder(size)
    window = torch.cat([_at(state, recent), x], 2)
    # the last step of x that falls into each place, below 0 where none does: the old number stays
    step = steps - 1 - (seen + steps - 1 - torch.arange(size, device=x.device)).remainder(size)
    updated = torch.where((step >= 0).unsqueeze(1), _at(x, step.clamp(min=0)), state)
    return window, updated


def _at(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, D, T) at positions (B, P): (B, D, P)."""
    return x.gather(2, positions.unsqueeze(1).expand(-1, x.shape[1], -1))


def _store(conv_state: Tensor, updated: Tensor, rows: Tensor | None, live: Tensor | None) -> None:
    """Writes the states where they belong."""
    if rows is None or live is None:
        conv_state.copy_(updated)
    elif rows.shape[0] > 0:
        # padding writes what the first live sequence writes anyway, so that the shapes do not depend on the data
        first = live.flatten().int().argmax(0, keepdim=True)
        rows = torch.where(live.flatten(), rows, rows.index_select(0, first))
        conv_state.index_copy_(0, rows, torch.where(live, updated, updated.index_select(0, first)))


def _known(op: str, activation: str | None) -> str | None:
    """The activation by the house's name."""
    activation = "silu" if activation == "swish" else activation
    check_activation(op, activation)
    return activation


def _check_given(op: str, forms: str, x: Tensor, **operands: Tensor) -> None:
    """Checks that the operands are tensors, and the axes of ``x``."""
    for name, operand in {"x": x, **operands}.items():
        check_dense(op, name, operand)
    if x.dim() not in (2, 3):
        fail(op, f"x must have shape {forms}", tuple(x.shape))


def _check_filter(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """Checks what every call has; returns the width W."""
    if x.shape[2] < 1:
        fail(op, "x must have at least one position", tuple(x.shape))
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[0] != x.shape[1] or weight.shape[1] < 1:
        fail(
            op, f"weight must have shape (D, W) with the {x.shape[1]} channels of x and a width of at least 1", tuple(weight.shape)
        )
    check_bias(op, bias, weight.shape[0])
    return weight.shape[1]


def _check_state(op: str, conv_state: Tensor, x: Tensor, past: int, indices: Tensor | None) -> None:
    batch, channels = x.shape[:2]
    fits = conv_state.dim() == 3 and conv_state.shape[1] == channels and conv_state.shape[2] >= past
    if not fits or (conv_state.shape[0] < 1 if indices is not None else conv_state.shape[0] != batch):
        rows = batch if indices is None else "M"
        fail(op, f"conv_state must have shape ({rows}, {channels}, S) with S at least {past}", tuple(conv_state.shape))
    check_writable(op, "conv_state", conv_state)


def _check_indices(op: str, name: str, indices: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """Checks a tensor of integers."""
    check_dense(op, name, indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {indices.dtype}")
    if indices.device != x.device:
        fail(op, f"{name} must be on the device of x, {x.device}", indices.device)
    if indices.shape != shape:
        fail(op, f"{name} must have shape {tuple(shape)}", tuple(indices.shape))


def _check_starts(op: str, starts: Tensor, x: Tensor, sequences: Tensor, seq_idx: Tensor | None) -> None:
    """Checks ``query_start_loc``: from 0 to T in steps of at least 0, over one row."""
    if seq_idx is not None:
        raise ValueError(f"{op}: seq_idx and query_start_loc must not be given together, got both")
    if sequences.shape[0] != 1:
        fail(op, "x must have one row where query_start_loc is given", tuple(x.shape))
    check_dense(op, "query_start_loc", starts)
    if starts.dim() != 1 or starts.shape[0] < 2:
        fail(op, "query_start_loc must have shape (S + 1,) for at least one sequence", tuple(starts.shape))
    _check_indices(op, "query_start_loc", starts, x, starts.shape)
    if _readable(starts):
        places = starts.tolist()
        if places[0] != 0 or places[-1] != x.shape[-1] or places != sorted(places):
            fail(op, f"query_start_loc must rise from 0 to the {x.shape[-1]} positions of x", places)


def _check_rows(op: str, indices: Tensor, conv_state: Tensor) -> None:
    if not _readable(indices):
        return
    rows = sorted(row for row in indices.tolist() if row >= 0)
    if rows and rows[-1] >= conv_state.shape[0]:
        fail(op, f"conv_state_indices must be below the {conv_state.shape[0]} rows of conv_state", rows[-1])
    if len(set(rows)) < len(rows):
        fail(op, "conv_state_indices must be distinct where they are not negative", indices.tolist())


def _readable(indices: Tensor) -> bool:
    """Whether to look at the numbers costs no synchronisation and pins no traced value; elsewhere torch's own checks remain."""
    return indices.device.type == "cpu" and not torch.compiler.is_compiling()


def problem(rank: int, arguments: Arguments) -> Problem:
    """Returns the depthwise Problem of a call; what a state adds counts as input."""
    x, width, updates = arguments["x"], arguments["weight"].shape[-1], "conv_state" in arguments
    batch, channels, steps = x.shape if x.dim() == 3 else (*x.shape, 1) if updates else (1, *x.shape)
    made = Problem("depthwise", channels, (steps,), batch, kernel=(width,), padding="causal", dtype=DTYPE_NAMES.get(x.dtype, "f32"))
    continues = updates or arguments.get("initial_states") is not None
    return made.replace(size=(steps + width - 1,), padding=((0, 0),)) if continues else made
