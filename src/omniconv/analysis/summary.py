"""A network's cost as a tree of its modules, with totals and what is not known."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from omniconv.analysis._users_code import one_line, users_code
from omniconv.analysis.cost import Cost, Counts, Coverage, ModuleCost, Row, cost
from omniconv.analysis.cost.result import METRICS, PASS, total_status
from omniconv.analysis.onnx_cost import onnx_cost
from omniconv.analysis.targets import Target, load
from omniconv.problem import Problem


@dataclass(frozen=True)
class Line:
    """A module with everything below it, or what the ops of one kind come to that a module with parts of its own calls itself.

    ``name`` is the module's path; of ops ``path:op``. A ``leaf`` has no lines below it. ``technique`` and ``problem`` are those of
    its one convolution; ``output`` is the shape of its last result; ``calls`` how often it ran and ``ops`` the calls of ops it
    made; ``status`` is as in a Row.
    """

    name: str
    type: str
    depth: int
    leaf: bool
    technique: str | None
    problem: Problem | None
    output: tuple[int, ...] | None
    calls: int
    ops: int
    params: int
    macs_dense: int
    macs_valid: int
    flops: int
    bytes_min: int
    bytes_impl: int
    intensity: float
    backward: Counts | None
    status: dict[str, str]


@dataclass(frozen=True)
class Summary:
    """A network's lines, root first, and its totals; see :func:`summary`.

    Numbers are those of :class:`omniconv.analysis.Cost`, for all the inputs given; ``intensity`` is in flops a byte.
    """

    target: str
    source: str
    inputs: tuple[str, ...]
    params: int
    macs_dense: int
    macs_valid: int
    flops: int
    bytes_min: int
    bytes_impl: int
    intensity: float
    peak_activation: int
    backward: Counts | None
    status: dict[str, str]
    lines: tuple[Line, ...]
    coverage: Coverage
    notes: tuple[str, ...]


def summary(target: str | Target | nn.Module, *inputs: Any, backward: bool = False, **kwargs: Any) -> Summary:
    """Counts what every module of a network costs.

    A network that does not run keeps its parameters; everything else is unknown, and a note says why.

    Args:
        target: A module, a text that :func:`omniconv.analysis.targets.load` reads, or what it gave.
        inputs: What a module is called with: tensors, real or on the meta device; none for a text, which has its own.
        backward: Whether to count the backward pass too.
        kwargs: Keyword arguments of the call.

    Raises:
        ValueError: The text names nothing, or the backward pass of an ONNX file is asked for.

    Example:
        >>> made = summary(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU()), torch.zeros(1, 3, 4, 4))
        >>> [(line.name, line.technique, line.macs_dense) for line in made.lines]
        [('', None, 384), ('0', 'pointwise', 384), ('1', None, 0)]
    """
    if isinstance(target, str):
        target = load(target, caller="summary")
    if isinstance(target, nn.Module):
        given = [f"{name}={_said(x)}" for name, x in kwargs.items()]
        return _summarised(
            type(target).__name__, "a module", (*map(_said, inputs), *given), _costed(target, inputs, kwargs, backward)
        )
    if target.kind == "onnx":
        if backward:
            raise ValueError(f"summary: the backward pass must be one of a network in torch, got the ONNX file '{target.text}'")
        assert target.onnx is not None
        found = onnx_cost(target.onnx, [(i.name, i.shape) for i in target.inputs])
    elif target.problem is not None:
        found = cost(target.problem, backward=backward)
    else:
        args, named = target.example_inputs()
        with users_code(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's own, when an exported program is copied
            found = _costed(target.network(), args, named, backward)
    return _summarised(target.text, target.source, tuple(map(str, target.inputs)), found)


def _said(x: Any) -> str:
    shape = getattr(x, "shape", None)
    return type(x).__name__ if shape is None else "x".join(map(str, shape))


def _costed(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], backward: bool) -> Cost:
    try:
        return cost(module, *inputs, backward=backward, **kwargs)
    except Exception as error:  # whatever a network of the user's does wrong
        return _parameters_alone(module, f"{_where(error)}{one_line(error)}", backward)


def _where(error: BaseException) -> str:
    """The innermost module that was running, in words."""
    running = []
    at = error.__traceback__
    while at is not None:
        running += [x for x in (at.tb_frame.f_locals.get("self"),) if isinstance(x, nn.Module)]
        at = at.tb_next
    if not running:
        return ""
    path = next((name for name, part in running[0].named_modules() if part is running[-1]), "")
    return f"in {path or 'the root'} ({type(running[-1]).__name__}) "


def _parameters_alone(module: nn.Module, why: str, backward: bool) -> Cost:
    """What is known of a module that does not run."""
    status = {name: "exact" if name == "params" else "unknown" for name in METRICS}
    seen: set[int] = set()
    rows, below = [], {}
    for name, part in module.named_modules():
        fresh = [p for p in part.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in fresh}
        below[name] = sum(p.numel() for p in fresh)
        rows.append(Row(name, type(part).__name__, "unknown", calls=0, params=below[name], status=status))
    tree = []
    for name, part in module.named_modules():
        params = sum(count for path, count in below.items() if name == "" or path == name or path.startswith(f"{name}."))
        tree.append(ModuleCost(name, type(part).__name__, name.count(".") + 1 if name else 0, params))
    note = f"it does not run, so nothing but its parameters is known: {why}"
    return Cost(
        type(module).__name__, tuple(rows), sum(below.values()), 0, 0, 0, 0, 0, 0, Counts() if backward else None,
        status | {"peak_activation": "unknown"}, Coverage(0, 0), tuple(tree), (note,),
    )  # fmt: skip


def _summarised(target: str, source: str, inputs: tuple[str, ...], found: Cost) -> Summary:
    totals = {name: getattr(found, name) for name in METRICS}
    return Summary(
        target, source, inputs, **totals, intensity=found.intensity, peak_activation=found.peak_activation,
        backward=found.backward, status=found.status, lines=tuple(_Tree(found).lines()), coverage=found.coverage, notes=found.notes,
    )  # fmt: skip


@dataclass
class _Sum:
    """Rows added up: those of a module and of all below it, or those of one op."""

    rows: list[Row] = field(default_factory=list)

    def line(self, name: str, kind: str, depth: int, leaf: bool, own: list[Row], backward: bool) -> Line:
        ran = [row for row in self.rows if row.calls]
        convolutions = [row for row in own if row.technique is not None]
        named = {row.technique for row in convolutions}
        forward = sum((row.forward for row in self.rows), Counts())
        back = sum((row.backward for row in self.rows if row.backward is not None), Counts()) if backward else None
        return Line(
            name, kind, depth, leaf,
            technique=convolutions[0].technique if len(named) == 1 else None,
            problem=convolutions[0].problem if len(convolutions) == 1 else None,
            output=ran[-1].outputs[0] if ran and ran[-1].outputs else None,
            calls=sum(row.calls for row in own),
            ops=sum(row.calls for row in self.rows),
            params=sum(row.params for row in self.rows),
            **{metric: getattr(forward, metric) for metric in PASS},
            intensity=forward.intensity, backward=back,
            status={metric: total_status([row.status[metric] for row in self.rows]) for metric in METRICS},
        )  # fmt: skip

    @property
    def works(self) -> bool:
        """Whether there is anything to say of it."""
        return any(row.calls or row.params for row in self.rows)


class _Tree:
    """The modules of a Cost, each with its rows and those below it."""

    def __init__(self, found: Cost) -> None:
        self.backward = found.backward is not None
        self.status = found.status
        self.modules = {m.name: m for m in found.modules}
        self.own: dict[str, list[Row]] = {m.name: [] for m in found.modules}
        self.sums: dict[str, _Sum] = {m.name: _Sum() for m in found.modules}
        for row in found.rows:
            self.own[row.name].append(row)
            parts = row.name.split(".") if row.name else []
            for depth in range(len(parts) + 1):
                self.sums[".".join(parts[:depth])].rows.append(row)
        self.children: dict[str, list[str]] = {m.name: [] for m in found.modules}
        for m in found.modules:
            if m.name and self.sums[m.name].works:
                self.children[m.name.rpartition(".")[0]].append(m.name)

    def lines(self, name: str = "") -> Iterator[Line]:
        """A module's line and those below it."""
        module, own, children = self.modules[name], self.own[name], self.children[name]
        ops: dict[str, list[Row]] = {}
        for row in own:
            ops.setdefault(row.op.rpartition("::")[2], []).append(row)
        apart = bool(children) or (name == "" and len(ops) > 1)
        made = self.sums[name].line(name, module.type, module.depth, not apart, own, self.backward)
        output = module.outputs[0] if module.outputs else made.output
        status = made.status if name else {metric: self.status[metric] for metric in METRICS}
        yield replace(made, output=output, calls=module.calls, status=status)
        for child in children:
            yield from self.lines(child)
        for op, rows in ops.items() if apart else ():
            if any(row.calls or row.params for row in rows):
                yield _Sum(rows).line(f"{name}:{op}", op, module.depth + 1, True, rows, self.backward)
