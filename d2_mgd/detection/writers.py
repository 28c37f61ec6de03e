"""Detectron2's event storage in the services of --log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from d2_mgd.detection.verdict import STOPPED
from d2_mgd.training.services import ServiceLog, open_logs

__all__ = ["ServiceWriter", "service_writers"]

_WINDOW = 20  # iterations that losses are smoothed over, as in Detectron2's own writers


class ServiceWriter(EventWriter):
    """Writes scalars and images to services. Stands before Detectron2's TensorBoard writer, which clears the images.

    Args:
        open_logs: opens the logs, at the first write.
        last_iteration: SOLVER.MAX_ITER.
        student: files that are stored with the finished run.
    """

    def __init__(self, open_logs: Callable[[], list[ServiceLog]], last_iteration: int, student: Sequence[Path]) -> None:
        self.open_logs = open_logs
        self.last_iteration = last_iteration
        self.student = student
        self._logs: list[ServiceLog] | None = None
        self._newest = -1

    def write(self) -> None:
        if self._logs is None:
            self._logs = self.open_logs()
        storage = get_event_storage()
        by_iteration: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in storage.latest_with_smoothing_hint(_WINDOW).items():
            if iteration > self._newest:
                by_iteration[iteration][name] = value
        self._newest = max(by_iteration, default=self._newest)
        for log in self._logs:
            for iteration, values in sorted(by_iteration.items()):
                log.scalars(values, iteration)
            for name, image, iteration in storage._vis_data:
                log.image(name, _pixels(image), iteration)

    def close(self) -> None:
        storage = get_event_storage()
        finished = storage.iter >= self.last_iteration - 1 or STOPPED in storage.latest()
        for log in self._logs or ():
            for path in self.student if finished else ():
                log.file(path)
            log.close(finished)


def service_writers(cfg: CfgNode, services: Sequence[str], log_student: bool, resume: bool) -> list[EventWriter]:
    """The writer of a training, none without a service.

    Args:
        cfg: of the training.
        services: of --log.
        log_student: store the final student with the run.
        resume: whether the training may go on from a checkpoint.
    """
    if not services:
        return []
    folder, settings = Path(cfg.OUTPUT_DIR), yaml.safe_load(cfg.dump())
    student = [folder / name for name in ("model_final.pth", "student.yaml")] if log_student else []
    opened = partial(open_logs, services, folder, settings, "iteration", resume)
    return [ServiceWriter(opened, cfg.SOLVER.MAX_ITER, student)]


def _pixels(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 of an image of the event storage: (3, H, W), uint8 or floats from 0 to 1."""
    pixels = np.asarray(image).transpose(1, 2, 0)
    return pixels if pixels.dtype == np.uint8 else (255 * pixels.clip(0, 1)).astype(np.uint8)
