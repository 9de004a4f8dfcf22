"""What ops besides products cost: flops by estimates a number, and what only moves bytes."""

from dataclasses import replace
from math import prod

import torch

from omniconv.analysis.cost.calls import FORMULAS, Call, base_name, formula, per_axis, tensors_in
from omniconv.analysis.cost.work import Work, bytes_of

# flops a number of the result, by name
_ELEMENTWISE = {
    1: "abs add sub rsub mul div neg maximum minimum relu clamp clamp_min clamp_max hardtanh threshold threshold_backward "
    "leaky_relu where masked_fill native_dropout_backward bernoulli",
    2: "addcmul addcdiv lerp hardtanh_backward leaky_relu_backward _prelu_kernel _prelu_kernel_backward native_dropout",
    4: "hardswish hardsigmoid hardswish_backward sigmoid_backward tanh_backward sigmoid exp log sqrt rsqrt sin cos tanh erf pow "
    "softplus elu elu_backward",
    5: "silu mish celu selu",
    8: "gelu gelu_backward silu_backward mish_backward",
}
_RESIZES = {
    0: "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d",
    4: "upsample_linear1d",
    8: "upsample_bilinear2d _upsample_bilinear2d_aa grid_sampler_2d",
    16: "upsample_trilinear3d grid_sampler_3d",
    24: "grid_sampler_2d_backward",
    40: "upsample_bicubic2d _upsample_bicubic2d_aa",
}
# flops a number of the largest operand
_REDUCTIONS = {
    1: "sum mean amax amin max min argmax argmin prod any all cumsum _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d "
    "adaptive_max_pool3d adaptive_max_pool2d_backward adaptive_max_pool3d_backward max_pool2d_with_indices_backward "
    "max_pool3d_with_indices_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward avg_pool2d_backward "
    "avg_pool3d_backward embedding_dense_backward index_put scatter_add index_add col2im mse_loss mse_loss_backward smooth_l1_loss",
    2: "norm linalg_vector_norm cumprod logcumsumexp nansum",
    4: "var std var_mean std_mean _softmax _log_softmax _safe_softmax _softmax_backward_data _log_softmax_backward_data logsumexp "
    "nll_loss_forward nll_loss2d_forward nll_loss_backward nll_loss2d_backward _weight_norm_interface "
    "_weight_norm_interface_backward renorm upsample_bilinear2d_backward upsample_nearest1d_backward upsample_nearest2d_backward "
    "upsample_nearest3d_backward upsample_linear1d_backward upsample_trilinear3d_backward",
    8: "native_layer_norm native_group_norm _fused_rms_norm _fused_rms_norm_backward",
    12: "native_layer_norm_backward native_group_norm_backward native_batch_norm_backward batch_norm_backward "
    "cudnn_batch_norm_backward",
}
# what moves numbers and makes none
_MOVES = {
    0: "clone copy _to_copy cat stack constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d im2col index index_select gather embedding roll flip repeat fill zero zeros zeros_like "
    "ones ones_like full full_like arange scalar_tensor new_zeros new_ones new_full pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle _reshape_copy tril triu slice_scatter select_scatter slice_backward select_backward unfold_backward "
    "contiguous rand randn rand_like randn_like randint randperm uniform normal eye linspace split_with_sizes_copy "
    "constant_pad_nd_backward reflection_pad1d_backward reflection_pad2d_backward replication_pad1d_backward "
    "replication_pad2d_backward reflection_pad3d_backward replication_pad3d_backward "
    "scatter nonzero one_hot diag_embed masked_select lift_fresh_copy unbind_copy resize",
}
# reading a part of an operand that may be much larger
_READS_PART = frozenset(("index", "index_select", "gather", "embedding", "slice_backward", "select_backward"))


def _by_name(table: dict[int, str]) -> dict[str, int]:
    return {name: flops for flops, names in table.items() for name in names.split()}


_PER_RESULT = _by_name(_ELEMENTWISE) | _by_name(_RESIZES)
_PER_OPERAND, _PER_MOVE = _by_name(_REDUCTIONS), _by_name(_MOVES)


@formula("aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::cudnn_batch_norm", "aten::_batch_norm_with_update")
def _batch_norm(call: Call) -> Work:
    """In evaluation a scale and a shift; in training the moments too."""
    training = call.op != "aten::_batch_norm_with_update" and next((a for a in call.args if isinstance(a, bool)), True)
    return Work(extra=(8 if training else 2) * call.result.numel())


@formula("aten::_native_batch_norm_legit_no_training", "aten::_batch_norm_no_update", "aten::batch_norm")
def _batch_norm_evaluated(call: Call) -> Work:
    return Work(extra=2 * call.result.numel())


@formula(
    *(f"aten::{kind}_pool{n}d{more}" for kind in ("max", "avg") for n in (1, 2, 3) for more in ("", "_with_indices")),
    "aten::mkldnn_max_pool2d",
)
def _pool(call: Call) -> Work:
    """One comparison or addition a tap."""
    rank = int(call.op.split("_pool")[1][0]) if "_pool" in call.op else 2
    return Work(extra=call.result.numel() * prod(per_axis(call.args[1], rank)))


@formula("aten::mkldnn_rnn_layer")
def _recurrent(call: Call) -> Work:
    """Both weights at every step; 9 flops a gate and unit."""
    x, *weights = call.args[:5]
    steps = x.shape[0] * x.shape[1]
    macs = steps * sum(w.numel() for w in weights[:2])
    return Work(macs, macs, 9 * steps * weights[0].shape[0])


@formula("aten::mkldnn_rnn_layer_backward")
def _recurrent_backward(call: Call) -> Work:
    """The gradients of both weights, the input and the state: twice the forward's products."""
    x, *weights = call.args[:5]
    steps = x.shape[0] * x.shape[1]
    macs = 2 * steps * sum(w.numel() for w in weights[:2])
    return Work(macs, macs, 18 * steps * weights[0].shape[0])


@formula("aten::_cdist_forward", "aten::_euclidean_dist")
def _distances(call: Call) -> Work:
    a, b = call.args[:2]
    return Work(extra=3 * a.numel() * b.shape[-2])


@formula("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def _bags(call: Call) -> Work:
    rows = call.args[1].numel() * call.args[0].shape[1]
    return Work(extra=rows, bytes_min=(rows + call.result.numel()) * call.args[0].element_size())


def per_result(name: str) -> int:
    """Flops a number that an elementwise op makes.

    >>> per_result("relu"), per_result("silu")
    (1, 5)
    """
    return _PER_RESULT.get(name, 1)


def work_of(call: Call, elementwise: bool) -> Work | None:
    """The work of a call; None where there is no formula.

    Args:
        call: What was called.
        elementwise: Whether torch says so of the op.
    """
    if any(t.layout != torch.strided for t in tensors_in(call.args)):
        return None
    found = FORMULAS.get(call.op)
    if found is not None:
        work = found(call)
        return replace(work, complex=True) if work.macs_dense and call.result.is_complex() else work
    if not call.op.startswith("aten::"):
        return None
    name, results = base_name(call.op), tensors_in(call.out)
    if name in _PER_MOVE:
        moved = 2 * sum(map(bytes_of, results)) if name in _READS_PART else None
        return Work(bytes_min=moved, flops_status="exact")
    if name in _PER_OPERAND:
        return Work(extra=_PER_OPERAND[name] * max((t.numel() for t in tensors_in(call.args)), default=0))
    if name in _PER_RESULT or elementwise:
        return Work(extra=per_result(name) * results[0].numel())
    return None
