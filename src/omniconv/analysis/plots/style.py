"""How every plot looks and leaves: one light style, no display, the same bytes for the same numbers. Needs the extra ``plot``."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

INK = "#1f2430"
FAINT = "#c9ced8"
PAPER = "#ffffff"
# apart from each other in grey and for the colour-blind: blue, orange, green, purple, red, grey
COLOURS = ("#1d6fb8", "#d9730d", "#1a8a5f", "#8452b0", "#c0352b", "#6b7280")
HEAT = "magma"
SUFFIXES = (".png", ".svg")
DPI = 160

_RC: Any = {
    "svg.hashsalt": "omniconv", "font.size": 10, "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold", "grid.color": FAINT, "grid.linewidth": 0.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False, "image.cmap": HEAT,
}  # fmt: skip


def check_extra(command: str) -> None:
    """Raises ValueError unless matplotlib is installed.

    >>> check_extra("roofline")
    """
    if find_spec("matplotlib") is None:
        raise ValueError(f"{command}: a plot must have matplotlib (pip install 'omniconv[plot]'), got none")


@contextmanager
def styled() -> Iterator[None]:
    """The style, for all that is drawn within; what the user has set for other plots stays.

    >>> with styled():
    ...     axes = figure().add_subplot()
    """
    from matplotlib import rc_context

    with rc_context(_RC):
        yield


def figure(width: float = 8.6, height: float = 4.8) -> Any:
    """An empty figure of so many inches, apart from pyplot: nothing is shown, nothing is kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def rendered(drawn: Any, suffix: str) -> bytes:
    """A figure as the bytes of a ``.png`` or ``.svg`` file.

    >>> with styled():
    ...     rendered(figure(1, 1), ".png")[1:4]
    b'PNG'
    """
    buffer = io.BytesIO()
    with styled():
        if suffix == ".svg":
            drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        else:
            drawn.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
