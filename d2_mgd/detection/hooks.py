"""Hooks of the training loop: rematching, and checkpoints.

A rematch runs at the start and then by schedule. Its costs come from a pass over images of an own loader, or were
collected on the way from the maps of training steps. Either way the training that surrounds it goes on as if nothing
had happened but the new matching.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import detectron2.utils.comm as comm
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from torch import Tensor, nn
from tqdm import tqdm

from d2_mgd.detection.loader import PassLoader
from d2_mgd.detection.state import preserved_modes
from d2_mgd.distill import MatchingGuidedDistiller, RematchReport, RematchSchedule, save_reports
from d2_mgd.errors import UserError
from d2_mgd.matching import SolverError
from d2_mgd.matching.cost import collective_device
from d2_mgd.training import Interrupted
from d2_mgd.training.randomness import preserved_randomness
from d2_mgd.visualize import matching_images

__all__ = ["CheckpointHook", "MatchingHook", "RematchError", "gather_costs"]

logger = logging.getLogger(__name__)


class RematchError(UserError):
    """There is no matching, and none can be found; the message says why."""


class MatchingHook(HookBase):
    """Rematches the detector under training. All processes take part; one solves.

    What a rematch found goes to the log, to the event storage as ``rematch/<feature>_cost``,
    ``rematch/<feature>_changed`` and ``rematch/seconds``, and to ``OUTPUT_DIR/matching/iter_0001000.npz``, where the
    number is that of finished iterations.

    A rematch whose cost is empty or not finite, or whose solver fails, keeps the matching in force, with a warning; if
    there is none yet, it is a :class:`RematchError`.

    Where the model's weight schedule says when distillation starts and stops, the rematch before the first step is that
    before its start, and there are none outside.

    Args:
        model: a :class:`~d2_mgd.detection.TeacherStudentDetector`, not wrapped.
        schedule: when.
        build_loader: number of finished iterations -> the loader of a pass.
        source: ``pass``, or ``online``: costs of training steps, after a pass for the first matching.
        every: online, the steps between two that are observed.
        output_dir: OUTPUT_DIR.
        autocast: makes the context in which networks run in training; by default none.
        leave: ends the training for a signal, given its number, which broke a pass off: the training that continues
            does that rematch first.
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
        weight = self.model.schedule
        if weight is None:
            return self.schedule.due(finished)
        first = finished == weight.start and self.schedule.start
        return weight.active(finished) and (first or self.schedule.due(finished))

    def rematch(self, finished: int) -> None:
        """Measure if need be, solve, use the new matching, and tell.

        Args:
            finished: number of finished iterations.

        Raises:
            RematchError: the first matching cannot be found, see :meth:`MatchingGuidedDistiller.rematch`.
        """
        distiller: MatchingGuidedDistiller = self.model.distiller
        begin = time.perf_counter()
        if self.source == "pass" or not distiller.matched:
            try:
                self._observe_pass(finished)
            except Interrupted as stopped:
                for cost in distiller.costs.values():
                    cost.reset()
                self.leave(stopped.number)
        try:
            reports = distiller.rematch()
        except (UserError, SolverError) as error:  # no other RuntimeError: a collective's means that a process is lost
            if not distiller.matched:
                raise RematchError(f"the first matching cannot be found: {error}") from error
            for cost in distiller.costs.values():
                cost.reset()
            logger.warning("Rematch after %d iterations: %s The matching in force stays.", finished, error)
            return
        self.newest = finished
        self._tell(finished, reports, time.perf_counter() - begin)

    def _observe_pass(self, finished: int) -> None:
        """Costs of one pass. Random state and modes are afterwards as before."""
        distiller = self.model.distiller
        for cost in distiller.costs.values():
            cost.reset()
        with preserved_randomness(), preserved_modes(self.model.student):
            loader = self.build_loader(finished)
            logger.info("Rematch after %d iterations: measuring on %d images", finished, loader.num_images)
            self.model.student.eval()
            _share_running_statistics(self.model.student)
            with self.autocast():
                for batch in _progress(loader, "matching cost"):
                    distiller.observe(*self.model.extract_maps(batch))

    def _tell(self, finished: int, reports: Mapping[str, RematchReport], seconds: float) -> None:
        storage = self.trainer.storage
        storage.put_scalar("rematch/seconds", seconds, smoothing_hint=False)
        for name, report in reports.items():
            storage.put_scalar(f"rematch/{name}_cost", report.mean_cost, smoothing_hint=False)
            storage.put_scalar(f"rematch/{name}_changed", report.changed, smoothing_hint=False)
            logger.info(
                "Rematch after %d iterations: %s S=%d T=%d images=%d mean cost %.4f, %.1f%% of channels changed, "
                "solved in %.2f s",
                finished,
                name,
                report.matching.num_student,
                report.matching.num_teacher,
                report.num_images,
                report.mean_cost,
                100 * report.changed,
                report.seconds,
            )
        logger.info("Rematch after %d iterations: %.1f s in all", finished, seconds)
        if self.pictures and comm.is_main_process():
            for name, image in matching_images(reports).items():
                storage.put_image(f"matching/{name}", image.transpose(2, 0, 1))
        if self.output_dir and comm.is_main_process():
            save_reports(os.path.join(self.output_dir, "matching", f"iter_{finished:07d}.npz"), reports)


class CheckpointHook(HookBase):
    """Saves ``model_<iteration>`` every ``period`` iterations and ``model_final`` after the last, in all processes.

    Args:
        save: saves a checkpoint under a name; a collective, since every process has state of its own.
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


def gather_costs(distiller: MatchingGuidedDistiller) -> None:
    """Move the running costs of all processes to the first one; the others start anew.

    The sum over processes stays as it was, and one process can save all of it. A collective.
    """
    if comm.get_world_size() == 1:
        return
    for cost in distiller.costs.values():
        state = cost.state_dict()
        shape = (cost.num_student, cost.num_teacher)
        packed = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.float64, device=collective_device())
        if state["similarity"] is not None:
            packed[:-1] = state["similarity"].flatten()
        packed[-1] = state["count"]
        dist.reduce(packed, dst=0)
        if comm.is_main_process():
            cost.load_state_dict({"similarity": packed[:-1].view(shape), "count": float(packed[-1])})
        else:
            cost.reset()


def _share_running_statistics(student: nn.Module) -> None:
    """Give all processes the first one's running statistics, so that all measure the same student.

    Training normalises with each batch's own statistics; only there may the running ones differ.
    """
    if comm.get_world_size() == 1:
        return
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for statistics in (module.running_mean, module.running_var):
                if isinstance(statistics, Tensor):
                    dist.broadcast(statistics, src=0)


def _progress(loader: PassLoader, what: str) -> Any:
    """A bar in a terminal; in a log file a line every ten seconds; nothing in the other processes."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(loader, desc=what, unit="batch", disable=not comm.is_main_process(), mininterval=interval)
