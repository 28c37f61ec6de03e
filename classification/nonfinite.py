"""A loss or gradient that is not finite: kept for whoever wants to know why.

``OUTPUT/nonfinite/epoch_0002_step_000005/student.pth`` has the student and the matching as they were, and
``rank_0000.pth`` a process's batch, the names of its files, its losses and the random state before its forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from classification.data import Batch
from classification.options import as_values
from d2_mgd.training import write_atomically

if TYPE_CHECKING:
    from classification.engine import Trainer

__all__ = ["dump_step"]

logger = logging.getLogger(__name__)


def dump_step(trainer: Trainer, batch: Batch, losses: Mapping[str, Tensor], random: dict[str, Any]) -> Path:
    """Write what is needed to repeat the step in progress; where the disk refuses, that is a warning.

    Args:
        trainer: before the step of its optimiser.
        batch: of this process, as it came from the loader.
        losses: name -> sum over the batch.
        random: the random state before the forward pass.

    Returns:
        The folder. The first process writes the student there, each its batch.
    """
    progress, process = trainer.progress, trainer.process
    folder = trainer.options.output_dir / "nonfinite" / f"epoch_{progress.epoch + 1:04d}_step_{progress.step + 1:06d}"
    keys = trainer.order.keys(progress.step)
    data = trainer.data["train"].folder
    own: dict[str, Any] = {
        "images": batch.images,
        "targets": batch.targets,
        "files": [str(data.path(key.number)) for key in keys],
        "losses": {name: float(loss) / max(1, len(batch.targets)) for name, loss in losses.items()},
        "random": random,
    }
    student = trainer.student
    state = {
        "arch": trainer.options.arch,
        "options": as_values(trainer.options),
        "teacher": trainer.teacher,
        "student": student.network.state_dict(),
        "distiller": None if student.distiller is None else student.distiller.state_dict(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"rank_{process.rank:04d}.pth", lambda file: torch.save(own, file))
        if process.is_main:
            write_atomically(folder / "student.pth", lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:
        logger.warning("what is needed to repeat the step could not be kept: %s", error)
    return folder
