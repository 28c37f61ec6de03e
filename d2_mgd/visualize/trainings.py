"""Metrics of trainings as curves."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from d2_mgd.errors import UserError
from d2_mgd.visualize.style import PALETTE, legend_columns, new_figure, style

NEW_TRAINING = "new_training"  # key of the line in metrics.json after which another training begins


def read_metrics(path: str | os.PathLike[str], step: str = "iteration") -> list[dict[str, Any]]:
    """Read ``metrics.json`` of a training as one dict per step; later lines of the same step overwrite earlier values.

    A resumed training writes some steps twice. Of several trainings in one folder the last one counts. Lines that a
    killed training has left incomplete are skipped.

    Args:
        path: of the file.
        step: key of the step's number: ``iteration`` in detection, ``epoch`` in classification.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: a line has no step.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(row, dict) or step not in row:
            raise UserError(f"a line of {path} has no key {step!r}: {line[:60]}")
        if NEW_TRAINING in row:
            rows.clear()
            continue
        rows.setdefault(int(row[step]), {}).update(row)
    return [rows[number] for number in sorted(rows)]


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average, over fewer values at the ends."""
    array = np.asarray(values, dtype=float)
    kernel = np.ones(max(1, min(window, len(array))))
    return np.convolve(array, kernel, "same") / np.convolve(np.ones_like(array), kernel, "same")


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    panels: Mapping[str, str],
    colours: Mapping[str, str] | None = None,
    window: int = 5,
    step: str = "iteration",
    logarithmic: Collection[str] = (),
) -> Figure:
    """Draw metrics of several trainings over iterations or epochs, one panel per metric.

    Args:
        runs: caption of a run -> its rows, as from :func:`read_metrics`.
        panels: title of a panel -> its metric; runs without the metric are not drawn there.
        colours: caption -> colour.
        window: number of points of the moving average, which is drawn over the values if there are more than 20.
        step: key of the step's number.
        logarithmic: titles of panels with a logarithmic axis, which shows positive values only.

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
            axes.set(title=title, xlabel=f"{step}s")
            if title in logarithmic and any((line.get_ydata() > 0).any() for line in axes.lines):
                axes.set(yscale="log")
            else:
                axes.set(ylim=(0, None))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.grid(axis="y", alpha=0.25)
        by_caption = {caption: handle for axes in grid for handle, caption in zip(*axes.get_legend_handles_labels())}
        if not shown:
            raise ValueError(f"no run has any of the metrics {', '.join(panels.values())}.")
        columns = legend_columns(figure, list(by_caption))
        figure.legend(list(by_caption.values()), list(by_caption), loc="outside upper center", ncols=columns)
    return figure


def _points(rows: Sequence[Mapping[str, Any]], step: str, metric: str) -> np.ndarray:
    """(2, P) steps and values, without missing and non-finite values, such as the AP of a class without objects."""
    found = [(row[step], row[metric]) for row in rows if row.get(metric) is not None]
    points = np.array(found, dtype=float).reshape(-1, 2)
    return points[np.isfinite(points[:, 1])].T
