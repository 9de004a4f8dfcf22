"""The problems that every technique is verified on: all it takes, crossed."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from omniconv.geometry import PADDING_MODES
from omniconv.problem import Problem
from omniconv.techniques import Technique

# sizes that no stride divides, kernels that differ by axis, even and odd
_SIZES = {1: (11,), 2: (8, 7), 3: (5, 6, 4)}
_KERNELS = {1: (4,), 2: (3, 2), 3: (2, 3, 2)}
_MIXED = {1: (3,), 2: (2, 1), 3: (2, 1, 3)}

_CHANNELS, _OUT = 4, 8


def _paddings(rank: int) -> tuple[tuple[Any, str], ...]:
    """Every kind of padding: none, even, uneven, wider than a window, by name; other modes than zeros with one of them."""
    by_name = ("valid", "same", "same_minimal", *(("causal",) if rank == 1 else ()))
    uneven = ((1, 2), (0, 1), (2, 0))[:rank]
    numbers = (((0, 0),) * rank, ((1, 1),) * rank, uneven, ((3, 4),) * rank)
    zeros = tuple((padding, "zeros") for padding in (*by_name, *numbers))
    return zeros + tuple((uneven, mode) for mode in ("reflect", "replicate", "circular"))


def _settings(technique: Technique, rank: int) -> dict[str, tuple[Any, ...]]:
    """For every field that the technique takes, the values that it is given."""
    ones, mixed = (1,) * rank, _MIXED[rank]
    choices: dict[str, tuple[Any, ...]] = {
        "kernel": (_KERNELS[rank],),
        "stride": (ones, (2,) * rank, mixed[::-1]),
        "dilation": (ones, (2,) * rank, mixed),
        "groups": (1, 2, _CHANNELS),
        "out_channels": (_OUT,),
        "multiplier": (None, 2),
        "heads": (2,),
        "offset_groups": (1, 2),
        "output_padding": ((0,) * rank, ones),
    }
    return {name: values for name, values in choices.items() if name in technique.takes}


def problems(technique: Technique) -> Iterator[Problem]:
    """Every rank, stride, dilation, group and padding that the technique takes, crossed; what does not fit together is left out.

    >>> from omniconv.techniques import find
    >>> len(list(problems(find("pointwise"))))
    9
    """
    for rank in technique.ranks:
        settings = _settings(technique, rank)
        unset = ((0, 0),) * rank
        paddings = _paddings(rank) if "padding" in technique.takes else tuple((unset, mode) for mode in PADDING_MODES)
        for (padding, mode), values in product(paddings, product(*settings.values())):
            if mode != "zeros" and "padding_mode" not in technique.takes:
                continue
            problem = Problem(
                technique.name, _CHANNELS, _SIZES[rank], padding=padding, padding_mode=mode,
                **dict(zip(settings, values, strict=True)),
            )  # fmt: skip
            if _fits(technique, problem):
                yield problem


def _fits(technique: Technique, problem: Problem) -> bool:
    try:
        technique.check(problem)
    except ValueError:
        return False
    return True
