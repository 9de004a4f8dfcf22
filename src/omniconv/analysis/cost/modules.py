"""Which module of a network is running, and what it returned."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from omniconv.analysis.cost.calls import base_name, tensors_in
from omniconv.analysis.cost.result import Shapes


class Modules:
    """Follows a network by hooks that are removed on leaving.

    >>> network = nn.Sequential(nn.ReLU())
    >>> with Modules(network) as modules:
    ...     _ = network(torch.ones(2))
    >>> modules.calls["0"], modules.outputs["0"], len(network[0]._forward_hooks)
    (1, ((2,),), 0)
    """

    def __init__(self, root: nn.Module | None) -> None:
        self.modules = {} if root is None else dict(root.named_modules())
        self.types = {name: type(module).__name__ for name, module in self.modules.items()}
        self.running: list[str] = []
        self.calls = dict.fromkeys(self.modules, 0)
        self.outputs: dict[str, Shapes] = dict.fromkeys(self.modules, ())
        self.stopped: str | None = None  # the innermost that an error left
        self._hooks: list[Any] = []

    def __enter__(self) -> "Modules":
        for name, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks: what it does is its parent's
                continue
            self._hooks.append(module.register_forward_pre_hook(self._entered(name), prepend=True))
            self._hooks.append(module.register_forward_hook(self._left(name), always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _entered(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.running.append(name)
            self.stopped = None

        return hook

    def _left(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.running.pop()
            self.calls[name] += 1
            if output is None and self.stopped is None:
                self.stopped = name
            self.outputs[name] = tuple(tuple(t.shape) for t in tensors_in(output))

        return hook

    @property
    def name(self) -> str:
        """The path of the innermost that is running."""
        return self.running[-1] if self.running else ""

    def kind_of(self, name: str, op: str) -> str:
        """What a row is called: the class of a leaf, or of an omniconv layer whose op it is; else the op."""
        module = self.modules.get(name)
        if module is None:
            return base_name(op)
        is_omniconv = hasattr(module, "technique") and op.startswith("omniconv::")
        return self.types[name] if is_omniconv or not any(True for _ in module.children()) else base_name(op)
