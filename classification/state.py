"""The state of a run on one rank, gathered over ranks for a checkpoint and restored from one.

Saving does not change the run: a run that is interrupted after any step and resumed ends with the same bits.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from classification.checkpoint import FORMAT, checkpoints_of
from classification.data import ImageDataset, ShuffledBatches, image_statistics
from classification.distillation import Student
from classification.evaluation import Intake
from classification.metrics import Journal
from classification.options import as_values
from classification.processes import Process
from d2_mgd.distill import MatchingGuidedDistiller
from d2_mgd.distill.rematching import gather_costs
from d2_mgd.errors import UserError, reason
from d2_mgd.training.nonfinite import NonFinitePolicy
from d2_mgd.training.processes import averaged_buffers, gather
from d2_mgd.training.randomness import random_state, set_random_state
from d2_mgd.training.steps import Stepper
from d2_mgd.training.sums import Sums

logger = logging.getLogger(__name__)


_ADVICE = (
    " Try a smaller --learning-rate, --warmup 1 or another --mixed-precision, or skip such steps with "
    "--skip-nonfinite; --resume continues from the last checkpoint, written before this step."
)


@dataclass
class Progress:
    """Progress of a run.

    Args:
        epoch, step: finished epochs, and finished steps of the next one.
        history: metrics of each epoch.
        best: metrics of the epoch with the lowest top-1 error.
        teacher: the teacher's errors, if its classes are the data's.
        share: of the distillation's weight, see :class:`~d2_mgd.distill.WeightSchedule`.
        before: top-1 error of a student with given weights, before the first step.
    """

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    teacher: dict[str, float] | None = None
    share: float = 1.0
    before: float | None = None


class Run:
    """One rank of a run: networks, optimiser, data and progress.

    Args:
        options: as parsed.
        process: this rank.
        student: the trainable part, on its device.
        step: the module that a batch goes through: the student (possibly wrapped) and the teacher.
        data: the data sets ``train``, ``valid`` and ``rematch``.
        teacher: architecture, file and digest of the teacher, for checkpoints.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        process: Process,
        student: Student,
        step: nn.Module,
        data: Mapping[str, ImageDataset],
        teacher: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = options
        self.process = process
        self.student = student
        self.step = step
        self.data = data
        self.teacher = dict(teacher) if teacher else None
        self.intake = Intake(process.device, options.skip_broken_images, image_statistics(student.network))
        self.progress = Progress(epoch=options.start_epoch)
        self.sums = Sums(process.device)
        self.summed: list[str] = []  # names of the values in sums
        self.checkpoints = checkpoints_of(options.output_dir, options.keep_checkpoints)
        optimizer = torch.optim.SGD(
            student.parameters(),
            options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=bool(options.nesterov),
        )
        self.stepper = Stepper(student, optimizer, student.precision, getattr(step, "student", step))
        folder = options.output_dir / "nonfinite"
        self.nonfinite = NonFinitePolicy(
            student, options.skip_nonfinite, folder, lambda random: training_state(self, random), advice=_ADVICE
        )
        self.batch_size = options.batch_size // process.local_world
        self.order = ShuffledBatches(len(data["train"]), self.batch_size, options.seed, process.rank, process.world)
        self.journal: Journal | None = None

    @property
    def distiller(self) -> MatchingGuidedDistiller:
        assert self.student.distiller is not None
        return self.student.distiller

    @property
    def together(self) -> int:
        """Number of images of a step, on all ranks."""
        return self.batch_size * self.process.world

    @property
    def finished_steps(self) -> int:
        """Number of finished steps of the whole run."""
        return self.progress.epoch * self.order.steps + self.progress.step


def training_state(run: Run, random: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state of all ranks, complete on rank 0 (collective).

    The student's running statistics are means over ranks. Within an epoch, those of each rank are stored too.
    """
    student = run.student
    data = run.options.data
    own: dict[str, Any] = {
        "random": random or random_state(),
        "sums": run.sums.state_dict(),
        "broken": sorted(os.path.relpath(path, data) for path in run.intake.broken),
    }
    if run.process.world > 1 and run.progress.step:
        statistics = {name: buffer for name, buffer in student.named_buffers() if buffer.is_floating_point()}
        own["buffers"] = {name: buffer.cpu() for name, buffer in statistics.items()}  # they differ between ranks
    if student.distiller is not None and run.options.mgd_update_source == "online":
        gather_costs(student.distiller)
    mean = averaged_buffers(student)
    return {
        "format": FORMAT,
        "arch": run.options.arch,
        "classes": list(run.data["train"].folder.classes),
        "options": as_values(run.options),
        "world": run.process.world,
        "together": run.together,
        "teacher": run.teacher,
        "progress": dict(vars(run.progress)),
        "nonfinite": run.nonfinite.state_dict(),
        "student": _with_means(student.network, "network.", mean),
        "distiller": None if student.distiller is None else _with_means(student.distiller, "distiller.", mean),
        "costs": None if student.distiller is None else student.distiller.cost_state_dict(),
        "optimizer": run.stepper.optimizer.state_dict(),
        "scaler": run.student.precision.scaler.state_dict(),
        "processes": gather(own),
    }


def _with_means(module: nn.Module, prefix: str, mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a module, with its running statistics replaced by those in ``mean`` (keys with ``prefix``)."""
    state = module.state_dict()
    state.update({name: mean[prefix + name] for name in state if prefix + name in mean})
    return state  # keeps its metadata, from which some networks read the version of their weights


def restore_training(run: Run, state: Mapping[str, Any]) -> None:
    """Restore the result of :func:`training_state`, on every rank.

    Raises:
        UserError: the checkpoint has another distiller.
    """
    _load_modules(run, state)
    if state["costs"] and run.process.is_main:
        run.distiller.load_cost_state_dict(state["costs"])
    processes = state["processes"]
    broken = [path for own in processes for path in own.get("broken", ())]
    run.intake.broken.update(os.path.join(run.options.data, path) for path in broken)
    step = state["progress"]["step"]
    if state["together"] != run.together:  # the same number of images, rounded down to whole steps
        step = min(run.order.steps, step * state["together"] // run.together)
    run.progress = Progress(**{**state["progress"], "step": step})
    run.nonfinite.load_state_dict(state["nonfinite"])
    run.summed = [name for name in processes[0]["sums"] if name != "images"]
    if len(processes) == run.process.world:
        own = processes[run.process.rank]
        run.sums.load_state_dict(own["sums"])
        buffers = dict(run.student.named_buffers())
        for name, buffer in own.get("buffers", {}).items():
            buffers[name].copy_(buffer)
        set_random_state(own["random"])
        return
    logger.warning(
        "the checkpoint is of %d processes and this run has %d: it continues, but not bit-exactly.",
        len(processes),
        run.process.world,
    )
    for other in processes[run.process.rank :: run.process.world]:
        run.sums.add_state(other["sums"])


def _load_modules(run: Run, state: Mapping[str, Any]) -> None:
    student = run.student
    if (state["distiller"] is None) != (student.distiller is None):
        raise UserError(f"it was written with{'' if state['distiller'] else 'out'} a feature distiller.")
    align = state["options"].get("mgd_align")
    if student.distiller is not None and align != student.distiller.align:
        raise UserError(f"it was written with --mgd-align {align}: use it again, or start in another --output-dir.")
    try:
        student.network.load_state_dict(state["student"])
        if student.distiller is not None:
            student.distiller.load_state_dict(state["distiller"])
    except RuntimeError as error:
        raise UserError(reason(error)) from error
    _load_momenta(run.stepper.optimizer, state["optimizer"])
    if state["scaler"] and run.student.precision.scaler.is_enabled():
        run.student.precision.scaler.load_state_dict(state["scaler"])


def _load_momenta(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the optimiser's momenta; its settings (weight decay, momentum, ...) stay those of this run's options."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
