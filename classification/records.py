"""What rank 0 writes for all: checkpoints, the student's files, metrics and matchings.

Each raises a :class:`UserError` where the disk refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from classification.checkpoint import STUDENT_BEST, STUDENT_LAST, save_student
from d2_mgd.distill import RematchReport, save_reports
from d2_mgd.training import disk_errors

if TYPE_CHECKING:
    from classification.engine import Trainer

__all__ = ["write_checkpoint", "write_epoch", "write_matching"]


def write_checkpoint(trainer: Trainer, state: dict[str, Any]) -> None:
    """Write the state of a training, and move the pointer to it."""
    if not trainer.process.is_main:
        return
    progress = trainer.progress
    step = f"_step_{progress.step:06d}" if progress.step else ""
    trainer.checkpoints.write(f"checkpoint_epoch_{progress.epoch:04d}{step}.pth", state, _position(trainer))


def _position(trainer: Trainer) -> int:
    """How far the run is; it grows also where the number of processes, and so of steps, changes."""
    images, progress = len(trainer.data["train"]), trainer.progress
    done = images if progress.step == trainer.order.steps else progress.step * trainer.together
    return progress.epoch * (images + 1) + done


def write_epoch(trainer: Trainer, line: Mapping[str, Any], is_best: bool) -> None:
    """Write the student's files and the metrics of a finished epoch.

    Args:
        trainer: with the epoch in its history.
        line: the epoch's metrics.
        is_best: whether the student is the best so far.
    """
    if trainer.journal is None:
        return
    content = {
        "arch": trainer.options.arch,
        "classes": list(trainer.data["train"].folder.classes),
        "image_size": trainer.options.image_size,
        "epoch": line["epoch"],
        "err1": line["err1"],
        "err5": line["err5"],
        "state_dict": trainer.student.network.state_dict(),
    }
    for name in [STUDENT_LAST, *([STUDENT_BEST] if is_best else [])]:
        save_student(content, trainer.options.output_dir / name, trainer.options.safetensors)
    trainer.journal.epoch(trainer.progress.history, trainer.finished_steps)


def write_matching(trainer: Trainer, epoch: int, reports: Mapping[str, RematchReport]) -> None:
    """Write what a rematch after ``epoch`` epochs found."""
    if trainer.journal is None:
        return
    trainer.journal.matchings(reports, trainer.finished_steps)
    path = trainer.options.output_dir / "matching" / f"epoch_{epoch:04d}.npz"
    with disk_errors(path):
        save_reports(path, reports)
