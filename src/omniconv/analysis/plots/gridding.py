"""Which positions a stack of convolutions sees: lattices with holes, side by side."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from omniconv.analysis.plots.style import COLOURS, FAINT, PAPER, figure, styled
from omniconv.analysis.receptive_field import ReceptiveField

_LINED = 48  # positions of a side up to which each is drawn as a cell of its own


def gridding(fields: Mapping[str, ReceptiveField]) -> Any:
    """The seen positions of each field's box, over two axes, and the paths along the middle row below.

    >>> import torch
    >>> from omniconv.analysis.receptive_field import receptive_field
    >>> drawn = gridding({"d 2": receptive_field(torch.nn.Conv2d(1, 1, 3, dilation=2), torch.empty(1, 1, 16, 16))})
    >>> [axes.get_title(loc="left") for axes in drawn.axes]
    ['d 2', '']
    """
    from matplotlib.colors import ListedColormap

    with styled():
        drawn = figure(3.1 * len(fields) + 0.6, 4.6)
        rows = drawn.subplots(2, len(fields), squeeze=False, height_ratios=(3, 1))
        for column, (name, field) in enumerate(fields.items()):
            above, below = rows[0][column], rows[1][column]
            mask, paths = np.atleast_2d(field.mask), np.atleast_2d(field.paths)
            line = 0.6 if max(mask.shape) <= _LINED else 0.0
            colours = ListedColormap([FAINT, COLOURS[0]])
            above.pcolormesh(mask, cmap=colours, vmin=0, vmax=1, edgecolors=PAPER, linewidth=line, antialiased=line > 0)
            above.set_aspect("equal")
            above.invert_yaxis()
            above.set_title(name)
            above.set_xlabel(f"{' × '.join(map(str, mask.shape))}: {field.coverage:.0%} seen\nunevenness {field.unevenness:.2f}")
            above.set_xticks([])
            above.set_yticks([])
            middle = paths[int(np.argmax(paths.sum(1)))]
            below.bar(np.arange(len(middle)), middle / middle.max(initial=1.0), width=1.0, color=COLOURS[1])
            below.set_xlim(-0.5, len(middle) - 0.5)
            below.set_xticks([])
            below.set_yticks([])
            below.set_xlabel("paths, richest row")
    return drawn
