"""The layer that owns the convolution which makes its offsets."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.geometry import Padding
from omniconv.ops.activation import check_activation
from omniconv.ops.grid import check_channels, normalized
from omniconv.ops.layer import Layer
from omniconv.ops.operator import check_dense, check_flags, fail
from omniconv.ops.tracing import number_sizes
from omniconv.techniques.deformable.op import deform_conv2d
from omniconv.techniques.standard import Conv2d


class DeformConv2d(Layer):
    """A deformable layer with the convolution that makes its offsets; see :func:`omniconv.functional.deform_conv2d`.

    ``offset_conv`` has the main kernel, stride, padding and dilation and starts at zero; with ``modulated`` it makes mask
    logits too, and mask = mask_scale · sigmoid(logit), so that a fresh layer with the default scale 2 *is* a standard convolution
    (1 is the paper's and mmcv's). The state dict holds ``weight``, ``bias`` and ``offset_conv.*``. With ``offset="external"``
    there is no offset convolution: ``forward`` takes (input, offset, mask) and torchvision's state dict loads strictly.

    Example:
        >>> DeformConv2d(2, 4, 3, padding=1)(torch.ones(1, 2, 5, 5)).shape
        torch.Size([1, 4, 5, 5])
    """

    technique, rank, op = "deformable", 2, deform_conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        offset_groups: int = 1,
        modulated: bool = True,
        offset: str = "learned",
        mask_scale: float = 2.0,
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        windows = normalized(name, 2, kernel_size, stride, padding, dilation, "zeros")
        self.kernel_size, self.stride, self.padding, self.dilation = windows
        check_channels(name, groups=groups, in_channels=in_channels, out_channels=out_channels)
        check_channels(name, groups=1, offset_groups=offset_groups)
        if in_channels % offset_groups:
            fail(name, "in_channels must be divisible by offset_groups", f"{in_channels} and {offset_groups}")
        if offset not in ("learned", "external"):
            fail(name, "offset must be 'learned' or 'external'", repr(offset))
        if isinstance(mask_scale, bool) or not isinstance(mask_scale, (int, float)):
            raise TypeError(f"{name}: mask_scale must be a number, got {mask_scale!r}")
        if not 0 < mask_scale < math.inf:
            fail(name, "mask_scale must be above 0 and finite", mask_scale)
        check_flags(name, bias=bias, modulated=modulated)
        check_activation(name, activation)
        self.in_channels, self.out_channels, self.groups, self.offset_groups = in_channels, out_channels, groups, offset_groups
        self.modulated, self.mask_scale, self.activation = modulated, float(mask_scale), activation
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size, **made))
        self.bias = nn.Parameter(torch.empty(out_channels, **made)) if bias else None
        channels = (3 if modulated else 2) * offset_groups * math.prod(self.kernel_size)
        self.offset_conv = None
        if offset == "learned":
            self.offset_conv = Conv2d(
                in_channels,
                channels,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                **made,
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills weight and bias as torch.nn does those of a convolution, the offset convolution with zeros."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            limit = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -limit, limit)
        if self.offset_conv is not None:
            for parameter in self.offset_conv.parameters():
                nn.init.zeros_(parameter)

    def offsets(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """The offset and the mask that the layer makes for an input.

        Raises:
            ValueError: The layer's offsets are external.
        """
        if self.offset_conv is None:
            fail(type(self).__name__, "forward must be given an offset where offset='external'", None)
        made = self.offset_conv(input)
        if not self.modulated:
            return made, None
        split = 2 * self.offset_groups * math.prod(self.kernel_size)
        offset, logits = made.split([split, split // 2], dim=made.dim() - 3)
        return offset, self.mask_scale * logits.sigmoid()

    def operands(self, input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Any]:
        """The keyword arguments with which ``forward`` calls the op."""
        if isinstance(input, Tensor):
            check_dense(type(self).__name__, "input", input)
            if input.dim() in (3, 4) and number_sizes(input)[-3] != self.in_channels:
                fail(type(self).__name__, f"input must have {self.in_channels} channels", f"shape {tuple(input.shape)}")
        for given, name in ((offset, "an offset"), (mask, "a mask")):
            if given is not None and self.offset_conv is not None:
                must = f"{name} is only given where offset='external'"
                fail(type(self).__name__, must, "one beside a learned offset convolution")
        if offset is None:
            offset, mask = self.offsets(input)
        return {
            "input": input,
            "offset": offset,
            "weight": self.weight,
            "bias": self.bias,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "mask": mask,
            "activation": self.activation,
        }

    def forward(self, input: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The op on the input, with the layer's own offsets or the given ones."""
        return deform_conv2d(**self.operands(input, offset, mask))

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"offset_groups={self.offset_groups}, modulated={self.modulated}, "
            f"offset={'external' if self.offset_conv is None else 'learned'!r}, "
            f"mask_scale={self.mask_scale}, activation={self.activation!r}"
        )
