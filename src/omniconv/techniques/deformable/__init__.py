"""Deformable convolution: every tap of every output looks where a learned offset sends it, between positions if need be.

    y[n, o, p] = bias[o] + Σ_c Σ_t weight[o, c, t] · mask[n, t, p] · x(n, c, p·S − P + t·D + offset[n, t, p])

x(n, c, ·) is bilinear interpolation, zero outside. Offsets are (Δy, Δx), interleaved per tap, per offset group: channel
((g·k + t)·2 + 0) of the offset is Δy of tap t in group g, the next one Δx. Without a mask it is version 1, with one version 2.

Params  C·O·k/G + 3·Go·k·C·k        with the layer's offset and mask convolution (2 in place of 3 without masks)
MACs    N·Out·(C·O·k/G + 3·Go·k·C·k)
Paper   Dai et al. 2017, arXiv:1703.06211; Zhu et al. 2019, arXiv:1811.11168 (version 2)
"""

from omniconv.techniques.deformable.layer import DeformConv2d
from omniconv.techniques.deformable.op import convolve, deform_conv2d, reference
from omniconv.techniques.deformable.record import TECHNIQUE

__all__ = ["TECHNIQUE", "DeformConv2d", "convolve", "deform_conv2d", "reference"]
