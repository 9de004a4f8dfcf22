"""Models of timm and torchvision by name, with random weights and the inputs that their configurations state."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from omniconv.analysis._users_code import Call, call_factory, near, one_line


@dataclass(frozen=True)
class Loaded:
    """A module, where it came from in words, and the shapes of the inputs it is meant for, if they are known."""

    module: nn.Module
    source: str
    inputs: tuple[tuple[int, ...], ...] = ()


def _package(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    except ModuleNotFoundError as error:
        if error.name in ("timm", "torchvision"):
            said = f"{name}:NAME needs the extra 'models' (pip install \"omniconv[models]\"), got no {error.name}"
            raise ValueError(said) from error
        raise ValueError(f"{name} must import, got {one_line(error)}") from error
    except Exception as error:  # such as a torchvision that was built for another torch
        raise ValueError(f"{name} must import, got {one_line(error)}") from error


def _made(call: Call, factory: Callable[..., Any]) -> nn.Module:
    for name in call.arguments:
        if name.startswith(("pretrained", "weights", "checkpoint")):
            raise ValueError(f"a model must be made with random weights, for nothing is ever downloaded, got {name}=")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on models that were renamed
        return call_factory(factory, call)


def load_timm(call: Call) -> Loaded:
    """A model of timm by its name, without or with the tag of its weights."""
    timm = _package("timm")
    if not timm.is_model(call.name):
        raise ValueError(f"the model must be one of timm.list_models(), got {call.name!r}{near(call.name, timm.list_models())}")
    module = _made(call, lambda **arguments: timm.create_model(call.name, pretrained=False, **arguments))
    size = (getattr(module, "pretrained_cfg", None) or {}).get("input_size")
    return Loaded(module, f"timm {timm.__version__}", ((1, *size),) if size else ())


# torchvision's truncated normals take seconds and a warning; what is counted does not depend on them
_SLOW_TO_INITIALISE = ("googlenet", "inception_v3")


def load_torchvision(call: Call) -> Loaded:
    """A model of torchvision by its name."""
    torchvision = _package("torchvision")
    known = torchvision.models.list_models()
    if call.name not in known:
        raise ValueError(f"the model must be one of torchvision.models.list_models(), got {call.name!r}{near(call.name, known)}")
    builder = torchvision.models.get_model_builder(call.name)
    settings: dict[str, Any] = {n: None for n in ("weights", "weights_backbone") if n in inspect.signature(builder).parameters}
    if call.name in _SLOW_TO_INITIALISE:
        settings["init_weights"] = False
    module = _made(call, lambda **arguments: builder(**settings, **arguments))
    weights = torchvision.models.get_model_weights(call.name)
    preset = weights.DEFAULT.transforms if len(weights) else None
    return Loaded(module, f"torchvision {torchvision.__version__}", _preset_inputs(preset, module))


def _preset_inputs(preset: Any, module: nn.Module) -> tuple[tuple[int, ...], ...]:
    """What the preprocessing of the published weights gives: ImageClassification(crop_size=224) and its kin."""
    kind = getattr(getattr(preset, "func", preset), "__name__", "ImageClassification")
    settings = getattr(preset, "keywords", {})
    size = getattr(module, "image_size", None) or settings.get("crop_size") or settings.get("resize_size") or 224
    if kind == "VideoClassification":
        clip = getattr(module, "temporal_size", 16)
        return ((1, 3, clip, *(size if isinstance(size, (tuple, list)) else (size, size))),)
    if kind == "OpticalFlow":  # the size of its published error, in multiples of eight
        return ((1, 3, 520, 960),) * 2
    if kind == "ObjectDetection":  # the short side its transform resizes to
        return ((1, 3, 800, 800),)
    side = size[0] if isinstance(size, (tuple, list)) else size
    return ((1, 3, side, side),)
