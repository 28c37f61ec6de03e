"""Metrics of a run: errors, `metrics.json` and TensorBoard.

Shape shorthand: N images, K classes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classification.checkpoint import replace_file
from d2_mgd.distill import RematchReport
from d2_mgd.training.services import ServiceLog
from d2_mgd.visualize import matching_images

logger = logging.getLogger(__name__)


@torch.no_grad()
def errors(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Numbers of images whose class is not the best one, and not among the best five (or K, if fewer)."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == targets.unsqueeze(1)
    images = targets.shape[0]  # a number, because creating a tensor from it would synchronise with the device
    return {"err1": images - hits[:, 0].sum(), "err5": images - hits.sum()}


class Journal:
    """Writes `metrics.json` (one line an epoch), TensorBoard's files, and the logs of ``--log``.

    Args:
        folder: of the run.
        step: number of finished steps; TensorBoard's values of later steps are dropped.
        logs: of the services.
    """

    def __init__(self, folder: Path, step: int, logs: Sequence[ServiceLog] = ()) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.json"
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step if step else None)
        self.logs = logs

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a training step."""
        self._scalars({f"step/{name}": value for name, value in values.items()}, step)

    def epoch(self, history: Sequence[Mapping[str, Any]], step: int) -> None:
        """Write `metrics.json` with all epochs, and log the values of the newest."""
        replace_file(self.path, "".join(json.dumps(line, allow_nan=True) + "\n" for line in history))
        numbers = {name: value for name, value in history[-1].items() if isinstance(value, (int, float))}
        self._scalars({f"epoch/{name}": value for name, value in numbers.items() if math.isfinite(value)}, step)
        self.writer.flush()

    def matchings(self, reports: Mapping[str, RematchReport], step: int) -> None:
        """Log pictures of new matchings in the services."""
        for name, image in matching_images(reports).items() if self.logs else ():
            for log in self.logs:
                log.image(f"matching/{name}", image, step)

    def close(self, student: Path | None = None, success: bool = False) -> None:
        """Close all logs.

        Args:
            student: file to store in the services.
            success: whether the run has finished.
        """
        self.writer.close()
        for log in self.logs:
            if student is not None:
                log.file(student)
            log.close(success)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        for log in self.logs:
            log.scalars(values, step)
