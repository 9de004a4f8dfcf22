"""Receptive fields of what a target text names."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from omniconv.analysis import targets
from omniconv.analysis._users_code import one_line
from omniconv.analysis.receptive_field.effective import EffectiveReceptiveField, effective_receptive_field
from omniconv.analysis.receptive_field.field import receptive_field, receptive_fields
from omniconv.analysis.receptive_field.result import ReceptiveField


@dataclass(frozen=True)
class FieldReport:
    """The fields of a network's layers, in the order in which they return, and what the last of them reacts to, if asked."""

    target: str
    inputs: tuple[str, ...]
    layers: tuple[ReceptiveField, ...]
    effective: EffectiveReceptiveField | None = None


def field_report(
    target: str,
    *,
    input: Sequence[str] | str = (),
    layers: Sequence[str] | None = None,
    position: str | None = None,
    local: bool = False,
    samples: int = 0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> FieldReport:
    """Receptive fields of the layers of what a text names.

    Args:
        target: One of the forms of :mod:`omniconv.analysis.targets`, but an ONNX file.
        input: Example inputs, as ``1x3x224x224[:dtype]``.
        layers: Dotted names; by default the children of the network and its output.
        position: Of the one layer, or of the output if none is named, as ``3x4``: one index per axis.
        local: As for :func:`receptive_field`.
        samples: Random inputs of the effective field; 0 measures none.
        seed: Of these.
        progress: Called with the number of random inputs done.

    Raises:
        ValueError: The target, an input, a layer or the position is not there.

    Example:
        >>> report = field_report("dilated2d c4 i32 k3 d3 psame")
        >>> report.layers[-1].size, round(report.layers[-1].gridding, 3)
        ((7, 7), 0.816)
    """
    caller = "receptive-field"
    if position is not None and not re.fullmatch(r"\d+(x\d+)*", position):
        raise ValueError(f"{caller}: the position must be one index per axis joined by x, as 3x4, got {position!r}")
    if position is not None and layers is not None and len(layers) != 1:
        raise ValueError(f"{caller}: a position must come with one layer, got {len(layers)}")
    if samples < 0:
        raise ValueError(f"{caller}: the samples must be at least 1, got {samples}")
    found = targets.load(target, input=input, caller=caller)
    module = found.network()
    args, named = found.example_inputs()
    where = None if position is None else tuple(map(int, position.split("x")))
    last: int | str = layers[-1] if layers else 0
    with _run(caller):
        if position is not None:
            fields: tuple[ReceptiveField, ...] = (
                receptive_field(module, *args, of=last, position=where, named=named, local=local),
            )
        else:
            fields = receptive_fields(module, *args, layers=layers, named=named, local=local)
            if layers is None:
                fields = (*fields, receptive_field(module, *args, named=named, local=local))
        effective = None
        if samples:
            effective = effective_receptive_field(
                module, *args, of=last, position=where, named=named, samples=samples, seed=seed, progress=progress
            )
    return FieldReport(found.source, tuple(map(str, found.inputs)), fields, effective)


@contextlib.contextmanager
def _run(caller: str) -> Iterator[None]:
    """Whatever a network raises, in one line."""
    try:
        yield
    except Exception as error:  # a network may raise anything
        if isinstance(error, ValueError) and str(error).startswith(("receptive_field:", "effective_receptive_field:")):
            raise
        raise ValueError(f"{caller}: the network must run on its example inputs, got {one_line(error)}") from error
