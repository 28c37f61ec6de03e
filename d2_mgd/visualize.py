"""Pictures of a matching, of the maps it pairs, of trainings, and of detections. Each function returns a figure.

Nothing here opens a window or keeps a figure: save one with ``figure.savefig(path)``, or make HTML of it with
:func:`d2_mgd.report.picture`. Colours are told apart by colour-blind eyes too (Okabe and Ito's palette; cividis).

Shape shorthand: S student channels, T teacher channels, K members of a group, H, W pixels of a map or image, B boxes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from d2_mgd.distill import RematchReport, load_reports
from d2_mgd.matching import ChannelMatching

__all__ = [
    "PALETTE",
    "Detections",
    "draw_curves",
    "draw_detections",
    "draw_group",
    "draw_matching",
    "draw_rematches",
    "load_history",
    "matching_order",
    "read_metrics",
    "smoothed",
]

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
"""Okabe and Ito's colours, and grey."""

_COST_COLOURS = "cividis"
_MAP_COLOURS = "viridis"
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


@contextmanager
def _style() -> Any:
    with matplotlib.rc_context(cast(Any, _STYLE)):
        yield


def _figure(width: float, height: float) -> Figure:
    """A figure of so many inches that belongs to nobody else."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# ---- matchings


def matching_order(cost: np.ndarray, matching: ChannelMatching) -> tuple[np.ndarray, np.ndarray]:
    """An order of channels in which matched pairs lie along the diagonal.

    Student channels go from the best matched to the worst. Teacher channels follow their student; those without one
    come last.

    Args:
        cost: (S, T).
        matching: between S and T channels.

    Returns:
        tuple: (S,) and (T,) indices.

    Raises:
        ValueError: cost and matching are of different sizes.
    """
    if cost.shape != (matching.num_student, matching.num_teacher):
        raise ValueError(
            f"the cost is {cost.shape}, but the matching is between {matching.num_student} student and "
            f"{matching.num_teacher} teacher channels."
        )
    student, teacher = matching.pairs
    total = np.bincount(student, weights=cost[student, teacher], minlength=matching.num_student)
    rows = np.argsort(total / matching.group_sizes, kind="stable")
    columns: list[int] = []
    seen = set()
    for row in rows:
        members = [int(member) for member in matching.groups[row] if member >= 0 and int(member) not in seen]
        members.sort(key=lambda member: cost[row, member])
        columns.extend(members)
        seen.update(members)
    columns.extend(member for member in range(matching.num_teacher) if member not in seen)
    return rows, np.array(columns)


def draw_matching(cost: np.ndarray, matching: ChannelMatching, title: str = "") -> Figure:
    """The matching cost as a heat map whose channels are ordered by the matching, with the matched pairs outlined.

    Beside it, for each student channel: the mean cost of its group, and of all teacher channels, which is what a
    matching by chance would cost.

    Args:
        cost: (S, T) mean distances, 0 to 4.
        matching: between S and T channels.
        title: what stands above, such as the feature's name.
    """
    rows, columns = matching_order(cost, matching)
    ordered = cost[np.ix_(rows, columns)]
    students, teachers = cost.shape
    ratio = float(np.clip(teachers / students, 0.6, 3.2))
    with _style():
        figure = _figure(1.7 + 3.0 * ratio + 2.0, 3.8)
        main, side = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [3.0 * ratio, 1.6]})
        image = main.imshow(
            ordered, cmap=_COST_COLOURS, aspect="auto", interpolation="nearest", extent=(0, teachers, students, 0)
        )
        _outline_pairs(main, rows, columns, matching)
        main.set(
            xlabel=f"{teachers} teacher channels, ordered by the matching",
            ylabel=f"{students} student channels, best matched first",
        )
        main.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        main.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        main.set_title(title, loc="left")
        bar = figure.colorbar(image, ax=main, pad=0.02, fraction=0.06)
        bar.set_label("cost")
        bar.outline.set_visible(False)
        _draw_cost_of_rows(side, cost, matching, rows)
    return figure


def _outline_pairs(axes: Axes, rows: np.ndarray, columns: np.ndarray, matching: ChannelMatching) -> None:
    """A thin frame around each run of a row's matched columns."""
    place = np.empty(len(columns), dtype=int)
    place[columns] = np.arange(len(columns))
    frames = []
    for y, row in enumerate(rows):
        members = np.sort(place[[member for member in matching.groups[row] if member >= 0]])
        for run in np.split(members, np.flatnonzero(np.diff(members) > 1) + 1):
            frames.append(Rectangle((run[0], y), len(run), 1))
    width = float(np.clip(60.0 / len(rows), 0.25, 1.2))
    axes.add_collection(PatchCollection(frames, facecolor="none", edgecolor="#D55E00", linewidth=width))


def _draw_cost_of_rows(axes: Axes, cost: np.ndarray, matching: ChannelMatching, rows: np.ndarray) -> None:
    student, teacher = matching.pairs
    matched = np.bincount(student, weights=cost[student, teacher], minlength=len(rows)) / matching.group_sizes
    y = np.arange(len(rows)) + 0.5
    axes.plot(matched[rows], y, color=PALETTE[0], label="matched")
    axes.plot(cost.mean(axis=1)[rows], y, color=PALETTE[1], label="all")
    axes.set(xlabel="mean cost", xlim=(0, None))
    axes.tick_params(left=False, labelleft=False)
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.03, 1.0), "ncols": 2}
    axes.legend(**place, columnspacing=1.0, handlelength=1.2, borderpad=0)


def draw_group(
    student: np.ndarray,
    teachers: Sequence[np.ndarray],
    guided: np.ndarray,
    image: np.ndarray | None = None,
    title: str = "",
    names: Sequence[str] = (),
) -> Figure:
    """One student channel on one image: its map, the maps of its group of teacher channels, and the reduced one.

    Args:
        student: (H, W) map of the student channel.
        teachers: K maps (H, W).
        guided: (H, W), what the reducer made of them.
        image: (H', W', 3) the image itself, uint8.
        title: what stands above.
        names: K captions of the teacher channels; "teacher 1" ... by default.

    Raises:
        ValueError: an empty group.
    """
    if not len(teachers):
        raise ValueError("a group without teacher channels cannot be drawn.")
    captions = list(names) or [f"teacher {number}" for number in range(1, len(teachers) + 1)]
    panels: list[tuple[str, np.ndarray]] = [("student", student), *zip(captions, teachers), ("reduced", guided)]
    if image is not None:
        panels.insert(0, ("image", image))
    across = min(len(panels), 7)
    down = math.ceil(len(panels) / across)
    with _style():
        figure = _figure(1.55 * across, 1.85 * down + (0.35 if title else 0.0))
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, (caption, panel) in zip(grid.flat, panels):
            axes.imshow(panel, cmap=None if panel.ndim == 3 else _MAP_COLOURS, interpolation="nearest")
            axes.set_title(caption, fontsize=9)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def load_history(folder: str | os.PathLike[str]) -> dict[int, dict[str, RematchReport]]:
    """All rematches of a training, from its ``matching`` folder.

    Args:
        folder: with ``iter_0001000.npz`` or ``epoch_0003.npz`` files.

    Returns:
        dict: finished iterations or epochs -> feature -> report, ascending.

    Raises:
        FileNotFoundError: there is none.
    """
    found = {}
    for path in sorted(Path(folder).glob("*.npz")):
        number = re.fullmatch(r"(?:iter|epoch)_(\d+)", path.stem)
        if number:
            found[int(number.group(1))] = load_reports(path)
    if not found:
        raise FileNotFoundError(f"there is no matching in {folder}: expected files such as iter_0001000.npz.")
    return dict(sorted(found.items()))


def draw_rematches(history: Mapping[int, Mapping[str, RematchReport]], steps: str = "iterations") -> Figure:
    """How a matching moved: the cost of the matched pairs, and the share of student channels whose group changed.

    Args:
        history: as from :func:`load_history`.
        steps: what its keys count.
    """
    features = list(next(iter(history.values())))
    with _style():
        figure = _figure(9.0, 3.2)
        left, right = figure.subplots(1, 2)
        for index, name in enumerate(features):
            colour = PALETTE[index % len(PALETTE)]
            at = [step for step, reports in history.items() if name in reports]
            reports = [history[step][name] for step in at]
            left.plot(at, [r.mean_cost for r in reports], "o-", ms=4, color=colour, label=name)
            left.plot(at, [float(r.cost.mean()) for r in reports], ":", color=colour)
            if len(at) > 1:
                right.plot(at[1:], [r.changed for r in reports[1:]], "o-", ms=4, color=colour, label=name)
        left.set(title="mean cost: matched (solid), all pairs (dotted)", xlabel=steps, ylim=(0, None))
        right.set(title="student channels whose group changed", xlabel=steps, ylim=(0, 1.02))
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        if all(len(reports) == 0 for reports in history.values()) or len(history) < 2:
            right.text(0.5, 0.5, "one matching only", ha="center", va="center", transform=right.transAxes)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.grid(axis="y", alpha=0.25)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
    return figure


# ---- trainings


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Detectron2's ``metrics.json``: one dict a line; lines of one iteration joined, later ones winning.

    A resumed training writes some iterations twice, and one that was killed may end in half a line: both are fine.

    Raises:
        FileNotFoundError: no such file.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows.setdefault(int(row["iteration"]), {}).update(row)
    return [rows[iteration] for iteration in sorted(rows)]


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average, over what there is at the ends."""
    array = np.asarray(values, dtype=float)
    kernel = np.ones(max(1, min(window, len(array))))
    return np.convolve(array, kernel, "same") / np.convolve(np.ones_like(array), kernel, "same")


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    panels: Mapping[str, str],
    colours: Mapping[str, str] | None = None,
    window: int = 5,
) -> Figure:
    """Metrics of several trainings over their iterations, one panel a metric.

    Args:
        runs: caption of a run -> its rows, as from :func:`read_metrics`.
        panels: title of a panel -> the metric that it shows; runs without it are left out there.
        colours: caption -> colour.
        window: points of the moving average of metrics that were written at more than 20 iterations; the raw values
            stay visible behind.

    Raises:
        ValueError: no run has any of the metrics.
    """
    colours = {**dict(zip(runs, PALETTE)), **(colours or {})}
    shown = 0
    with _style():
        figure = _figure(4.6 * len(panels), 3.4)
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, metric) in zip(grid, panels.items()):
            for caption, rows in runs.items():
                points = [
                    (row["iteration"], row[metric]) for row in rows if row.get(metric) is not None
                ]  # an AP without objects is not a number
                if not points:
                    continue
                shown += 1
                x, y = np.array(points, dtype=float).T
                if len(x) > 20:
                    axes.plot(x, y, color=colours[caption], alpha=0.2, linewidth=1)
                    axes.plot(x, smoothed(y, window), color=colours[caption], label=caption)
                else:
                    axes.plot(x, y, "o-", ms=4, color=colours[caption], label=caption)
            axes.set(title=title, xlabel="iterations", ylim=(0, None))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.grid(axis="y", alpha=0.25)
        by_caption = {caption: handle for axes in grid for handle, caption in zip(*axes.get_legend_handles_labels())}
        if not shown:
            raise ValueError(f"no run has any of the metrics {', '.join(panels.values())}.")
        figure.legend(list(by_caption.values()), list(by_caption), loc="outside upper center", ncols=len(by_caption))
    return figure


# ---- detections


def draw_detections(
    images: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[Detections]],
    classes: Sequence[str],
    threshold: float = 0.5,
    truth: str | None = None,
) -> Figure:
    """Detections of several models side by side: an image a row, a model a column.

    Args:
        images: (H, W, 3) uint8 RGB.
        columns: caption -> the detections on each image.
        classes: names, by label.
        threshold: detections below this score are not drawn.
        truth: caption of the column that is the ground truth. With it, boxes of other columns are dashed where no
            object of that class overlaps by an IoU of one half.

    Raises:
        ValueError: a column has detections for another number of images.
    """
    for caption, found in columns.items():
        if len(found) != len(images):
            raise ValueError(f"column {caption!r} has detections of {len(found)} images, and there are {len(images)}.")
    height, width = images[0].shape[:2]
    cell = 2.35
    with _style():
        figure = _figure(cell * len(columns), cell * height / width * len(images) + 0.65)
        grid = figure.subplots(len(images), len(columns), squeeze=False)
        layout: Any = figure.get_layout_engine()  # its base class has no such arguments
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
        handles = [Rectangle((0, 0), 1, 1, facecolor=_class_colour(label)) for label in present]
        figure.legend(
            handles,
            [classes[label] for label in present],
            loc="outside lower center",
            ncols=min(len(present), 8) or 1,
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
        for edge, width in (("black", 2.6), (colour, 1.5)):  # the dark rim keeps it visible on any ground
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
    """Whether an object of that class overlaps by an IoU of one half."""
    same = objects.boxes[objects.labels == label].reshape(-1, 4)
    low, high = np.maximum(same[:, :2], box[:2]), np.minimum(same[:, 2:], box[2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = (same[:, 2:] - same[:, :2]).prod(axis=1) + (box[2] - box[0]) * (box[3] - box[1])
    return bool((shared >= 0.5 * (areas - shared)).any())


def _class_colour(label: int) -> str:
    return PALETTE[label % len(PALETTE)]
