"""Hooks of the training loop: rematching, and checkpoints."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

from detectron2.engine import HookBase
from tqdm import tqdm

from d2_mgd.detection.loader import PassLoader
from d2_mgd.distill import MatchingGuidedDistiller, RematchReport, RematchSchedule, WeightSchedule, save_reports
from d2_mgd.distill.rematching import observe_pass, rematch, rematch_due
from d2_mgd.training import Interrupted
from d2_mgd.training.processes import rank
from d2_mgd.visualize import matching_images

logger = logging.getLogger(__name__)

_LOG_PERIOD = 20  # iterations, that of Detectron2's writers


class BalanceHook(HookBase):
    """Logs how much the distillation weighs, and warns where fixed weights drown the task.

    ``ratio/<feature>`` and, under a balance, ``balance/<feature>`` go to the event storage every 20 iterations.

    Args:
        distiller: of the model under training.
    """

    def __init__(self, distiller: MatchingGuidedDistiller) -> None:
        self.distiller = distiller

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % _LOG_PERIOD == 0:
            self.trainer.storage.put_scalars(smoothing_hint=False, **self.distiller.balance.report())
            for warning in self.distiller.balance.warnings():
                logger.warning(warning)


class MatchingHook(HookBase):
    """Rematches the detector under training: at the start and then by schedule.

    A rematch is logged, and written to the event storage as ``rematch/<feature>_cost``, ``rematch/<feature>_changed``
    and ``rematch/seconds``, and to ``OUTPUT_DIR/matching/iter_0001000.npz``, where the number is that of finished
    iterations.

    Where the model's weight schedule starts and stops the distillation, the rematch before the first step becomes that
    before its start, and there are none outside.

    Args:
        model: a :class:`~d2_mgd.detection.TeacherStudentDetector`, not wrapped.
        schedule: when to rematch.
        build_loader: number of finished iterations -> the loader of a pass.
        source: ``pass``, or ``online``: costs of training steps, after a pass for the first matching.
        every: online, observe every so many steps.
        output_dir: OUTPUT_DIR.
        autocast: makes the context in which networks run in training; by default none.
        leave: ends the training, given the number of the signal that interrupted a pass; the training that continues
            starts with that rematch.
        pictures: put a picture of each feature's matching into the event storage.
    """

    def __init__(
        self,
        model: Any,
        schedule: RematchSchedule,
        build_loader: Callable[[int], PassLoader],
        *,
        source: str = "pass",
        every: int = 1,
        output_dir: str = "",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        leave: Callable[[int], NoReturn],
        pictures: bool = False,
    ) -> None:
        self.model = model
        self.schedule = schedule
        self.build_loader = build_loader
        self.source = source
        self.every = every
        self.output_dir = output_dir
        self.autocast = autocast
        self.leave = leave
        self.pictures = pictures
        self.newest = -1  # finished iterations at the newest rematch

    def state_dict(self) -> dict[str, Any]:
        return {"newest": self.newest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.newest = state["newest"]

    def before_train(self) -> None:
        # After resuming, a rematch that is due was done before the checkpoint, except at the end of a shorter training.
        start = self.trainer.start_iter
        if start < self.trainer.max_iter and self._due(start) and self.newest != start:
            self.rematch(start)

    def before_step(self) -> None:
        if self.source == "online":  # also off: a step that failed before its maps were there has left it on
            self.model.observe_next = self.trainer.iter % self.every == 0

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        if finished < self.trainer.max_iter and self._due(finished):
            self.rematch(finished)

    def _due(self, finished: int) -> bool:
        return rematch_due(self.schedule, self.model.schedule or WeightSchedule(), finished)

    def rematch(self, finished: int) -> None:
        """Measure the costs if need be, solve, and use the new matching (collective).

        Args:
            finished: number of finished iterations.

        Raises:
            CommonError: there is no first matching, see :func:`~d2_mgd.distill.rematching.rematch`.
        """
        distiller: MatchingGuidedDistiller = self.model.distiller
        begin = time.perf_counter()
        if self.source == "pass" or not distiller.matched:
            try:
                self._observe_pass(finished)
            except Interrupted as stopped:
                self.leave(stopped.number)
        reports = rematch(distiller, f"{finished} iterations")
        if reports:
            self.newest = finished
            self._record(finished, reports, time.perf_counter() - begin)

    def _observe_pass(self, finished: int) -> None:
        def maps_of(batch: Any) -> Any:
            with self.autocast():
                return self.model.extract_maps(batch)

        batches = lambda: _progress(self.build_loader(finished), "matching cost")  # noqa: E731
        observe_pass(self.model.distiller, self.model.student, batches, maps_of)

    def _record(self, finished: int, reports: Mapping[str, RematchReport], seconds: float) -> None:
        storage = self.trainer.storage
        storage.put_scalar("rematch/seconds", seconds, smoothing_hint=False)
        for name, report in reports.items():
            storage.put_scalar(f"rematch/{name}_cost", report.mean_cost, smoothing_hint=False)
            storage.put_scalar(f"rematch/{name}_changed", report.changed, smoothing_hint=False)
        if self.pictures and rank() == 0:
            for name, image in matching_images(reports).items():
                storage.put_image(f"matching/{name}", image.transpose(2, 0, 1))
        if self.output_dir and rank() == 0:
            save_reports(os.path.join(self.output_dir, "matching", f"iter_{finished:07d}.npz"), reports)


class CheckpointHook(HookBase):
    """Saves ``model_<iteration>`` every ``period`` iterations and ``model_final`` after the last, on every rank.

    Args:
        save: saves a checkpoint under a name; a collective.
        period: SOLVER.CHECKPOINT_PERIOD.
    """

    def __init__(self, save: Callable[[str], None], period: int) -> None:
        self.save = save
        self.period = period

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        if finished >= self.trainer.max_iter:
            self.save("model_final")
        elif self.period > 0 and finished % self.period == 0:
            self.save(f"model_{self.trainer.iter:07d}")


def _progress(loader: PassLoader, what: str) -> Any:
    """A bar in a terminal; a line every ten seconds in a log file; nothing on the other ranks."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(loader, desc=what, unit="batch", disable=rank() != 0, mininterval=interval)
