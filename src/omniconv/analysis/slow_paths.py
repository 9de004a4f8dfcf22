"""Which layers of a network fall on slow paths in stock torch on a CPU, by rules; what it costs only a measurement tells.

The rules say what torch does, not how much slower that is: :func:`omniconv.bench.checkup.checkup` measures it, or quotes what was.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from omniconv.analysis.layers import FORMATS, Kind
from omniconv.ops.layer import Layer

LARGE_KERNEL = 15  # taps an axis: of 13 oneDNN still takes jit_dw, of 15 gemm:jit (torch 2.13, ONEDNN_VERBOSE=1)
FEW = 16  # channels a group: what a vector of AVX-512 holds


@dataclass(frozen=True)
class SlowPath:
    """A rule: its name, when it holds of a layer, and what torch does there."""

    name: str
    holds: Callable[[Kind], bool]
    why: str


def _torchs(holds: Callable[[Kind, _ConvNd], bool]) -> Callable[[Kind], bool]:
    """A rule about torch's own convolutions."""

    def test(kind: Kind) -> bool:
        layer = kind.module
        return isinstance(layer, _ConvNd) and not isinstance(layer, Layer) and holds(kind, layer)

    return test


def _depthwise(holds: Callable[[Kind, _ConvNd], bool]) -> Callable[[Kind], bool]:
    """A rule about those in which every channel is a group of its own."""
    return _torchs(lambda kind, c: not c.transposed and 1 < c.groups == c.in_channels and holds(kind, c))


def _contiguous(kind: Kind) -> bool:
    x = next((x for x in (*kind.args, *kind.kwargs.values()) if isinstance(x, Tensor)), None)
    return x is not None and x.dim() in FORMATS and x.is_contiguous()


def _half(native: bool) -> Callable[[Kind], bool]:
    """A rule about half types for which oneDNN has kernels on this processor, or has none."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return _torchs(lambda kind, c: kind.dtype in asked and native == getattr(torch.ops.mkldnn, asked[kind.dtype])())


def _named(*names: str) -> Callable[[Kind], bool]:
    return lambda kind: kind.type in names and not isinstance(kind.module, Layer)


SLOW_PATHS: tuple[SlowPath, ...] = (
    SlowPath(
        "half types", _half(native=False),
        "oneDNN has no kernel for this half type on this processor: torch ends in slow_conv kernels, group by group",
    ),
    SlowPath(
        "half types, converted", _half(native=True),
        "oneDNN converts or emulates half types where the processor has no arithmetic of its own for them",
    ),
    SlowPath(
        "float64", _torchs(lambda k, c: k.dtype is torch.float64),
        "oneDNN has no float64: torch ends in slow_conv kernels, group by group",
    ),
    SlowPath(
        "depthwise 1-D", _depthwise(lambda k, c: len(c.kernel_size) == 1),
        "torch has no kernel for depthwise over one axis: it goes through those for two",
    ),
    SlowPath(
        "depthwise 3-D", _depthwise(lambda k, c: len(c.kernel_size) == 3),
        "oneDNN's depthwise kernels for three axes are for channels-last memory and dense taps: others are reordered or multiplied",
    ),
    SlowPath(
        "contiguous depthwise", _depthwise(lambda k, c: len(c.kernel_size) == 2 and _contiguous(k)),
        "oneDNN's depthwise kernels work on blocked or channels-last memory: a contiguous input is reordered there and back",
    ),
    SlowPath(
        "dilated depthwise", _depthwise(lambda k, c: max(c.dilation) > 1),
        "oneDNN's depthwise kernels for channels-last memory are for dense taps: those for blocked memory take over",
    ),
    SlowPath(
        "depth multiplier", _depthwise(lambda k, c: c.out_channels != c.in_channels),
        "oneDNN's depthwise kernels have one filter a channel: more are groups of one input channel",
    ),
    SlowPath(
        "large-kernel depthwise",
        _depthwise(lambda k, c: len(c.kernel_size) == 2 and max(c.kernel_size) >= LARGE_KERNEL and _contiguous(k)),
        f"of {LARGE_KERNEL} taps an axis and more oneDNN has no depthwise kernel for contiguous input: it multiplies matrices",
    ),
    SlowPath(
        "grouped", _torchs(lambda k, c: not c.transposed and 1 < c.groups < c.in_channels < FEW * c.groups),
        f"groups of fewer than {FEW} channels do not fill a vector of AVX-512",
    ),
    SlowPath(
        "transposed with groups", _torchs(lambda k, c: c.transposed and c.groups > 1),
        "oneDNN reorders input, weight and output around a gradient of its convolution; without oneDNN torch goes group by group",
    ),
    SlowPath(
        "padding mode", _torchs(lambda k, c: c.padding_mode != "zeros"),
        "torch copies the input with its padding before the convolution",
    ),
    SlowPath(
        "deformable", _named("DeformConv2d"),
        "torchvision's kernel on the CPU is one scalar loop on one thread that writes every sampled tap to memory",
    ),
    SlowPath(
        "convolution of sequences through unfold", _named("LightweightConv1d", "LightweightConv1dTBC", "DynamicConv1dTBC"),
        "fairseq's formulations on the CPU write a window or a band matrix for every position",
    ),
)  # fmt: skip


def slow_paths(kind: Kind) -> tuple[SlowPath, ...]:
    """The rules that hold of a layer, in their order; none of what is not a convolution of stock torch.

    >>> from omniconv.analysis.layers import captured
    >>> (kind,) = captured(torch.nn.Conv1d(8, 8, 3, groups=8), [torch.ones(1, 8, 9)])
    >>> [path.name for path in slow_paths(kind)]
    ['depthwise 1-D']
    """
    return tuple(path for path in SLOW_PATHS if path.holds(kind))
