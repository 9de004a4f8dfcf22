"""The surgery on what a target text names, with what it costs before and after."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from omniconv.analysis.cost import Cost, cost
from omniconv.analysis.targets import load
from omniconv.ops.operator import fail
from omniconv.surgery.dilate import DilationChange, dilation_plan, stride_to_dilation


@dataclass(frozen=True)
class DilatedTarget:
    """A network with strides turned into dilation; pairs are (before, after).

    Attributes:
        target: What was named.
        inputs: Shapes of the inputs that costs are of.
        output_stride: What was asked for.
        changes: The layers that changed.
        notes: What differs besides.
        params: Parameters, which stay.
        macs: Multiply-accumulates of the papers' convention.
        peak_activation: Bytes of inputs and results that are alive at once.
        status: Of those: "exact", "estimate", "lower_bound" or "unknown", the worse of before and after.
        module: The network.
        example: What it was run with.

    Example:
        >>> result = dilate_target("torch.nn:Conv2d(in_channels=1, out_channels=1, kernel_size=2, stride=2)", 1, inputs=["1x1x8x8"])
        >>> type(result).__name__, len(result.changes), len(result.saved(".pt")) > 0
        ('DilatedTarget', 1, True)
    """

    target: str
    inputs: tuple[tuple[int, ...], ...]
    output_stride: int
    changes: tuple[DilationChange, ...]
    notes: tuple[str, ...]
    params: int
    macs: tuple[int, int]
    peak_activation: tuple[int, int]
    status: dict[str, str]
    module: nn.Module = field(metadata={"json": False}, repr=False, compare=False)
    example: tuple[Tensor, ...] = field(metadata={"json": False}, repr=False, compare=False)

    def saved(self, suffix: str) -> bytes:
        """The network as a file: ".pt" of torch.save (which reads it where its classes can be imported), ".pt2" of torch.export.

        Raises:
            ValueError: It cannot be written so, or the suffix is another.
        """
        buffer = io.BytesIO()
        if suffix not in (".pt", ".pt2"):
            fail("dilate", "the suffix must be .pt or .pt2", repr(suffix))
        try:
            if suffix == ".pt":
                torch.save(self.module, buffer)
            else:
                torch.export.save(torch.export.export(self.module, self.example), buffer)
        except Exception as error:  # whatever a model's own code does under pickle or export
            said = (str(error).splitlines() or [""])[0]
            fail("dilate", f"the network must be one that can be saved as {suffix}", f"{type(error).__name__}: {said}")
        return buffer.getvalue()


_WORSE = ("exact", "estimate", "lower_bound", "unknown")


def dilate_target(target: str, output_stride: int = 8, *, inputs: Sequence[str] = ()) -> DilatedTarget:
    """:func:`omniconv.surgery.stride_to_dilation` of what a text names, and what that costs.

    Args:
        target: As in :func:`omniconv.analysis.targets.load`.
        output_stride: Input steps between neighbouring positions, at most.
        inputs: As there.

    Raises:
        ValueError: As there and in :func:`omniconv.surgery.stride_to_dilation`.

    Example:
        >>> result = dilate_target("torch.nn:Conv2d(in_channels=1, out_channels=1, kernel_size=3, stride=2, padding=1)", 1,
        ...     inputs=["1x1x8x8"])
        >>> result.macs, result.params
        ((144, 576), 10)
    """
    loaded = load(target, input=list(inputs), caller="dilate")
    module = loaded.network()
    example, named = loaded.example_inputs()
    if named:
        fail("dilate", "inputs must be given by their place", ", ".join(named))
    plan = dilation_plan(module, output_stride, example_input=example)
    dilated = stride_to_dilation(module, output_stride, example_input=example)
    before, after = cost(module, *example), cost(dilated, *example)
    shapes = tuple(tuple(x.shape) for x in example)
    return DilatedTarget(
        target, shapes, output_stride, plan.changes, plan.notes, before.params, (before.macs_dense, after.macs_dense),
        (before.peak_activation, after.peak_activation), _status(before, after), dilated, example,
    )  # fmt: skip


def _status(before: Cost, after: Cost) -> dict[str, str]:
    return {
        key: max(before.status[key], after.status[key], key=_WORSE.index) for key in ("params", "macs_dense", "peak_activation")
    }  # fmt: skip
