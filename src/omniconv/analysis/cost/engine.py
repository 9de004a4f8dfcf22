"""Runs a copy of a model on tensors without data, and adds up what was seen."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.utils._pytree import tree_map

from omniconv.analysis.cost.calls import tensors_in
from omniconv.analysis.cost.modules import Modules
from omniconv.analysis.cost.recorder import Recorder
from omniconv.analysis.cost.result import METRICS, Cost, Counts, ModuleCost, Row, total_status
from omniconv.analysis.untouched import untouched
from omniconv.ops.operator import intercept_ops
from omniconv.problem import Problem
from omniconv.techniques import find


def cost(target: nn.Module | Callable[..., Any] | Problem | str, /, *inputs: Any, backward: bool = False, **kwargs: Any) -> Cost:
    """Counts what a layer, a network or a function of tensors costs, op by op as torch's dispatcher sees them.

    The model is never run: a copy of its structure is, with tensors that have shapes but no data. So nothing of it changes, an
    input may be on the meta device, and a network of any size takes milliseconds an op. Where the path through a model depends on
    its data, a copy runs on the data instead, and ``notes`` says so.

    MACs are multiply-accumulates of matrix products and convolutions, gradients included; what else is calculated counts as
    ``flops``, by estimates. Of zeros that pad a convolution ``macs_valid`` leaves out the products; in the other padding modes
    every tap lands, and it equals ``macs_dense``. Zeros that a model puts around its numbers by other means than padding, as
    ``unfold`` does, count as numbers.

    Args:
        target: A module, a function, a Problem or its text form.
        inputs: What it is called with: tensors, or containers of them; none for a Problem.
        backward: Whether to count the backward pass too, from every floating result to the parameters and to those inputs that
            require a gradient. Tensors that a function closes over are constants.
        kwargs: Keyword arguments of the call.

    Raises:
        TypeError: The target cannot be called, or a Problem was given inputs.
        ValueError: The text is no Problem, or its technique does not take it; a model with lazy parameters does not run.

    Example:
        >>> cost(torch.nn.Conv2d(3, 8, 3, padding=1), torch.empty(1, 3, 32, 32)).macs_dense
        221184
        >>> cost("depthwise2d c32 i56 k3 p1").params
        320

    Source: conventions of Howard et al. 2017, arXiv:1704.04861 (MACs); Williams et al. 2009 (intensity).
    """
    if isinstance(target, str):
        target = Problem.parse(target)
    if isinstance(target, Problem):
        if inputs or kwargs:
            raise TypeError(f"cost: a Problem must be given no inputs, got {len(inputs) + len(kwargs)}")
        return _of_problem(target, backward)
    if not callable(target):
        raise TypeError(f"cost: the target must be a module, a function, a Problem or its text, got {type(target).__name__}")
    name = type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__name__", type(target).__name__)
    module = target if isinstance(target, nn.Module) else None
    with untouched(module, weights=False), torch.inference_mode(False):
        return _counted(name, _with_shapes(target, inputs, kwargs), inputs, kwargs, backward)


def _of_problem(problem: Problem, backward: bool) -> Cost:
    """The cost of the layer that a Problem describes."""
    technique = find(problem.technique)
    technique.check(problem)
    with untouched(), FakeTensorMode():
        torch.set_default_dtype(problem.torch_dtype)
        layer = technique.layer(problem)
        x = torch.empty(technique.operands(problem)["input"].shape, dtype=problem.torch_dtype)
        if problem.channels_last and problem.rank > 1:
            x = x.to(memory_format=torch.channels_last if problem.rank == 2 else torch.channels_last_3d)
    with untouched():
        return _counted(str(problem), layer, (x,), {}, backward)


def _with_shapes(target: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The target; of a model with lazy parameters a copy that has run once, which gives them their shapes."""
    if not isinstance(target, nn.Module) or not any(map(is_lazy, [*target.parameters(), *target.buffers()])):
        return target
    lazy: Callable[..., Any] = UninitializedBuffer  # has no copy of its own, as parameters have
    memo = {id(x): lazy(device=x.device, dtype=x.dtype) for x in target.buffers() if is_lazy(x)}
    made = copy.deepcopy(target, memo)
    args, named = _detached((inputs, kwargs))
    try:
        with torch.no_grad():
            made(*args, **named)
    except Exception as error:
        raise ValueError(f"cost: a model with lazy parameters must run on its inputs, got {_first_line(error)}") from error
    return made


def _counted(name: str, target: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], backward: bool) -> Cost:
    """Without data where that serves; else on data, in a copy; else as far as it came."""
    given = tensors_in([inputs, kwargs])
    without = _Run(name, backward)
    try:
        with _silent(_FAKES):
            return without(*_without_data(target, inputs, kwargs))
    except Exception as error:
        failed = error
    if any(isinstance(x, FakeTensor) or x.is_meta for x in given):
        return without.as_far_as(failed)
    with_data = _Run(name, backward, [f"run on data, since tensors without data do not serve: {_first_line(failed)}"])
    try:
        with untouched(target if isinstance(target, nn.Module) else None):
            return with_data(None, *_with_data(target, inputs, kwargs))
    except Exception as error:
        return with_data.as_far_as(error)


_FAKES = logging.getLogger("torch._subclasses.fake_tensor")  # prints the traceback of what is raised as well


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _with_data(target: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Copies of all."""
    return _copy(target, {}), *_detached((inputs, kwargs))


def _detached(tree: Any) -> Any:
    """Tensors of their own graph, which may want a gradient as those given do."""

    def of(x: Any) -> Any:
        return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return tree_map(of, tree)


def _without_data(
    target: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[FakeTensorMode, Any, tuple[Any, ...], dict[str, Any]]:
    """The mode, and copies of all with tensors that have no data."""
    held = _held(target) if isinstance(target, nn.Module) else []
    fakes = [x for x in [*tensors_in([inputs, kwargs]), *held] if isinstance(x, FakeTensor)]
    mode = fakes[0].fake_mode if fakes else FakeTensorMode(allow_non_fake_inputs=True)
    device = next((x.device for x in held if not x.is_meta), None)

    def of(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        if (x.is_meta and device is not None) or x.is_inference():
            return _like(x, mode, device if x.is_meta else x.device)
        return mode.from_tensor(x.detach()).requires_grad_(x.requires_grad)

    fake = tree_map(of, (inputs, kwargs))
    memo: dict[int, Any] = {}
    for x in held:
        if x.is_inference() and not isinstance(x, FakeTensor):
            made = _like(x, mode, x.device)
            memo[id(x)] = nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made
        else:
            memo[id(x)] = x if isinstance(x, FakeTensor) else mode.from_tensor(x)
    return mode, _copy(target, memo), *fake


def _like(x: Tensor, mode: FakeTensorMode, device: torch.device | None) -> Tensor:
    """A tensor without data in the place of one that torch does not turn into such."""
    with mode:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).requires_grad_(x.requires_grad)


def _held(module: nn.Module) -> list[Tensor]:
    """Every tensor in the module: parameters, buffers, and those that are mere attributes."""
    found = {id(x): x for x in [*module.parameters(), *module.buffers()]}
    for part in module.modules():
        found |= {id(x): x for x in vars(part).values() if isinstance(x, Tensor)}
    return list(found.values())


def _copy(target: Any, memo: dict[int, Any]) -> Any:
    """A module of the same structure; tensors in ``memo`` stand for their keys."""
    if not isinstance(target, nn.Module):
        return target
    target = getattr(target, "_orig_mod", target)  # what torch.compile was given
    try:
        return copy.deepcopy(target, memo)
    except Exception:  # a part that has no copy: the model itself runs, under guard
        return target


@contextmanager
def _grad_mode(enabled: bool) -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)  # it hides attention in one op; untouched() puts it back
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


class _Run:
    """One attempt at both passes, and what was seen of them."""

    def __init__(self, name: str, backward: bool, notes: Sequence[str] = ()) -> None:
        self.name, self.backward, self.notes = name, backward, list(notes)
        self.recorder: Recorder | None = None
        self.module: nn.Module | None = None

    def __call__(self, mode: FakeTensorMode | None, target: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
        """Runs all and adds up."""
        self.module = target if isinstance(target, nn.Module) else None
        with Modules(self.module) as modules, _grad_mode(self.backward), mode or nullcontext():
            recorder = self.recorder = Recorder(modules, [] if self.module is None else self.module.parameters())
            if self.module is not None:
                recorder.memory.leave_out(_held(self.module))
            recorder.memory.see(tensors_in([inputs, kwargs]))
            with recorder, intercept_ops(recorder.intercept):
                results = tensors_in(target(*inputs, **kwargs))
                if self.backward:
                    self._gradients(recorder, results, tensors_in([inputs, kwargs]))
        return _totals(self.name, recorder, self.module, self.backward, self.notes)

    def _gradients(self, recorder: Recorder, results: list[Tensor], given: list[Tensor]) -> None:
        recorder.backwards = True
        ends = [y for y in results if y.requires_grad]
        parameters = [] if self.module is None else list(self.module.parameters())
        leaves = [x for x in [*parameters, *given] if x.requires_grad]
        if not ends or not leaves:
            self.notes.append("no result depends on anything that requires a gradient: the backward pass is empty")
            return
        hooks = [leaf.register_hook(_dropped) for leaf in leaves]
        try:
            torch.autograd.grad(ends, leaves, [torch.empty_like(y) for y in ends], allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()

    def as_far_as(self, error: Exception) -> Cost:
        """What was counted before the error; the error itself where nothing was."""
        if self.recorder is None or not self.recorder.lines:
            raise error
        modules = self.recorder.modules
        where = "" if modules.stopped is None else f" in {modules.stopped!r} ({modules.types[modules.stopped]})"
        self.notes.append(f"stopped{where}, and counted no further: {_first_line(error)}")
        found = _totals(self.name, self.recorder, self.module, self.backward, self.notes)
        return replace(found, status=dict.fromkeys(found.status, "lower_bound") | {"params": "exact"})


def _dropped(gradient: Tensor) -> Tensor:
    """In place of a finished gradient, so that it is alive no longer than in an optimiser that takes it away."""
    return gradient.new_empty(()).expand(gradient.shape)


def _totals(name: str, recorder: Recorder, module: nn.Module | None, backward: bool, notes: list[str]) -> Cost:
    rows = [line.row(backward) for line in recorder.lines.values()]
    if module is not None:
        rows += _unread(recorder, module, backward, notes)
    forward = sum((row.forward for row in rows), Counts())
    status = {metric: total_status([row.status[metric] for row in rows]) for metric in METRICS}
    return Cost(
        name, tuple(rows), recorder.parameters, **vars(forward), peak_activation=recorder.memory.peak,
        backward=_backward_of(rows) if backward else None, status=status | {"peak_activation": "exact"},
        coverage=recorder.coverage(), modules=_tree(recorder.modules, rows, backward), notes=tuple(notes),
    )  # fmt: skip


def _backward_of(rows: list[Row]) -> Counts:
    return sum((row.backward for row in rows if row.backward is not None), Counts())


def _unread(recorder: Recorder, module: nn.Module, backward: bool, notes: list[str]) -> list[Row]:
    """A row for the parameters of each module that the forward never read."""
    left = dict(recorder.unread())
    rows = []
    for name, part in module.named_modules():
        places = [(id(p.untyped_storage()), p.storage_offset()) for p in part.parameters(recurse=False)]
        count = sum(left.pop(place, 0) for place in places)
        if count:
            status = dict.fromkeys(METRICS, "exact")
            made = Counts() if backward else None
            rows.append(Row(name, type(part).__name__, "unused", calls=0, params=count, backward=made, status=status))
    if rows:
        notes.append(f"{sum(row.params for row in rows)} parameters are never read by this forward")
    return rows


def _tree(modules: Modules, rows: list[Row], backward: bool) -> tuple[ModuleCost, ...]:
    """Every module with the sum of its rows and of all below it."""
    sums: dict[str, tuple[int, Counts, Counts]] = {}
    for row in rows:
        parts = row.name.split(".") if row.name else []
        for depth in range(len(parts) + 1):
            path = ".".join(parts[:depth])
            params, forward, back = sums.get(path, (0, Counts(), Counts()))
            sums[path] = (params + row.params, forward + row.forward, back + (row.backward or Counts()))
    tree = []
    for path, kind in (modules.types or {"": "function"}).items():
        params, forward, back = sums.get(path, (0, Counts(), Counts()))
        depth = path.count(".") + 1 if path else 0
        tree.append(
            ModuleCost(
                path, kind, depth, params, **vars(forward), backward=back if backward else None,
                outputs=modules.outputs.get(path, ()), calls=modules.calls.get(path, 1),
            )
        )  # fmt: skip
    return tuple(tree)
