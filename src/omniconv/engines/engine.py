"""The machinery of every native engine: the calls it takes, plans of calls that passed their checks, gradients, raw operators.

A raw operator is one of the native library's; people never call it. An :class:`Engine` is a family of raw operators with what
torch needs around them: the ordered reasons that send a call to the composite path, the forward, and the gradients.
"""

from collections.abc import Callable, Hashable, Sequence
from inspect import Parameter, Signature
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from omniconv import _native, settings
from omniconv.geometry import Grid
from omniconv.layout import is_channels_last
from omniconv.ops.activation import activate, followed_apart
from omniconv.ops.grid import is_plain
from omniconv.ops.operator import accumulated_in

ACTIVATION_CODES = {None: 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4, "gelu": 5, "sigmoid": 6}
_CURVED = ("silu", "gelu", "sigmoid")  # in float64 these are torch's, on the result
_OF_RESULT = ("relu", "relu6", "sigmoid")  # their derivative is a function of their result

Windows = Grid | None
Reason = tuple[str, Callable[[Tensor, Tensor, Tensor | None, Windows], bool]]


def wants_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Returns whether autograd would record an operator of these operands."""
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))


def is_transformed() -> bool:
    """Returns whether a torch.func transform or forward-mode differentiation is active."""
    # the dispatcher's own functions, which the tracer knows; a raw operator has neither a tangent nor a batching rule
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def fused_activation(x: Tensor, activation: str | None) -> str | None:
    """Returns the activation if the kernels can end with it, and None if torch must follow."""
    return activation if x.dtype != torch.float64 or activation not in _CURVED else None


def unfused_reason(weight: Tensor, *activations: str | None) -> str | None:
    """Returns why torch's activations after a kernel may give other bits in chunks, or None."""
    reasons = (None if fused_activation(weight, a) == a else followed_apart(a) for a in activations)
    return next(filter(None, reasons), None)


# in order; the first that holds sends a call to the composite path, an engine's own come between the two
_FIRST: tuple[Reason, ...] = (
    ("the native library is not there", lambda x, w, b, g: not _native.AVAILABLE),
    ("composite paths were asked for", lambda x, w, b, g: settings.is_composite_only()),
    ("the tensors are not on the CPU", lambda x, w, b, g: x.device.type != "cpu"),
    ("there are no samples, channels, positions or taps", lambda x, w, b, g: 0 in x.shape or 0 in w.shape),
)
_LAST: tuple[Reason, ...] = (
    ("a torch.func transform or forward-mode differentiation is active", lambda x, w, b, g: is_transformed()),
    (
        "a gradient is wanted through reflect, replicate or circular padding in a call that is being compiled",
        lambda x, w, b, g: g is not None and g.mode != "zeros" and torch.compiler.is_compiling() and wants_gradient(x, w, b),
    ),
)


class Engine:
    """A family of native kernels: which calls it takes, its forward and its gradients.

    Operands are (x, weight, bias, …), those that follow without a gradient. ``plan`` is what the kernels need to know of a call
    besides them: a tuple of numbers, made once; its ``mode`` is the place of the padding mode, 0 for zeros. A packed weight,
    once there is one, is a further operand.

    Args:
        name: The family's.
        when: Which calls end in it, for people.
        own: Its own reasons to leave a call to the composite path.
        padded: Whether its calls have windows with padding modes.
    """

    def __init__(self, name: str, when: str, own: Sequence[Reason] = (), padded: bool = True) -> None:
        self.name, self.when = name, when
        self.unsupported: tuple[Reason, ...] = (*_FIRST, *own, *_LAST[: None if padded else 1])

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons to leave a call to the composite path, in order."""
        return tuple(reason for reason, _ in self.unsupported)

    def unsupported_reason(self, x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows = None) -> str | None:
        """Returns the reason why the native kernels cannot run this call, or None."""
        for reason, holds in self.unsupported:
            if holds(x, weight, bias, windows):
                return reason
        return None

    def run_native(self, plan: Any, activation: str | None, *operands: Tensor | None) -> Tensor:
        """Returns ``activation`` of the operator for a call that is checked and supported, recorded where a gradient is wanted.

        A recorded call has the bits of one that is not: the same kernel makes both, and rounds once.
        """
        x, weight, bias = operands[:3]
        assert x is not None
        assert weight is not None
        fused, flush = fused_activation(x, activation), not settings.is_precise()
        if wants_gradient(x, weight, bias):
            y: Tensor = _Recorded.apply(self, plan, fused, flush, *operands)
        else:
            y = self.forward(plan, ACTIVATION_CODES[fused], flush, *operands)
        return y if fused is activation else activate(y, activation)

    def forward(self, plan: Any, activation: int, flush: bool, *operands: Any) -> Tensor:
        """Returns what the kernels make of the operands."""
        raise NotImplementedError

    def gradients(
        self, plan: Any, flush: bool, grad_y: Tensor, needed: Sequence[bool], *operands: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients of x, weight and bias where needed, by the kernels, which know zeros for padding alone."""
        raise NotImplementedError

    def composite(self, plan: Any, *operands: Any) -> Tensor:
        """Returns the operator by torch's own, of which gradients have gradients."""
        raise NotImplementedError


class _Recorded(torch.autograd.Function):
    """An engine's call under autograd."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, plan: Any, activation: str | None, flush: bool, *operands: Tensor | None) -> Tensor:
        y = engine.forward(plan, ACTIVATION_CODES[activation], flush, *operands)
        ctx.save_for_backward(*operands, y if activation in _OF_RESULT else None)
        ctx.engine, ctx.plan, ctx.activation, ctx.flush = engine, plan, activation, flush
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        engine, plan, activation, flush = ctx.engine, ctx.plan, ctx.activation, ctx.flush
        *operands, y = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:7]
        rest = (None,) * (len(operands) - 3)
        if torch.is_grad_enabled() or plan.mode:  # enabled: the gradient of this gradient is wanted
            return None, None, None, None, *_differentiable(engine, plan, activation, grad_y, needed, operands), *rest
        if activation is not None:
            # what an activation was applied to is made again rather than kept: one forward, against a tensor of the result's size
            before = y if y is not None else engine.forward(plan, 0, flush, *operands)
            grad_y = _ACTIVATION_GRAD(grad_y, before, ACTIVATION_CODES[activation], flush)
        return None, None, None, None, *engine.gradients(plan, flush, grad_y, needed, *operands), *rest


def _differentiable(
    engine: Engine, plan: Any, activation: str | None, grad_y: Tensor, needed: Sequence[bool], operands: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """Returns the gradients by the composite path; where they are recorded, autograd can differentiate them again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # by aliases of their own: operands may depend on one another, and hooks on them must not run here
        aliases = tuple(None if t is None else t.view_as(t) for t in operands[:3])
        wide = accumulated_in(operands[0])
        y = engine.composite(plan, *(None if t is None else t.to(wide) for t in aliases), *operands[3:])
        y = activate(y, activation).to(operands[0].dtype)
        wanted = [t for t, need in zip(aliases, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=create_graph))
    return tuple(next(found) if need else None for need in needed)


class CallPlan(NamedTuple):
    """The way to run a call that passed its checks, found from shapes and settings alone.

    ``run(plan, activation, input, weight, bias)`` takes all calls like it.
    """

    run: Callable[..., Tensor]
    plan: Any


_PLAIN = frozenset((Tensor, torch.nn.Parameter))  # subclasses have ways of their own
_MOST = 4096  # plans, then all are forgotten: shapes that vary without end must not grow memory
_plans: dict[Hashable, CallPlan] = {}


def plan_key(
    op: Hashable,
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    mode: Any,
    activation: Any,
    more: Any = None,
) -> Hashable:
    """Returns what all checks of a call depend on, or None where they have to be made.

    To look a call up takes a third of the time of checking it (2.5 and 8 µs; the raw operator takes 4.7).
    """
    if torch.compiler.is_compiling() or type(input) not in _PLAIN or type(weight) not in _PLAIN:
        return None
    dtype = input.dtype
    if not (
        weight.dtype is dtype
        and input.is_cpu
        and weight.is_cpu
        and input.layout is weight.layout is torch.strided
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
        and not settings.is_composite_only()
        # 1 is equal to True and 1.0, which are refused
        and (type(stride) is int or is_plain(stride))
        and (type(padding) is int or is_plain(padding))
        and (type(dilation) is int or is_plain(dilation))
    ):
        return None
    try:
        if bias is None:
            return op, input.shape, weight.shape, None, dtype, stride, padding, dilation, mode, activation, more
        if type(bias) in _PLAIN and bias.dtype is dtype and bias.is_cpu and bias.layout is torch.strided:
            return op, input.shape, weight.shape, bias.shape, dtype, stride, padding, dilation, mode, activation, more
    except RuntimeError:  # a nested tensor has no shape; it is refused by name
        pass
    return None


def lookup_plan(key: Hashable) -> CallPlan | None:
    """Returns the plan of a call like one before, or None."""
    try:
        return _plans.get(key)
    except TypeError:  # a setting has no hash
        return None


def cache_plan(key: Hashable, plan: CallPlan) -> None:
    """Keeps the plan of a call that passed its checks; of ``None`` for a key, which no call has, nothing is kept.

    >>> plan = CallPlan(max, ())
    >>> cache_plan(("example", 3), plan)
    >>> lookup_plan(("example", 3)) is plan, lookup_plan(("example", [])), lookup_plan(None)
    (True, None, None)
    """
    if key is None:
        return
    if len(_plans) >= _MOST:
        _plans.clear()
    _plans[key] = plan


def raw_op(name: str, result: Callable[[Any], Any], flops: Callable[[Any, Any], int] | None = None) -> Any:
    """Returns a raw operator, bound once, after telling torch what it makes and what work that is; None without the library.

    Args:
        name: Its name in the native library.
        result: Makes an empty result of the operands; they are attributes by their names in the schema.
        flops: The number of floating-point operations, from the shapes of the operands and of the result.
    """
    if not _native.AVAILABLE:
        return None
    packet = getattr(torch.ops.omniconv, name)
    overload = packet.default
    signature = Signature([Parameter(a.name, Parameter.POSITIONAL_OR_KEYWORD) for a in overload._schema.arguments])

    def fake(*args: Any, **kwargs: Any) -> Any:
        return result(SimpleNamespace(**signature.bind(*args, **kwargs).arguments))

    def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        assert flops is not None
        return flops(SimpleNamespace(**signature.bind(*args, **kwargs).arguments), out_shape)

    torch.library.register_fake(f"omniconv::{name}", fake)
    if flops is not None:
        register_flop_formula(packet)(formula)
    return overload  # to look it up at every call costs a microsecond


def _empty_activation_grad(a: Any) -> Tensor:
    if is_channels_last(a.value) and is_channels_last(a.grad_y):
        return torch.empty_like(a.value)
    return a.value.new_empty(a.value.shape)


_ACTIVATION_GRAD = raw_op("activation_grad", _empty_activation_grad)
