"""What a network costs, layer by layer, as bars: multiply-accumulates, parameters and bytes side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omniconv.analysis.cost import Cost
from omniconv.analysis.plots.style import COLOURS, FAINT, INK, figure, styled
from omniconv.analysis.tables import amount

MOST = 24  # bars; the others are one bar together
REST = "all others"
_METRICS = (("macs_dense", "MACs"), ("params", "parameters"), ("bytes_min", "bytes"))


@dataclass(frozen=True)
class Bar:
    """One layer, or what is left: the sums of its rows."""

    name: str
    technique: str | None
    macs_dense: int
    params: int
    bytes_min: int


def bars(cost: Cost, most: int = MOST) -> tuple[Bar, ...]:
    """The layers in the order of their calls; beyond ``most``, those with the smallest shares of all three are one bar, the last.

    Example:
        >>> import torch
        >>> from omniconv.analysis import cost
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> [(bar.name, bar.params) for bar in bars(cost(net, torch.empty(1, 3, 4, 4)), most=2)]
        [('0', 32), ('2', 36), ('all others', 0)]
    """
    rows: dict[str, list[Any]] = {}
    for row in cost.rows:
        rows.setdefault(row.name, []).append(row)
    every = [_summed(name or "(whole)", mine) for name, mine in rows.items()]
    totals = {metric: sum(getattr(bar, metric) for bar in every) or 1 for metric, _ in _METRICS}
    kept = sorted(every, key=lambda bar: -sum(getattr(bar, metric) / total for metric, total in totals.items()))[:most]
    rest = [bar for bar in every if bar not in kept]
    shown = [bar for bar in every if bar in kept]
    return (*shown, *([_summed(REST, rest)] if rest else []))


def _summed(name: str, rows: Sequence[Any]) -> Bar:
    sums = {metric: sum(getattr(row, metric) for row in rows) for metric, _ in _METRICS}
    technique = None if name == REST else next((row.technique for row in rows if row.technique), None)
    return Bar(name, technique, **sums)


def cost_bars(cost: Cost, most: int = MOST) -> Any:
    """Three rows of bars that share their layers, first above last; a colour a technique, shares of the totals beside the bars."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown = bars(cost, most)
    kinds = list(dict.fromkeys(bar.technique for bar in shown if bar.technique))
    colours = {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}
    longest = max((len(bar.name) for bar in shown), default=1)
    with styled():
        drawn = figure(9.0 + 0.06 * min(longest, 40), 1.5 + 0.21 * max(len(shown), 3))
        panels = drawn.subplots(1, 3, sharey=True)
        places = range(len(shown))
        for axes, (metric, title) in zip(panels, _METRICS, strict=True):
            values = [getattr(bar, metric) for bar in shown]
            total = getattr(cost, metric)
            axes.barh(places, values, height=0.72, color=[colours.get(bar.technique or "", FAINT) for bar in shown])
            axes.set_title(f"{title}  {amount(float(total))}", fontsize=10)
            axes.set_xlim(0, 1.22 * max([*values, 1]))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(float(value)) if value else "0"))
            axes.tick_params(axis="x", labelsize=8)
            axes.grid(axis="x")
            for place, value in zip(places, values, strict=True):
                if total and value >= 0.01 * total:
                    axes.annotate(
                        f"{value / total:.0%}",
                        (value, place),
                        (3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=7.5,
                        color=INK,
                    )
        panels[0].set_yticks(places, [_short(bar.name) for bar in shown], fontsize=8)
        panels[0].set_ylim(max(len(shown), 1) - 0.4, -0.6)
        _legend(drawn, colours, any(bar.technique is None for bar in shown))
    return drawn


def _short(name: str, length: int = 40) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _legend(drawn: Any, colours: dict[str, str], others: bool) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=kind) for kind, colour in colours.items()]
    if others:
        handles.append(Patch(color=FAINT, label="others"))
    if handles:
        drawn.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8.5)
