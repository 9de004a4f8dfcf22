"""Runs that leave a model, and everything torch keeps beside it, exactly as it was."""

import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# what a module keeps in dictionaries of its own, which hooks, and code that sets attributes, change
_BOOKS = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@contextmanager
def untouched(module: nn.Module | None = None, *, weights: bool = True) -> Iterator[None]:
    """Puts everything back on leaving, however it is left: by an error, or by an interruption, too.

    Of the module: hooks, parameters and buffers (which tensors, and their numbers), submodules, attributes, training mode of
    every part, gradients and ``requires_grad``. Of torch: random states (Python's and NumPy's too), number of threads, grad mode,
    default dtype, autocast's switches, deterministic mode and the attention fast path.

    Args:
        module: What is going to be run; None guards what is torch's alone.
        weights: Whether parameters are copied so that they can be put back; buffers always are. False is for runs that cannot
            change them.

    Example:
        >>> layer = torch.nn.BatchNorm1d(2)
        >>> with untouched(layer):
        ...     _ = layer(torch.ones(3, 2)), layer.eval()
        >>> layer.num_batches_tracked.item(), layer.training
        (0, True)
    """
    restores = _torchs_own() + ([] if module is None else _modules_own(module, weights))
    try:
        yield
    finally:
        with _uninterrupted(), ExitStack() as stack:
            for restore in restores:
                stack.callback(restore)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end; only the main thread hears it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda *what: heard.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard and callable(before):
            before(*heard[0])


def _torchs_own() -> list[Callable[[], None]]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    grad, deterministic = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fast, generator, pythons = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state(), random.getstate()
    cast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")}

    def cast_again() -> None:
        for kind, (enabled, lower) in cast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, lower)

    restores = [
        lambda: torch.set_rng_state(generator),
        lambda: random.setstate(pythons),
        lambda: torch.set_num_threads(threads) if torch.get_num_threads() != threads else None,
        lambda: torch.set_default_dtype(dtype),
        lambda: torch._C._set_grad_enabled(grad),
        lambda: torch.use_deterministic_algorithms(deterministic, warn_only=warns),
        lambda: torch.backends.mha.set_fastpath_enabled(fast),
        cast_again,
    ]
    if torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        restores.append(lambda: torch.cuda.set_rng_state_all(states))
    if "numpy" in sys.modules:
        numpy_random = sys.modules["numpy"].random
        state = numpy_random.get_state()
        restores.append(lambda: numpy_random.set_state(state))
    return restores


def _modules_own(module: nn.Module, weights: bool) -> list[Callable[[], None]]:
    restores: list[Callable[[], None]] = []
    tensors: dict[int, Tensor] = {}
    for part in module.modules():
        restores.append(_training(part) if isinstance(part, torch.jit.ScriptModule) else _attributes(part))
        tensors |= {id(x): x for x in [*part._parameters.values(), *part._buffers.values()] if x is not None}
        tensors |= {id(x): x for x in vars(part).values() if isinstance(x, Tensor)}
    restores += [_tensor(x, weights or not isinstance(x, nn.Parameter)) for x in tensors.values()]
    return restores


def _training(part: nn.Module) -> Callable[[], None]:
    """The mode of a part that is not Python's, and whose books are views of what it has."""
    training = part.training

    def restore() -> None:
        if part.training != training:
            part.training = training

    return restore


def _attributes(part: nn.Module) -> Callable[[], None]:
    """All that hangs on one module; of containers, what is in them."""
    attributes = dict(vars(part))
    contents = {name: type(value)(value) for name, value in attributes.items() if name in _BOOKS}

    def restore() -> None:
        _set_back(vars(part), attributes)
        for name, content in contents.items():
            if isinstance(content, dict):
                _set_back(attributes[name], content)
            elif attributes[name] != content:
                attributes[name].clear()
                attributes[name].update(content)

    return restore


def _set_back(book: dict[Any, Any], before: dict[Any, Any]) -> None:
    """The same entries in the same order; nothing is written where nothing changed."""
    if len(book) == len(before) and all(k is i and v is j for (k, v), (i, j) in zip(book.items(), before.items(), strict=True)):
        return
    book.clear()
    book.update(before)


def _tensor(x: Tensor, numbers: bool) -> Callable[[], None]:
    """Gradient and switch of one tensor, and its numbers if they are kept."""
    wants, leaf = x.requires_grad, x.is_leaf
    gradient = x.grad if leaf else None
    gradients = None if gradient is None else gradient.detach().clone()
    kept = x.detach().clone() if numbers and not x.is_meta and not is_lazy(x) else None

    def restore() -> None:
        with torch.no_grad():
            if kept is not None and not _same(x, kept):
                x.detach().copy_(kept)
            if leaf:
                if x.requires_grad != wants:
                    x.requires_grad_(wants)
                x.grad = gradient
            if gradient is not None and gradients is not None and not _same(gradient, gradients):
                gradient.detach().copy_(gradients)

    return restore


def _same(x: Any, kept: Tensor) -> bool:
    return bool(torch.equal(x.detach(), kept))
