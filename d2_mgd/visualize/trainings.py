"""Curves of trainings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from d2_mgd.visualize.style import PALETTE, new_figure, style

__all__ = ["draw_curves", "read_metrics", "smoothed"]


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
    with style():
        figure = new_figure(4.6 * len(panels), 3.4)
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
