"""Taps of transposed convolutions that land on each output position."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from omniconv.analysis.plots.style import HEAT, figure, styled
from omniconv.analysis.receptive_field import Overlap


def checkerboard(overlaps: Mapping[str, Overlap]) -> Any:
    """The number of taps on every output position, side by side, on one scale.

    >>> from omniconv.analysis.receptive_field import overlap
    >>> drawn = checkerboard({"k3 s2": overlap(6, 3, 2), "k4 s2": overlap(6, 4, 2)})
    >>> [axes.get_title(loc="left") for axes in drawn.axes[:2]]
    ['k3 s2', 'k4 s2']
    """
    with styled():
        drawn = figure(3.2 * len(overlaps) + 0.9, 3.9)
        most = max(int(found.counts.max()) for found in overlaps.values())
        shown: Any = None
        panels = drawn.subplots(1, len(overlaps), squeeze=False)[0]
        for axes, (name, found) in zip(panels, overlaps.items(), strict=True):
            counts = np.atleast_2d(found.counts)
            shown = axes.imshow(counts, cmap=HEAT, vmin=0, vmax=most, interpolation="nearest")
            axes.set_title(name)
            even = f"even: {found.most} everywhere inside" if found.even else f"uneven: {found.fewest} to {found.most} inside"
            axes.set_xlabel(f"{even}\noutput {' × '.join(map(str, counts.shape))}")
            axes.set_xticks([])
            axes.set_yticks([])
        drawn.colorbar(shown, ax=list(panels), shrink=0.8, label="taps", ticks=range(most + 1))
    return drawn
