"""Causal modules made stateful: a sequence in chunks of any sizes gives what it gives whole."""

from torch import nn

from omniconv.ops.layer import Causal
from omniconv.streaming._places import Step
from omniconv.streaming._stream import Stream

__all__ = ["Causal", "Step", "Stream", "streaming"]


def streaming(module: nn.Module, *, layout: str | None = None) -> Stream:
    """Makes a causal module stateful: chunk after chunk, of any sizes, it gives what the whole sequence would give.

        s = streaming(module);    cat(s(chunk) for chunk in chunks) = module(cat(chunks))

    The bits are the same where :attr:`Stream.exact` is true, and equal under the error bound otherwise; :attr:`Stream.inexact`
    has the reasons by name. ``module`` stands for itself in evaluation mode, on the CPU and without gradients: s records none.

    *Exact* are, with the native library: ``DepthwiseConv1d`` (any dilation, stride, multiplier), ``PointwiseConv1d``,
    ``DepthwiseSeparableConv1d``, ``LightweightConv1d`` and ``DynamicConv1d`` (context "position"), activations fused; and of
    torch, what it computes by sums, products and comparisons: ReLU, ReLU6, LeakyReLU, PReLU, Hardtanh, Hardswish, Hardsigmoid,
    Hardshrink, Softshrink, Softsign, Threshold, dropout and Identity. *Under the bound*: SiLU, GELU, Sigmoid, Tanh, ELU, CELU,
    SELU, Mish, Softplus, LogSigmoid, Tanhshrink and GLU, BatchNorm1d, LayerNorm and RMSNorm over the channels, Linear over
    (N, T, C) or (T, N, C). ``nn.Sequential`` composes them. *Refused*, by qualified name and reason: whatever looks ahead or over
    all of time, dense and transposed convolutions, whose kernels' bits depend on the length, and whatever is unknown.

    The module is neither copied nor changed: later changes of its weights count from the next chunk on. Its hooks run chunk by
    chunk. After ``train()``, or with a child replaced, the next call is refused.

    **Your own modules** say how they stream by one method, in the words of ``forward``, with every child called through ``step``:

        class Residual(nn.Module):
            def __init__(self, body):
                super().__init__()
                self.body = body
            def forward(self, x):
                return x + self.body(x)
            def stream(self, x, step):
                return x + step(self.body, x)
            stream_exact = True                     # sums and products of the same positions: the same bits

    ``stream_children`` names the children that it steps (all of them where it is not given; each once a chunk);
    ``stream_layouts`` those that get another layout than the module, as ``{"norm": "NTC"}``. What looks back by itself has two
    methods instead: ``stream_reads()`` returns a :class:`Causal`, and ``stream_step(window)`` the outputs over the next inputs
    behind their past, without any pads.

    Args:
        module: A causal layer or a stack of them, in evaluation mode.
        layout: Of the chunks, where the layers leave it open, as Linear does: "NCT", "NTC" or "TNC". None: the first they can have.

    Returns:
        A :class:`Stream`, at the beginning of a sequence.

    Raises:
        TypeError: ``module`` is no module, or one in it is unknown.
        ValueError: A module in it looks ahead, is in training mode, or has another layout than the rest.

    Example:
        >>> from omniconv.nn import DepthwiseConv1d
        >>> layer = DepthwiseConv1d(1, 3, padding="causal", bias=False).eval()
        >>> _ = torch.nn.init.ones_(layer.weight)
        >>> s = streaming(torch.nn.Sequential(layer, torch.nn.ReLU()).eval())
        >>> x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
        >>> [s(chunk).flatten().tolist() for chunk in x.split([1, 0, 3], 2)]
        [[1.0], [], [3.0, 6.0, 9.0]]
        >>> s.exact, s.state()["past"]["0"].tolist()
        (True, [[[3.0, 4.0]]])
    """
    return Stream(module, layout)
