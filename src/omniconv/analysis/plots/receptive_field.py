"""Receptive fields as heat maps: the paths of every position, and what an output reacts to."""

from typing import Any

import numpy as np

from omniconv.analysis.plots.style import COLOURS, FAINT, HEAT, INK, figure, styled
from omniconv.analysis.receptive_field import EffectiveReceptiveField, ReceptiveField


def receptive_field_map(field: ReceptiveField, effective: EffectiveReceptiveField | None = None) -> Any:
    """Paths of every position of the field's box, holes left white; beside it, if measured, what the output reacts to.

    One axis is drawn as bars, of three the first two are shown through the middle of the third.

    >>> import torch
    >>> from omniconv.analysis.receptive_field import receptive_field
    >>> drawn = receptive_field_map(receptive_field(torch.nn.Conv2d(1, 1, 3, dilation=2), torch.empty(1, 1, 16, 16)))
    >>> drawn.axes[0].get_title(loc="left")
    'Paths to output 0'
    """
    with styled():
        drawn = figure(10.4 if effective is not None else 5.6, 4.8)
        left, *right = drawn.subplots(1, 2 if effective is not None else 1, squeeze=False)[0]
        start = tuple(0.0 if o is None else o for o in field.offset)
        _paths(left, field, start)
        for axes in right:
            assert effective is not None
            _reaction(axes, effective)
    return drawn


def _flat(values: Any) -> Any:
    """At most two axes: the middle of all further ones."""
    while values.ndim > 2:
        values = values[..., values.shape[-1] // 2]
    return values


def _paths(axes: Any, field: ReceptiveField, start: tuple[float, ...]) -> None:
    axes.set_title(f"Paths to {field.of}")
    if not field.mask.size:
        axes.text(0.5, 0.5, "sees nothing", ha="center", transform=axes.transAxes)
        return
    paths = _flat(field.paths / field.paths.max())
    said = f"{' × '.join(map(str, field.mask.shape))} positions, {field.coverage:.0%} seen, unevenness {field.unevenness:.2f}"
    if paths.ndim == 1:
        axes.bar(start[0] + np.arange(len(paths)), paths, width=1.0, color=COLOURS[0])
        axes.set_ylabel("paths, share of the most")
        axes.set_xlabel(f"input position from p·jump on\n{said}")
        return
    _image(axes, np.where(paths > 0, paths, np.nan), start, "paths, share of the most")
    axes.set_xlabel(f"input column from p·jump on\n{said}")
    axes.set_ylabel("input row")


def _image(axes: Any, values: Any, start: tuple[float, ...], label: str) -> None:
    from matplotlib.colors import LogNorm, Normalize

    low = float(np.nanmin(values))
    norm: Any = LogNorm(max(low, 1e-4), 1.0) if low < 0.05 else Normalize(0.0, 1.0)
    extent = (start[1] - 0.5, start[1] + values.shape[1] - 0.5, start[0] + values.shape[0] - 0.5, start[0] - 0.5)
    shown = axes.imshow(values, cmap=HEAT, norm=norm, extent=extent, interpolation="nearest")
    axes.set_facecolor(FAINT if np.isnan(values).any() else "none")
    axes.figure.colorbar(shown, ax=axes, shrink=0.85, label=label)


def _reaction(axes: Any, effective: EffectiveReceptiveField) -> None:
    from matplotlib.patches import Ellipse

    axes.set_title("What it reacts to")
    sigmas = " × ".join(f"{s:.1f}" for s in effective.sigma)
    half = effective.areas[1]
    said = f"σ {sigmas} positions; half of it on {half.positions:,}, {effective.samples} inputs"
    shown = _flat(effective.map / effective.map.max())
    if shown.ndim == 1:
        axes.bar(np.arange(len(shown)), shown, width=1.0, color=COLOURS[1])
        axes.set_ylabel(f"{effective.measure} gradient, share of the most")
        axes.set_xlabel(f"input position\n{said}")
        return
    _image(axes, np.maximum(shown, 1e-4), (0.0, 0.0), f"{effective.measure} gradient, share of the most")
    for width, style in ((1, "-"), (2, "--")):
        size = [2 * width * s for s in effective.sigma[:2]]
        middle = effective.centre[1], effective.centre[0]
        axes.add_patch(Ellipse(middle, size[1], size[0], fill=False, edgecolor="white", linestyle=style, label=f"{width}σ"))
    axes.legend(loc="upper right", labelcolor="white")
    axes.set_xlabel(f"input column\n{said}")
    axes.set_ylabel("input row", color=INK)
