"""Malformed calls of every op and layer: a TypeError or ValueError of the house, before any work, and nothing worse.

The calls are made from the Technique record: a good call with one thing wrong. What is right and what is wrong with another size
of one axis is the record's to say: right is what some Problem asks for.
"""

import inspect
import re
import resource
import types
import typing
import warnings
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch
from cases import batched_operands, constructor_call, on, one_case_per_op, parameters_of

from omniconv import _native
from omniconv.geometry import Padding
from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES
from omniconv.testing import make_inputs

MESSAGE = r"{}: .+, got .+"


def quietly(make):
    """Without torch's warnings that a kind of tensor is on its way in, or out."""

    def made(x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(x)

    return made


WRONG_TENSORS = {
    "sparse": lambda x: x.to_sparse(),
    "sparse in rows": quietly(lambda x: x.reshape(x.shape[0], -1).to_sparse_csr()),
    "nested": quietly(lambda x: torch.nested.nested_tensor([x, x])),
    "ragged": quietly(lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged)),
}


WRONG_KINDS = {
    "a list": lambda x: x.tolist(),
    "a number": lambda x: 3.0,
    "a string": lambda x: "nonsense",
    "an array": lambda x: x.numpy(),
    "oneDNN's": lambda x: x.to_mkldnn(),
    "quantized": quietly(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
    **WRONG_TENSORS,
}
WRONG_DTYPES = (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64)

WRONG_INTS = (0.5, 1.0, "1", True, None, torch.tensor(1), [1.0], (), {1: 1}, 2**31, -(2**31))
WRONG_FLAGS = ("no", "", 0, 1, 0.5, float("nan"), None, [True], torch.tensor(True))
WRONG_NAMES = ("nonsense", "", "ZEROS", 3, True, ["zeros"])


def neighbours(problem: Problem) -> Iterator[Problem]:
    """Every problem that differs in one number by one, or in one that was left out."""
    for field in fields(problem):
        value = getattr(problem, field.name)
        if isinstance(value, bool) or field.name == "padding":
            continue
        if isinstance(value, int) or value is None:
            for changed in {1, 2, 3} if value is None else {value - 1, value + 1}:
                yield problem.replace(**{field.name: changed})
        elif isinstance(value, tuple):
            for axis in range(len(value)):
                for step in (-1, 1):
                    yield problem.replace(**{field.name: tuple(v + step * (a == axis) for a, v in enumerate(value))})


def shapes_asked_for(technique, problem) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the operands of all neighbours that need the same arguments."""
    found = []
    for other in neighbours(problem):
        try:
            technique.check(other)
            asked = {name: operand.shape for name, operand in technique.operands(other).items()}
        except (ValueError, ZeroDivisionError):
            continue
        if technique.arguments(other) == technique.arguments(problem) and min(map(min, asked.values())) >= 0:
            found.append(asked)
    return found


def resized(x, axis, size):
    """The same numbers on fewer or more positions of one axis."""
    if size <= x.shape[axis]:
        return x.narrow(axis, 0, size).clone()
    return torch.cat([x, x.narrow(axis, 0, size - x.shape[axis])], axis)


def base_case(technique, rank) -> Problem:
    """A problem on which one wrong number shows: sizes that differ from each other and from 1."""
    sizes = {"kernel": (3, 2, 3)[:rank], "padding": ((1, 1),) * rank, "multiplier": 2, "out_channels": 6, "groups": 2, "heads": 2}
    return technique.check(
        Problem(technique.name, 4, (7, 5, 6)[:rank], batch=2, **{k: v for k, v in sizes.items() if k in technique.takes})
    )


def wrong_operands(technique, problem) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(what is wrong, operands, further arguments)."""
    operands = make_inputs(technique, problem)
    batched = batched_operands(technique, problem)
    asked = shapes_asked_for(technique, problem)
    for name, x in operands.items():
        for words, spoil in WRONG_KINDS.items():
            yield f"{name} is {words}", operands | {name: spoil(x)}, {}
        for dtype in WRONG_DTYPES:
            yield f"{name} is {dtype}", operands | {name: x.to(dtype)}, {}
        yield f"{name} is elsewhere", operands | {name: x.to("meta")}, {}
        yield f"{name} has one axis more", operands | {name: x.unsqueeze(0)}, {}
        fewer = x[0, 0] if name in batched else x[0]
        yield f"{name} has too few axes", operands | {name: fewer}, {}
        yield f"{name} has no axes", operands | {name: x.flatten()[0]}, {}
        for axis, size in enumerate(x.shape):
            for changed in {0, size - 1, size + 1}:
                if name == "input" and axis == 0 and changed == 0:
                    continue  # an empty batch is a batch
                spoilt = operands | {name: resized(x, axis, changed)}
                if {n: tuple(o.shape) for n, o in spoilt.items()} not in asked:
                    yield f"{name} has {changed} in axis {axis} of {tuple(x.shape)}", spoilt, {}
    required = [n for n, p in parameters_of(technique.ops[problem.rank]).items() if p.default is p.empty]
    for name in required:
        yield f"{name} is None", operands | {name: None}, {}


def wrong_settings(technique, problem) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every argument that is no tensor, with values of the wrong kind and out of range, by its annotation."""
    operands = make_inputs(technique, problem)
    rank = problem.rank
    for name, parameter in parameters_of(technique.ops[rank]).items():
        if name in operands:
            continue
        for value in wrong_values(parameter, rank):
            words = value.layout if isinstance(value, torch.Tensor) and value.is_nested else repr(value)
            yield f"{name} is {words}", operands, {name: value}
        if parameter.annotation == Padding:
            for value in (((rank + 8, rank + 8),) * rank, (9,) * rank):
                for mode in ("reflect", "circular"):
                    if "padding_mode" in technique.takes:
                        yield f"padding is {value} in mode {mode}", operands, {name: value, "padding_mode": mode}


def wrong_values(parameter: inspect.Parameter, rank: int) -> list[Any]:
    annotation = parameter.annotation
    kinds = set(typing.get_args(annotation)) if isinstance(annotation, types.UnionType) else {annotation}
    if annotation == Padding:
        minus = (-1, (-1,) * rank, ((0, -1),) * rank, ((-1, 0),) * rank)
        shapes = ((1,) * (rank + 1), ((1, 1),) * (rank + 1), ((1, 1, 1),) * rank, ((1,),) * rank, ((0.5, 1),) * rank)
        names = ("nonsense", "", "SAME", "same_lower") + (("causal",) if rank > 1 else ())
        return [v for v in WRONG_INTS if v != "1"] + [*minus, *shapes, *names]
    if bool in kinds:
        return list(WRONG_FLAGS)
    if int in kinds:
        below = min(parameter.default if isinstance(parameter.default, int) else 1, 1) - 1
        none = [] if type(None) not in kinds else [None]
        values = [v for v in WRONG_INTS if v is not None or not none]
        sequences = any(typing.get_origin(k) is not None for k in kinds)
        values += [below, (below,) * rank, (1,) * (rank + 1)] if sequences else [below, (1,), [1]]
        return values
    if str in kinds:
        return list(WRONG_NAMES) + ([] if type(None) in kinds else [None])
    if float in kinds:
        return ["1", None, -0.5, float("inf"), float("nan"), [0.5]]
    if torch.Tensor in kinds:
        bools = torch.ones(2, 7, dtype=torch.bool)
        kinds = [spoil(bools) for spoil in WRONG_TENSORS.values()]
        return [3, "nonsense", [True], torch.ones(1), torch.ones(1, 1, 1, dtype=torch.int64), *kinds]
    return []


def too_small(technique, problem) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """One position, no padding: the window does not fit."""
    operands = make_inputs(technique, problem)
    small = operands | {"input": operands["input"][(..., *(slice(0, 1),) * problem.rank)]}
    try:
        technique.check(problem.replace(size=(1,) * problem.rank, padding=((0, 0),) * problem.rank))
    except ValueError:
        yield "the window is larger than the input", small, {"padding": 0}
    if "padding" in technique.takes:
        for value in (2**31 - 1, ((2**31, 0),) * problem.rank):
            try:
                technique.check(problem.replace(padding=((value, value),) * problem.rank if isinstance(value, int) else value))
            except ValueError:
                yield f"padding is {value}", operands, {"padding": value}


@cache
def malformed(name: str, rank: int) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    technique = next(t for t in TECHNIQUES if t.name == name)
    problem = base_case(technique, rank)
    return [
        *wrong_operands(technique, problem),
        *wrong_settings(technique, problem),
        *too_small(technique, problem),
    ]


OPS = [pytest.param(t, rank, id=f"{t.name}{rank}d") for t in TECHNIQUES for rank in t.ranks]


def complaint(call, name: str) -> str | None:
    """What is not right with how a malformed call ends; None where it ends as it should."""
    try:
        call()
    except (TypeError, ValueError) as error:
        if re.fullmatch(MESSAGE.format(re.escape(name)), str(error), re.DOTALL):
            return None
        return f"{type(error).__name__}: {str(error)[:120]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return "no error"


def test_there_are_many():
    counts = {f"{t.name}{r}d": len(malformed(t.name, r)) for t in TECHNIQUES for r in t.ranks}
    assert min(counts.values()) >= 50, counts
    assert sum(counts.values()) >= 100


@pytest.mark.parametrize(("technique", "rank"), OPS)
def test_the_call_they_come_from_is_good(technique, rank):
    problem = base_case(technique, rank)
    assert technique.call(problem, make_inputs(technique, problem)).shape == technique.output_shape(problem)


@pytest.mark.parametrize(("technique", "rank"), OPS)
def test_malformed_calls(technique, rank):
    op = technique.ops[rank]
    arguments = technique.arguments(base_case(technique, rank))
    wrong = []
    for words, operands, further in malformed(technique.name, rank):
        found = complaint(lambda o=operands, f=further: op(**o, **(arguments | f)), op.__name__)
        if found:
            wrong.append(f"{words}: {found}")
    assert not wrong, f"{len(wrong)} of {len(malformed(technique.name, rank))}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(("technique", "rank"), OPS)
def test_errors_come_before_any_work(technique, rank):
    """A malformed call fails on tensors without data too: nothing was computed to find out."""
    problem = base_case(technique, rank)
    op, arguments = technique.ops[rank], technique.arguments(problem)
    wrong = []
    for words, operands, further in malformed(technique.name, rank):
        given = [*operands.values(), *(v for v in further.values() if isinstance(v, torch.Tensor))]
        if not all(isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.layout == torch.strided for x in given):
            continue
        if any(x.is_quantized or x.is_nested for x in given):
            continue
        empty = {n: x.to("meta") for n, x in operands.items()}
        further = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in further.items()}
        found = complaint(lambda o=empty, f=further: op(**o, **(arguments | f)), op.__name__)
        if found:
            wrong.append(f"{words}: {found}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@on(one_case_per_op())
def test_other_numbers_are_served_right_or_refused(technique, problem, dtype):
    """All operands of another kind of number: torch's drop-ins hand them on, the others raise by name."""
    operands = {n: x.to(dtype) for n, x in make_inputs(technique, problem, fill="integers").items()}
    op = technique.ops[problem.rank]
    try:
        y = technique.call(problem, operands, **technique.linear)
    except TypeError as error:
        named = re.fullmatch(MESSAGE.format(op.__name__), str(error))
        assert named
    except RuntimeError:
        assert dtype == torch.bool  # torch itself has no convolution of bools
    else:
        assert torch.equal(y, technique.reference(**operands, **(technique.arguments(problem) | technique.linear)).to(dtype))


@pytest.mark.parametrize(("technique", "rank"), OPS)
def test_unknown_arguments_are_pythons_own_error(technique, rank):
    problem = base_case(technique, rank)
    with pytest.raises(TypeError, match="unexpected keyword argument 'strides'"):
        technique.call(problem, make_inputs(technique, problem), strides=2)


@pytest.mark.parametrize(("technique", "rank"), OPS)
def test_malformed_layers(technique, rank):
    """Every argument of the constructor, by its annotation; the message opens with the layer's name."""
    cls, arguments = constructor_call(technique, base_case(technique, rank))
    wrong, count = [], 0
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in ("device", "dtype"):
            continue
        values = wrong_values(parameter.replace(default=1) if parameter.default is parameter.empty else parameter, rank)
        for value in values:
            count += 1
            found = complaint(lambda n=name, v=value: cls(**arguments | {n: v}), cls.__name__)
            if found:
                wrong.append(f"{name}={value!r}: {found}")
    assert count > 20
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(("technique", "rank"), OPS)
def test_layers_refuse_other_channels(technique, rank):
    problem = base_case(technique, rank)
    layer = technique.layer(problem)
    op = technique.ops[rank].__name__
    for channels in (problem.channels - 1, problem.channels + 1, 0):
        with pytest.raises(ValueError, match=r"^\w+: .+, got .+") as caught:
            layer(torch.ones(2, channels, *problem.size))
        assert str(caught.value).split(":")[0] in (op, type(layer).__name__)


@pytest.mark.parametrize(("technique", "rank"), OPS)
def test_a_call_like_one_before_is_checked_all_the_same(technique, rank):
    """What is known of a call must not serve flags that are only equal to right ones, nor tensors that only look alike."""
    problem = base_case(technique, rank)
    op, operands, arguments = technique.ops[rank], make_inputs(technique, problem), technique.arguments(problem)
    flags = {name: p.default for name, p in parameters_of(op).items() if p.annotation is bool}
    wrong = []
    for changed in [{}, *({name: not value} for name, value in flags.items())]:
        call = arguments | flags | changed
        for _ in range(2):
            op(**operands, **call)
        for name in flags:
            for value in (*WRONG_FLAGS, int(call[name]), float(call[name])):
                found = complaint(lambda c=call | {name: value}: op(**operands, **c), op.__name__)
                wrong += [f"{name}={value!r}: {found}"] if found else []
        for name, x in operands.items():
            for words, spoil in WRONG_TENSORS.items():
                spoilt = operands | {name: spoil(x)}
                found = complaint(lambda o=spoilt, c=call: op(**o, **c), op.__name__)
                wrong += [f"{name} is {words}: {found}"] if found else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("technique", "rank"), OPS)
def test_layers_refuse_other_kinds_of_tensors(technique, rank):
    problem = base_case(technique, rank)
    layer, op = technique.layer(problem), technique.ops[rank]
    for spoil in (*WRONG_TENSORS.values(), WRONG_KINDS["oneDNN's"]):
        with pytest.raises(TypeError, match=rf"^({op.__name__}|{type(layer).__name__}): input must be a dense Tensor, got .+"):
            layer(spoil(torch.ones(2, problem.channels, *problem.size)))


native = pytest.mark.skipif(not _native.AVAILABLE, reason="this build has no native library")
HUGE = torch.zeros(1, 1, 1).expand(2**20, 2**10, 2**12)  # 16 TiB, of one element

# op and what does not fit -> a call
TOO_LARGE = {
    "pointwise: the result": lambda ops: ops.pointwise(HUGE, torch.zeros(2**10, 2**10, 1), None, 0, True),
    "lightweight: the result": lambda ops: ops.lightweight(HUGE, torch.zeros(1, 1), None, None, 0, [0, 0], 1, 0, False, 0, True),
    "depthwise: a contiguous copy": lambda ops: ops.depthwise(
        HUGE, torch.zeros(2**10, 1, 1), None, [1], [0, 0], [1], 0, 0, False, True
    ),
    "depthwise_grad_weight: the result": lambda ops: ops.depthwise_grad_weight(
        torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), [2**31, 2**31], [1, 1], [2**31 - 1, 0] * 2, [1, 1], False, True
    ),
}


@native
@pytest.mark.parametrize("call", TOO_LARGE)
def test_what_does_not_fit_into_memory_is_named(call):
    op, what = call.split(": ")
    size = r"(\d+|more than 2\^63) bytes \(sizes \d+(, \d+)+\)"
    with pytest.raises(RuntimeError, match=rf"^{op}: {what} of {size} must fit into memory, got an allocation failure"):
        TOO_LARGE[call](torch.ops.omniconv)


@native
def test_memory_that_runs_out_within_a_call_is_named():
    """Weights of a half type are packed as float32: twice their size, and more than is left."""
    side = 2**13
    x, weight = torch.zeros(1, 1, 1, 1).bfloat16(), torch.zeros(1, 1, side, side).bfloat16()
    arguments = (x, weight, None, [1, 1], [side - 1, 0] * 2, [1, 1], 0, 0, False, True)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + weight.nbytes, limit[1]))
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.ops.omniconv.depthwise(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    must = f"depthwise: the packed weight of {2 * weight.nbytes} bytes (sizes {side * side}) must fit into memory"
    assert str(caught.value).startswith(f"{must}, got an allocation failure")
