"""How people compute lightweight and dynamic convolutions with torch's own operators: five formulations, in any layout.

Each computes from the kernels as they are applied, (N or 1, H, K, Out or 1), and takes the form that suits the layout of the input.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from omniconv.geometry import Grid, Padding
from omniconv.ops.activation import activate
from omniconv.ops.operator import accumulated_in
from omniconv.ops.reference import with_bias
from omniconv.ops.sequence import LAYOUTS, Axes, make_windows, masked, normalised, of_channels, pad_axis, shift_and_add
from omniconv.ops.technique import Peer

Compute = Callable[[Tensor, Tensor, Tensor | None, Axes, Grid], Tensor]


def _through_torch(
    compute: Compute,
    input: Tensor,
    kernels: Tensor,
    bias: Tensor | None,
    padding: Padding,
    *,
    dilation: int | Sequence[int] = 1,
    softmax: bool = True,
    layout: str = "NCT",
    padding_mode: str = "zeros",
    padding_mask: Tensor | None = None,
    weight_dropout: float = 0.0,
    training: bool = False,
    activation: str | None = None,
) -> Tensor:
    """What the formulations share; ``compute`` makes (N, C, Out) of the input in its layout and the kernels as they are applied."""
    axes = LAYOUTS[layout]
    x = masked(input, padding_mask, axes)
    windows = make_windows("torch", x.shape[axes.time], kernels.shape[2], padding, dilation, padding_mode)
    kernels = normalised(kernels, 2, softmax, weight_dropout if training else 0.0)
    return axes.of(activate(compute(x, kernels, bias, axes, windows), activation))


def _one_kernel(kernels: Tensor) -> Tensor:
    """(N or 1, H, K), where all positions share a kernel.

    Raises:
        ValueError: They do not.
    """
    if kernels.shape[3] != 1:
        raise ValueError("a convolution has one kernel for all positions")
    return kernels.squeeze(3)


def _outputs(x: Tensor, kernels: Tensor, axes: Axes, windows: Grid) -> int:
    return windows.output_size((x.shape[axes.time],), (kernels.shape[2],))[0]


def _along_time(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Grid, groups: int) -> Tensor:
    """torch's convolution over the last axis, of (N, C, T) or (N, C, rows, T)."""
    (before, after), last = windows.pads[0], x.dim() - 1
    if windows.mode != "zeros":
        x, before, after = pad_axis(x, last, windows), 0, 0
    settings = {"dilation": (1,) * (last - 2) + windows.dilation, "groups": groups}
    convolution: Callable[..., Tensor] = F.conv1d if last == 2 else F.conv2d
    wide, outputs = max(before, after), x.shape[last] + before + after - windows.dilation[0] * (weight.shape[-1] - 1)
    # uneven pads: where few positions are in excess, to compute them costs less than a padded copy
    if 4 * (2 * wide - before - after) > outputs:
        x, before, wide = F.pad(x, (before, after)), 0, 0
    y = convolution(x, weight, bias, padding=(0,) * (last - 2) + (wide,), **settings)
    return y if y.shape[last] == outputs else y.narrow(last, wide - before, outputs)


def _depthwise(x: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, windows: Grid) -> Tensor:
    """The kernel of its head for every channel; where samples have kernels of their own, they stand side by side as channels."""
    x = axes.channel_first(x)
    shape, own = x.shape[:2], kernels.shape[0] > 1
    weight = of_channels(_one_kernel(kernels), 1, shape[1]).flatten(0, 1).unsqueeze(1)
    if own:
        x, bias = x.reshape(1, -1, x.shape[2]), None if bias is None else bias.repeat(shape[0])
    return _along_time(x, weight, bias, windows, weight.shape[0]).view(*shape, -1)


def _depthwise_as_picture(x: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, windows: Grid) -> Tensor:
    """The same over pictures of one row in channels-last, which NTC is already, and so is TNC with samples side by side."""
    weight = _one_kernel(kernels)
    size, channels = x.shape[axes.batch], x.shape[axes.channel]
    joined = kernels.shape[0] > 1 or axes.time == 0
    weight = of_channels(weight, 1, channels)[:, :, None, None]
    if joined:
        x = axes.channel_first(x).permute(2, 0, 1).reshape(1, 1, -1, size * channels).permute(0, 3, 1, 2)
        weight, bias = weight.expand(size, *weight.shape[1:]), None if bias is None else bias.repeat(size)
    else:
        x = axes.channel_first(x).unsqueeze(2).contiguous(memory_format=torch.channels_last)
    weight = weight.flatten(0, 1)
    y = _along_time(x, weight, bias, windows, weight.shape[0]).squeeze(2)
    return y.unflatten(1, (size, channels)).squeeze(0) if joined else y


def _folded(x: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, windows: Grid) -> Tensor:
    """fairseq's lightweight convolution without its CUDA kernels: the channels of a head are samples, heads are channels."""
    weight = _one_kernel(kernels)
    x = axes.channel_first(x).unflatten(1, (weight.shape[1], -1))
    if weight.shape[0] > 1:
        x = x.flatten(0, 1).unsqueeze(0)
    batch, heads, width = x.shape[:3]
    folded = x.transpose(1, 2).flatten(0, 1)
    y = _along_time(folded, weight.flatten(0, 1).unsqueeze(1), None, windows, heads)
    return _with_heads(y.view(batch, width, heads, -1).transpose(1, 2), kernels, bias)


def _folded_as_picture(x: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, windows: Grid) -> Tensor:
    """A head is a channel of a picture whose rows are the channels of the head: nothing has to be moved in NCT."""
    weight = _one_kernel(kernels)
    x = axes.channel_first(x).unflatten(1, (weight.shape[1], -1))
    if weight.shape[0] > 1:
        x = x.flatten(0, 1).unsqueeze(0)
    return _with_heads(_along_time(x, weight.flatten(0, 1)[:, None, None], None, windows, x.shape[1]), kernels, bias)


def _with_heads(y: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """(N, H, C/H, Out), or (1, N·H, C/H, Out), as (N, C, Out) with the bias."""
    return with_bias(y.reshape(-1, kernels.shape[1] * y.shape[2], y.shape[3]), bias)


def _unfold(x: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, windows: Grid) -> Tensor:
    """What fairseq falls back to without its CUDA kernels: windows of the input, and a matrix product per head and position.

    With time first the windows are a view; otherwise they are K copies of the input.
    """
    batch, heads, taps, outputs = x.shape[axes.batch], kernels.shape[1], kernels.shape[2], _outputs(x, kernels, axes, windows)
    step, width = windows.dilation[0], x.shape[axes.channel] // heads
    kernels = kernels.expand(batch, -1, -1, outputs)
    if axes.time < axes.channel:
        x = pad_axis(axes.channel_first(x).permute(2, 0, 1).contiguous(), 0, windows)
        seen = x.unfold(0, step * (taps - 1) + 1, 1)[..., ::step].unflatten(2, (heads, width)).flatten(0, 2)
        products = torch.bmm(seen, kernels.permute(3, 0, 1, 2).reshape(-1, taps, 1))
        y = products.view(outputs, batch, heads * width)
        return (y if bias is None else y + bias).permute(1, 2, 0)
    seen = pad_axis(x, 2, windows).unfold(2, step * (taps - 1) + 1, 1)[..., ::step]
    seen = seen.unflatten(1, (heads, width)).transpose(2, 3).flatten(0, 2)
    products = torch.bmm(seen, kernels.transpose(2, 3).reshape(-1, taps, 1))
    return with_bias(products.view(batch, heads, outputs, width).transpose(2, 3).flatten(1, 2), bias)


def _bands(kernels: Tensor, outputs: int, windows: Grid, size: int) -> Tensor:
    """Matrices (N·H or H, Out, positions) with the kernel of a position along its row, the columns of zero pads cut off."""
    matrices, taps, step = kernels.shape[0] * kernels.shape[1], kernels.shape[2], windows.dilation[0]
    width = outputs + step * (taps - 1)
    bands = kernels.new_zeros(matrices, outputs, width)
    places = bands.as_strided((matrices, outputs, taps), (outputs * width, width + 1, step))
    places.copy_(kernels.transpose(2, 3).flatten(0, 1).expand(-1, outputs, -1))
    return bands.narrow(2, windows.pads[0][0], size) if windows.mode == "zeros" else bands


def _band(x: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, windows: Grid) -> Tensor:
    """fairseq's other form, for short inputs: a product with a matrix that is zero off its band.

    One matrix serves the whole batch where the samples have no kernels of their own.
    """
    heads, outputs = kernels.shape[1], _outputs(x, kernels, axes, windows)
    bands = _bands(kernels, outputs, windows, x.shape[axes.time])
    if windows.mode != "zeros":
        x = pad_axis(x, axes.time, windows)
    batch, channels = x.shape[axes.batch], x.shape[axes.channel]
    split = axes.channel_first(x).unflatten(1, (heads, channels // heads))
    last = axes.time > axes.channel  # then rows along time are kept, otherwise the channels of a head side by side
    if kernels.shape[0] > 1 or batch == 1:
        split = split.flatten(0, 1) if last else split.transpose(2, 3).flatten(0, 1)
        y = (torch.bmm(split, bands.transpose(1, 2)) if last else torch.bmm(bands, split)).unflatten(0, (batch, heads))
        y = y if last else y.transpose(2, 3)
    elif last:
        y = torch.bmm(split.transpose(0, 1).flatten(1, 2), bands.transpose(1, 2)).unflatten(1, (batch, -1)).transpose(0, 1)
    else:
        y = torch.bmm(bands, split.permute(1, 3, 0, 2).flatten(2)).unflatten(2, (batch, -1)).permute(2, 0, 3, 1)
    if bias is not None:
        y = y + bias.view(heads, -1, 1)
    if last:
        return y.flatten(1, 2)
    return _in_layout(y, axes)


def _in_layout(y: Tensor, axes: Axes) -> Tensor:
    """(N, H, C/H, Out) as (N, C, Out) over memory in the layout, the channels last there."""
    first, second = (0, 3) if axes.batch == 0 else (3, 0)
    return axes.channel_first(y.permute(first, second, 1, 2).flatten(2))


def _shift_and_add(x: Tensor, kernels: Tensor, bias: Tensor | None, axes: Axes, windows: Grid, in_place: bool = True) -> Tensor:
    """A multiply-add over the whole input per tap; in place, half types are widened once and rounded once."""
    heads, taps, narrow = kernels.shape[1], kernels.shape[2], x.dtype
    if in_place:
        wide = accumulated_in(x)
        x, kernels, bias = x.to(wide), kernels.to(wide), None if bias is None else bias.to(wide)
    x = axes.channel_first(pad_axis(x, axes.time, windows))
    fixed = kernels.shape[3] == 1
    if fixed:  # a number per channel, which lie side by side in two of the layouts
        applied = of_channels(kernels, 1, x.shape[1]).permute(2, 0, 1, 3).contiguous().unbind(0)
    else:
        applied = kernels.unsqueeze(2).unbind(3)
        x = x.unflatten(1, (heads, -1))
    bias = None if bias is None else bias.view(*x.shape[1:-1], 1)
    axis, step = x.dim() - 1, windows.dilation[0]
    if in_place:
        y = shift_and_add(x, applied, bias, axis, step)
    else:
        outputs = x.shape[axis] - step * (taps - 1)
        y = x.narrow(axis, 0, outputs) * applied[0]
        for i in range(1, taps):
            y = torch.addcmul(y, x.narrow(axis, i * step, outputs), applied[i])
        y = y if bias is None else y + bias
    return (y if fixed else y.flatten(1, 2)).to(narrow)


# what takes one kernel for the whole sequence, and one for every position if need be
_FIXED: dict[str, Compute] = {
    "torch depthwise": _depthwise,
    "torch depthwise 2-D": _depthwise_as_picture,
    "torch folded": _folded,
    "torch folded 2-D": _folded_as_picture,
}
_BY_POSITION: dict[str, Compute] = {
    "torch unfold": _unfold,
    "torch band": _band,
    "torch shift and add": _shift_and_add,
    "torch add out of place": partial(_shift_and_add, in_place=False),
}


def _lightweight(
    compute: Compute, input: Tensor, weight: Tensor, bias: Tensor | None = None, padding: Padding = "same", **settings: object
) -> Tensor:
    return _through_torch(compute, input, weight[None, :, :, None], bias, padding, **settings)  # type: ignore[arg-type]  # settings are a mapping of the op's own


def _dynamic(
    compute: Compute, input: Tensor, kernels: Tensor, bias: Tensor | None = None, padding: Padding = "same", **settings: object
) -> Tensor:
    return _through_torch(compute, input, kernels, bias, padding, **settings)  # type: ignore[arg-type]  # settings are a mapping of the op's own


LIGHTWEIGHT_PEERS = tuple(Peer(name, partial(_lightweight, compute)) for name, compute in (_FIXED | _BY_POSITION).items())
DYNAMIC_PEERS = tuple(Peer(name, partial(_dynamic, compute)) for name, compute in (_BY_POSITION | _FIXED).items())
