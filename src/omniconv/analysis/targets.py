"""What a text names that can be understood: a network, an exported program, an ONNX file or one convolution.

    package.module:factory          a function or class of your own that is called without arguments, or a module; also
    path/to/file.py:factory         with literal keyword arguments: nets:build(width=0.5, norm="batch")
    timm:NAME, torchvision:NAME     a model of those packages, with random weights: nothing is ever downloaded
    FILE.pt2                        a program that torch.export.save wrote
    FILE.onnx                       an ONNX model
    standard2d n1 c64-128 i56 k3    one convolution as a Problem's text; the axes may be left out: standard c64 i56 k3

See :func:`load`.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omniconv.analysis._models import Loaded, load_timm, load_torchvision
from omniconv.analysis._users_code import (
    call_factory,
    find_factory,
    import_file,
    import_module,
    near,
    one_line,
    read_call,
    users_code,
)
from omniconv.analysis.onnx_file import graph_inputs, read_model
from omniconv.problem import DTYPES as FLOATING
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, find

KINDS = ("module", "program", "onnx", "problem")
FORMS = (
    "package.module:factory, file.py:factory, timm:NAME, torchvision:NAME, a .pt2 or .onnx file, or a problem such as "
    "'standard2d c64 i56 k3'"
)

WHOLE = {"u8": "uint8", "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64", "bool": "bool"}
DTYPES: dict[str, torch.dtype] = FLOATING | {short: getattr(torch, long) for short, long in WHOLE.items()}
_INPUT = re.compile(r"(?:([A-Za-z_]\w*)=)?([0-9]{1,9}(?:x[0-9]{1,9})*)(?::(\w+))?")
_RANKLESS = re.compile(r"[a-z]+(?:_[a-z]+)*")
_SIZES = re.compile(r"(?:op|[iksdp])([0-9+x]+)")
_STATE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Input:
    """One example input: its shape, its dtype (None: that of the parameters) and the keyword it is given by, if any."""

    shape: tuple[int, ...]
    dtype: str | None = None
    name: str | None = None

    @staticmethod
    def parse(text: str) -> "Input":
        """Reads ``[keyword=]1x3x224x224[:dtype]``.

        Raises:
            ValueError: The text is malformed.

        >>> Input.parse("mask=1x128:bool")
        Input(shape=(1, 128), dtype='bool', name='mask')
        """
        match = _INPUT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"an input must be [keyword=]sizes joined by x[:dtype], as 1x3x224x224 or 1x128:i64, got {text!r}")
        known = DTYPES | {str(value).removeprefix("torch."): value for value in DTYPES.values()}
        if match[3] is not None and match[3] not in known:
            raise ValueError(f"the dtype of an input must be one of {', '.join(DTYPES)}, got {text!r}")
        dtype = next((short for short, value in DTYPES.items() if value is known[match[3]]), None) if match[3] else None
        return Input(tuple(map(int, match[2].split("x"))), dtype, match[1])

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return (f"{self.name}=" if self.name else "") + sizes + (f":{self.dtype}" if self.dtype else "")


@dataclass(frozen=True, eq=False)
class Target:
    """What a text names.

    ``kind`` is one of KINDS: a module (of your code, timm or torchvision), an exported program (its module hierarchy rebuilt), an
    ONNX file or a problem. ``source`` says in words where it came from. ``module`` is in eval mode; a problem has ``problem`` in
    its place, an ONNX file ``onnx``, its path. ``inputs`` are what it is looked at with.
    """

    text: str
    kind: str
    source: str
    inputs: tuple[Input, ...]
    module: nn.Module | None = None
    problem: Problem | None = None
    onnx: Path | None = None

    def network(self) -> nn.Module:
        """The module: the one that was loaded, or the layer of a problem with weights that are the same every time.

        Raises:
            ValueError: It is an ONNX file.
        """
        if self.module is not None:
            return self.module
        if self.problem is None:
            raise ValueError(f"target: it must be something that runs in torch, got '{self.text}'")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return find(self.problem.technique).layer(self.problem).to(self.problem.torch_dtype).eval()

    def example_inputs(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Positional and keyword arguments for the module: the same normal numbers every time, zeros where they are whole."""
        first = next((p for p in self.module.parameters() if p.is_floating_point()), None) if self.module is not None else None
        dtype = self.problem.torch_dtype if self.problem is not None else torch.float32 if first is None else first.dtype
        device = torch.device("cpu") if first is None else first.device
        generator = torch.Generator().manual_seed(0)
        made = [(i.name, _filled(i, DTYPES[i.dtype] if i.dtype else dtype, device, generator)) for i in self.inputs]
        if self.problem is not None and self.problem.channels_last:
            form = {2: torch.channels_last, 3: torch.channels_last_3d}.get(self.problem.rank, torch.contiguous_format)
            made = [(name, x.contiguous(memory_format=form)) for name, x in made]
        return tuple(x for name, x in made if name is None), {name: x for name, x in made if name is not None}


def _filled(spec: Input, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    try:
        if device.type == "meta" or not dtype.is_floating_point:
            return torch.zeros(spec.shape, dtype=dtype, device=device)
        return torch.randn(spec.shape, generator=generator).to(device, dtype)
    except (RuntimeError, TypeError) as error:  # of torch, on sizes that no memory or no number holds
        raise ValueError(f"target: an input must fit into memory, got '{spec}'") from error


def read_problem(text: str) -> Problem:
    """The problem that a text describes, checked; without a rank in its first word it has as many axes as its longest setting.

    Settings of one number for all axes leave that open: then two, or what the technique has.

    Raises:
        ValueError: The text is malformed, names no technique, or asks for what the technique does not take.

    >>> str(read_problem("standard n1 c64-128 i56 k3 p1"))
    'standard2d n1 c64-128 i56 k3 p1'
    >>> read_problem("lightweight c8 i100 k7 h2").rank, read_problem("dilated c8 i8x64x64 k3 d2").rank
    (1, 3)
    """
    name, _, rest = text.strip().partition(" ")
    if _RANKLESS.fullmatch(name):
        known = [t.name for t in TECHNIQUES]
        if name not in known:
            raise ValueError(f"the technique must be one of {', '.join(known)}, got {name!r}{near(name, known)}")
        lengths = [match[1].count("x") + 1 for word in rest.partition("#")[0].split() if (match := _SIZES.fullmatch(word))]
        ranks = find(name).ranks
        rank = max(lengths, default=1) if max(lengths, default=1) > 1 else 2 if 2 in ranks else ranks[0]
        text = f"{name}{rank}d {rest}"
    problem = Problem.parse(text)
    return find(problem.technique).check(problem)


def load(text: str, *, input: Sequence[str] | str = (), caller: str = "target") -> Target:
    """Finds what a text names.

    Code of your own is imported with the current directory (and a file's folder) on the path, and what it prints goes to standard
    error; a model is made with torch's random numbers at seed 0, whose state is left as it was, and put into eval mode.

    Args:
        text: One of the forms above.
        input: Example inputs as ``[keyword=]1x3x224x224[:dtype]``, one or several. Where there are none: those of timm's and
            torchvision's configurations, a Lightning module's ``example_input_array``, an exported program's own, an ONNX file's.
        caller: Who speaks in errors.

    Raises:
        ValueError: The text, an input or what they name is malformed or cannot be had; one line says what.

    >>> target = load("standard c64 i56 k3 p1")
    >>> target.kind, str(target.problem), tuple(target.example_inputs()[0][0].shape)
    ('problem', 'standard2d n1 c64 i56 k3 p1', (1, 64, 56, 56))
    """
    try:
        inputs = tuple(Input.parse(word) for word in ([input] if isinstance(input, str) else input))
        return _load(text.strip(), inputs)
    except ValueError as error:
        raise ValueError(f"{caller}: {error}") from error.__cause__


def _load(text: str, inputs: tuple[Input, ...]) -> Target:
    head, colon, tail = text.partition(":")
    if any(text.startswith(t.name) for t in TECHNIQUES) and re.search(r"\s", head):
        return _problem(text, inputs)
    suffix = Path(text).suffix.lower()
    if suffix == ".pt2":
        return _program(text, inputs)
    if suffix == ".onnx":
        return _onnx(text, inputs)
    if suffix in _STATE_SUFFIXES:
        raise ValueError(f"weights must come with the code that makes their module, as file.py:factory, got '{text}'")
    if colon and not re.search(r"\s", head):
        return _module(text, head, tail, inputs)
    return _problem(text, inputs)


def _problem(text: str, inputs: tuple[Input, ...]) -> Target:
    if not re.search(r"\s", text):
        raise ValueError(f"the target must be {FORMS}, got {text!r}")
    if inputs:
        raise ValueError(f"a problem must come without inputs, which it has of itself, got '{inputs[0]}'")
    problem = read_problem(text)
    shape = (problem.batch, problem.channels, *problem.size)
    return Target(text, "problem", f"one {find(problem.technique).title.lower()}", (Input(shape, problem.dtype),), problem=problem)


def _module(text: str, head: str, tail: str, inputs: tuple[Input, ...]) -> Target:
    call = read_call(tail)
    makers: dict[str, Callable[..., Loaded]] = {"timm": load_timm, "torchvision": load_torchvision}
    with torch.random.fork_rng(devices=[]), users_code(Path(head).parent if head.endswith(".py") else None):
        torch.manual_seed(0)
        if head in makers:
            loaded = makers[head](call)
        else:
            module = import_file(Path(head)) if head.endswith(".py") else import_module(head)
            loaded = Loaded(call_factory(find_factory(module, head, call), call), f"{call.name} of {head}")
    loaded.module.eval()
    chosen = inputs or tuple(map(_spec, loaded.inputs)) or _own_inputs(loaded.module)
    if not chosen:
        raise ValueError(f"there must be an input (as --input 1x3x224x224) where the module states none, got '{text}'")
    return Target(text, "module", loaded.source, chosen, module=loaded.module)


def _spec(shape: tuple[int, ...]) -> Input:
    return Input(shape)


def _own_inputs(module: nn.Module) -> tuple[Input, ...]:
    """What a module says of its inputs: Lightning's ``example_input_array`` or the configuration of a timm model."""
    example = getattr(module, "example_input_array", None)
    if isinstance(example, Tensor):
        example = (example,)
    if isinstance(example, dict):
        return tuple(_like(value, name) for name, value in example.items() if isinstance(value, Tensor))
    if isinstance(example, (tuple, list)):
        return tuple(_like(value) for value in example if isinstance(value, Tensor))
    config = getattr(module, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    return (Input((1, *size)),) if size else ()


def _like(example: Any, name: str | None = None) -> Input:
    dtype = next((short for short, value in DTYPES.items() if value is example.dtype), None)
    return Input(tuple(map(int, example.shape)), dtype, name)


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"the file must exist, got '{text}'")
    return path


def _program(text: str, inputs: tuple[Input, ...]) -> Target:
    path = _existing(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
            module = torch.export.unflatten(program)
    except Exception as error:
        raise ValueError(f"the file must hold a program of torch.export.save, got '{text}' ({one_line(error)})") from error
    if not inputs and program.example_inputs is not None:
        args, kwargs = program.example_inputs
        inputs = (
            *(_like(x) for x in args if isinstance(x, Tensor)),
            *(_like(x, n) for n, x in kwargs.items() if isinstance(x, Tensor)),
        )
    if not inputs:
        raise ValueError(f"there must be an input (as --input 1x3x224x224) where the program keeps none, got '{text}'")
    return Target(text, "program", f"the exported program {path.name}", inputs, module=module)


def _onnx(text: str, inputs: tuple[Input, ...]) -> Target:
    path = _existing(text)
    taken = graph_inputs(read_model(path), [(i.name, i.shape) for i in inputs])
    known = tuple(Input(shape, dtype, name) for name, shape, dtype in taken)
    return Target(text, "onnx", f"the ONNX file {path.name}", known, onnx=path)
