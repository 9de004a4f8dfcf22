"""Deformable convolutions: their taps look where offsets say; with offsets of zero they see the least that is sure."""

from collections.abc import Sequence

from omniconv.analysis.receptive_field.graph import Node
from omniconv.analysis.receptive_field.rules import Parts, Walk, rule
from omniconv.analysis.receptive_field.seen import Seen
from omniconv.analysis.receptive_field.windows import mixed_channels, per_channel, through_windows
from omniconv.geometry import Grid, grid

_WHY = "its taps are taken where they lie with offsets of zero"


@rule("omniconv::deform_conv2d")
def deform_conv2d(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """See :func:`omniconv.functional.deform_conv2d`."""
    size, kernel = node["input"].shape[-2:], node["weight"].shape[2:]
    windows = grid("deform_conv2d", size, kernel, node["stride"], node["padding"], node["dilation"])
    yield from _carried(node, up, walk, kernel, windows)


@rule("torchvision::deform_conv2d")
def torchvisions(node: Node, _slot: int, up: Seen, walk: Walk) -> Parts:
    """torchvision's operator."""
    size, kernel = node["input"].shape[-2:], node["weight"].shape[2:]
    stride, padding, dilation = ((node[f"{n}_h"], node[f"{n}_w"]) for n in ("stride", "pad", "dilation"))
    yield from _carried(node, up, walk, kernel, grid("deform_conv2d", size, kernel, stride, padding, dilation))


def _carried(node: Node, up: Seen, walk: Walk, kernel: Sequence[int], windows: Grid) -> Parts:
    x, weight = node["input"], node["weight"]
    channel = len(x.shape) - 3
    walk.lower_bound(node, _WHY)
    for name in ("offset", "mask"):
        operand = node[name]
        if operand is not None and operand.depends and operand.shape[channel + 1 :] == up.shape[channel + 1 :]:
            yield operand, up.averaged([channel], [operand.shape[channel]])
    bias = node["bias"]
    if bias is not None and bias.depends:
        yield bias, per_channel(up, channel)
    if x.depends:
        mixed = mixed_channels(up, channel, x.shape[channel], x.shape[channel] // weight.shape[1])
        before = [pad for pad, _ in windows.pads]
        yield x, through_windows(node, mixed, walk, x.shape[-2:], kernel, windows.stride, before, windows.dilation)
