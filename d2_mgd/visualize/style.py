"""Colours, fonts and layout of all figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
"""Okabe and Ito's colours, and grey."""

_STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Context with Matplotlib's settings for these figures; restores the settings at its end."""
    with matplotlib.rc_context(cast(Any, _STYLE)):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A new figure, in inches, that is not registered with pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend_columns(figure: Figure, names: Sequence[str]) -> int:
    """Number of columns with which a legend of these names is not wider than the figure."""
    widest = 0.09 * max(map(len, names), default=0) + 0.6  # inches of the text, of the line and of the gap
    return max(1, min(len(names), int(figure.get_size_inches()[0] / widest)))
