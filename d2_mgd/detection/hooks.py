"""Hooks of the training loop: rematching, the first step, and checkpoints."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn
from tqdm import tqdm

from d2_mgd.detection.config_loaders import build_pass_loader, training_records
from d2_mgd.detection.loader import PassLoader
from d2_mgd.detection.rematcher import Rematcher
from d2_mgd.detection.steps import precision_of
from d2_mgd.distill import MatchingGuidedDistiller, save_reports
from d2_mgd.distill.rematching import observe_pass, rematch_due
from d2_mgd.training import Interrupted, disk_errors
from d2_mgd.training.processes import failing_together, rank
from d2_mgd.visualize import matching_images
from d2_mgd.visualize.trainings import NEW_TRAINING

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


def _exit(number: int) -> NoReturn:
    raise SystemExit(128 + number)


def distillation_hooks(
    cfg: CfgNode,
    model: nn.Module,
    *,
    build_loader: Callable[[int], Iterable[Any]] | None = None,
    leave: Callable[[int], NoReturn] = _exit,
    pictures: bool = False,
) -> list[HookBase]:
    """What ``trainer.register_hooks`` takes for the extra pass over images, and for files of what each rematch found.

    The model trains without them too, unless MGD.REMATCH.SOURCE is "pass".

    Args:
        cfg: the training's config, with the `MGD` node.
        model: a :class:`~d2_mgd.detection.TeacherStudentDetector`, or a wrapper that has it as ``module``.
        build_loader: number of finished iterations -> batches of this rank's share of a pass; by default those of
            MGD.REMATCH.NUM_IMAGES images of DATASETS.TRAIN, with the test-time augmentation.
        leave: ends the training, given the number of the signal that interrupted a pass; by default exits. The training
            that continues starts with that rematch.
        pictures: put a picture of each feature's matching into the event storage.

    Returns:
        list: no hook for a model without matchings.
    """
    detector: Any = getattr(model, "module", model)
    if detector.distiller is None or not detector.distiller.needs_matching:
        return []
    if build_loader is None:
        build_loader = _PassesOfConfig(cfg)
    return [
        MatchingHook(
            detector,
            build_loader,
            output_dir=cfg.OUTPUT_DIR,
            autocast=precision_of(cfg).autocast,
            leave=leave,
            pictures=pictures,
        )
    ]


class _PassesOfConfig:
    """Loaders of passes over the training data of a config, which is read at the first pass."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self._records: Any = None

    def __call__(self, finished: int) -> PassLoader:
        if self._records is None:
            self._records = training_records(self.cfg)
        return build_pass_loader(self.cfg, self._records, (max(self.cfg.SEED, 0), finished))


class MatchingHook(HookBase):
    """Rematches on a pass over images where the model's source is ``pass``, and writes what each rematch found.

    A rematch is written to ``OUTPUT_DIR/matching/iter_0001000.npz``, where the number is that of finished iterations.

    Where the model's weight schedule starts and stops the distillation, the rematch before the first step becomes that
    before its start, and there are none outside.

    Args:
        model: a :class:`~d2_mgd.detection.TeacherStudentDetector`, not wrapped.
        build_loader: number of finished iterations -> the loader of a pass.
        output_dir: OUTPUT_DIR.
        autocast: makes the context in which networks run in training; by default none.
        leave: ends the training, given the number of the signal that interrupted a pass.
        pictures: put a picture of each feature's matching into the event storage.
    """

    def __init__(
        self,
        model: Any,
        build_loader: Callable[[int], Iterable[Any]],
        *,
        output_dir: str = "",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        leave: Callable[[int], NoReturn] = _exit,
        pictures: bool = False,
    ) -> None:
        self.model = model
        self.rematcher: Rematcher = model.rematcher
        self.build_loader = build_loader
        self.output_dir = output_dir
        self.autocast = autocast
        self.leave = leave
        self.pictures = pictures

    def before_train(self) -> None:
        # After resuming, a rematch that is due was done before the checkpoint, except at the end of a shorter training.
        start = self.trainer.start_iter
        if start < self.trainer.max_iter and self._due(start) and self.rematcher.checked <= start:
            self.rematch(start)

    def after_step(self) -> None:
        self._record(self.trainer.iter)  # of the model's own rematch in this step
        finished = self.trainer.iter + 1
        if finished < self.trainer.max_iter and self._due(finished):
            self.rematch(finished)

    def _due(self, finished: int) -> bool:
        return self.rematcher.source == "pass" and rematch_due(self.rematcher.schedule, self.model.schedule, finished)

    def rematch(self, finished: int) -> None:
        """Measure the costs on a pass, solve, and use the new matching (collective).

        Args:
            finished: number of finished iterations.

        Raises:
            CommonError: there is no first matching, see :func:`~d2_mgd.distill.rematching.rematch`.
        """
        begin = time.perf_counter()
        try:
            self._observe_pass(finished)
        except Interrupted as stopped:
            self.leave(stopped.number)
        self.rematcher.rematch(self.model.distiller, finished, begin)
        self._record(finished)

    def _observe_pass(self, finished: int) -> None:
        def maps_of(batch: Any) -> Any:
            with self.autocast():
                return self.model.extract_maps(batch)

        batches = lambda: _progress(self.build_loader(finished), "matching cost")  # noqa: E731
        observe_pass(self.model.distiller, self.model.student, batches, maps_of)

    def _record(self, finished: int) -> None:
        reports = self.rematcher.take_reports()
        if not reports or rank() != 0:
            return
        if self.pictures:
            for name, image in matching_images(reports).items():
                self.trainer.storage.put_image(f"matching/{name}", image.transpose(2, 0, 1))
        if self.output_dir:
            save_reports(os.path.join(self.output_dir, "matching", f"iter_{finished:07d}.npz"), reports)


class FirstStepHook(HookBase):
    """Changes files of OUTPUT_DIR after this process's first step: a start that is refused before it changes nothing.

    A new training in a used folder begins with a line in ``metrics.json`` that parts its rows from the earlier ones.

    Args:
        output_dir: OUTPUT_DIR.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir
        self.actions: list[Callable[[], None]] = []  # more to do then, on rank 0

    def after_step(self) -> None:
        start = self.trainer.start_iter
        if self.trainer.iter != start:
            return
        with failing_together():
            if rank() == 0:
                if start == 0:
                    _mark_new_training(self.output_dir)
                for action in self.actions:
                    action()


def _mark_new_training(output_dir: str) -> None:
    path = Path(output_dir, "metrics.json")
    found = path.read_bytes() if path.is_file() else b""
    if found:
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            cut = "" if found.endswith(b"\n") else "\n"  # by a kill
            file.write(cut + json.dumps({"iteration": 0, NEW_TRAINING: True}) + "\n")


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


def _progress(loader: Iterable[Any], what: str) -> Any:
    """A bar in a terminal; a line every ten seconds in a log file; nothing on the other ranks."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(loader, desc=what, unit="batch", disable=rank() != 0, mininterval=interval)
