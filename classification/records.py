"""Files that rank 0 writes: checkpoints, the student's files, metrics and matchings.

All functions raise a :class:`UserError` if a file cannot be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from classification.checkpoint import STUDENT_BEST, STUDENT_LAST, save_student
from classification.state import Run
from d2_mgd.distill import RematchReport, save_reports
from d2_mgd.training import disk_errors


def write_checkpoint(run: Run, state: dict[str, Any]) -> None:
    """Write a checkpoint, and point ``checkpoint.pth`` to it."""
    if not run.process.is_main:
        return
    progress = run.progress
    step = f"_step_{progress.step:06d}" if progress.step else ""
    run.checkpoints.write(f"checkpoint_epoch_{progress.epoch:04d}{step}.pth", state, _position(run))


def _position(run: Run) -> int:
    """Position of the run, counted in images; it also grows when a resumed run has another number of ranks."""
    images, progress = len(run.data["train"]), run.progress
    done = images if progress.step == run.order.steps else progress.step * run.together
    return progress.epoch * (images + 1) + done


def write_epoch(run: Run, line: Mapping[str, Any], is_best: bool) -> None:
    """Write the student's files and the metrics of a finished epoch.

    Args:
        run: its history already includes the epoch.
        line: the epoch's metrics.
        is_best: whether the student is the best so far.
    """
    if run.journal is None:
        return
    content = {
        "arch": run.options.arch,
        "classes": list(run.data["train"].folder.classes),
        "image_size": run.options.image_size,
        "epoch": line["epoch"],
        "err1": line["err1"],
        "err5": line["err5"],
        "state_dict": run.student.network.state_dict(),
    }
    for name in [STUDENT_LAST, *([STUDENT_BEST] if is_best else [])]:
        save_student(content, run.options.output_dir / name, run.options.safetensors)
    run.journal.epoch(run.progress.history, run.finished_steps)


def write_matching(run: Run, epoch: int, reports: Mapping[str, RematchReport]) -> None:
    """Write the reports of a rematch after ``epoch`` epochs."""
    if run.journal is None:
        return
    run.journal.matchings(reports, run.finished_steps)
    path = run.options.output_dir / "matching" / f"epoch_{epoch:04d}.npz"
    with disk_errors(path):
        save_reports(path, reports)
