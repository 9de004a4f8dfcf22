"""ONNX files: counted as torch counts the same network, and by hand where torch has no such thing."""

import onnx
import pytest
from onnx import TensorProto, helper

from omniconv.analysis.onnx_cost import onnx_cost
from omniconv.analysis.summary import summary
from omniconv.analysis.targets import load
from omniconv.techniques import parse

F32 = TensorProto.FLOAT


def saved(path, nodes, inputs, weights=(), opset=19):
    """A model of these nodes; weights by name and shape."""
    values = [helper.make_tensor_value_info(name, F32, shape) for name, shape in inputs.items()]
    y = helper.make_tensor_value_info(nodes[-1].output[0], F32, None)
    held = [helper.make_tensor(name, F32, shape, [0.0] * _count(shape)) for name, shape in dict(weights).items()]
    graph = helper.make_graph(list(nodes), "g", values, [y], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("my.own", 1)]), path)
    return path


def _count(shape):
    count = 1
    for size in shape:
        count *= size
    return count


def one(path, op, inputs, weights, **attributes):
    return onnx_cost(saved(path, [helper.make_node(op, [*inputs, *weights], ["y"], **attributes)], inputs, weights))


SAME = {"auto_pad": "SAME_UPPER"}
TWO = {"strides": [2, 2]}
ONE_MORE = {"output_padding": [1, 1]}
# as ONNX says it, and as a Problem says it
CONVOLUTIONS = [
    ("Conv", (2, 3, 9, 8), (8, 3, 3, 3), {"pads": [1] * 4, "strides": [2, 1]}, "standard2d n2 c3-8 i9x8 k3 s2x1 p1"),
    ("Conv", (1, 8, 9), (8, 1, 3), {"group": 8, "pads": [2, 0]}, "depthwise1d c8 i9 k3 p2+0"),
    ("Conv", (1, 8, 7, 7), (16, 1, 3, 3), {"group": 8}, "depthwise2d c8 i7 k3 m2"),
    ("Conv", (1, 8, 7, 7), (8, 2, 3, 3), {"group": 4, "auto_pad": "VALID"}, "grouped2d c8 i7 k3 g4"),
    ("Conv", (1, 8, 7, 7), (4, 8, 1, 1), {}, "pointwise2d c8-4 i7"),
    ("Conv", (1, 8, 9, 9), (8, 8, 3, 3), {"dilations": [2, 2], "pads": [2] * 4}, "dilated2d c8 i9 k3 d2 p2"),
    ("Conv", (1, 4, 5, 6, 7), (4, 4, 3, 3, 3), SAME | {"strides": [2] * 3}, "standard3d c4 i5x6x7 k3 s2 psame_minimal"),
    ("Conv", (1, 4, 8, 8), (4, 4, 3, 3), TWO | {"auto_pad": "SAME_LOWER"}, "standard2d c4 i8 k3 s2 p1+0"),
    ("ConvTranspose", (1, 8, 5, 5), (8, 4, 4, 4), TWO | {"pads": [1] * 4}, "transposed2d c8-4 i5 k4 s2 p1"),
    ("ConvTranspose", (1, 8, 5, 5), (8, 2, 3, 3), TWO | ONE_MORE | {"group": 2}, "transposed2d c8-4 i5 k3 s2 op1 g2"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "x", "weight", "attributes", "text"), CONVOLUTIONS, ids=[c[-1] for c in CONVOLUTIONS])
def test_convolutions(tmp_path, op, x, weight, attributes, text):
    found = one(tmp_path / "a.onnx", op, {"x": x}, {"w": weight}, **attributes)
    technique, problem = parse(text)
    expected = technique.cost(problem, bias=False)
    (row,) = found.rows
    assert (found.macs_dense, found.macs_valid) == (expected.macs_dense, expected.macs_valid)
    assert row.technique == text.partition(" ")[0][:-2]
    assert technique.stages(row.problem)[-1].pads == technique.stages(problem)[-1].pads
    assert found.params == _count(weight)
    assert found.bytes_min == 4 * (_count(x) + _count(weight) + _count(row.outputs[0]))
    assert found.flops == 2 * found.macs_dense
    assert found.coverage.unknown == ()


def test_deformable(tmp_path):
    inputs = {"x": (1, 4, 6, 6), "offset": (1, 18, 4, 4)}
    nodes = [helper.make_node("DeformConv", ["x", "w", "offset", "b"], ["y"])]
    found = onnx_cost(saved(tmp_path / "a.onnx", nodes, inputs, {"w": (8, 4, 3, 3), "b": (8,)}))
    (row,) = found.rows
    assert (row.technique, found.macs_dense, found.params) == ("deformable", 16 * 8 * 36, 8 * 36 + 8)
    assert found.flops == 2 * found.macs_dense + 8 * 16 + 8 * 4 * 9 * 16, "bias, and 8 a sample to interpolate"
    assert found.status["macs_valid"] == "estimate"


@pytest.mark.parametrize(
    ("op", "inputs", "weights", "attributes", "macs", "flops"),
    [
        ("Gemm", {"x": (3, 5)}, {"w": (7, 5), "b": (7,)}, {"transB": 1}, 105, 231),
        ("Gemm", {"x": (5, 3)}, {"w": (5, 7)}, {"transA": 1}, 105, 210),
        ("MatMul", {"x": (2, 3, 5)}, {"w": (5, 7)}, {}, 210, 420),
        ("MaxPool", {"x": (1, 2, 6, 6)}, {}, {"kernel_shape": [2, 3], "strides": [2, 3]}, 0, 2 * 3 * 2 * 6),
        ("GlobalAveragePool", {"x": (1, 2, 6, 6)}, {}, {}, 0, 72),
        ("Sigmoid", {"x": (1, 2, 6, 6)}, {}, {}, 0, 288),
        ("Softmax", {"x": (2, 6)}, {}, {}, 0, 48),
        ("Transpose", {"x": (2, 6)}, {}, {"perm": [1, 0]}, 0, 0),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_operators(tmp_path, op, inputs, weights, attributes, macs, flops):
    found = one(tmp_path / "a.onnx", op, inputs, weights, **attributes)
    assert (found.macs_dense, found.flops) == (macs, flops)
    assert found.params == sum(map(_count, weights.values()))


def network(path):
    """As torch's exporter names it: a block with a residual, and a head that shares nothing."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], name="/stem/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "s", "b", "m", "v"], ["n"], name="/norm/BatchNormalization"),
        helper.make_node("Conv", ["n", "w1"], ["c"], name="/blocks/blocks.0/conv/Conv"),
        helper.make_node("Add", ["c", "n"], ["d"], name="/blocks/blocks.0/Add"),
        helper.make_node("Conv", ["d", "w1"], ["e"], name="/blocks/blocks.1/conv/Conv"),
        helper.make_node("Mystery", ["e"], ["f"], name="/odd/Mystery", domain="my.own"),
        helper.make_node("Flatten", ["e"], ["y"], name="/Flatten"),
    ]
    weights = {"w0": (4, 3, 3, 3), "s": (4,), "b": (4,), "m": (4,), "v": (4,), "w1": (4, 4, 1, 1)}
    return saved(path, nodes, {"x": ("N", 3, 8, 8)}, weights)


def test_a_network(tmp_path):
    made = summary(str(network(tmp_path / "net.onnx")))
    lines = {line.name: line for line in made.lines}
    assert made.params == 108 + 8 + 16, "shared once, running moments apart"
    assert made.macs_dense == 64 * 108 + 2 * 64 * 16
    assert made.coverage.unknown == (("my.own::Mystery", 1),)
    assert made.status["macs_dense"] == "lower_bound"
    assert (lines["stem"].technique, lines["blocks.0.conv"].technique) == ("standard", "pointwise")
    assert lines["blocks.0"].macs_dense == 64 * 16
    assert lines["blocks.0.Add"].flops == 256
    assert made.peak_activation == 3 * 4 * 4 * 64, "the sum, its two operands"
    assert summary_of(tmp_path, "2x3x8x8").macs_dense == 2 * made.macs_dense


def summary_of(folder, sizes):
    return summary(load(str(folder / "net.onnx"), input=sizes))


def test_refusals(tmp_path):
    path = network(tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"^summary: the backward pass must be one of a network in torch, got the ONNX file"):
        summary(str(path), backward=True)


def test_shapes_that_do_not_fit_leave_the_operator_unknown(tmp_path):
    found = one(tmp_path / "bad.onnx", "MatMul", {"x": (2, 3)}, {"w": (4, 5)})
    assert found.coverage.unknown == (("onnx::MatMul", 1),)
    assert found.status["macs_dense"] == "unknown"
