"""The native matrix product over channels at every instruction set: what runs, its bits, its gradients, what it refuses."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import omniconv
from omniconv import settings
from omniconv.functional import pointwise_conv1d, pointwise_conv2d
from omniconv.nn import DynamicConv1d, PointwiseConv1d
from omniconv.problem import Problem
from omniconv.techniques import find
from omniconv.testing import assert_within_bound

OPS = torch.ops.omniconv
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (N, C, O, T): around the vectors of every level and dtype, around the tiles and the depth of 256, more than one group of rows
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (1, 17, 33, 15),
    (3, 31, 65, 1),
    (6, 16, 8, 1),
    (1, 257, 40, 3),
    (2, 513, 31, 40),
    (5, 20, 3, 29),
    (1, 64, 2, 301),
    (40, 9, 70, 2),
    (1, 4100, 18, 50),
]
# memory of a tensor that is read as (N, C, T)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NCT": lambda x: x.contiguous(),
    "NTC": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "TNC": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every other": lambda x: torch.stack([x, x + 1], 3).flatten(2)[:, :, ::2],
    "part": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[:, 1:-4, 3:-2],
    "samples inside": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(
    fill: Callable[..., Tensor], n: int, c: int, o: int, t: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return fill(n, c, t, dtype=dtype), fill(o, c, 1, dtype=dtype, seed=1), fill(o, dtype=dtype, seed=2)


class Calls(TorchDispatchMode):
    """The ops that reach the dispatcher, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def called(function: Callable[[], Any]) -> list[str]:
    with Calls() as calls:
        function()
    return calls.names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_are_what_runs_and_nothing_is_copied(layout: str) -> None:
    x, w, b = operands(normal, 2, 5, 7, 6)
    x = LAYOUTS[layout](x)
    assert called(lambda: pointwise_conv1d(x, w, b, activation="gelu")) == ["omniconv::pointwise"]
    strided = called(lambda: pointwise_conv1d(x, w, b, 2))
    assert strided[-1] == "omniconv::pointwise"
    assert not any("copy" in name or "clone" in name for name in strided)
    assert "omniconv::pointwise" not in called(lambda: pointwise_conv2d(x.unsqueeze(3), w.unsqueeze(3), b))


@pytest.mark.parametrize("layout", ["NCT", "NTC", "TNC"])
def test_the_projection_of_a_dynamic_layer_runs_there(layout: str) -> None:
    layer = DynamicConv1d(8, 3, heads=2, layout=layout).eval()
    with torch.no_grad():
        assert "omniconv::pointwise" in called(lambda: layer(torch.randn(4, 6, 8) if layout != "NCT" else torch.randn(4, 8, 6)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_exact(shape: tuple[int, ...], layout: str, dtype: torch.dtype, level: str) -> None:
    x, w, b = operands(integers, *shape)
    expected = torch.einsum("oc,nct->not", w.squeeze(2).double(), x.double()) + b.double().unsqueeze(1)
    y = pointwise_conv1d(LAYOUTS[layout](x.to(dtype)), w.to(dtype), b.to(dtype))
    assert torch.equal(y, expected.to(dtype))
    assert y.is_contiguous()
    assert torch.equal(pointwise_conv1d(LAYOUTS[layout](x.to(dtype)), w.to(dtype)), (expected - b.double().unsqueeze(1)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_numbers_stay_under_the_bound(shape: tuple[int, ...], dtype: torch.dtype, level: str) -> None:
    x, w, b = operands(normal, *shape, dtype=dtype)
    for stride in (1, 3):
        y = pointwise_conv1d(x, w, b, stride)
        assert_within_bound(find("pointwise"), {"input": x, "weight": w, "bias": b, "stride": stride}, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", "gelu", "sigmoid"])
@pytest.mark.parametrize("shape", [(2, 9, 19, 21), (3, 9, 19, 1), (1, 9, 3, 40)], ids=str)
def test_fused_activations_stay_under_the_bound(shape: tuple[int, ...], activation: str, dtype: torch.dtype, level: str) -> None:
    x, w, b = operands(normal, *shape, dtype=dtype)
    y = pointwise_conv1d(x, w, b, activation=activation)
    assert_within_bound(find("pointwise"), {"input": x, "weight": w, "bias": b, "activation": activation}, y)


def chunks(total: int, seed: int) -> list[int]:
    generator, sizes = torch.Generator().manual_seed(seed), []
    while sum(sizes) < total:
        largest = (1, 3, 20, 100)[int(torch.randint(0, 4, (), generator=generator))]
        sizes.append(min(int(torch.randint(1, largest + 1, (), generator=generator)), total - sum(sizes)))
    return sizes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NCT", "NTC", "TNC"])
@pytest.mark.parametrize(("channels", "outputs"), [(37, 50), (300, 16), (64, 5), (700, 130), (1, 1)])
def test_a_position_has_the_same_bits_in_every_chunk(
    channels: int, outputs: int, layout: str, dtype: torch.dtype, level: str
) -> None:
    """By few and by many columns, vectors along the outputs and along the columns: one order of summation."""
    total = 173
    x, w, b = operands(normal, 2, channels, outputs, total, dtype=dtype)
    x = LAYOUTS[layout](x)
    # in float64 the curved ones are torch's, whose bits depend on the place
    for bias, activation in ((b, None), (None, "relu" if dtype == torch.float64 else "silu")):
        whole = pointwise_conv1d(x, w, bias, activation=activation)
        for seed in range(3):
            parts = [pointwise_conv1d(part, w, bias, activation=activation) for part in x.split(chunks(total, seed), 2)]
            assert torch.equal(torch.cat(parts, 2), whole)
        steps = [pointwise_conv1d(step, w, bias, activation=activation) for step in x.split(1, 2)]
        assert torch.equal(torch.cat(steps, 2), whole)
        alone = [pointwise_conv1d(x[n : n + 1], w, bias, activation=activation) for n in range(2)]
        assert torch.equal(torch.cat(alone), whole)
        assert torch.equal(pointwise_conv1d(x, w, bias, 3, activation=activation), whole[..., ::3])
        copied = pointwise_conv1d(x.contiguous(), w, bias, activation=activation)
        assert torch.equal(copied, whole), "the layout must not show"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(5, 300, 260, 90), (64, 200, 300, 1), (1, 500, 700, 3)], ids=str)
def test_threads_leave_the_bits_alone(shape: tuple[int, ...], dtype: torch.dtype, level: str) -> None:
    x, w, b = operands(normal, *shape, dtype=dtype)

    def everything() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        y = pointwise_conv1d(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))[:2]]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(3)
        three = everything()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 3, 40])
def test_what_is_not_a_number_stays_in_its_column_or_row(columns: int, dtype: torch.dtype, bad: float, level: str) -> None:
    x, w, b = operands(normal, 2, 19, 21, columns, dtype=dtype)
    clean = pointwise_conv1d(x, w, b)
    hurt = x.clone()
    hurt[1, 7, columns // 2] = bad
    y = pointwise_conv1d(hurt, w, b)
    assert not y[1, :, columns // 2].isfinite().any()
    y[1, :, columns // 2] = clean[1, :, columns // 2]
    assert torch.equal(y, clean)
    hurt = w.clone()
    hurt[20, 18] = bad
    y = pointwise_conv1d(x, hurt, b)
    assert not y[:, 20].isfinite().any()
    y[:, 20] = clean[:, 20]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("layout", ["NCT", "TNC", "every other"])
def test_gradients_of_whole_numbers_are_exact(layout: str, needed: tuple[bool, ...], dtype: torch.dtype, level: str) -> None:
    x, w, b = operands(integers, 3, 11, 19, 23, dtype=torch.float64)
    weights = integers(3, 19, 12, dtype=torch.float64, seed=3)

    def gradients(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, w, b), needed, strict=True)]
        y = pointwise_conv1d(*leaves, 2)
        return torch.autograd.grad(y, [t for t in leaves if t.requires_grad], weights.to(y.dtype))

    with settings.composite_only():
        expected = gradients(x, w, b)
    for ours, theirs in zip(gradients(LAYOUTS[layout](x.to(dtype)), w.to(dtype), b.to(dtype)), expected, strict=True):
        assert torch.equal(ours, theirs.to(dtype))


def test_gradients_of_gradients_and_of_a_sum() -> None:
    x, w, b = (t.requires_grad_() for t in operands(normal, 2, 3, 4, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(pointwise_conv1d, (x, w, b))
    assert torch.autograd.gradgradcheck(pointwise_conv1d, (x, w, b))
    # operands that depend on one another
    assert torch.autograd.gradgradcheck(lambda x: pointwise_conv1d(x, x[0, :, :3].t().unsqueeze(2) ** 2, x[0, 0, :3]), (x,))
    pointwise_conv1d(x, w, b).sum().backward()  # a gradient of one number in all strides
    assert b.grad is not None
    assert torch.equal(b.grad, torch.full_like(b, 10))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(2, 3, 5))


def test_compiled_and_exported_with_any_length() -> None:
    layer = PointwiseConv1d(6, 9, activation="silu").eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    exported = torch.export.export(
        layer, (torch.randn(2, 6, 8),), dynamic_shapes={"input": {0: torch.export.Dim("n"), 2: torch.export.Dim("t")}}
    ).module()
    for n, t in ((2, 8), (3, 5), (7, 30)):
        x = torch.randn(n, 6, t)
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(exported(x), layer(x))
        assert torch.equal(exported(LAYOUTS["NTC"](x)), layer(x))
    x = torch.randn(2, 6, 8, requires_grad=True)
    for call in (layer, compiled):
        (gradient,) = torch.autograd.grad(call(x).square().sum(), x)
        assert gradient.shape == x.shape


def test_transforms_take_the_composite_path() -> None:
    x, w, _ = operands(normal, 2, 3, 4, 5, dtype=torch.float64)
    single = torch.func.vmap(lambda x: pointwise_conv1d(x.unsqueeze(0), w))(x).squeeze(1)
    torch.testing.assert_close(single, pointwise_conv1d(x, w))
    _, tangent = torch.func.jvp(lambda x: pointwise_conv1d(x, w), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, pointwise_conv1d(torch.ones_like(x), w))
    assert torch.func.grad(lambda x: pointwise_conv1d(x, w).sum())(x).shape == x.shape


def test_autocast_lowers_it() -> None:
    x, w, b = operands(normal, 2, 3, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pointwise_conv1d(x, w, b)
    assert torch.equal(y, pointwise_conv1d(x.bfloat16(), w.bfloat16(), b.bfloat16()))


def test_without_samples_or_batch() -> None:
    x, w, b = operands(normal, 2, 3, 4, 5)
    assert pointwise_conv1d(x[:0], w, b).shape == (0, 4, 5)
    assert torch.equal(pointwise_conv1d(x[1], w, b), pointwise_conv1d(x, w, b)[1])


def test_denormals_count_as_zero_unless_precise(level: str) -> None:
    for shape in ((1, 1, 3), (1, 1, 90)):
        x, w = torch.full(shape, 1e-40), torch.ones(2, 1, 1)
        assert pointwise_conv1d(x, w).abs().sum() == 0
        with omniconv.precise():
            assert torch.equal(pointwise_conv1d(x, w), x.expand(1, 2, -1))


def test_weights_are_never_remembered() -> None:
    layer, x = PointwiseConv1d(5, 20, bias=False), torch.ones(1, 5, 9)
    for value in (1.0, 2.0):
        layer.weight.data.fill_(value)
        assert (layer(x) == 5 * value).all()


def test_more_elements_than_an_int_counts() -> None:
    """Expanded operands: nothing is as large as it says."""
    x = torch.ones(1, 1, 1).expand(2, 1 << 16, 1)
    assert pointwise_conv1d(x, torch.ones(1, 1, 1).expand(1 << 16, 1 << 16, 1)[:2])[1, 1, 0] == 1 << 16
    long = torch.ones(1, 1, 1).expand(1, 1 << 12, 1 << 20)[:, :, :3]
    assert (pointwise_conv1d(long, torch.ones(1, 1 << 12, 1)) == 1 << 12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["NCT", "TNC"])
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    x, w, b = operands(normal, 2, 20, 9, 8, dtype=dtype)
    torch.library.opcheck(OPS.pointwise.default, (LAYOUTS[layout](x), w, b, 0, True))
    torch.library.opcheck(OPS.pointwise.default, (LAYOUTS[layout](x), w, None, 1, False))


WRONG: dict[str, tuple[Any, ...]] = {
    "x must be (N, C, T)": (torch.randn(4, 4), torch.randn(4, 4, 1), None, 0),
    "x must be (N, C, T) with at least one channel": (torch.randn(1, 0, 4), torch.randn(4, 0, 1), None, 0),
    "x must be (N, C, T) with at least one channel and at most 2^31": (
        torch.ones(1, 1, 1).expand(1, 1 << 62, 1),
        torch.ones(1, 1, 1).expand(1, 1 << 62, 1),
        None,
        0,
    ),
    "weight must be (O, 4, 1) of the dtype of x": (torch.randn(1, 4, 9), torch.randn(4, 4, 2), None, 0),
    "weight must be (O, 4, 1) of": (torch.randn(1, 4, 9), torch.randn(4, 5, 1), None, 0),
    "weight must be (O, 4, 1)": (torch.randn(1, 4, 9), torch.randn(4, 4), None, 0),
    "weight must be (O, 4": (torch.randn(1, 4, 9), torch.randn(0, 4, 1), None, 0),
    "weight must be (O": (torch.randn(1, 4, 9), torch.randn(4, 4, 1).double(), None, 0),
    "bias must be (6,) of the dtype of x or of its sums": (torch.randn(1, 4, 9), torch.randn(6, 4, 1), torch.randn(4), 0),
    "bias must be (6,)": (torch.randn(1, 4, 9), torch.randn(6, 4, 1), torch.randn(6).double(), 0),
    "the dtype must be": (torch.ones(1, 4, 9).int(), torch.ones(4, 4, 1).int(), None, 0),
    "the activation must be one that is fused": (torch.randn(1, 4, 9), torch.randn(4, 4, 1), None, 7),
    "the activation must be one that": (torch.randn(1, 4, 9).double(), torch.randn(4, 4, 1).double(), None, 3),
}


@pytest.mark.parametrize("must", WRONG)
def test_the_raw_op_refuses_by_name(must: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"pointwise: {must}")):
        OPS.pointwise(*WRONG[must], True)


def test_the_raw_op_without_samples_or_positions() -> None:
    assert OPS.pointwise(torch.randn(0, 4, 9), torch.randn(5, 4, 1), None, 0, True).shape == (0, 5, 9)
    assert OPS.pointwise(torch.randn(2, 4, 0), torch.randn(5, 4, 1), None, 0, True).shape == (2, 5, 0)


def known_call(**changed: Any) -> Tensor:
    taken: dict[str, Any] = {"input": torch.ones(1, 2, 5), "weight": torch.ones(3, 2, 1), "bias": torch.ones(3)}
    return pointwise_conv1d(**taken | changed)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"stride": True}, TypeError),
        ({"stride": 1.0}, TypeError),
        ({"activation": []}, ValueError),
        ({"weight": torch.ones(3, 2, 1).to_sparse()}, TypeError),
        ({"weight": torch.ones(3, 2, 1, dtype=torch.float64)}, ValueError),
        ({"bias": torch.ones(3, device="meta")}, ValueError),
        ({"bias": torch.ones(1)}, ValueError),
        ({"weight": torch.ones(3, 2, 2)}, ValueError),
    ],
)
def test_a_known_call_admits_nothing_that_is_equal_to_it(changed: dict[str, Any], error: type[Exception]) -> None:
    known_call()
    known_call()
    with pytest.raises(error, match="pointwise_conv1d: "):
        known_call(**changed)


def test_a_known_call_heeds_what_has_changed_around_it() -> None:
    whole = known_call()
    assert torch.equal(whole, torch.full((1, 3, 5), 3.0))
    assert "omniconv::pointwise" in called(known_call)
    assert known_call(stride=2).shape == (1, 3, 3)
    assert known_call(input=torch.ones(2, 5)).shape == (3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert known_call().dtype == torch.bfloat16
    assert torch.func.vmap(lambda x: known_call(input=x))(torch.ones(3, 1, 2, 5)).shape == (3, 1, 3, 5)
    x = torch.ones(1, 2, 5, requires_grad=True)
    known_call(input=x).sum().backward()
    assert x.grad is not None
    with settings.composite_only():
        assert "omniconv::pointwise" not in called(known_call)


def test_torchs_flop_counter_sees_it() -> None:
    x, w, b = (t.requires_grad_() for t in operands(normal, 2, 3, 4, 5))
    with FlopCounterMode(display=False) as ours:
        pointwise_conv1d(x, w, b).sum().backward()
    assert ours.get_total_flops() == 3 * 2 * find("pointwise").cost(Problem.parse("pointwise1d n2 c3-4 i5"), bias=False).macs_dense
