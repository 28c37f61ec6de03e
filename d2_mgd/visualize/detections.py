"""Figures of detections.

Shape shorthand: H, W pixels of an image, B boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from d2_mgd.visualize.style import PALETTE, legend_columns, new_figure, style


@dataclass(frozen=True)
class Detections:
    """Boxes on one image.

    Args:
        boxes: (B, 4) x0, y0, x1, y1 in pixels.
        labels: (B,) indices of classes.
        scores: (B,) between 0 and 1, or None for the ground truth.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


def draw_detections(
    images: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[Detections]],
    classes: Sequence[str],
    threshold: float = 0.5,
    truth: str | None = None,
) -> Figure:
    """Draw detections of several models side by side: one row per image, one column per model.

    Args:
        images: (H, W, 3) uint8 RGB.
        columns: caption -> the detections on each image.
        classes: names, by label.
        threshold: detections below this score are not drawn.
        truth: caption of the ground-truth column. With it, a box of another column is dashed if no object of its class
            has an IoU of at least 0.5 with it.

    Raises:
        ValueError: a column has another number of images.
    """
    for caption, found in columns.items():
        if len(found) != len(images):
            raise ValueError(f"column {caption!r} has detections of {len(found)} images, but there are {len(images)}.")
    shapes = [image.shape[0] / image.shape[1] for image in images]
    cell = min(float(np.clip(9.4 / len(columns), 1.9, 3.2)), 2.8 / float(np.median(shapes)))  # inches
    heights = [cell * shape for shape in shapes]
    with style():
        figure = new_figure(cell * len(columns), sum(heights) + 0.65)
        grid = figure.subplots(len(images), len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
        layout: Any = figure.get_layout_engine()  # typed as its base class, whose set() has no arguments
        layout.set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
        for row, image in enumerate(images):
            for column, (caption, found) in enumerate(columns.items()):
                axes = grid[row][column]
                axes.imshow(image, interpolation="bicubic")
                axes.axis("off")
                if row == 0:
                    axes.set_title(caption)
                objects = None if truth is None or caption == truth else columns[truth][row]
                _draw_boxes(axes, found[row], objects, threshold)
        present = sorted({int(label) for found in columns.values() for item in found for label in item.labels})
        names = [classes[label] for label in present]
        handles = [Rectangle((0, 0), 1, 1, facecolor=_class_colour(label)) for label in present]
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=legend_columns(figure, names),
            handlelength=1.0,
            columnspacing=1.2,
        )
    return figure


def _draw_boxes(axes: Axes, found: Detections, objects: Detections | None, threshold: float) -> None:
    for index, (box, label) in enumerate(zip(found.boxes, found.labels)):
        score = None if found.scores is None else float(found.scores[index])
        if score is not None and score < threshold:
            continue
        x0, y0, x1, y1 = (float(value) for value in box)
        missed = objects is not None and not _hits(box, int(label), objects)
        colour = _class_colour(int(label))
        for edge, width in (("black", 2.6), (colour, 1.5)):  # a dark rim, visible on any background
            axes.add_patch(
                Rectangle(
                    (x0, y0), x1 - x0, y1 - y0, fill=False, ec=edge, lw=width, ls=(0, (2.2, 1.6)) if missed else "-"
                )
            )
        if score is not None:
            axes.text(
                x0,
                y0,
                f"{100 * score:.0f}",
                fontsize=6,
                color="black",
                va="bottom" if y0 > 6 else "top",
                clip_on=True,
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6},
            )


def _hits(box: np.ndarray, label: int, objects: Detections) -> bool:
    """Whether an object of the class has an IoU of at least 0.5 with the box."""
    same = objects.boxes[objects.labels == label].reshape(-1, 4)
    low, high = np.maximum(same[:, :2], box[:2]), np.minimum(same[:, 2:], box[2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = (same[:, 2:] - same[:, :2]).prod(axis=1) + (box[2] - box[0]) * (box[3] - box[1])
    return bool((shared >= 0.5 * (areas - shared)).any())


def _class_colour(label: int) -> str:
    return PALETTE[label % len(PALETTE)]
