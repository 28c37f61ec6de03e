"""Curves of trainings."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from d2_mgd.errors import UserError
from d2_mgd.visualize.style import PALETTE, legend_columns, new_figure, style


def read_metrics(path: str | os.PathLike[str], step: str = "iteration") -> list[dict[str, Any]]:
    """Read ``metrics.json`` of a training: a dict per step. Lines of one step are joined; later values win.

    A resumed training writes some steps twice. Incomplete lines of a killed training are skipped.

    Args:
        path: of the file.
        step: key of the step: ``iteration`` (Detectron2), ``epoch`` (the classification pipeline).

    Raises:
        FileNotFoundError: no such file.
        UserError: a line without a step.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(row, dict) or step not in row:
            raise UserError(f"a line of {path} names no {step}: {line[:60]}")
        rows.setdefault(int(row[step]), {}).update(row)
    return [rows[number] for number in sorted(rows)]


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Return the centred moving average; at the ends it averages fewer values."""
    array = np.asarray(values, dtype=float)
    kernel = np.ones(max(1, min(window, len(array))))
    return np.convolve(array, kernel, "same") / np.convolve(np.ones_like(array), kernel, "same")


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    panels: Mapping[str, str],
    colours: Mapping[str, str] | None = None,
    window: int = 5,
    step: str = "iteration",
) -> Figure:
    """Draw metrics of several trainings over their iterations or epochs, one panel per metric.

    Args:
        runs: caption of a run -> its rows, as from :func:`read_metrics`.
        panels: title of a panel -> the metric that it shows; runs without it are left out there.
        colours: caption -> colour.
        window: points of the moving average of metrics that were written at more than 20 steps; the raw values stay
            visible behind.
        step: key of the step in the rows.

    Raises:
        ValueError: no run has any of the metrics.
    """
    colours = {**dict(zip(runs, itertools.cycle(PALETTE))), **(colours or {})}
    shown = 0
    with style():
        figure = new_figure(max(3.4, min(4.6, 10.2 / len(panels))) * len(panels), 3.4)
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, metric) in zip(grid, panels.items()):
            for caption, rows in runs.items():
                x, y = _points(rows, step, metric)
                if not len(x):
                    continue
                shown += 1
                if len(x) > 20:
                    axes.plot(x, y, color=colours[caption], alpha=0.2, linewidth=1)
                    axes.plot(x, smoothed(y, window), color=colours[caption], label=caption)
                else:
                    axes.plot(x, y, "o-", ms=4, color=colours[caption], label=caption)
            axes.set(title=title, xlabel=f"{step}s", ylim=(0, None))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.grid(axis="y", alpha=0.25)
        by_caption = {caption: handle for axes in grid for handle, caption in zip(*axes.get_legend_handles_labels())}
        if not shown:
            raise ValueError(f"no run has any of the metrics {', '.join(panels.values())}.")
        columns = legend_columns(figure, list(by_caption))
        figure.legend(list(by_caption.values()), list(by_caption), loc="outside upper center", ncols=columns)
    return figure


def _points(rows: Sequence[Mapping[str, Any]], step: str, metric: str) -> np.ndarray:
    """Return (2, P) steps and finite values. An AP without objects is not finite."""
    found = [(row[step], row[metric]) for row in rows if row.get(metric) is not None]
    points = np.array(found, dtype=float).reshape(-1, 2)
    return points[np.isfinite(points[:, 1])].T
