"""The blocks of Wu et al. 2019: a transformer's, with a lightweight or dynamic convolution in the place of self-attention.

    x = x + O · conv(GLU(I·x))                  the convolution; masked positions are zeros to it
    x = x + attention(x, memory)                a decoder's, where it reads an encoder's result
    x = x + B · relu(A·x)                       the feed-forward part

Each line has its layer normalisation: of what the line reads (``normalize_before``), or of what it gives (the published form).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omniconv.geometry import LARGEST, is_integer
from omniconv.nn import DynamicConv1d, LightweightConv1d
from omniconv.ops.operator import check_dense, check_flags, fail
from omniconv.ops.sequence import Axes, SequenceLayer, axes_of, received_mask

Step = Callable[[nn.Module, Tensor], Tensor]


class _Block(nn.Module):
    """What both blocks share: all but the kind of convolution."""

    convolution: ClassVar[Callable[..., SequenceLayer]]
    attention: nn.MultiheadAttention | None
    attention_norm: nn.LayerNorm | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        heads: int,
        *,
        conv_channels: int | None,
        feed_forward_channels: int | None,
        causal: bool,
        attention: bool,
        glu: bool,
        normalize_before: bool,
        softmax: bool,
        dropout: float,
        input_dropout: float,
        activation_dropout: float,
        attention_dropout: float,
        weight_dropout: float,
        layout: str,
        device: Any,
        dtype: Any,
        **conv: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        inner = channels if conv_channels is None else conv_channels
        hidden = feed_forward_channels
        for argument, value in (
            ("channels", channels), ("conv_channels", inner), ("kernel_size", kernel_size), ("heads", heads),
            ("feed_forward_channels", 1 if hidden is None else hidden),
        ):  # fmt: skip
            if not is_integer(value):
                raise TypeError(f"{name}: {argument} must be an int, got {value!r}")
            if not 1 <= value <= LARGEST:
                fail(name, f"{argument} must be at least 1 and at most {LARGEST}", value)
        flags = {k: v for k, v in conv.items() if k == "projection_bias"}  # of a dynamic convolution alone
        check_flags(name, causal=causal, attention=attention, glu=glu, normalize_before=normalize_before, softmax=softmax, **flags)
        rates = {
            "dropout": dropout, "input_dropout": input_dropout, "activation_dropout": activation_dropout,
            "attention_dropout": attention_dropout, "weight_dropout": weight_dropout,
        }  # fmt: skip
        for argument, rate in rates.items():
            _check_rate(name, argument, rate)
        if inner % heads:
            fail(name, "heads must divide the channels of the convolution", f"{heads} and {inner}")
        if attention and not causal:
            fail(name, "attention must be False where causal is False: it belongs to a decoder", attention)
        if attention and channels % heads:
            fail(name, "heads must divide channels where there is attention", f"{heads} and {channels}")
        axes_of(name, layout, batched=True)
        hidden = 4 * channels if hidden is None else hidden
        made = {"device": device, "dtype": dtype}
        self.channels, self.layout, self.causal = channels, layout, causal
        self.normalize_before, self.glu = normalize_before, glu
        self.input_projection = nn.Linear(channels, 2 * inner if glu else inner, **made)
        self.conv = type(self).convolution(
            inner, kernel_size, heads, "causal" if causal else "same", weight_dropout=weight_dropout, softmax=softmax,
            layout="TNC" if layout == "TNC" else "NTC", **conv, **made,
        )  # fmt: skip
        self.output_projection = nn.Linear(inner, channels, **made)
        self.conv_norm = nn.LayerNorm(channels, **made)
        self.attention = self.attention_norm = None
        if attention:
            self.attention = nn.MultiheadAttention(channels, heads, attention_dropout, batch_first=layout != "TNC", **made)
            self.attention_norm = nn.LayerNorm(channels, **made)
        self.feed_forward_in = nn.Linear(channels, hidden, **made)
        self.feed_forward_out = nn.Linear(hidden, channels, **made)
        self.feed_forward_norm = nn.LayerNorm(channels, **made)
        self.dropout = nn.Dropout(dropout)
        self.input_dropout = nn.Dropout(input_dropout)
        self.activation_dropout = nn.Dropout(activation_dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills as fairseq does: projections by Glorot's uniform distribution with zero bias, the convolution as its layer does."""
        for linear in (self.input_projection, self.output_projection, self.feed_forward_in, self.feed_forward_out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for norm in (self.conv_norm, self.attention_norm, self.feed_forward_norm):
            if norm is not None:
                norm.reset_parameters()
        self.conv.reset_parameters()  # type: ignore[operator]  # both layers have it; nn.Module's own attributes hide that
        if self.attention is not None:
            self.attention._reset_parameters()

    def forward(
        self,
        input: Tensor,
        padding_mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The block on a sequence; see the class.

        Args:
            input: (N, T, C), (N, C, T) or (T, N, C), as ``layout`` says; or one without the batch axis.
            padding_mask: (N, T) of bools; the convolution sees zeros where it is True.
            memory: What the attention reads, in the input's layout, of any length S: the result of an encoder.
            memory_padding_mask: (N, S) of bools; the attention passes over what is True.

        Returns:
            Of the input's shape.

        Raises:
            TypeError: An operand is not a tensor or of another dtype than the block, or a mask is not bool.
            ValueError: Shapes do not fit, or there is a memory without attention or attention without a memory.
        """
        name = type(self).__name__
        axes = self._axes("input", input)
        batched = input.dim() == 3
        mask = received_mask(name, padding_mask, input if batched else input.unsqueeze(0), axes, batched)
        self._check_memory(input, axes, memory, memory_padding_mask)
        turned = self.layout == "NCT"
        if turned:
            input, memory = input.transpose(-1, -2), None if memory is None else memory.transpose(-1, -2)
        attention, seen = self.attention, mask if batched else padding_mask

        def call(module: nn.Module, x: Tensor) -> Tensor:
            if module is self.conv:
                return module(x, seen)
            if module is attention:
                return module(x, memory, memory, memory_padding_mask, need_weights=False)[0]
            return module(x)

        y = self._composed(input, call)
        return y.transpose(-1, -2).contiguous() if turned else y

    @property
    def stream_layouts(self) -> dict[str, str]:
        """The children of a block in layout NCT work in NTC."""
        return dict.fromkeys((name for name, _ in self.named_children()), "NTC") if self.layout == "NCT" else {}

    def stream(self, x: Tensor, step: Step) -> Tensor:
        """How a causal block without attention composes in :func:`omniconv.streaming.streaming`."""
        self._axes("input", x)
        if self.layout != "NCT":
            return self._composed(x, step)
        return self._composed(x.transpose(-1, -2), step).transpose(-1, -2).contiguous()

    def _composed(self, x: Tensor, call: Step) -> Tensor:
        """The parts one after another; ``call`` calls a child."""

        def beside(x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
            if self.normalize_before:
                return x + call(self.dropout, branch(call(norm, x)))
            return call(norm, x + call(self.dropout, branch(x)))

        def convolution(x: Tensor) -> Tensor:
            x = call(self.input_projection, call(self.input_dropout, x))
            return call(self.output_projection, call(self.conv, F.glu(x, -1) if self.glu else x))

        def feed_forward(x: Tensor) -> Tensor:
            return call(self.feed_forward_out, call(self.activation_dropout, F.relu(call(self.feed_forward_in, x))))

        x = beside(x, self.conv_norm, convolution)
        attention, norm = self.attention, self.attention_norm
        if attention is not None and norm is not None:
            x = beside(x, norm, lambda x: call(attention, x))
        return beside(x, self.feed_forward_norm, feed_forward)

    def _axes(self, called: str, x: Any) -> Axes:
        """The axes of an operand, once it is known to be one of this block's."""
        name, weight = type(self).__name__, self.input_projection.weight
        check_dense(name, called, x)
        if x.dim() not in (2, 3):
            fail(name, f"{called} must have 3 axes, or 2 without the batch", f"shape {tuple(x.shape)}")
        axes = axes_of(name, self.layout, x.dim() == 3)
        if x.shape[axes.channel - 3] != self.channels:
            fail(name, f"{called} must have {self.channels} channels in layout {self.layout}", f"shape {tuple(x.shape)}")
        if x.device != weight.device:
            fail(name, f"{called} must be on the block's device {weight.device}", x.device)
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name}: {called} must have the block's dtype {weight.dtype}, got {x.dtype}")
        return axes

    def _check_memory(self, input: Tensor, axes: Axes, memory: Tensor | None, mask: Tensor | None) -> None:
        name = type(self).__name__
        if self.attention is None:
            for called, operand in (("memory", memory), ("memory_padding_mask", mask)):
                if operand is not None:
                    fail(name, f"{called} must be None in a block without attention", type(operand).__name__)
            return
        if memory is None:
            fail(name, "memory must be given to a block with attention", None)
        self._axes("memory", memory)
        batched = input.dim() == 3
        if memory.dim() != input.dim() or (batched and memory.shape[axes.batch] != input.shape[axes.batch]):
            fail(
                name, "memory must have the input's batch axis", f"shapes {tuple(memory.shape)} and {tuple(input.shape)}"
            )  # fmt: skip
        try:
            received_mask(name, mask, memory if batched else memory.unsqueeze(0), axes, batched)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("padding_mask", "memory_padding_mask", 1)) from None

    def extra_repr(self) -> str:
        """What the children do not show."""
        form = f"causal={self.causal}, glu={self.glu}, normalize_before={self.normalize_before}"
        return f"{self.channels}, {form}, layout={self.layout!r}"


def _check_rate(name: str, argument: str, rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"{name}: {argument} must be a number, got {rate!r}")
    if not 0 <= rate <= 1:
        fail(name, f"{argument} must be at least 0 and at most 1", rate)


class LightConvBlock(_Block):
    """A transformer block whose self-attention is a lightweight convolution: LightConv's encoder or decoder layer.

        x = norm(x + output_projection(conv(GLU(input_projection(x)))))
        x = norm(x + attention(x, memory, memory))                               with ``attention``
        x = norm(x + feed_forward_out(relu(feed_forward_in(x))))

    The encoder form (``causal=False``) sees as far ahead as back ("same" padding); the decoder form only back. With
    ``normalize_before`` each line is x + f(norm(x)) instead, and whoever stacks blocks normalises after the last.

    The decoder form without attention streams (:func:`omniconv.streaming.streaming`): chunks give what the whole sequence gives,
    under the error bound, as torch's norms and linear maps do not promise the same bits for every length.

    The children are named as above; the norms ``conv_norm``, ``attention_norm`` and ``feed_forward_norm``. Weights of fairseq's
    LightConvEncoderLayer and LightConvDecoderLayer load through :func:`omniconv.convert.block_state_from_fairseq`.

    Args:
        channels: C, of the input and the result.
        kernel_size: K taps.
        heads: H, of the convolution and of the attention.
        conv_channels: Channels of the convolution; by default C.
        feed_forward_channels: Between the two layers of the feed-forward part; by default 4·C.
        causal: Whether an output sees only its own and earlier positions.
        attention: Whether a causal block also attends to a ``memory``.
        glu: Whether a gated linear unit follows the input projection, which then gives twice the channels.
        normalize_before: Whether each part normalises what it reads, and not what it gives.
        softmax: Whether the kernel is normalised.
        dropout: Rate at the end of each part.
        input_dropout: Rate before the input projection.
        activation_dropout: Rate within the feed-forward part.
        attention_dropout: Rate of the attention's weights.
        weight_dropout: Rate of the kernel's weights.
        layout: "NTC", "NCT" or "TNC" (fairseq's), of input, memory and result.
        device: Where the parameters live.
        dtype: Their type.

    Raises:
        TypeError: A size is no int, or a rate no number.
        ValueError: Sizes, rates or forms that do not fit together.

    Example:
        >>> encoder = LightConvBlock(8, kernel_size=3, heads=2)
        >>> memory = encoder(torch.ones(2, 5, 8))
        >>> decoder = LightConvBlock(8, kernel_size=3, heads=2, causal=True, attention=True)
        >>> decoder(torch.ones(2, 4, 8), memory=memory).shape
        torch.Size([2, 4, 8])

    Source: Wu et al. 2019, arXiv:1901.10430.
    """

    convolution = LightweightConv1d

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        heads: int,
        *,
        conv_channels: int | None = None,
        feed_forward_channels: int | None = None,
        causal: bool = False,
        attention: bool = False,
        glu: bool = True,
        normalize_before: bool = False,
        softmax: bool = True,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        layout: str = "NTC",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            channels, kernel_size, heads, conv_channels=conv_channels, feed_forward_channels=feed_forward_channels, causal=causal,
            attention=attention, glu=glu, normalize_before=normalize_before, softmax=softmax, dropout=dropout,
            input_dropout=input_dropout, activation_dropout=activation_dropout, attention_dropout=attention_dropout,
            weight_dropout=weight_dropout, layout=layout, device=device, dtype=dtype,
        )  # fmt: skip


class DynamicConvBlock(_Block):
    """A transformer block whose self-attention is a dynamic convolution: DynamicConv's encoder or decoder layer.

    As :class:`LightConvBlock`, but the kernel of each position is made from that position's own features, by ``conv.projection``:
    published without a bias, which ``projection_bias`` adds.

    Args:
        channels: C, of the input and the result.
        kernel_size: K taps.
        heads: H, of the convolution and of the attention.
        conv_channels: Channels of the convolution; by default C.
        feed_forward_channels: Between the two layers of the feed-forward part; by default 4·C.
        causal: Whether an output sees only its own and earlier positions.
        attention: Whether a causal block also attends to a ``memory``.
        glu: Whether a gated linear unit follows the input projection, which then gives twice the channels.
        normalize_before: Whether each part normalises what it reads, and not what it gives.
        projection_bias: Whether the kernels' projection has a bias.
        softmax: Whether the kernels are normalised.
        dropout: Rate at the end of each part.
        input_dropout: Rate before the input projection.
        activation_dropout: Rate within the feed-forward part.
        attention_dropout: Rate of the attention's weights.
        weight_dropout: Rate of the kernels' weights.
        layout: "NTC", "NCT" or "TNC" (fairseq's), of input, memory and result.
        device: Where the parameters live.
        dtype: Their type.

    Raises:
        TypeError: A size is no int, or a rate no number.
        ValueError: Sizes, rates or forms that do not fit together.

    Example:
        >>> block = DynamicConvBlock(8, kernel_size=3, heads=2, causal=True)
        >>> x = torch.ones(1, 6, 8)
        >>> torch.allclose(block(x)[:, :4], block(x[:, :4]), atol=1e-5)  # what comes later changes nothing
        True

    Source: Wu et al. 2019, arXiv:1901.10430.
    """

    convolution = DynamicConv1d

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        heads: int,
        *,
        conv_channels: int | None = None,
        feed_forward_channels: int | None = None,
        causal: bool = False,
        attention: bool = False,
        glu: bool = True,
        normalize_before: bool = False,
        projection_bias: bool = False,
        softmax: bool = True,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        layout: str = "NTC",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            channels, kernel_size, heads, conv_channels=conv_channels, feed_forward_channels=feed_forward_channels, causal=causal,
            attention=attention, glu=glu, normalize_before=normalize_before, softmax=softmax, dropout=dropout,
            input_dropout=input_dropout, activation_dropout=activation_dropout, attention_dropout=attention_dropout,
            weight_dropout=weight_dropout, layout=layout, device=device, dtype=dtype, projection_bias=projection_bias,
        )  # fmt: skip
