"""Other ways to compute a problem, made ready to be timed: plain torch in every memory format, torch.compile and the runtimes.

Where an op takes a layout, a way is asked in each, and its answers are given back in NCT. A way is a call without arguments: all
that can be done once (plans, packed weights, bound buffers) is done before. A package that is missing, or that refuses a problem,
is absent with a reason.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omniconv.ops.sequence import LAYOUTS
from omniconv.ops.technique import Stage
from omniconv.problem import DTYPES, Problem
from omniconv.techniques import Technique

FORWARD, BOTH = "forward", "both"
DIRECTIONS = (FORWARD, BOTH)

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}

_COMPILED_SEQUENCES = ("torch shift and add NCT", "torch shift and add NTC")  # Inductor makes one loop of it; the others are calls


@dataclass(frozen=True)
class Way:
    """One way: what is timed, and what it computes (the result, or the gradient of every operand in their order)."""

    name: str
    call: Callable[[], object]
    answer: Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Absent:
    """A way that cannot be timed, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Task:
    """What is to be computed: the operands of the technique's op, contiguous, and the gradient that comes in."""

    technique: Technique
    problem: Problem
    operands: Mapping[str, Any]
    grad_y: Tensor
    threads: int = 1

    @property
    def stage(self) -> Stage:
        """The one plain convolution that the technique is here.

        Raises:
            ValueError: It is none.
        """
        first, *others = self.technique.stages(self.problem)
        if others or first.weights is not None or first.bypass or first.flops or first.transposed or first.padding_mode != "zeros":
            raise ValueError("the problem is not one plain convolution")
        return first


def torch_way(
    name: str, direction: str, op: Callable[..., Tensor], operands: Mapping[str, Any], grad_y: Tensor, layout: str | None = None
) -> Way:
    """A torch function on these operands, forward alone or with the backward of a training step; ``grad_y`` is in NCT.

    A sequence is in ``layout``, or where that is not given, in the one among the operands.
    """
    operands = {k: v.detach() if isinstance(v, Tensor) else v for k, v in operands.items()}
    layout = layout or operands.get("layout")
    axes = None if layout is None else LAYOUTS[layout]
    if direction == FORWARD:
        forward = partial(op, **operands)
        return Way(name, forward, lambda: (forward() if axes is None else axes.channel_first(forward()),))
    leaves = {k: v.requires_grad_() for k, v in operands.items() if isinstance(v, Tensor) and v.is_floating_point()}
    with torch.no_grad():
        y = op(**operands)
    incoming = torch.empty_like(y).copy_(grad_y.reshape(y.shape) if axes is None else axes.of(grad_y))

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(**operands), tuple(leaves.values()), incoming)

    def answer() -> tuple[Tensor, ...]:
        gradients = dict(zip(leaves, step(), strict=True))
        return tuple(g if axes is None or k != "input" else axes.channel_first(g) for k, g in gradients.items())

    return Way(name, step, answer)


def formatted(operands: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The operands in channels-last format, those that have one."""
    return {
        k: v.to(memory_format=FORMATS[rank]) if isinstance(v, Tensor) and v.dim() == rank + 2 else v for k, v in operands.items()
    }


def laid_out(operands: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Operands in NCT in another layout; kernels per position lie in memory as a projection in that layout makes them."""
    axes, changed = LAYOUTS[layout], dict(operands, layout=layout)
    changed["input"] = axes.of(operands["input"]).contiguous()
    kernels = operands.get("kernels")
    if kernels is not None:
        made = axes.of(kernels.flatten(1, 2)).contiguous()
        changed["kernels"] = axes.channel_first(made).unflatten(1, kernels.shape[1:3])
    return changed


def _torch_forms(task: Task) -> Iterator[tuple[str, Callable[..., Tensor], Mapping[str, Any]]]:
    """Name, function and operands of every way in which torch can be asked."""
    rank = task.problem.rank
    try:
        stage = task.stage
    except ValueError:
        forms: dict[str, Mapping[str, Any]] = {"contiguous": task.operands}
        if "layout" in task.operands:
            forms = {layout: laid_out(task.operands, layout) for layout in LAYOUTS}
        elif rank > 1:
            forms["channels-last"] = formatted(task.operands, rank)
        for peer in task.technique.peers:
            for form, given in forms.items():
                yield f"{peer.name} {form}", peer.run, given
        return
    operands = {name: task.operands[name] for name in ("input", "weight", "bias")}
    for suffix, op in _convolutions(stage):
        yield f"torch contiguous{suffix}", op, operands
        if rank > 1:
            yield f"torch channels-last{suffix}", op, formatted(operands, rank)
    if rank == 1:
        flat = {k: v.unsqueeze(2).contiguous() if v.dim() == 3 else v for k, v in operands.items()}
        for suffix, op in _convolutions(_with_a_row(stage)):
            yield f"torch as 2-D contiguous{suffix}", op, flat
            yield f"torch as 2-D channels-last{suffix}", op, formatted(flat, 2)


def _with_a_row(stage: Stage) -> Stage:
    """A convolution over one axis as one over two, the first of one row."""
    return Stage(
        stage.name, stage.in_channels, stage.out_channels, (1, *stage.size), (1, *stage.out), (1, *stage.kernel),
        (1, *stage.stride), ((0, 0), *stage.pads), (1, *stage.dilation), stage.groups,
    )  # fmt: skip


def _convolutions(stage: Stage) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """torch's convolution; where pads differ between the sides, what people write around it: a padded input or a cropped result."""
    convolution = _CONVOLUTIONS[len(stage.size)]
    settings = {"stride": stage.stride, "dilation": stage.dilation, "groups": stage.groups}
    if all(before == after for before, after in stage.pads):
        yield "", partial(convolution, padding=tuple(before for before, _ in stage.pads), **settings)
        return
    flat = [pad for pair in reversed(stage.pads) for pad in pair]

    def padded(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolution(F.pad(input, flat), weight, bias, **settings)

    yield ", padded", padded
    widest = tuple(max(pair) for pair in stage.pads)
    surplus = [wide - before for wide, (before, _) in zip(widest, stage.pads, strict=True)]
    if any(extra % step for extra, step in zip(surplus, stage.stride, strict=True)):
        return
    window = tuple(
        slice(extra // step, extra // step + out) for extra, step, out in zip(surplus, stage.stride, stage.out, strict=True)
    )

    def cropped(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolution(input, weight, bias, padding=widest, **settings)[(slice(None), slice(None), *window)]

    yield ", cropped", cropped


def _torch(task: Task, direction: str) -> Iterator[Way | Absent]:
    for name, op, operands in _torch_forms(task):
        try:
            yield torch_way(name, direction, op, operands, task.grad_y)
        except ValueError as error:  # a formulation that does not exist for this problem
            yield Absent(name, reason_of(error))


def _compiled(task: Task, direction: str) -> Iterator[Way]:
    """Inductor, told that shapes never change."""
    sequence = "layout" in task.operands
    if task.problem.rank != 2 and not sequence:
        return
    torch._dynamo.reset()
    for name, op, operands in _torch_forms(task):
        if sequence and name not in _COMPILED_SEQUENCES:
            continue
        settings = {k: v for k, v in operands.items() if not isinstance(v, Tensor)}
        tensors = {k: v for k, v in operands.items() if isinstance(v, Tensor)}
        yield torch_way(
            f"torch.compile{name.removeprefix('torch')}",
            direction,
            _inductor(op, settings),
            tensors,
            task.grad_y,
            settings.get("layout"),
        )


def _inductor(op: Callable[..., Tensor], settings: Mapping[str, Any]) -> Callable[..., Tensor]:
    def function(**tensors: Tensor) -> Tensor:
        return op(**tensors, **settings)

    return torch.compile(function, dynamic=False)


_ONNX_TYPES = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}


def _onnx_type(x: Tensor) -> Any:
    return getattr(import_module("onnx").TensorProto, _ONNX_TYPES[x.dtype])


def onnx_model(task: Task) -> bytes:
    """The problem as an ONNX model of one Conv whose weight and bias are constants.

    Raises:
        ValueError: The problem is not one plain convolution.
    """
    onnx = import_module("onnx")
    stage, kind = task.stage, _onnx_type(task.operands["input"])
    constants = [
        onnx.helper.make_tensor(name, kind, list(task.operands[name].shape), _bytes(task.operands[name]).tobytes(), raw=True)
        for name in ("weight", "bias")
    ]
    node = onnx.helper.make_node(
        "Conv", ["input", "weight", "bias"], ["y"], group=stage.groups, kernel_shape=stage.kernel, strides=stage.stride,
        dilations=stage.dilation, pads=[*(before for before, _ in stage.pads), *(after for _, after in stage.pads)],
    )  # fmt: skip
    values = [
        onnx.helper.make_tensor_value_info(name, kind, list(shape))
        for name, shape in {"input": task.operands["input"].shape, "y": task.technique.output_shape(task.problem)}.items()
    ]
    graph = onnx.helper.make_graph([node], "problem", values[:1], values[1:], constants)
    opset = onnx.helper.make_opsetid("", 22 if task.problem.dtype == "bf16" else 17)  # 22 is the first with bfloat16 in Conv
    return bytes(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())


def _bytes(x: Tensor) -> Any:
    """The numbers of a contiguous tensor as an array of bytes over the same memory."""
    return x.detach().contiguous().view(torch.uint8).reshape(-1).numpy()


def onnxruntime_call(model: bytes, x: Tensor, y: Tensor, threads: int) -> Callable[[], object]:
    """What runs an ONNX model of one input and one output, bound to these tensors' memory, with all graph optimisations."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads must not spin while others are timed
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    binding.bind_input(given.name, "cpu", 0, _onnx_type(x), list(x.shape), x.data_ptr())
    binding.bind_output(made.name, "cpu", 0, _onnx_type(y), list(y.shape), y.data_ptr())
    return partial(session.run_with_iobinding, binding)


def openvino_call(model: bytes, x: Tensor, y: Tensor, threads: int) -> Callable[[], object]:
    """What runs an ONNX model of one input and one output in these tensors' memory, in their precision, tuned for latency."""
    openvino = import_module("openvino")
    core = openvino.Core()
    network = core.read_model(model)
    compiled = core.compile_model(
        network,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": next(name for name, dtype in DTYPES.items() if dtype is x.dtype),
        },
    )
    kind = network.input(0).element_type
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(_bytes(x), openvino.Shape(list(x.shape)), kind))
    request.set_output_tensor(openvino.Tensor(_bytes(y), openvino.Shape(list(y.shape)), kind))
    return partial(request.infer, share_outputs=True)


def runtime_way(name: str, make: Callable[..., Callable[[], object]], model: bytes, x: Tensor, y: Tensor, threads: int) -> Way:
    """A runtime made ready for a model by :func:`onnxruntime_call` or :func:`openvino_call`; ``x`` and ``y`` are contiguous."""
    run = make(model, x, y, threads)
    return Way(name, run, partial(_answer, run, x, y))


def _bound(task: Task) -> tuple[Tensor, Tensor]:
    """The input of a task and room for its result."""
    return task.operands["input"].contiguous(), torch.zeros(
        task.technique.output_shape(task.problem), dtype=task.problem.torch_dtype
    )


def _onnxruntime(task: Task, direction: str) -> Iterator[Way]:
    yield runtime_way("ONNX Runtime", onnxruntime_call, onnx_model(task), *_bound(task), task.threads)


def _openvino(task: Task, direction: str) -> Iterator[Way]:
    if task.problem.dtype == "f64":
        raise ValueError("it computes float64 in float32")
    yield runtime_way("OpenVINO", openvino_call, onnx_model(task), *_bound(task), task.threads)


def _answer(run: Callable[[], object], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """What a runtime writes; the arguments also keep the memory that it was given alive."""
    run()
    return (y.clone(),)


@dataclass(frozen=True)
class Rival:
    """Who is compared with: the packages it needs, the directions it computes, and how it is made ready."""

    name: str
    packages: tuple[str, ...]
    directions: tuple[str, ...]
    prepare: Callable[[Task, str], Iterator[Way | Absent]]


TORCH = Rival("torch", (), DIRECTIONS, _torch)
COMPILED = Rival("torch.compile", (), (FORWARD,), _compiled)
ONNXRUNTIME = Rival("ONNX Runtime", ("onnx", "onnxruntime"), (FORWARD,), _onnxruntime)
OPENVINO = Rival("OpenVINO", ("onnx", "openvino"), (FORWARD,), _openvino)


def rivals(compiled: bool) -> tuple[tuple[Rival, ...], tuple[Absent, ...]]:
    """Those that can be compared with here, and those that cannot, with the reason."""
    present, absent = [], []
    for rival in (TORCH, COMPILED, ONNXRUNTIME, OPENVINO):
        missing = lacking(rival.name, rival.packages)
        if rival is COMPILED and not compiled:
            absent.append(Absent(rival.name, "it was not asked for (--compile)"))
        elif missing is not None:
            absent.append(missing)
        else:
            present.append(rival)
    return tuple(present), tuple(absent)


def lacking(name: str, packages: Sequence[str]) -> Absent | None:
    """Why who needs these packages cannot be compared with; None where all are installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if not missing:
        return None
    return Absent(name, f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed")


def ways(task: Task, direction: str, asked: Sequence[Rival]) -> Iterator[Way | Absent]:
    """Every way of those asked that computes the direction."""
    for rival in asked:
        if direction not in rival.directions:
            continue
        try:
            yield from list(rival.prepare(task, direction))
        except Exception as error:  # whatever a package raises only means that it cannot be compared with
            yield Absent(rival.name, reason_of(error))


def reason_of(error: Exception) -> str:
    """An exception in one line of at most 200 characters."""
    words = " ".join(str(error).split())
    text = words if isinstance(error, ValueError) else f"{type(error).__name__}: {words}"
    return text if len(text) <= 200 else text[:199] + "…"
