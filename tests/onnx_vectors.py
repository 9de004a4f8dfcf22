"""The node test vectors that the onnx package ships, and their attributes in this library's arguments.

Single-node models of the served operators: those of ``onnx.backend.test.case.node``, which are built when their module is
imported, and those stored as files (exported from torch).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.backend.test.case import node as node_cases
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import DATA_DIR, load_model_tests
from torch import Tensor

from omniconv import functional

MODULES = {
    "Conv": "conv", "ConvTranspose": "convtranspose", "DeformConv": "deformconv", "CausalConvWithState": "causal_conv_with_state"
}  # fmt: skip
STORED = ("pytorch-converted", "pytorch-operator")


@dataclass(frozen=True)
class Vector:
    """One node, what goes in (None: an optional input left out) and what comes out, with the tolerances that onnx gives it."""

    kind: str
    name: str
    op: str
    attributes: dict[str, Any]
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    rtol: float
    atol: float


def served() -> tuple[str, ...]:
    """The operators that the installed onnx knows."""
    return tuple(op for op in MODULES if onnx.defs.has(op))


def vectors() -> list[Vector]:
    """Every vector of the installed onnx."""
    return [*_built(), *_stored()]


def _built() -> Iterator[Vector]:
    for op in served():
        import_module(f"{node_cases.__name__}.{MODULES[op]}")
    for case in node_cases._NodeTestCases:
        for inputs, outputs in case.data_sets:
            yield from _of_model("node", case, case.model, inputs, outputs)


def _stored() -> Iterator[Vector]:
    for kind in STORED:
        if not (Path(DATA_DIR) / kind).is_dir():
            continue
        for case in sorted(load_model_tests(kind=kind), key=lambda case: case.name):
            folder = Path(case.model_dir)
            model = onnx.load(folder / "model.onnx")
            for data in sorted(folder.glob("test_data_set_*")):
                yield from _of_model(kind, case, model, _arrays(data, "input"), _arrays(data, "output"))


def _arrays(folder: Path, stem: str) -> list[np.ndarray]:
    files = sorted(folder.glob(f"{stem}_*.pb"), key=lambda file: int(file.stem.removeprefix(f"{stem}_")))
    return [numpy_helper.to_array(onnx.load_tensor(file)) for file in files]


def _of_model(
    kind: str, case: TestCase, model: onnx.ModelProto, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
) -> Iterator[Vector]:
    """The vector of a model with a single served node; nothing for another."""
    graph = model.graph
    if len(graph.node) != 1 or graph.node[0].op_type not in MODULES:
        return
    node = graph.node[0]
    known = {stored.name: numpy_helper.to_array(stored) for stored in graph.initializer}
    given = [entry.name for entry in graph.input if entry.name not in known]
    known |= dict(zip(given, inputs, strict=True))
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    yield Vector(
        kind,
        case.name,
        node.op_type,
        {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()},
        tuple(torch.tensor(known[name]) if name else None for name in node.input),
        tuple(torch.tensor(output) for output in outputs),
        case.rtol,
        case.atol,
    )


def run(vector: Vector) -> tuple[Tensor, ...]:
    """What this library makes of a vector's inputs."""
    return _OPERATORS[vector.op](vector.attributes, *vector.inputs)


@dataclass(frozen=True)
class Windows:
    """The window attributes of a node, defaults filled in."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    span: tuple[int, ...]
    auto_pad: str


def _windows(attributes: dict[str, Any], weight: Tensor) -> Windows:
    kernel = tuple(weight.shape[2:])
    if tuple(attributes.get("kernel_shape", kernel)) != kernel:
        raise AssertionError(f"kernel_shape {attributes['kernel_shape']} is not that of the weight {kernel}")
    rank = len(kernel)
    dilation = tuple(attributes.get("dilations", (1,) * rank))
    pads = attributes.get("pads", (0,) * 2 * rank)
    return Windows(
        tuple(attributes.get("strides", (1,) * rank)),
        dilation,
        tuple(zip(pads[:rank], pads[rank:], strict=True)),
        tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)),
        attributes.get("auto_pad", "NOTSET"),
    )


def _conv(attributes: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor]:
    windows = _windows(attributes, weight)
    padding: Any = {"NOTSET": windows.pads, "VALID": "valid", "SAME_UPPER": "same_minimal"}.get(windows.auto_pad)
    if windows.auto_pad == "SAME_LOWER":  # the odd one before
        axes = zip(x.shape[2:], windows.stride, windows.span, strict=True)
        padding = tuple(_split(max((-(-i // s) - 1) * s + span - i, 0), larger_first=True) for i, s, span in axes)
    op: Callable[..., Tensor] = getattr(functional, f"conv{x.dim() - 2}d")
    return (op(x, weight, bias, windows.stride, padding, windows.dilation, attributes.get("group", 1)),)


def _split(total: int, larger_first: bool) -> tuple[int, int]:
    small = total // 2
    return (total - small, small) if larger_first else (small, total - small)


def _conv_transpose(attributes: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor]:
    windows = _windows(attributes, weight)
    rank = x.dim() - 2
    extra = tuple(attributes.get("output_padding", (0,) * rank))
    wanted = attributes.get("output_shape")
    if wanted is not None:
        size = _of_size(windows, x, extra, wanted[-rank:])
    elif windows.auto_pad == "SAME_UPPER" and not any(extra):
        size = {"padding": "same"}
    elif windows.auto_pad.startswith("SAME"):
        size = _of_size(windows, x, extra, [i * s for i, s in zip(x.shape[2:], windows.stride, strict=True)])
    else:
        size = {"padding": "valid" if windows.auto_pad == "VALID" else windows.pads, "output_padding": extra}
    op: Callable[..., Tensor] = getattr(functional, f"conv_transpose{rank}d")
    return (op(x, weight, bias, windows.stride, groups=attributes.get("group", 1), dilation=windows.dilation, **size),)


def _of_size(windows: Windows, x: Tensor, extra: tuple[int, ...], wanted: Sequence[int]) -> dict[str, Any]:
    """The arguments that give a size: a surplus is cropped, the odd one after for SAME_UPPER, a lack is added after."""
    axes = zip(x.shape[2:], windows.stride, windows.span, extra, wanted, strict=True)
    surplus = [(i - 1) * s + span + e - out for i, s, span, e, out in axes]
    if all(total <= 0 for total in surplus):
        return {"output_size": tuple(wanted)}
    return {
        "padding": tuple(_split(max(total, 0), larger_first=windows.auto_pad != "SAME_UPPER") for total in surplus),
        "output_padding": tuple(e + max(-total, 0) for e, total in zip(extra, surplus, strict=True)),
    }


def _deform_conv(
    attributes: dict[str, Any],
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor]:
    windows = _windows(attributes, weight)
    for name, parts in (("group", x.shape[1] // weight.shape[1]), ("offset_group", offset.shape[1] // (2 * weight[0, 0].numel()))):
        if attributes.get(name, 1) != parts:
            raise AssertionError(f"{name} {attributes.get(name, 1)} is not what the shapes say, {parts}")
    return (functional.deform_conv2d(x, offset, weight, bias, windows.stride, windows.pads, windows.dilation, mask),)


def _causal_conv_with_state(
    attributes: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None, past_state: Tensor | None = None
) -> tuple[Tensor, ...]:
    activation = attributes.get("activation", "none")
    return functional.causal_conv1d_fn(
        x,
        weight.squeeze(1),
        bias,
        initial_states=past_state,
        return_final_states=True,
        activation=None if activation == "none" else activation,
    )


_OPERATORS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DeformConv": _deform_conv,
    "CausalConvWithState": _causal_conv_with_state,
}
