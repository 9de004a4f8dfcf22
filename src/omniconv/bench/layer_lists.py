"""The layers that are measured: ``shapes/<technique>.txt``, by network.

A line is a Problem; ``# network: NAME`` begins the layers of a network; what else follows a ``#`` is for people.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from omniconv.problem import Problem
from omniconv.techniques import TECHNIQUES, Technique, find, parse

SHAPES = Path(__file__).parent / "shapes"

_NETWORK = re.compile(r"#\s*network:\s*(.*?)\s*")


@dataclass(frozen=True)
class NetworkLayer:
    """One layer of a network."""

    network: str
    problem: Problem


def measurable() -> tuple[str, ...]:
    """The techniques that have layers to measure.

    >>> "depthwise" in measurable()
    True
    """
    return tuple(t.name for t in TECHNIQUES if (SHAPES / f"{t.name}.txt").exists())


def read_layers(name: str, *, dtype: str | None = None, only: str | None = None) -> tuple[Technique, tuple[NetworkLayer, ...]]:
    """A technique and its layers, in the order of its file, each once.

    Args:
        name: The technique's.
        dtype: Of all layers, in place of their own.
        only: Keeps the layers in whose network or problem this text occurs, in any case.

    Raises:
        ValueError: The technique has no layers, the file is malformed or nothing is left.
    """
    if name not in measurable():
        raise ValueError(f"bench: the technique must be one of {', '.join(measurable())}, got {name!r}")
    layers = parse_layers((SHAPES / f"{name}.txt").read_text(encoding="utf-8"), name)
    if dtype is not None:
        layers = tuple(NetworkLayer(layer.network, layer.problem.replace(dtype=dtype)) for layer in layers)
    if only is not None:
        layers = tuple(layer for layer in layers if only.lower() in f"{layer.network}\n{layer.problem}".lower())
        if not layers:
            raise ValueError(f"bench: 'only' must occur in a network or a problem of {name}, got {only!r}")
    return find(name), tuple({layer.problem: layer for layer in reversed(layers)}.values())[::-1]


def parse_layers(text: str, technique: str) -> tuple[NetworkLayer, ...]:
    r"""The layers that a text describes.

    Raises:
        ValueError: A line is malformed, is of another technique or has no network; the message names the line.

    >>> [layer.network for layer in parse_layers("# network: MobileNetV1\ndepthwise2d c32 i112 k3 p1  # first", "depthwise")]
    ['MobileNetV1']
    """
    layers, network = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        header = _NETWORK.fullmatch(line.strip())
        if header:
            network = header[1]
        if not line.split("#", 1)[0].strip():
            continue
        try:
            found, problem = parse(line)
        except ValueError as error:
            raise ValueError(f"bench: line {number}: {error}") from None
        if found.name != technique:
            raise ValueError(f"bench: line {number}: the technique must be {technique}, got {line.strip()!r}")
        if not network:
            raise ValueError(f"bench: line {number}: a layer must follow a line '# network: NAME', got {line.strip()!r}")
        layers.append(NetworkLayer(network, problem))
    return tuple(layers)
