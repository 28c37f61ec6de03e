"""Figures of the most probable classes of images.

Shape shorthand: H, W pixels of an image, K classes that are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2_mgd.visualize.style import new_figure, style

_RIGHT, _WRONG = "#7CCFB7", "#D3D8DD"
_LONGEST = 24  # characters of a class name


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Args:
        classes: K names, the most probable first.
        shares: (K,) their probabilities, between 0 and 1.
    """

    classes: Sequence[str]
    shares: np.ndarray


def draw_predictions(
    images: Sequence[np.ndarray], truth: Sequence[str], columns: Mapping[str, Sequence[Prediction]]
) -> Figure:
    """Draw the most probable classes by several classifiers: one row per image, one column per classifier.

    The true class is green.

    Args:
        images: (H, W, 3) uint8 RGB.
        truth: the class of each image.
        columns: caption -> the prediction for each image.

    Raises:
        ValueError: a column, or the truth, has another number of images.
    """
    for caption, found in {"truth": truth, **columns}.items():
        if len(found) != len(images):
            raise ValueError(f"column {caption!r} is of {len(found)} images, but there are {len(images)}.")
    with style():
        wide = float(np.clip(8.6 / len(columns), 2.4, 3.6))
        figure = new_figure(1.5 + wide * len(columns), 1.5 * len(images) + 0.5)
        ratios = [1.5, *[wide] * len(columns)]
        grid = figure.subplots(len(images), 1 + len(columns), squeeze=False, gridspec_kw={"width_ratios": ratios})
        for row, image in enumerate(images):
            grid[row][0].imshow(image, interpolation="bicubic")
            grid[row][0].axis("off")
            grid[row][0].set_title(_short(truth[row]), fontsize=9)
            for column, (caption, found) in enumerate(columns.items(), start=1):
                _draw_shares(grid[row][column], found[row], truth[row])
                if row == 0:
                    grid[row][column].set_title(caption)
    return figure


def _draw_shares(axes: Axes, found: Prediction, truth: str) -> None:
    places = range(len(found.classes))
    colours = [_RIGHT if name == truth else _WRONG for name in found.classes]
    axes.barh(places, found.shares, color=colours, height=0.74)
    for place, name, share in zip(places, found.classes, found.shares):
        weight = "bold" if name == truth else "normal"
        axes.text(0.015, place, _short(name), va="center", fontsize=8, fontweight=weight)
        axes.text(0.995, place, f"{100 * share:.0f}%", va="center", ha="right", fontsize=8, fontweight=weight)
    axes.set(xlim=(0, 1), ylim=(max(len(places), 5) - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines["bottom"].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
