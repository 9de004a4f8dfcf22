"""What every operator does before and after its arithmetic: checks, autocast, batch axis, accumulation type, memory format."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Concatenate, NoReturn, ParamSpec

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from omniconv.geometry import is_integer
from omniconv.layout import arrange, is_channels_last
from omniconv.ops.activation import activate

P = ParamSpec("P")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
_AXES = {1: "T", 2: "H, W", 3: "D, H, W"}
_NAMES = {1: "one axis", 2: "two axes", 3: "three axes"}

Interceptor = Callable[[Callable[..., Any], Mapping[str, Any]], Any]
interceptors: dict[int, Interceptor] = {}  # by thread


@contextmanager
def intercept_ops(interceptor: Interceptor | None) -> Iterator[None]:
    """Sends every call of an op in this thread to ``interceptor(op, arguments by name)``, whose result it returns; None: to the op.

    An op asks ``if interceptors``, which costs 15 ns where nobody intercepts.
    """
    thread = get_ident()
    before = interceptors.pop(thread, None)
    if interceptor is not None:
        interceptors[thread] = interceptor
    try:
        yield
    finally:
        interceptors.pop(thread, None)
        if before is not None:
            interceptors[thread] = before


def is_intercepted() -> bool:
    """Whether somebody intercepts this thread; nobody does where a call is being compiled."""
    return not torch.compiler.is_compiling() and get_ident() in interceptors


def intercepted(op: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Returns what the interceptor of this thread makes of a call."""
    return interceptors[get_ident()](op, arguments)


def per_rank(core: Callable[Concatenate[int, P], Tensor]) -> tuple[Callable[P, Tensor], ...]:
    """The 1-, 2- and 3-D functions of ``core(rank, …)``, named ``<core>1d``, ``<core>2d`` and ``<core>3d``.

    The docstring of ``core`` serves all three: ``{n}`` is the rank, ``{axes}`` the spatial letters, ``{threes}`` and ``{ones}``
    spatial sizes of an example, ``{taps}`` the taps of a 3-wide kernel.
    """
    return tuple(_of_rank(core, rank) for rank in (1, 2, 3))


def _of_rank(core: Callable[Concatenate[int, P], Tensor], rank: int) -> Callable[P, Tensor]:
    # a tracer may take an int in a closure for a number that varies, but never the length of a text
    axes = _AXES[rank].replace(", ", "")

    def function(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        input = args[0] if args else kwargs.get("input")
        if not isinstance(input, Tensor) and has_torch_function_unary(input):
            return handle_torch_function(function, (input,), *args, **kwargs)  # torch.fx traces it as one call
        if interceptors and is_intercepted():
            return intercepted(function, inspect.signature(function).bind(*args, **kwargs).arguments)
        return core(len(axes), *args, **kwargs)

    signature = inspect.signature(core)
    function.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    function.__annotations__ = {k: v for k, v in core.__annotations__.items() if k != "rank"}
    function.__name__ = function.__qualname__ = f"{core.__name__}{rank}d"
    function.__module__ = core.__module__
    function.__doc__ = ranked_text(core.__doc__ or "", rank)
    return function


def ranked_text(text: str, rank: int) -> str:
    """A docstring template filled in for one rank."""
    words = {"n": rank, "axes": _AXES[rank], "over": _NAMES[rank], "taps": 3**rank}
    words |= {
        "twice": 2 * 3**rank,
        "threes": ", ".join("3" * rank),
        "ones": ", ".join("1" * rank),
        "twos": ", ".join("2" * rank),
        "doubled": 2**rank,
    }
    for word, value in words.items():
        text = text.replace("{" + word + "}", str(value))
    return text


def fail(op: str, must: str, got: object) -> NoReturn:
    """Raises the house's ValueError."""
    raise ValueError(f"{op}: {must}, got {got}")


def prepare_operands(
    op: str,
    rank: int,
    input: Tensor,
    *,
    any_dtype: bool = False,
    mixed: bool = False,
    called: str = "input",
    **others: Tensor | None,
) -> tuple[Any, ...]:
    """The operands, checked and cast: ``input`` with a batch axis first, then ``others`` in order (None stays None).

    Under autocast, floating operands other than float64 take the autocast dtype, as torch's convolutions do. ``mixed`` lets the
    others have another served dtype than the input; ``called`` is the input's name in error messages.

    Raises:
        TypeError: An operand is not a dense tensor, or its dtype is not served.
        ValueError: The number of axes is wrong, or dtypes or devices differ.
    """
    check_dense(op, called, input)
    if input.dim() not in (rank + 1, rank + 2):
        fail(op, f"{called} must have {rank + 2} axes, or {rank + 1} without the batch", f"shape {tuple(input.shape)}")
    for name, other in others.items():
        if other is None and name.endswith(_MAY_BE_MISSING):
            continue
        check_dense(op, name, other)
        assert other is not None
        if other.device != input.device:
            fail(op, f"{name} must be on the input's device {input.device}", other.device)
    device = input.device.type
    if _autocasts(device):
        lower = torch.get_autocast_dtype(device)
        input = _lowered(input, lower)
        others = {name: None if other is None else _lowered(other, lower) for name, other in others.items()}
    if input.dtype not in FLOATS and not (any_dtype and _is_torchs_own(input.dtype)):
        served = "float32, float64, bfloat16 or float16" + (", or of complex or whole numbers" if any_dtype else "")
        raise TypeError(f"{op}: {called} must be {served}, got {input.dtype}")
    for name, other in others.items():
        if other is not None and other.dtype != input.dtype:
            _refuse_dtype(op, name, other, input, mixed)
    return (input if input.dim() == rank + 2 else input.unsqueeze(0), *others.values())


def _is_torchs_own(dtype: torch.dtype) -> bool:
    """Complex and whole numbers, which the drop-ins hand to torch as they are."""
    return dtype.is_complex or not (dtype.is_floating_point or dtype == torch.bool)


_MAY_BE_MISSING = ("bias", "mask", "states", "out")  # how the names of operands end that may be None


def check_dense(op: str, name: str, x: Any) -> None:
    """Raises TypeError unless an operand is a tensor with one number at every place of its shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    if x.is_nested or x.is_quantized:
        raise TypeError(f"{op}: {name} must be a dense Tensor, got a {'nested' if x.is_nested else 'quantized'} one")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense Tensor, got {x.layout}")


def check_flags(op: str, **flags: bool) -> None:
    """Raises TypeError unless every setting is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {value!r}")


def _refuse_dtype(op: str, name: str, other: Tensor, input: Tensor, mixed: bool) -> None:
    if not mixed:
        fail(op, f"{name} must have the input's dtype {input.dtype}", other.dtype)
    if other.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {other.dtype}")


def _autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # torch raises for meta


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def check_weight(op: str, x: Tensor, weight: Tensor, groups: int, name: str = "weight", in_axis: int = 1) -> None:
    """Checks (O, C/G, K…), or (C, O/G, K…) with ``in_axis=0``, against the channels of ``x`` and the groups.

    Raises:
        TypeError: ``groups`` is not an int.
        ValueError: The shapes do not agree.
    """
    channels = x.shape[1]
    if not is_integer(groups):
        raise TypeError(f"{op}: groups must be an int, got {groups!r}")
    if groups < 1:
        fail(op, "groups must be at least 1", groups)
    if weight.dim() != x.dim():
        fail(op, f"{name} must have {x.dim()} axes", f"shape {tuple(weight.shape)}")
    if weight.shape[1 - in_axis] < 1:
        fail(op, f"{name} must have at least one output channel", f"shape {tuple(weight.shape)}")
    if channels % groups or weight.shape[0] % groups:
        fail(
            op,
            f"groups must divide the input's {channels} channels and axis 0 of {name}",
            f"{groups} for shape {tuple(weight.shape)}",
        )
    expected = channels // groups if in_axis else channels
    if weight.shape[in_axis] != expected:
        fail(
            op,
            f"{name} must have {expected} in axis {in_axis} for {channels} input channels in {groups} groups",
            tuple(weight.shape),
        )


def check_bias(op: str, bias: Tensor | None, channels: int, name: str = "bias") -> None:
    """Raises ValueError unless ``bias`` is None or has one number per channel."""
    if bias is not None and bias.shape != (channels,):
        fail(op, f"{name} must have shape ({channels},)", tuple(bias.shape))


def accumulated_in(x: Tensor) -> torch.dtype:
    """The dtype the arithmetic runs in: float32 for half types on the CPU, whose own kernels crawl, else the dtype itself."""
    return torch.float32 if x.dtype in _HALVES and x.device.type == "cpu" else x.dtype


def finalize_output(
    input: Tensor,
    rank: int,
    compute: Callable[..., Tensor],
    operands: Sequence[Tensor | None],
    *settings: Any,
    activation: str | None = None,
) -> Tensor:
    """``activation(compute(*operands, *settings))`` as the caller expects it.

    Half types are widened once and rounded once; the result has the memory format of :mod:`omniconv.layout` and no batch axis
    where ``input``, the tensor as the caller gave it, had none.
    """
    x = operands[0]
    assert x is not None
    wide, narrow = accumulated_in(x), x.dtype
    if wide != narrow:
        operands = [None if t is None else t.to(wide) for t in operands]
    device = x.device.type
    if _autocasts(device):
        with torch.autocast(device, enabled=False):
            y = activate(compute(*operands, *settings), activation)
    else:
        y = activate(compute(*operands, *settings), activation)
    if wide != narrow:
        y = y.to(narrow)
    y = arrange(y, is_channels_last(x))
    return y if input.dim() == rank + 2 else y.squeeze(0)
