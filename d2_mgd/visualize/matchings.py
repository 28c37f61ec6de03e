"""Figures of matchings and of the maps that they pair.

Shape shorthand: S student channels, T teacher channels, K members of a group, H, W pixels of a map or image.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from d2_mgd.distill import RematchReport, load_reports
from d2_mgd.matching import ChannelMatching
from d2_mgd.visualize.style import PALETTE, new_figure, style

_COST_COLOURS = "cividis"
_MAP_COLOURS = "viridis"


def matching_order(cost: np.ndarray, matching: ChannelMatching) -> tuple[np.ndarray, np.ndarray]:
    """Order channels so that matched pairs lie along the diagonal.

    Student channels go from the lowest to the highest cost. Teacher channels are in the order of their student
    channels; those without one come last.

    Args:
        cost: (S, T).
        matching: between S and T channels.

    Returns:
        tuple: (S,) and (T,) indices.

    Raises:
        ValueError: cost and matching differ in size.
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
    """Draw the matching cost as a heat map, ordered by the matching, with the matched pairs outlined.

    Beside it, for each student channel: the mean cost of its group, and the mean cost of all teacher channels, which is
    the expected cost of a random matching.

    Args:
        cost: (S, T) mean distances, 0 to 4.
        matching: between S and T channels.
        title: such as the feature's name.
    """
    rows, columns = matching_order(cost, matching)
    ordered = cost[np.ix_(rows, columns)]
    students, teachers = cost.shape
    ratio = float(np.clip(teachers / students, 1.0, 3.2))
    with style():
        figure = new_figure(1.7 + 3.0 * ratio + 2.0, 3.8)
        main, side = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [3.0 * ratio, 1.6]})
        image = main.imshow(
            ordered, cmap=_COST_COLOURS, aspect="auto", interpolation="nearest", extent=(0, teachers, students, 0)
        )
        _outline_pairs(main, rows, columns, matching)
        main.set(
            xlabel=f"{teachers} teacher channels" + (", ordered by the matching" if ratio > 1.5 else ""),
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


def matching_images(reports: Mapping[str, RematchReport]) -> dict[str, np.ndarray]:
    """Feature -> picture of :func:`draw_matching`, (H, W, 3) uint8 RGB."""
    images = {}
    for name, report in reports.items():
        canvas = FigureCanvasAgg(draw_matching(report.cost, report.matching, name))
        canvas.draw()
        images[name] = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return images


def _outline_pairs(axes: Axes, rows: np.ndarray, columns: np.ndarray, matching: ChannelMatching) -> None:
    """Draw a thin frame around each run of matched columns in a row."""
    place = np.empty(len(columns), dtype=int)
    place[columns] = np.arange(len(columns))
    frames = []
    for y, row in enumerate(rows):
        members = np.sort(place[[member for member in matching.groups[row] if member >= 0]])
        for run in np.split(members, np.flatnonzero(np.diff(members) > 1) + 1):
            frames.append(Rectangle((run[0], y), len(run), 1))
    width = float(np.clip(60.0 / len(rows), 0.6, 1.2))
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
    """Draw a student channel's map on one image, the maps of its group of teacher channels, and the reduced map.

    Args:
        student: (H, W) map of the student channel.
        teachers: K maps (H, W).
        guided: (H, W) map that the reducer computes from them.
        image: (H', W', 3) uint8 image.
        title: of the figure.
        names: K captions of the teacher channels; "teacher 1" ... by default.

    Raises:
        ValueError: the group is empty.
    """
    if not len(teachers):
        raise ValueError("draw_group needs at least one teacher map; this group is without teacher channels.")
    captions = list(names) or [f"teacher {number}" for number in range(1, len(teachers) + 1)]
    panels: list[tuple[str, np.ndarray]] = [("student", student), *zip(captions, teachers), ("reduced", guided)]
    if image is not None:
        panels.insert(0, ("image", image))
    across = min(len(panels), 7)
    down = math.ceil(len(panels) / across)
    with style():
        figure = new_figure(1.55 * across, 1.85 * down + (0.35 if title else 0.0))
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
    """Load all rematches of a training from its ``matching`` folder.

    Args:
        folder: with ``iter_0001000.npz`` or ``epoch_0003.npz`` files.

    Returns:
        dict: finished iterations or epochs -> feature -> report, ascending.

    Raises:
        FileNotFoundError: the folder contains no rematch.
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
    """Draw, over all rematches, the cost of matched pairs and the share of student channels whose group changed.

    Args:
        history: as from :func:`load_history`.
        steps: unit of its keys, for the labels.
    """
    features = list(next(iter(history.values())))
    with style():
        figure = new_figure(9.0, 3.2)
        left, right = figure.subplots(1, 2, sharex=True)
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
        if len(history) < 2:
            right.text(0.5, 0.5, "one matching only", ha="center", va="center", transform=right.transAxes)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.grid(axis="y", alpha=0.25)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
    return figure
