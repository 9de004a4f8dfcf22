"""Calls that ``torch.jit.trace`` records, where sizes are tensors unless something makes them numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from omniconv.ops.operator import fail

_SIZES = (Tensor.shape.__get__, Tensor.size, Tensor.numel)  # type: ignore[attr-defined]


class _NumberSizes(TorchFunctionMode):
    """Answers a question for sizes with numbers, which a trace holds as constants; all else is recorded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _SIZES:
            return func(*args, **(kwargs or {}))
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # nothing is recorded
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` records this call and sizes are tensors.

    It takes 0.1 µs: an op asks once it has not found the call among those it knows.
    """
    return not torch.compiler.is_compiling() and torch._C._is_tracing() and not _has_number_sizes()


def _has_number_sizes() -> bool:
    return any(isinstance(m, _NumberSizes) for m in torch.overrides._get_current_function_mode_stack())


def call_with_number_sizes(op: Callable[..., Any], scope: Mapping[str, Any]) -> Any:
    """Calls an op anew, with its arguments as they stand in its scope, and sizes that are numbers.

    The trace then serves every batch and, since pads are a matter of the kernel alone, every length or image.

    Raises:
        ValueError: The pads depend on the size of the input.
    """
    code = op.__code__
    stride = scope.get("stride", 1)
    if scope.get("padding") == "same_minimal" and any(s != 1 for s in (stride if isinstance(stride, (tuple, list)) else (stride,))):
        name = f"{code.co_name}{scope['rank']}d" if "rank" in scope else code.co_name
        must = "torch.jit.trace needs pads that do not depend on the size, use torch.export"
        fail(name, must, f"padding 'same_minimal' with stride {stride}")
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    with _NumberSizes():
        return op(**{name: scope[name] for name in names})


def check_not_traced(op: str) -> None:
    """Raises TypeError while ``torch.jit.trace`` records: of an op whose state is cut by lengths, which a trace would fix."""
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        raise TypeError(f"{op}: torch.jit.trace must not record this op, use torch.export, got a call that it records")


def number_sizes(x: Tensor) -> Sequence[int]:
    """Returns the shape of a tensor, also of one that ``torch.jit.trace`` records, in numbers."""
    if torch.compiler.is_compiling() or not torch._C._is_tracing():
        return x.shape
    with _NumberSizes():
        return x.shape


def with_recorded_sizes(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a function whose own questions for sizes ``torch.jit.trace`` records: one that makes indices of them."""
    if torch.compiler.is_compiling() or not torch._C._is_tracing():
        return compute

    def recorded(*operands: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            return compute(*operands)

    return recorded
