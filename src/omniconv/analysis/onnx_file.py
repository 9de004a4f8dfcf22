"""ONNX files: what they take and, by ONNX's own shape inference, what their operators cost. The weights are not read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omniconv.analysis._users_code import one_line

# numbers of onnx.TensorProto -> ours
DTYPES = {1: "f32", 2: "u8", 3: "i8", 5: "i16", 6: "i32", 7: "i64", 9: "bool", 10: "f16", 11: "f64", 16: "bf16"}

GraphInput = tuple[str, tuple[int, ...], str]


def read_model(path: Path) -> Any:
    """The ModelProto of a file, weights that lie beside it left where they are.

    Raises:
        ValueError: The extra ``onnx`` is not installed, or the file holds no ONNX model.
    """
    try:
        import onnx
    except ImportError:
        raise ValueError("an ONNX file needs the extra 'onnx' (pip install \"omniconv[onnx]\"), got no onnx") from None
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's and the file system's
        raise ValueError(f"the file must hold an ONNX model, got '{path}' ({one_line(error)})") from error
    if not model.graph.node:
        raise ValueError(f"the file must hold an ONNX model, got '{path}' without a single node")
    return model


def graph_inputs(model: Any, given: Sequence[tuple[str | None, tuple[int, ...]]]) -> tuple[GraphInput, ...]:
    """What the graph takes, as name, shape and dtype; sizes that it leaves open are those of the inputs given.

    Inputs go by name, or where they have none in the graph's order. A first size left open, the batch, is one.

    Raises:
        ValueError: A size is open and not given, or an input given does not fit the graph.
    """
    weights = {w.name for w in model.graph.initializer}
    declared = [value for value in model.graph.input if value.name not in weights]
    unnamed = iter([shape for name, shape in given if name is None])
    named = {name: shape for name, shape in given if name is not None}
    made = tuple(_input(value, named.pop(value.name, None) or next(unnamed, None)) for value in declared)
    left = [*named, *("x".join(map(str, shape)) for shape in unnamed)]
    if left:
        names = ", ".join(value.name for value in declared)
        raise ValueError(f"the inputs must be those of the graph ({names}), got {left[0]} too many")
    return made


def _input(value: Any, given: tuple[int, ...] | None) -> GraphInput:
    kind = value.type.tensor_type
    if kind.elem_type not in DTYPES:
        raise ValueError(f"an input of the graph must be a tensor of numbers, got {value.name!r}")
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
    if given is None:
        if sizes and sizes[0] is None:
            sizes[0] = 1
        if None in sizes:
            axis = sizes.index(None)
            known = "x".join("?" if size is None else str(size) for size in sizes)
            raise ValueError(f"--input must give what the file leaves open, got no size of axis {axis} of {value.name!r} ({known})")
        return value.name, tuple(int(size or 0) for size in sizes), DTYPES[kind.elem_type]
    if len(given) != len(sizes) or any(size not in (None, g) for size, g in zip(sizes, given, strict=True)):
        known = "x".join("?" if size is None else str(size) for size in sizes)
        raise ValueError(f"the input {value.name!r} must be {known}, got {'x'.join(map(str, given))}")
    return value.name, given, DTYPES[kind.elem_type]
