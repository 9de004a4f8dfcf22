"""Formulas of matrix products, convolutions and attention: MACs by what the op is, gradients included."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from omniconv.analysis.cost.calls import Call, formula, per_axis
from omniconv.analysis.cost.work import Work, convolution_stage, mixing_stage, problem_of
from omniconv.functional import deform_conv2d
from omniconv.geometry import Pairs
from omniconv.ops.technique import Stage
from omniconv.problem import DTYPE_NAMES, Problem
from omniconv.techniques import find_convolution, find_op


def _same_sides(padding: Sequence[int]) -> Pairs:
    return tuple((p, p) for p in padding)


def seen_stage(x: Tensor, weight: Tensor, call: Call, out: Sequence[int], settings: Sequence[Any]) -> Stage:
    """The Stage of aten::convolution's arguments: (stride, padding, dilation, transposed, output padding, groups).

    Zeros that were padded before count as padding: they are not real inputs.
    """
    stride, padding, dilation, transposed, _, groups = settings
    rank = x.dim() - 2
    stride, padding, dilation = (per_axis(v, rank) for v in (stride, padding, dilation))
    pads, size = _same_sides(padding), list(x.shape)
    if call.pads is not None and not transposed and all(p == (0, 0) for p in call.pads[:2]):
        held = call.pads[2:]
        pads = tuple((a + c, b + d) for (a, b), (c, d) in zip(pads, held, strict=True))
        size = [*size[:2], *(n - a - b for n, (a, b) in zip(size[2:], held, strict=True))]
    return convolution_stage(size, weight.shape, stride, pads, dilation, groups, out, transposed)


def _with_batch(x: Tensor, weight: Tensor) -> Tensor:
    return x if x.dim() == weight.dim() else x.unsqueeze(0)


@formula("aten::convolution", "aten::_convolution", "aten::convolution_overrideable", "aten::cudnn_convolution")
def _convolution(call: Call) -> Work:
    x, weight, bias, *settings = call.args[:9]
    x = _with_batch(x, weight)
    spatial = call.result.shape[-(weight.dim() - 2) :]
    stage = seen_stage(x, weight, call, spatial, settings)
    n = x.shape[0]
    return Work(
        n * stage.macs_dense,
        n * stage.macs_valid,
        0 if bias is None else n * stage.out_channels * prod(stage.out),
        find_convolution(stage).name,
        problem_of(stage, n, x, per_axis(settings[4], len(stage.size))),
        flops_status="exact",
    )


@formula("aten::convolution_backward")
def _convolution_backward(call: Call) -> Work:
    """Every gradient asked for costs one forward's MACs, whatever the groups; the bias' is a sum."""
    grad_y, x, weight, _, *settings, asked = call.args
    stage = seen_stage(x, weight, call, grad_y.shape[2:], settings)
    products = x.shape[0] * (asked[0] + asked[1])
    return Work(
        products * stage.macs_dense,
        products * stage.macs_valid,
        grad_y.numel() if asked[2] else 0,
        find_convolution(stage).name,
        flops_status="exact",
    )


def product_work(macs: int, extra: int, problem: Problem | None = None) -> Work:
    """A matrix product, which reads every number it is given."""
    return Work(macs, macs, extra, None if problem is None else problem.technique, problem, flops_status="exact")


@formula("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot")
def _product(call: Call) -> Work:
    a, b = call.args[:2]
    return product_work(a.numel() * (b.shape[-1] if b.dim() > 1 else 1), 0, _mixing(call, a, b))


@formula("aten::addmm", "aten::baddbmm", "aten::addmv", "aten::_addmm_activation")
def _added_product(call: Call) -> Work:
    a, b = call.args[1:3]
    return product_work(a.numel() * (b.shape[-1] if b.dim() > 1 else 1), call.result.numel(), _mixing(call, a, b))


def _mixing(call: Call, a: Tensor, b: Tensor) -> Problem | None:
    """(M, C) · (C, O) with a parameter on the right mixes the channels of M positions: a pointwise convolution."""
    if not call.shared or a.dim() != 2 or b.dim() != 2 or a.dtype not in DTYPE_NAMES or 0 in (*a.shape, *b.shape):
        return None
    stage = mixing_stage(a.shape[0], a.shape[1], b.shape[1])
    return find_convolution(stage).problem_of(stage, out_channels=b.shape[1], dtype=DTYPE_NAMES[a.dtype])


@formula("aten::linear")
def _linear(call: Call) -> Work:
    x, weight, bias = call.args[:3]
    y = call.result
    return product_work(x.numel() * weight.shape[0], 0 if bias is None else y.numel())


@formula("aten::addbmm")
def _addbmm(call: Call) -> Work:
    a, b = call.args[1:3]
    return product_work(a.numel() * b.shape[-1], call.result.numel() * (a.shape[0] + 1))


@formula("aten::addr", "aten::outer", "aten::ger")
def _outer(call: Call) -> Work:
    return Work(extra=2 * call.result.numel())


@formula("aten::_trilinear")
def _trilinear(call: Call) -> Work:
    """Σ a·b·c over axes that some of them lack: a product and a multiply-accumulate each."""
    shapes = []
    for x, missing in zip(call.args[:3], call.args[3:6], strict=True):
        for axis in missing:
            x = x.unsqueeze(axis)
        shapes.append(x.shape)
    places = prod(map(max, zip(*shapes, strict=True)))
    return product_work(places, places)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Work:
    """Scores and their products with the values; the softmax at 4 a score."""
    scores = prod(query.shape[:-1]) * key.shape[-2]
    return Work(scores * (query.shape[-1] + value.shape[-1]), scores * (query.shape[-1] + value.shape[-1]), 4 * scores)


@formula(
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::scaled_dot_product_attention",
)
def _attention_forward(call: Call) -> Work:
    return _attention(*call.args[:3])


@formula(
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_scaled_dot_product_fused_attention_overrideable_backward",
)
def _attention_backward(call: Call) -> Work:
    """The scores again, and two products for each of the two of the forward."""
    forward = _attention(*call.args[1:4])
    query, key = call.args[1:3]
    again = prod(query.shape[:-1]) * key.shape[-2] * query.shape[-1]
    macs = 2 * forward.macs_dense + again
    return Work(macs, macs, 2 * forward.extra)


_DEFORMABLE, _ = find_op(deform_conv2d)  # torchvision's op and ours are the same


@formula("torchvision::deform_conv2d")
def _deformable(call: Call) -> Work:
    """The main convolution, at the places of the grid; 8 flops a tap and channel to interpolate, 1 to mask. Columns are written."""
    x, weight, offset = call.args[:3]
    stage, masked = _deformable_stage(call, call.result.shape[2:])
    samples = x.shape[0] * x.shape[1] * prod(weight.shape[2:]) * prod(stage.out)
    extra = (9 if masked else 8) * samples + call.result.numel()
    problem = problem_of(stage, x.shape[0], x)
    if problem is not None:
        groups = offset.shape[1] // (2 * prod(weight.shape[2:]))
        problem = Problem(
            _DEFORMABLE.name, stage.in_channels, stage.size, problem.batch, weight.shape[0], stage.kernel, stage.stride, stage.pads,
            stage.dilation, stage.groups, offset_groups=groups, dtype=problem.dtype, channels_last=problem.channels_last,
        )  # fmt: skip
    return Work(
        x.shape[0] * stage.macs_dense, x.shape[0] * stage.macs_valid, extra, _DEFORMABLE.name, problem,
        scratch=2 * samples * x.element_size(), valid="estimate",
    )  # fmt: skip


def _deformable_stage(call: Call, out: Sequence[int]) -> tuple[Stage, bool]:
    x, weight = call.args[:2] if call.op == "torchvision::deform_conv2d" else call.args[1:3]
    settings = call.args[5 if call.op == "torchvision::deform_conv2d" else 6 :]
    sh, sw, ph, pw, dh, dw, groups, _, masked = settings[:9]
    return convolution_stage(x.shape, weight.shape, (sh, sw), ((ph, ph), (pw, pw)), (dh, dw), groups, out), masked


@formula("torchvision::_deform_conv2d_backward")
def _deformable_backward(call: Call) -> Work:
    """The samples' gradient and the weight's, one forward's MACs each; interpolation three times: of input, places and samples."""
    grad_y, x, weight = call.args[:3]
    stage, masked = _deformable_stage(call, grad_y.shape[2:])
    samples = x.shape[0] * x.shape[1] * prod(weight.shape[2:]) * prod(stage.out)
    n = 2 * x.shape[0]
    return Work(
        n * stage.macs_dense, n * stage.macs_valid, 3 * (9 if masked else 8) * samples + grad_y.numel(), _DEFORMABLE.name,
        scratch=4 * samples * x.element_size(), valid="estimate",
    )  # fmt: skip
