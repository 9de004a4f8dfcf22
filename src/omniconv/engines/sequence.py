"""What the native kernels of lightweight and dynamic share: the calls left to the composite path, and the places of layouts."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from omniconv import _native, settings
from omniconv.engines.depthwise import wants_gradient
from omniconv.geometry import Grid
from omniconv.ops.sequence import LAYOUTS

LAYOUTS_BY_PLACE = tuple(LAYOUTS.values())  # a raw op is given the place of its layout
PLACES = {axes.order: place for place, axes in enumerate(LAYOUTS_BY_PLACE)}  # dynamo has no rule for a dataclass as a key
_FARTHEST = 1 << 20  # positions between the first and the last tap: a tile copies as many


def _is_transformed() -> bool:
    # a raw op has neither a tangent nor a batching rule
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# in order; the first that holds for (x, kernel, bias, windows, taps) sends a call to the composite path
REFUSALS: tuple[tuple[str, Callable[[Tensor, Tensor, Tensor | None, Grid, int], bool]], ...] = (
    ("the native library is not there", lambda x, w, b, g, k: not _native.AVAILABLE),
    ("composite paths were asked for", lambda x, w, b, g, k: settings.is_composite_only()),
    ("the tensors are not on the CPU", lambda x, w, b, g, k: x.device.type != "cpu"),
    ("there are no samples or no positions", lambda x, w, b, g, k: 0 in x.shape or k == 0),
    ("a window covers more than a million positions", lambda x, w, b, g, k: g.dilation[0] * (k - 1) > _FARTHEST),
    ("a torch.func transform or forward-mode differentiation is active", lambda x, w, b, g, k: _is_transformed()),
    (
        "a gradient is wanted through reflect, replicate or circular padding",
        lambda x, w, b, g, k: g.mode != "zeros" and wants_gradient(x, w, b),
    ),
)


def refusal(x: Tensor, kernel: Tensor, bias: Tensor | None, windows: Grid, taps: int) -> str | None:
    """Why no native kernel takes a call with so many taps; None where one does."""
    for reason, holds in REFUSALS:
        if holds(x, kernel, bias, windows, taps):
            return reason
    return None
