"""The native path: it is there, it is what runs, it is right at every instruction set; nothing leaks or is exported by the way."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import VIEWS, cases_of, integer_operands, on
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import omniconv
from omniconv import _native, settings
from omniconv.functional import conv2d, depthwise_conv1d, depthwise_conv2d
from omniconv.problem import Problem
from omniconv.techniques import find, parse
from omniconv.testing import assert_matches_reference, assert_within_bound, make_inputs

CSRC = Path(__file__).parent.parent / "csrc"
DEPTHWISE = find("depthwise")
CASES = [case for case in cases_of(DEPTHWISE) if case[1].batch]
DTYPES = ("f32", "f64", "bf16", "f16")


class Calls(TorchDispatchMode):
    """The names of the ops that reach the dispatcher."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), func.name()]
        return func(*args, **(kwargs or {}))


def called(function):
    with Calls() as calls:
        function()
    return getattr(calls, "names", [])


def test_the_library_is_there():
    """A silent fall-back would pass every other test."""
    assert _native.AVAILABLE, _native.WHY_ABSENT


@on(CASES)
def test_the_kernels_are_what_runs(technique, problem):
    operands = make_inputs(technique, problem)
    assert "omniconv::depthwise" in called(lambda: technique.call(problem, operands))


def test_grouped_convolutions_of_one_channel_each_run_there_too():
    x, w = torch.randn(1, 4, 6, 6), torch.randn(8, 1, 3, 3)
    assert "omniconv::depthwise" in called(lambda: conv2d(x, w, groups=4))
    assert "omniconv::depthwise" not in called(lambda: conv2d(x, w.reshape(4, 2, 3, 3), groups=2))


@pytest.mark.parametrize("dtype", DTYPES)
@on(CASES)
def test_whole_numbers_are_exact_at_every_level(technique, problem, dtype, level):
    assert_matches_reference(technique, problem.replace(dtype=dtype), integer_operands(technique, problem.replace(dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@on(CASES)
def test_random_numbers_stay_under_the_bound_at_every_level(technique, problem, dtype, level):
    problem = problem.replace(dtype=dtype)
    assert_matches_reference(technique, problem, make_inputs(technique, problem))


def gradients(technique, problem, operands, dtype):
    tensors = {name: x.to(dtype).requires_grad_() for name, x in operands.items()}
    y = technique.call(problem, tensors)
    weights = torch.arange(y.numel()).reshape(y.shape) % 5 - 2
    return torch.autograd.grad(y, tuple(tensors.values()), weights.to(y.dtype))


@on([case for case in CASES if case[1].padding_mode == "zeros"])
def test_gradients_of_whole_numbers_are_exact_at_every_level(technique, problem, level):
    """Against the composite path in float64."""
    operands = integer_operands(technique, problem.replace(dtype="f64"))
    with settings.composite_only():
        expected = gradients(technique, problem, operands, torch.float64)
    for dtype in (torch.float64, torch.float32):
        for ours, theirs in zip(gradients(technique, problem, operands, dtype), expected, strict=True):
            assert torch.equal(ours.double(), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on([case for case in CASES if case[1].padding_mode == "zeros"])
def test_gradients_in_half_types_round_once_at_every_level(technique, problem, dtype, level):
    operands = integer_operands(technique, problem.replace(dtype="f64"))
    with settings.composite_only():
        expected = gradients(technique, problem, operands, torch.float64)
    for ours, theirs in zip(gradients(technique, problem, operands, dtype), expected, strict=True):
        assert torch.equal(ours, theirs.to(dtype))


@pytest.mark.parametrize("channels_last", [False, True])
def test_weights_are_never_remembered(channels_last):
    """A write that autograd's version counter does not see is seen by the next call."""
    layer = omniconv.nn.DepthwiseConv2d(20, 3, bias=False)
    x = torch.ones(1, 20, 5, 5)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    for value in (1.0, 2.0):
        layer.weight.data.fill_(value)
        assert (layer(x) == 9 * value).all()


TILES = [
    "depthwise1d n1 c2 i9001 k5 p2",  # rows longer than a tile of planes
    "depthwise1d n1 c2 i17001 k3 s2 p1",
    "depthwise2d n1 c2 i210x190 k3 p1",  # more rows than a tile
    "depthwise2d n1 c2 i301x290 k5 s2 p2",
    "depthwise3d n1 c2 i12x70x60 k3 p1",  # more slices
    "depthwise2d n1 c24 i150x140 k3 p1 cl",  # rows of channels-last tiles
    "depthwise2d n1 c128 i20x56 k3 p1 cl",  # narrow tiles
    "depthwise2d n1 c512 i14 k3 p1 cl",  # narrow tiles of one row
]
WINDOWS = [
    "depthwise1d n1 c2 i5 k3 s2 p5+4",  # pads beyond the kernel's reach
    "depthwise2d n1 c3 i5x6 k3x2 p4x3 d1x2",
    "depthwise2d n1 c18 i5x6 k3x1 p4x2 cl",
    "depthwise2d n1 c3 i9x10 k3x2 s2x1 d2x3 p2",  # dilation on every axis
    "depthwise2d n1 c20 i9x10 k3 d2 p2 cl",
    "depthwise3d n1 c2 i5x6x7 k2x3x2 d2x2x3 p2",
    "depthwise2d n1 c20 i9x10 k3 s2 d2 p2 cl",  # a stride and dilation together, in both layouts
    "depthwise2d n1 c3 i9x10 k3 s2 d2 p2",
    "depthwise3d n1 c18 i7x8x9 k3x2x3 s2x3x2 d2x1x2 p2 cl",
]


@pytest.mark.parametrize("text", TILES + WINDOWS)
def test_what_is_larger_than_a_tile_and_windows_beyond_the_plain_are_exact_in_every_direction(text, level):
    technique, problem = parse(text)
    operands = integer_operands(technique, problem.replace(dtype="f64"))
    with settings.composite_only():
        expected = technique.call(problem, operands), *gradients(technique, problem, operands, torch.float64)
    for dtype in (torch.float32, torch.float64):
        cast = {name: x.to(dtype) for name, x in operands.items()}
        found = technique.call(problem, cast), *gradients(technique, problem, operands, dtype)
        assert all(torch.equal(ours.double(), theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_direction_flushes_denormals_unless_precise(channels_last, level):
    def everything(x, w, g):
        """Output, and gradients of input, weight and bias, for constant operands."""
        x = torch.full((1, 32, 6, 6), x)
        x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
        w, b = torch.full((32, 1, 3, 3), w, requires_grad=True), torch.zeros(32, requires_grad=True)
        y = depthwise_conv2d(x, w, b, padding=1)
        return [t.abs().max().item() for t in (y.detach(), *torch.autograd.grad(y, (x, w, b), torch.full_like(y, g)))]

    # a denormal operand, which one tap makes large; a denormal product of normal numbers
    for operands, denormal in [((1e-40, 1e20, 1.0), (0, 2)), ((1.0, 1e20, 1e-40), (1, 2, 3)), ((1e-20, 1e-21, 1e-21), (0, 1, 2))]:
        flushed = everything(*operands)
        with omniconv.precise():
            kept = everything(*operands)
        for i in denormal:
            assert flushed[i] == 0, (operands, i)
            assert kept[i] > 0, (operands, i)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "text", ["depthwise1d n2 c3 i70 k31 psame", "depthwise2d n2 c3 i18x33 k3 p1", "depthwise2d n2 c50 i15x17 k3 s2 p1 cl"]
)
def test_half_types_round_to_nearest_even_in_every_direction(text, dtype, level):
    """Whole numbers whose sums float32 holds and a half type does not: one rounding of the exact result, and no other."""
    technique, problem = parse(text)
    generator = torch.Generator().manual_seed(0)
    operands = {
        name: torch.randint(-most, most + 1, x.shape, generator=generator).double()
        for (name, x), most in zip(integer_operands(technique, problem).items(), (120, 7, 100), strict=True)
    }
    if problem.channels_last:
        operands["input"] = operands["input"].to(memory_format=torch.channels_last)
    with settings.composite_only():
        expected = technique.call(problem, operands), *gradients(technique, problem, operands, torch.float64)
    halves = {name: x.to(dtype) for name, x in operands.items()}
    found = technique.call(problem, halves), *gradients(technique, problem, operands, dtype)
    assert (expected[0].abs() > 2048).any()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs.to(dtype))


@pytest.mark.parametrize("create_graph", [False, True])
def test_operands_that_depend_on_each_other_and_hooks(create_graph):
    """Each operand's gradient is its own, also where the gradient is to be differentiated again."""

    def gradients(convolution):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4, 6, 6, dtype=torch.float64, generator=generator, requires_grad=True)
        weight = x[:, :, :3, :3].reshape(4, 1, 3, 3) * 2
        bias = weight.sum((1, 2, 3))
        for t in (weight, bias):
            t.register_hook(lambda g: 3 * g)
        loss = convolution(x, weight, bias, padding=1).square().sum()
        return torch.autograd.grad(loss, (x, weight, bias), create_graph=create_graph)

    ours = gradients(depthwise_conv2d)
    theirs = gradients(lambda x, w, b, padding: F.conv2d(x, w, b, padding=padding, groups=4))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("channels", [4, 20])
def test_an_exported_program_takes_every_layout(channels):
    """Traced with a contiguous input, for which nothing had to be copied."""
    layer = omniconv.nn.DepthwiseConv2d(channels, 3)
    x = torch.randn(1, channels, 9, 9)
    program = torch.export.export(layer, (x,)).module()
    for view in (x, x.transpose(-1, -2), torch.randn(1, channels, 12, 12)[..., :9, :9], x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(program(view), layer(view))


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", "gelu", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["depthwise2d c3 i9 k3 p1", "depthwise2d c20 i9 k3 p1 cl"])
def test_fused_activations_stay_under_the_bound_at_every_level(text, dtype, activation, level):
    technique, problem = parse(f"{text} dt:{dtype}")
    operands = make_inputs(technique, problem)
    operands = {name: 3 * x for name, x in operands.items()}
    arguments = technique.arguments(problem) | {"activation": activation}
    assert_within_bound(technique, operands | arguments, technique.call(problem, operands, activation=activation))


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", "gelu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_numbers_pass_an_activation_as_in_torch(activation, dtype, level):
    x = torch.tensor([[[float("nan"), float("inf"), -float("inf"), 90.0, -90.0, 0.0, -0.0, 1e30, -1e30, 5.0]]], dtype=dtype)
    y = depthwise_conv1d(x, torch.ones(1, 1, 1, dtype=dtype), activation=activation)
    with settings.composite_only():
        expected = depthwise_conv1d(x, torch.ones(1, 1, 1, dtype=dtype), activation=activation)
    if activation == "gelu":  # torch's own is NaN or inf at inf, by how many numbers stand beside it
        expected[0, 0, 1] = float("inf")
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_window_does_not_see_cannot_reach_it(dtype, channels_last, level):
    """NaN in one corner stays within the kernel's reach of it, in all three directions of the arithmetic."""
    x, w = torch.ones(1, 20, 21, 19, dtype=dtype), torch.ones(20, 1, 3, 3, dtype=dtype)
    x[0, :, 0, 0] = float("nan")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    x.requires_grad_()
    y = depthwise_conv2d(x, w, padding=1)
    assert y.isnan().sum() == 20 * 4
    g = torch.zeros_like(y)
    g[0, :, -1, -1] = float("nan")
    (grad_x,) = torch.autograd.grad(y, x, g)
    assert grad_x.isnan().sum() == 20 * 4


def test_levels_differ_at_most_by_rounding(level):
    technique, problem = parse("depthwise2d n2 c37 i23x29 k5 p2 cl")
    operands = make_inputs(technique, problem)
    torch.testing.assert_close(
        technique.call(problem, operands), technique.reference(**operands, **technique.arguments(problem)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("view", VIEWS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "text", ["depthwise1d n2 c18 i33 k4 p2", "depthwise2d n2 c18 i9x17 k3 p1", "depthwise3d n2 c18 i4x5x6 k3 p1"]
)
def test_any_strides(text, view, level):
    technique, problem = parse(text)
    operands = integer_operands(technique, problem)
    operands["input"] = view(operands["input"])
    y = technique.call(problem, operands)
    assert torch.equal(y, technique.reference(**operands, **technique.arguments(problem)))


BITS = [
    "depthwise1d n5 c6 i700 k31 p15",
    "depthwise2d n5 c7 i33x41 k3 p1",
    "depthwise2d n5 c50 i33x41 k5 s2 p2 cl",
    "depthwise2d n5 c40 i1x2100 k1x4 p0x3 cl",
    "depthwise3d n3 c20 i5x9x17 k3 p1 cl",
]


@pytest.mark.parametrize("text", BITS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_threads_and_batch_leave_the_bits_alone(text, dtype, level):
    technique, problem = parse(f"{text} dt:{dtype}")
    operands = make_inputs(technique, problem)

    def everything(n=slice(None)):
        x = operands["input"][n].detach().requires_grad_()
        w, b = (operands[name].detach().requires_grad_() for name in ("weight", "bias"))
        y = technique.call(problem, {"input": x, "weight": w, "bias": b})
        return [y.detach(), *torch.autograd.grad(y, (x, w, b), torch.ones_like(y))]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        alone = everything(slice(2, 3))
        torch.set_num_threads(3)
        three = everything()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    assert all(torch.equal(a[2:3], b) for a, b in zip(one[:2], alone[:2], strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_padding_adds_nothing_whatever_its_weight_is(value, channels, dtype, memory_format, level):
    x = torch.ones(1, channels, 6, 5, dtype=dtype).to(memory_format=memory_format)
    w = torch.ones(2 * channels, 1, 3, 3, dtype=dtype)
    w[2, 0, 0, 1] = value  # of channel 1
    y = depthwise_conv2d(x, w, padding=1, activation="relu6")
    assert y[:, 2, 0].isfinite().all()
    assert not (y[:, 2, 1:] < 6).any()
    y[:, 2] = 0
    assert y.isfinite().all()
    w = w[::2].contiguous()
    (grad,) = torch.autograd.grad(
        depthwise_conv2d(x.requires_grad_(), w, padding=1, stride=2), x, torch.ones(1, channels, 3, 3, dtype=dtype)
    )
    assert (
        grad[:, 1, 1::2, ::2].isfinite().logical_not().sum() == 6
    )  # what a window's upper tap reads: rows 1, 3 (and −1), columns 0, 2, 4
    grad[:, 1, 1::2, ::2] = 0
    assert grad.isfinite().all()


def test_precise_keeps_denormals_and_the_default_flushes_them():
    x, w = torch.full((1, 1, 8), 1e-40), torch.ones(1, 1, 1)
    assert depthwise_conv1d(x, w).abs().sum() == 0
    with omniconv.precise():
        assert torch.equal(depthwise_conv1d(x, w), x)

    @omniconv.precise()
    def call():
        return depthwise_conv1d(x, w)

    assert torch.equal(call(), x)
    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(), x)
    compiled = torch.compile(lambda: depthwise_conv1d(x, w), backend="eager", fullgraph=True)
    assert compiled().abs().sum() == 0
    with omniconv.precise():
        assert torch.equal(compiled(), x)
    assert depthwise_conv1d(x, w).abs().sum() == 0
    assert (x * 1).abs().sum() > 0, "the thread's own setting must return"


@pytest.mark.parametrize(
    "text", ["depthwise1d n2 c3 i20 k5 p2", "depthwise2d n2 c18 i9x8 k3x5 s2 cl", "depthwise2d n1 c4 i7 k3 m2"]
)
def test_torchs_flop_counter_sees_the_raw_ops(text):
    """The forward as torch counts its own; each of the two gradients the same again (torch's formula forgets the groups there)."""
    technique, problem = parse(text)
    operands = {name: x.requires_grad_() for name, x in make_inputs(technique, problem).items()}
    with settings.composite_only(), FlopCounterMode(display=False) as torchs:
        technique.call(problem, operands)
    with FlopCounterMode(display=False) as ours:
        technique.call(problem, operands).sum().backward()
    assert ours.get_total_flops() == 3 * torchs.get_total_flops() > 0


OPS = torch.ops.omniconv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format, dtype):
    x = torch.randn(2, 20, 9, 8, dtype=dtype).to(memory_format=memory_format)
    w, b = torch.randn(20, 1, 3, 3, dtype=dtype), torch.randn(20, dtype=dtype)
    windows = ([2, 1], [1, 0, 2, 1], [1, 2])
    g = OPS.depthwise(x, w, b, *windows, 0, 0, False, True)
    torch.library.opcheck(OPS.depthwise.default, (x, w, b, *windows, 0, 0, False, True))
    torch.library.opcheck(OPS.depthwise.default, (x, w, None, *windows, 0, 1, False, True))
    torch.library.opcheck(OPS.depthwise_grad_input.default, (g, w, [9, 8], *windows, True))
    torch.library.opcheck(OPS.depthwise_grad_weight.default, (g, x, [3, 3], *windows, True, True))


WRONG = {
    "the input must": (torch.randn(4, 4), torch.randn(4, 1, 3)),
    "weight must be (C·M, 1, K…)": (torch.randn(1, 4, 9), torch.randn(4, 2, 3)),
    "weight must have a multiple": (torch.randn(1, 4, 9), torch.randn(6, 1, 3)),
    "weight must have the input's dtype": (torch.randn(1, 4, 9), torch.randn(4, 1, 3).double()),
    "the padded input must hold one window": (torch.randn(1, 4, 2), torch.randn(4, 1, 3)),
    "the dtype must be": (torch.ones(1, 4, 9).int(), torch.ones(4, 1, 3).int()),
}


@pytest.mark.parametrize("must", WRONG)
def test_the_raw_op_refuses_by_name(must):
    x, w = WRONG[must]
    with pytest.raises(RuntimeError, match=re.escape(f"depthwise: {must}")):
        OPS.depthwise(x, w, None, [1], [0, 0], [1], 0, 0, False, True)


@pytest.mark.parametrize(
    "windows",
    [
        ([0], [0, 0], [1]),
        ([1], [0], [1]),
        ([1], [-1, 0], [1]),
        ([1], [0, 0], [0]),
        ([1, 1], [0, 0], [1]),
        ([2**40], [0, 0], [1]),
        ([1], [2**40, 0], [1]),
    ],
)
def test_the_raw_op_refuses_windows(windows):
    with pytest.raises(RuntimeError, match="depthwise: "):
        OPS.depthwise(torch.randn(1, 4, 9), torch.randn(4, 1, 3), None, *windows, 0, 0, False, True)


def resident() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.slow
def test_nothing_leaks():
    """10⁵ calls, good and refused, forward and backward: a lost handle or list would cost some hundred bytes each."""
    x, w, b = torch.randn(1, 4, 5), torch.randn(4, 1, 3), torch.randn(4)
    g = torch.randn(1, 4, 3)

    def calls(count):
        for _ in range(count):
            OPS.depthwise(x, w, b, [1], [0, 0], [1], 0, 0, False, True)
            OPS.depthwise_grad_input(g, w, [5], [1], [0, 0], [1], True)
            OPS.depthwise_grad_weight(g, x, [3], [1], [0, 0], [1], True, True)
            with pytest.raises(RuntimeError):
                OPS.depthwise(x, w, b, [1], [0], [1], 0, 0, False, True)

    calls(2000)
    before = resident()
    calls(25000)
    assert resident() - before < 1000, "kB"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_varying_shapes_do_not_grow_memory():
    w = torch.randn(4, 1, 3, 3)
    for size in (300, 700):
        depthwise_conv2d(torch.randn(1, 4, size, size), w, padding=1)
    before = resident()
    for size in range(300, 700, 3):
        depthwise_conv2d(torch.randn(1, 4, size, 1000 - size), w, padding=1)
    assert resident() - before < 30_000, "kB"


compiler = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(compiler is None, reason="there is no compiler")
def test_our_declarations_are_torchs(tmp_path):
    """Both headers in one translation unit: a signature that differs is a compile error."""
    include = Path(torch.__file__).parent / "include"
    source = tmp_path / "agree.cpp"

    def compiles(ours: str) -> bool:
        source.write_text(
            "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n#include <torch/csrc/stable/c/shim.h>\n"
            + ours.replace("#pragma once", "")
        )
        command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{include}", f"-I{include}/torch/csrc/api/include", str(source)]
        return subprocess.run(command, capture_output=True).returncode == 0

    ours = (CSRC / "torch_c.h").read_text()
    assert compiles(ours)
    wrong = ours.replace("torch_parallel_for(int64_t", "torch_parallel_for(int32_t")
    assert wrong != ours
    assert not compiles(wrong)


def library() -> str:
    return os.environ.get("OMNICONV_LIBRARY") or find_spec("omniconv._library").origin


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_the_library_exports_one_function_and_wants_only_the_stable_abi():
    lines = subprocess.run(["nm", "-D", library()], capture_output=True, text=True, check=True).stdout.splitlines()
    defined = {line.split()[-1] for line in lines if " T " in line or " D " in line or " B " in line}
    assert defined == {"omniconv_isa"}
    wanted = {line.split()[-1] for line in lines if " U " in line}
    torchs = {name for name in wanted if "torch" in name}
    assert torchs <= set(re.findall(r"\b((?:aoti_)?torch_[a-z0-9_]+)\(", (CSRC / "torch_c.h").read_text()))
    assert not {name for name in wanted if name.startswith(("_ZN2at", "_ZN3c10", "Py", "GOMP"))}


@pytest.mark.skipif(compiler is None or shutil.which("nm") is None, reason="there is no compiler")
@pytest.mark.parametrize("kernel", sorted(CSRC.glob("kernels/*.kernel.cpp")), ids=lambda p: p.name)
def test_a_kernel_object_exports_its_table_alone(kernel, tmp_path):
    """Anything else could be merged with the copy of another instruction set, and die of an illegal instruction."""
    made = tmp_path / "kernel.o"
    command = [
        compiler,
        "-std=gnu++17",
        "-O1",
        "-fno-exceptions",
        "-fno-rtti",
        "-Wno-psabi",
        "-DISA=isa_base",
        "-DVECTOR_BYTES=16",
        f"-I{CSRC}",
        "-c",
    ]
    subprocess.run([*command, str(kernel), "-o", str(made)], check=True, capture_output=True)
    lines = subprocess.run(["nm", "-C", str(made)], capture_output=True, text=True, check=True).stdout.splitlines()
    exported = [line.split(maxsplit=2)[-1] for line in lines if re.search(r" [A-TV-Z] ", line)]
    family = kernel.name.removesuffix(".kernel.cpp")
    assert exported == [f"omniconv::isa_base::{family}"]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False)


def test_the_environment_caps_the_level():
    code = "from omniconv import _native; print(_native.isa(), len(_native.levels()))"
    assert python(code, OMNICONV_ISA="base").stdout.split() == ["base", "1"]
    assert "OMNICONV_ISA must be one of base, avx2, avx512, got 'sse'" in python(code, OMNICONV_ISA="sse").stderr


def test_a_library_that_cannot_load_is_one_warning_and_the_composite_path(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    call = "f(torch.ones(1, 1, 3), torch.ones(1, 1, 3)).item()"
    code = f"import torch, omniconv; from omniconv.functional import depthwise_conv1d as f; print({call})"
    done = python(code, OMNICONV_LIBRARY=str(broken))
    assert done.stdout.strip() == "3.0", done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "cannot be loaded" in done.stderr


def test_problem_ids_reach_every_form_of_the_kernels():
    """Both layouts, each compiled kernel width with strides 1 and 2, and what has no form of its own."""
    last = [p for _, p in CASES if p.channels_last and p.channels >= 16 and not p.multiplier]
    assert {(p.kernel[-1], p.stride[-1]) for p in last} >= {(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)}
    assert any(max(p.dilation) > 1 for p in last)
    assert any(p.channels % 16 for p in last)
    assert isinstance(last[0], Problem)
