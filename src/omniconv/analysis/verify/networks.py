"""What is counted of a network, against ones: every convolution on its own shapes, and all that run together."""

from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from omniconv.analysis.cost import Cost, cost
from omniconv.analysis.untouched import untouched
from omniconv.analysis.verify.checks import Check
from omniconv.analysis.verify.oracle import FEW, counted
from omniconv.problem import Problem
from omniconv.techniques import find

ROW_DENSE = "macs_dense of a layer = sum of ones on its shapes"
ROW_VALID = "macs_valid of a layer = sum of ones on its shapes"
ALL_VALID = "macs_valid of all torch convolutions = those that ran, again on ones"
PARAMETERS = "params = numbers in the parameters"


def of_network(name: str, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Iterator[Check]:
    """What :func:`omniconv.analysis.cost` says of a network, compared with ones.

    A network of torch's own layers runs once, and is left as it was, to see which convolutions it runs.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, groups=2))
    >>> [check.got for check in of_network("two layers", network, (torch.ones(1, 3, 9, 9),), {})]
    [17496, 15000, 4608, 4608, 520, 19608]
    """
    found = cost(module, *inputs, **named)
    yield from _of_rows(found)
    numbers = sum(p.numel() for p in module.parameters())
    yield Check(PARAMETERS, "", name, "network", numbers, found.params, numbers == found.params)
    if any(row.op.startswith("omniconv::") for row in found.rows):
        return  # what runs inside an op of the library may be more than what is kept
    with untouched(module), torch.no_grad(), Again() as again:
        module(*inputs, **named)
    said = sum(row.macs_valid for row in found.rows if row.op == "aten::convolution")
    yield Check(ALL_VALID, "", name, f"{again.calls} calls", again.macs, said, again.macs == said)


def _of_rows(found: Cost) -> Iterator[Check]:
    for row in found.rows:
        if row.problem is None or row.technique is None:
            continue
        dense, valid = (row.calls * row.problem.batch * macs for macs in _of_problem(row.problem))
        technique = row.technique
        yield Check(ROW_DENSE, technique, str(row.problem), row.name, dense, row.macs_dense, dense == row.macs_dense)
        sure = row.status["macs_valid"] == "exact" or find(technique).moves_taps
        said = row.macs_valid if sure else f"{row.macs_valid} ({row.status['macs_valid']})"
        yield Check(ROW_VALID, technique, str(row.problem), row.name, valid, said, valid == said)


@cache
def _of_problem(problem: Problem) -> tuple[int, int]:
    """Per sample, of the stages on the path: one row is one op."""
    path = [stage for stage in find(problem.technique).stages(problem) if not stage.side]
    return sum(counted(s, real=False) for s in path), sum(counted(s, real=True) for s in path)


class Again(TorchDispatchMode):
    """Runs every convolution that torch runs once more on ones: sums of ones are the multiply-accumulates on real inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.macs = 0, 0
        self.known: dict[tuple[Any, ...], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (torch.ops.aten.convolution.default, torch.ops.aten._convolution.default):
            x, weight, _, *settings = args
            settings = [tuple(value) if isinstance(value, list) else value for value in settings[:6]]
            key = (tuple(x.shape), tuple(weight.shape), *settings)
            if key not in self.known:
                self.known[key] = _on_ones(x, weight, *settings)
            self.calls += 1
            self.macs += self.known[key]
        return func(*args, **(kwargs or {}))


def _on_ones(x: Tensor, weight: Tensor, stride: Any, pads: Any, dilation: Any, transposed: bool, extra: Any, groups: int) -> int:
    """One sample, and one channel of each group where there are too many products to run: they are alike."""
    shapes, alike = [[1, *x.shape[1:]], list(weight.shape)], x.shape[0]
    places = prod(x.shape[2:]) // (1 if transposed else prod(stride))
    if weight.numel() * places > FEW:
        alike *= weight.shape[1] * weight.shape[0]
        shapes, groups = [[1, 1, *x.shape[2:]], [1, 1, *weight.shape[2:]]], 1
    ones = (torch.ones(shape, dtype=torch.float64) for shape in shapes)
    y = torch.ops.aten.convolution.default(*ones, None, list(stride), list(pads), list(dilation), transposed, list(extra), groups)
    return int(y.sum()) * alike
