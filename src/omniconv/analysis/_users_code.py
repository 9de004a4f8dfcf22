"""Code that is not ours: found, imported and called, and whatever it does wrong said in one line."""

import ast
import contextlib
import copy
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Call:
    """A dotted name and the literal keyword arguments it is called with."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


def one_line(error: BaseException) -> str:
    """An error as its name and the first line of what it says.

    >>> one_line(KeyError("a"))
    "KeyError: 'a'"
    """
    said = str(error).strip().splitlines()
    return type(error).__name__ + (f": {said[0]}" if said else "")


def near(name: str, known: Iterable[str]) -> str:
    """The known names that a name may stand for, in words; nothing where none is near.

    >>> near("resnet5", ["resnet50", "vgg16"])
    ' (near: resnet50)'
    """
    names = difflib.get_close_matches(name, list(known), n=5, cutoff=0.6)
    return f" (near: {', '.join(names)})" if names else ""


def read_call(text: str) -> Call:
    """Reads ``name`` or ``name(width=0.5, norm="batch")``; the values are literals and nothing is evaluated.

    Raises:
        ValueError: It is anything else.

    >>> read_call("build(width=0.5, sizes=[1, 2])")
    Call(name='build', arguments={'width': 0.5, 'sizes': [1, 2]})
    """
    sentence = f"a factory must be a name, with literal keyword arguments if any, as build(width=0.5), got {text!r}"
    name, bracket, _ = text.strip().partition("(")
    if not all(part.isidentifier() or not bracket for part in name.split(".")) or not name:
        raise ValueError(sentence)
    if not bracket:
        return Call(name)
    try:
        call = ast.parse(text.strip(), mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(k.arg is None for k in call.keywords):
            raise ValueError(sentence)
        return Call(name, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (SyntaxError, AssertionError, ValueError, TypeError, RecursionError, MemoryError):
        raise ValueError(sentence) from None


@contextlib.contextmanager
def users_code(folder: Path | None = None) -> Iterator[None]:
    """Where code of the user is imported and called: the current directory on the path, its prints on standard error."""
    places = [*([str(folder.resolve())] if folder is not None else []), str(Path.cwd())]
    sys.path[:0] = places
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for place in places:
            if place in sys.path:
                sys.path.remove(place)


def import_module(name: str) -> ModuleType:
    """The module of that dotted name."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"what stands before the colon must be a module, a file ending in .py, timm or torchvision, got {name!r}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(f"the module must be in the current directory or installed, got {name!r}") from error
        raise ValueError(f"the module {name!r} must import, got {one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"the module {name!r} must import, got {one_line(error)}") from error


def import_file(path: Path) -> ModuleType:
    """The module that a file holds, under a name of its own."""
    if not path.is_file():
        raise ValueError(f"the file must exist, got '{path}'")
    name = f"_omniconv_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise ValueError(f"the file '{path}' must import, got {one_line(error)}") from error
    return module


def find_factory(module: ModuleType, where: str, call: Call) -> Any:
    """What a module has under the (dotted) name."""
    found: Any = module
    for part in call.name.split("."):
        if not hasattr(found, part):
            known = [n for n, value in vars(module).items() if callable(value) or isinstance(value, nn.Module)]
            own = [n for n in known if not n.startswith("_") and getattr(vars(module)[n], "__module__", "") == module.__name__]
            names = near(call.name, known) or (f" (it has {', '.join(own[:8])})" if own else "")
            raise ValueError(f"the factory must be a function or class of '{where}', got {call.name!r}{names}")
        found = getattr(found, part)
    return found


def call_factory(factory: Any, call: Call) -> nn.Module:
    """The module that a factory makes; a module that stands there itself is copied, so that the original stays as it is."""
    if isinstance(factory, nn.Module):
        if call.arguments:
            raise ValueError(f"arguments must go to a function or class, got the module {call.name!r}")
        return copy.deepcopy(factory)
    if not callable(factory):
        raise ValueError(f"the factory must be a function or class, got {call.name!r}, a {type(factory).__name__}")
    try:
        made = factory(**call.arguments)
    except (Exception, SystemExit) as error:
        raise ValueError(f"the factory {call.name!r} must return a module, got {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"the factory {call.name!r} must return a torch.nn.Module, got a {type(made).__name__}")
    return made
