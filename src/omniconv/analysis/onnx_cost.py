"""What the operators of an ONNX file cost, from the shapes that ONNX's own shape inference gives them.

MACs are exact where shapes are known; flops of what is no product are estimates, as of :mod:`omniconv.analysis.cost`. Nothing runs.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch

from omniconv.analysis._users_code import one_line
from omniconv.analysis.cost import Cost, Counts, Coverage, ModuleCost, Row
from omniconv.analysis.cost.result import METRICS, total_status
from omniconv.analysis.cost.work import Work, convolution_stage, mixing_stage, problem_of
from omniconv.analysis.onnx_file import DTYPES, graph_inputs, read_model
from omniconv.functional import deform_conv2d
from omniconv.geometry import Pairs
from omniconv.problem import DTYPES as FLOATING
from omniconv.techniques import find_convolution, find_op

_BYTES = {"f32": 4, "u8": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "bool": 1, "f16": 2, "f64": 8, "bf16": 2}
# hands its input on, or makes what the graph knows before it runs
_FREE = frozenset(
    ("Constant", "ConstantOfShape", "Dropout", "Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze")
)
# flops a number of the result
_PER_RESULT = {
    0: "ArgMax ArgMin Cast CenterCropPad Concat CumSum DepthToSpace Expand EyeLike Gather GatherElements GatherND NonZero OneHot "
    "Pad Range ScatterElements ScatterND Slice SpaceToDepth Split Tile TopK Transpose Trilu",
    1: "Abs Add And BitShift Ceil Clip DequantizeLinear Div Equal Floor Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul "
    "Neg Not Or QuantizeLinear Relu Round Sign Sub Sum ThresholdedRelu Where Xor",
    2: "BatchNormalization LeakyRelu PRelu Mean",
    4: "Cos Elu Erf Exp HardSigmoid HardSwish Log Pow Reciprocal Sigmoid Sin Softplus Softsign Sqrt Tanh",
    5: "Celu Mish Selu Swish",
    8: "Gelu",
}  # fmt: skip
# flops a number of the operand
_PER_OPERAND = {
    1: "GlobalAveragePool GlobalMaxPool ReduceL1 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum",
    2: "ReduceL2 ReduceSumSquare",
    4: "LogSoftmax LRN ReduceLogSum ReduceLogSumExp Softmax",
    8: "GroupNormalization InstanceNormalization LayerNormalization RMSNormalization",
}
_RESIZE = {"nearest": 0, "linear": 8, "cubic": 40}


@dataclass(frozen=True)
class _Value:
    """A tensor of the graph."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * _BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class _Node:
    """An operator with what is known of its operands; None where an operand is left out."""

    op: str
    attributes: dict[str, Any]
    inputs: tuple[_Value | None, ...]
    outputs: tuple[_Value, ...]

    def operand(self, index: int) -> _Value | None:
        return self.inputs[index] if index < len(self.inputs) else None

    @property
    def first(self) -> _Value:
        value = self.inputs[0]
        assert value is not None
        return value


FORMULAS: dict[str, Callable[[_Node], Work]] = {}


def _formula(*ops: str) -> Callable[[Callable[[_Node], Work]], Callable[[_Node], Work]]:
    def register(function: Callable[[_Node], Work]) -> Callable[[_Node], Work]:
        FORMULAS.update(dict.fromkeys(ops, function))
        return function

    return register


def _pads(
    node: _Node, x: _Value, out: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Pairs:
    """Zeros before and after each axis, whichever way the node says it."""
    rank, automatic = len(kernel), node.attributes.get("auto_pad", b"NOTSET").decode()
    if automatic in ("NOTSET", ""):
        flat = node.attributes.get("pads", [0] * 2 * rank)
        return tuple(zip(flat[:rank], flat[rank:], strict=True))
    if automatic == "VALID":
        return ((0, 0),) * rank
    made = []
    for size, o, k, s, d in zip(x.shape[2:], out, kernel, stride, dilation, strict=True):
        few, many = (size, o) if node.op == "ConvTranspose" else (o, size)
        total = max((few - 1) * s + d * (k - 1) + 1 - many, 0)
        less, more = total // 2, total - total // 2
        made.append((less, more) if automatic == "SAME_UPPER" else (more, less))
    return tuple(made)


def _convolution(node: _Node, weight: _Value, bias: bool) -> Work:
    x, y = node.first, node.outputs[0]
    rank = len(weight.shape) - 2
    stride, dilation = (node.attributes.get(name, [1] * rank) for name in ("strides", "dilations"))
    pads = _pads(node, x, y.shape[2:], weight.shape[2:], stride, dilation)
    groups, transposed = node.attributes.get("group", 1), node.op == "ConvTranspose"
    stage = convolution_stage(x.shape, weight.shape, stride, pads, dilation, groups, y.shape[2:], transposed)
    n = x.shape[0]
    like = torch.empty(x.shape, dtype=FLOATING.get(x.dtype, torch.int8), device="meta")
    more = node.attributes.get("output_padding", [0] * rank)
    return Work(
        n * stage.macs_dense, n * stage.macs_valid, y.count if bias else 0, find_convolution(stage).name,
        problem_of(stage, n, like, more), flops_status="exact",
    )  # fmt: skip


@_formula("Conv", "ConvTranspose")
def _conv(node: _Node) -> Work:
    weight = node.inputs[1]
    assert weight is not None
    return _convolution(node, weight, node.operand(2) is not None)


@_formula("ConvInteger")
def _conv_integer(node: _Node) -> Work:
    weight = node.inputs[1]
    assert weight is not None
    return _convolution(node, weight, False)


@_formula("QLinearConv")
def _conv_quantised(node: _Node) -> Work:
    weight = node.inputs[3]
    assert weight is not None
    return _convolution(node, weight, node.operand(8) is not None)


@_formula("DeformConv")
def _deform_conv(node: _Node) -> Work:
    """At the places of the grid; 8 flops a tap and channel to interpolate, 1 to mask."""
    x, weight, y = node.first, node.inputs[1], node.outputs[0]
    assert weight is not None
    plain = _convolution(node, weight, node.operand(3) is not None)
    samples = x.shape[0] * x.shape[1] * prod(weight.shape[2:]) * prod(y.shape[2:])
    extra = plain.extra + samples * (9 if node.operand(4) is not None else 8)
    return Work(
        plain.macs_dense, plain.macs_valid, extra, find_op(deform_conv2d)[0].name, None, scratch=8 * samples, valid="estimate"
    )


@_formula("MatMul", "MatMulInteger", "QLinearMatMul")
def _matmul(node: _Node) -> Work:
    a, y = node.first, node.outputs[0]
    macs = y.count * a.shape[-1]
    return Work(macs, macs, flops_status="exact")


@_formula("Gemm")
def _gemm(node: _Node) -> Work:
    a, b, y = node.first, node.inputs[1], node.outputs[0]
    assert b is not None
    inner = a.shape[0] if node.attributes.get("transA", 0) else a.shape[1]
    extra = y.count if node.operand(2) is not None else 0
    positions, out_channels = y.shape
    stage = mixing_stage(positions, inner, out_channels)
    named = find_convolution(stage)
    problem = named.problem_of(stage, out_channels=out_channels, dtype=a.dtype) if a.dtype in FLOATING else None
    return Work(y.count * inner, y.count * inner, extra, named.name, problem, flops_status="exact")


@_formula("LSTM", "GRU", "RNN")
def _recurrent(node: _Node) -> Work:
    """Both weights at every step and in every direction; 9 flops a gate and unit."""
    x, weight, again = node.first, node.inputs[1], node.inputs[2]
    assert weight is not None
    assert again is not None
    steps = x.shape[0] * x.shape[1]
    macs = steps * (weight.count + again.count)
    return Work(macs, macs, 9 * steps * weight.shape[0] * weight.shape[1])


@_formula("MaxPool", "AveragePool", "LpPool")
def _pool(node: _Node) -> Work:
    return Work(extra=node.outputs[0].count * prod(node.attributes["kernel_shape"]))


@_formula("Resize", "Upsample", "GridSample")
def _resize(node: _Node) -> Work:
    mode = node.attributes.get("mode", b"nearest").decode()
    return Work(extra=_RESIZE.get(mode.removeprefix("bi"), 8) * node.outputs[0].count)


def _per(table: dict[int, str], of: Callable[[_Node], _Value]) -> None:
    for flops, names in table.items():
        for name in names.split():
            FORMULAS[name] = partial(_each, flops, of)


def _each(flops: int, of: Callable[[_Node], _Value], node: _Node) -> Work:
    return Work(extra=flops * of(node).count)


_per(_PER_RESULT, lambda node: node.outputs[0])
_per(_PER_OPERAND, lambda node: node.first)


def onnx_cost(path: Path, given: Sequence[tuple[str | None, tuple[int, ...]]] = ()) -> Cost:
    """Counts what the operators of an ONNX file cost.

    Parameters are the floating tensors that the file holds, running means and variances apart. Operators without a formula and
    those whose shapes are not known are named in ``coverage``.

    Args:
        path: The file.
        given: Names (None: by order) and shapes of inputs whose sizes the file leaves open.

    Raises:
        ValueError: The extra ``onnx`` is missing, the file holds no model, or the shapes do not fit it.
    """
    import onnx

    model = read_model(path)
    for (name, shape, _), value in zip(graph_inputs(model, given), _declared(model), strict=True):
        assert name == value.name
        for dimension, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dimension.dim_value = size
    del model.graph.value_info[:]  # shapes of other inputs
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # onnx's own, for graphs that contradict themselves
        raise ValueError(f"the shapes of the graph must fit together, got {one_line(error)} in '{path}'") from error
    return _Reader(model, onnx).cost(path.name)


def _declared(model: Any) -> list[Any]:
    weights = {w.name for w in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


@dataclass
class _Reader:
    """Goes through the nodes of a graph in order."""

    model: Any
    onnx: Any
    values: dict[str, _Value] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)  # parameters that no node has read yet
    ops: int = 0
    unknown: dict[str, int] = field(default_factory=dict)

    def cost(self, name: str) -> Cost:
        graph = self.model.graph
        for value in (*graph.input, *graph.value_info, *graph.output):
            kind = value.type.tensor_type
            if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
                self.values[value.name] = _Value(tuple(d.dim_value for d in kind.shape.dim), DTYPES.get(kind.elem_type, "f32"))
        moments = {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]}
        quantised = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        for weight in graph.initializer:
            value = _Value(tuple(weight.dims), DTYPES.get(weight.data_type, "f32"))
            self.values[weight.name] = value
            if weight.dims and weight.name not in moments and (value.dtype in FLOATING or weight.name in quantised):
                self.left[weight.name] = value.count
        paths = _paths([(node.name or next(iter(node.output), ""), node.op_type) for node in graph.node])
        rows = [row for node, path in zip(graph.node, paths, strict=True) if (row := self._row(node, path)) is not None]
        forward = sum((row.forward for row in rows), Counts())
        status = {metric: total_status([row.status[metric] for row in rows]) for metric in METRICS}
        names = tuple(sorted(self.unknown.items(), key=lambda item: -item[1]))
        notes = (
            ("weights that the file holds in Constant nodes are not parameters here",) if not any(r.params for r in rows) else ()
        )
        coverage = Coverage(self.ops, self.ops - sum(self.unknown.values()), names)
        return Cost(
            name, tuple(rows), sum(row.params for row in rows), **vars(forward), peak_activation=self._peak(), backward=None,
            status=status | {"peak_activation": "lower_bound" if self.unknown else "exact"}, coverage=coverage,
            modules=tuple(_modules(rows)), notes=notes,
        )  # fmt: skip

    def _row(self, node: Any, path: str) -> Row | None:
        if node.op_type in _FREE:
            return None
        self.ops += 1
        op = f"onnx::{node.op_type}" if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        params = sum(self.left.pop(name, 0) for name in node.input)
        inputs = tuple(self.values.get(name) for name in node.input)
        outputs = tuple(self.values[name] for name in node.output if name in self.values)
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        complete = bool(outputs) and all(v is not None or not name for v, name in zip(inputs, node.input, strict=True))
        formula = FORMULAS.get(node.op_type) if op.startswith("onnx::") and complete else None
        work = formula(_Node(node.op_type, attributes, inputs, outputs)) if formula is not None else None
        known = [v for v in (*inputs, *outputs) if v is not None]
        moved = sum(v.bytes for v in known)
        shapes = tuple(v.shape for v in inputs if v is not None), tuple(v.shape for v in outputs)
        if work is None:
            self.unknown[op] = self.unknown.get(op, 0) + 1
            status = dict.fromkeys(METRICS, "unknown") | {"params": "exact"}
            bytes_status = "estimate" if complete else "lower_bound"
            status |= {"bytes_min": bytes_status, "bytes_impl": bytes_status}
            return Row(path, node.op_type, op, None, None, *shapes, 1, params, 0, 0, 0, moved, moved, None, status)
        status = dict.fromkeys(METRICS, "exact") | {"macs_valid": work.valid, "flops": work.flops_status, "bytes_impl": "estimate"}
        return Row(
            path, node.op_type, op, work.technique, work.problem, *shapes, 1, params, work.macs_dense, work.macs_valid, work.flops,
            moved, moved + work.scratch, None, status,
        )  # fmt: skip

    def _peak(self) -> int:
        """The most bytes alive at once when every tensor goes after its last reader."""
        graph = self.model.graph
        weights = {w.name for w in graph.initializer}
        last = {name: i for i, node in enumerate(graph.node) for name in node.input}
        last |= {value.name: len(graph.node) for value in graph.output}
        alive = {v.name: self.values[v.name].bytes for v in _declared(self.model) if v.name in self.values}
        peak = sum(alive.values())
        for i, node in enumerate(graph.node):
            alive |= {name: self.values[name].bytes for name in node.output if name in self.values and name not in weights}
            peak = max(peak, sum(alive.values()))
            alive = {name: size for name, size in alive.items() if last.get(name, -1) > i}
        return peak


def _paths(nodes: Sequence[tuple[str, str]]) -> list[str]:
    """Dotted paths, each once: torch's exporter calls a node /layer1/layer1.0/conv1/Conv, of which the path is layer1.0.conv1.

    >>> _paths([("/layer1/layer1.0/conv1/Conv", "Conv"), ("/layer1/layer1.0/Add", "Add"), ("y", "Relu")])
    ['layer1.0.conv1', 'layer1.0.Add', 'y']
    """
    split = []
    for name, kind in nodes:
        parts = [part for part in name.split("/") if part] or [kind]
        tails = [parts[0], *(b.removeprefix(f"{a}.") for a, b in pairwise(parts))]
        split.append([tail.replace(".", "_") or "_" for tail in tails])
    scopes = Counter(tuple(parts[:depth]) for parts in split for depth in range(1, len(parts)))
    taken: dict[str, int] = {}
    made = []
    for parts in split:
        path = ".".join(parts[:-1] if scopes[tuple(parts[:-1])] == 1 else parts)
        taken[path] = taken.get(path, 0) + 1
        made.append(path if taken[path] == 1 else f"{path}_{taken[path]}")
    return made


def _modules(rows: Sequence[Row]) -> list[ModuleCost]:
    """The graph, the scopes of its nodes, and the nodes."""
    types = {"": "graph"}
    sums: dict[str, tuple[int, Counts]] = {}
    for row in rows:
        parts = row.name.split(".")
        for depth in range(len(parts) + 1):
            path = ".".join(parts[:depth])
            types.setdefault(path, row.type if depth == len(parts) else "scope")
            params, forward = sums.get(path, (0, Counts()))
            sums[path] = (params + row.params, forward + row.forward)
    made = []
    for path, kind in types.items():
        params, forward = sums.get(path, (0, Counts()))
        made.append(ModuleCost(path, kind, path.count(".") + 1 if path else 0, params, **vars(forward), calls=1))
    return made
