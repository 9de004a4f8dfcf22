"""The public API against the node test vectors of ONNX."""

from collections import Counter

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_vectors import Vector, run, served, vectors

VECTORS = vectors()
SHIPPED_SINCE_1_18 = {
    ("node", "Conv"): 6,
    ("node", "ConvTranspose"): 10,
    ("node", "DeformConv"): 4,
    ("pytorch-converted", "Conv"): 26,
    ("pytorch-converted", "ConvTranspose"): 2,
    ("pytorch-operator", "Conv"): 1,
    ("pytorch-operator", "ConvTranspose"): 1,
}


def test_no_vector_is_lost():
    found = Counter((v.kind, v.op) for v in VECTORS)
    least = SHIPPED_SINCE_1_18 | ({("node", "CausalConvWithState"): 13} if "CausalConvWithState" in served() else {})
    assert {key: found[key] for key, count in least.items() if found[key] < count} == {}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v.kind}-{v.name}")
def test_vector(vector: Vector):
    results = run(vector)
    assert len(results) == len(vector.outputs)
    for y, expected in zip(results, vector.outputs, strict=True):
        torch.testing.assert_close(y, expected, rtol=vector.rtol, atol=vector.atol)


@pytest.mark.parametrize("size", [(7, 6), (9, 8)])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Conv", {"auto_pad": "VALID", "strides": [2, 1]}),
        ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
        ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 3], "dilations": [2, 1]}),
        ("Conv", {"pads": [1, 0, 2, 3], "strides": [3, 1], "group": 2}),
        ("ConvTranspose", {"auto_pad": "VALID", "strides": [2, 1], "output_padding": [1, 0]}),
        ("ConvTranspose", {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
        ("ConvTranspose", {"auto_pad": "SAME_UPPER", "strides": [2, 2], "output_padding": [0, 1]}),
        ("ConvTranspose", {"auto_pad": "SAME_LOWER", "strides": [2, 1], "dilations": [1, 2]}),
        ("ConvTranspose", {"pads": [1, 0, 0, 2], "strides": [3, 2]}),
        ("ConvTranspose", {"auto_pad": "SAME_LOWER", "strides": [2, 2], "output_shape": [14, 13]}),
        ("ConvTranspose", {"auto_pad": "SAME_UPPER", "strides": [2, 2], "output_shape": [14, 13]}),
    ],
)
def test_attributes_that_no_vector_has(op, attributes, size):
    """Against onnx's own evaluator."""
    node = onnx.helper.make_node(op, ["X", "W"], ["Y"], **attributes)
    x, weight = torch.randn(1, 4, *size), torch.randn(4, 4 // attributes.get("group", 1), 3, 4)
    (expected,) = ReferenceEvaluator(node).run(None, {"X": x.numpy(), "W": weight.numpy()})
    (y,) = run(Vector("reference", op, op, attributes, (x, weight), (), 0, 0))
    torch.testing.assert_close(y, torch.tensor(expected))
