"""Numbers of several runs' ``metrics.json``: measures, finished steps, seconds, sums of losses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from run_folder import Run

from d2_mgd.visualize import PALETTE

# Metrics of a distilled run: its losses to those of the task; the median over features of the same of the gradients.
RATIOS = ("losses, distillation / task", "gradients at the maps, distillation / task")

# Detection metrics, those first that include others -> the measure's name, and the metrics beside it in the table.
_DETECTION = {
    "panoptic_seg/PQ": ("panoptic quality", ("SQ", "RQ")),
    "keypoints/AP": ("keypoint AP", ("AP50", "AP75")),
    "segm/AP": ("mask AP", ("AP50", "AP75")),
    "bbox/AP": ("box AP", ("AP50", "AP75")),
    "sem_seg/mIoU": ("mIoU", ("fwIoU", "pACC")),
    "sem_seg/IoU": ("mIoU", ("iIoU",)),  # of Cityscapes' evaluator
}
_DISTILLATION = ("loss_distill/", "loss_kd", "loss_dense_kd", "loss_cross_head")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Measure:
    """What runs are compared by.

    Args:
        title: with its unit, such as ``top-1 error, %``.
        key: in the rows of the metrics.
        better: ``max`` or ``min`` of several values.
        beside: title -> key of what stands beside it in the table.
    """

    title: str
    key: str
    better: Callable[..., float]
    beside: Mapping[str, str]

    def best(self, rows: Rows) -> dict[str, Any] | None:
        """The row with the best value; None where there is no value."""
        measured = self.measured(rows)
        return self.better(measured, key=lambda row: row[self.key]) if measured else None  # type: ignore[return-value]

    def last(self, rows: Rows) -> dict[str, Any] | None:
        """The last row with a value; None where there is none."""
        measured = self.measured(rows)
        return measured[-1] if measured else None

    def measured(self, rows: Rows) -> Rows:
        return [row for row in rows if finite(row.get(self.key)) is not None]


@dataclass(frozen=True)
class Compared:
    """The runs.

    Args:
        runs: name -> its folder, all of one kind.
        rows: name -> its metrics, with the sums ``task loss`` and ``distillation loss``.
    """

    runs: Mapping[str, Run]
    rows: Mapping[str, Rows]

    @property
    def kind(self) -> str:
        return next(iter(self.runs.values())).kind

    @property
    def step(self) -> str:
        return next(iter(self.runs.values())).step

    @property
    def colours(self) -> dict[str, str]:
        return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(self.runs)}

    def measures(self) -> list[Measure]:
        if self.kind == "classification":
            return [Measure("top-1 error, %", "err1", min, {"top-5 error, %": "err5"})]
        names = dict.fromkeys(key for rows in self.rows.values() for row in rows for key in row)
        return [_detection_measure(name, end) for end in _DETECTION for name in names if f"/{name}".endswith(f"/{end}")]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, evenly spread, because images are in the order of their classes."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[int(place)] for place in places]


def finished_steps(row: Mapping[str, Any], rows: Rows, compared: Compared) -> int:
    """Finished epochs or iterations at a row. Detectron2 counts from 0, but for the evaluation after the last step."""
    if compared.kind == "classification":
        return int(row["epoch"])
    trained = [int(one["iteration"]) + 1 for one in rows if "total_loss" in one]
    return min(int(row["iteration"]) + 1, max(trained, default=0))


def training_seconds(rows: Rows, compared: Compared) -> float:
    if compared.kind == "classification":
        return float(sum(row.get("seconds", 0.0) for row in rows))
    timed = [(int(row["iteration"]) + 1, float(row["time"])) for row in rows if finite(row.get("time")) is not None]
    before = [0, *(iteration for iteration, _ in timed[:-1])]
    return sum(seconds * (iteration - earlier) for (iteration, seconds), earlier in zip(timed, before))


def with_sums(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the sum of its task losses and, if it was distilled, of its distillation losses, and their ratios."""
    numbers = {key.removeprefix("train_"): value for key, value in row.items() if isinstance(value, (int, float))}
    losses = {key: value for key, value in numbers.items() if key.startswith("loss_")}
    distillation = [value for key, value in losses.items() if key.startswith(_DISTILLATION)]
    task = [value for key, value in losses.items() if not key.startswith(_DISTILLATION)]
    sums = {"task loss": sum(task), "distillation loss": sum(distillation)}
    found = {name: value for (name, value), values in zip(sums.items(), (task, distillation)) if values}
    if distillation and sum(task):
        found[RATIOS[0]] = sum(distillation) / sum(task)
    gradients = [value for key, value in numbers.items() if key.startswith("ratio/")]
    if gradients:
        found[RATIOS[1]] = statistics.median(gradients)  # a level without objects has hardly a gradient of the task
    return {**row, **found}


def _detection_measure(name: str, end: str) -> Measure:
    """The measure of a metric such as ``data set/bbox/AP``; without the data set where there is one set."""
    what, others = _DETECTION[end]
    data = name.removesuffix(end).removesuffix("/")
    task = name.rpartition("/")[0]
    title = f"{what} on {data}, %" if data else f"{what}, %"
    return Measure(title, name, max, {other: f"{task}/{other}" for other in others})


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
