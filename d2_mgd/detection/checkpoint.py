"""Checkpoints of a training: the plain student, and beside it what is needed to continue as if never stopped.

A file holds ``model``, the student as an unmodified Detectron2 loads it; ``iteration``, the newest finished one;
``training``, the optimiser, schedule, scaler, hooks and the random state of every process; and ``distillation``, the
matchings, student-side norms, running costs, and which teacher it was. The teacher itself is never in it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from d2_mgd.detection.weights import SafeCheckpointer
from d2_mgd.errors import UserError
from d2_mgd.training import Checkpoints, disk_errors, write_atomically
from d2_mgd.training.processes import failing_together, from_main, rank
from d2_mgd.training.weights_files import read_tensors

logger = logging.getLogger(__name__)


class TrainingCheckpointer(SafeCheckpointer):
    """Writes and reads the checkpoints of one training.

    Args:
        student: the module whose weights are loaded from ``model``; for a distilled student the trained one, with its
            trainable norms.
        save_dir: OUTPUT_DIR.
        export: the plain student's state, ``model`` in the file; the student's own ``state_dict`` by default.
        save_to_disk: by default true in the main process only.
        keep: how many checkpoints stay; older ones are removed after each that was written. 0 keeps all.
    """

    def __init__(
        self,
        student: nn.Module,
        save_dir: str = "",
        *,
        export: Callable[[], dict[str, torch.Tensor]] | None = None,
        save_to_disk: bool | None = None,
        keep: int = 0,
    ) -> None:
        super().__init__(student, save_dir, save_to_disk=save_to_disk)
        self.checkpoints = Checkpoints(save_dir, r"model_(\d+|final)\.pth", "last_checkpoint", keep=keep)
        self.export = export or student.state_dict

    def save(self, name: str, **state: Any) -> None:
        """Write ``name``.pth with the plain student as ``model`` and ``state`` beside it, then move the pointer to it.

        Raises:
            CommonError: the disk of rank 0 refuses, on every rank; earlier checkpoints and the pointer are untouched.
        """
        with failing_together():
            if self.save_dir and self.save_to_disk:
                self.checkpoints.write(f"{name}.pth", {"model": dict(self.export()), **state}, state["iteration"])

    def save_student(self, name: str, **state: Any) -> None:
        """Write the plain student and ``state`` to ``name``.pth, from which nothing resumes. Errors as above."""
        path = os.path.join(self.save_dir, f"{name}.pth")
        with failing_together():
            if self.save_to_disk:
                with disk_errors(path):
                    content = {"model": dict(self.export()), **state}
                    write_atomically(path, lambda file: torch.save(content, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Point ``last_checkpoint`` to a file, whole or not at all."""
        self.checkpoints.point_to(last_filename_basename)

    def has_checkpoint(self) -> bool:
        """Whether there is a pointer, or without one any checkpoint."""
        return bool(self.save_dir) and self.checkpoints.exist()

    def newest_whole(self) -> str:
        """Path of the last checkpoint, or of the newest other that is whole, as rank 0 finds it (collective)."""
        path = ""
        with failing_together():
            if rank() == 0:
                path = self.checkpoints.newest_whole()
        return from_main(path)

    def resume(self, path: str | None = None) -> dict[str, Any]:
        """Load the student from the last checkpoint.

        Args:
            path: of the file, by default that of :meth:`newest_whole`.

        Returns:
            The rest of the file: ``iteration``, ``training`` and, if it was distilled, ``distillation``.

        Raises:
            UserError: the file is no checkpoint of a training, or of another student than the config's.
        """
        path = path or self.newest_whole()
        logger.info("Resuming from %s", path)
        data = read_tensors(path)
        if not {"model", "iteration", "training"} <= set(data):
            raise UserError(
                f"{path} holds weights but no state of a training; give it as MODEL.WEIGHTS, without --resume."
            )
        left = self._load_model({"model": data.pop("model")})
        absent = [name for name in left.missing_keys if not name.endswith("num_batches_tracked")]
        other = list(dict.fromkeys([name for name, *_ in left.incorrect_shapes] + absent + list(left.unexpected_keys)))
        if other:
            raise UserError(
                f"{path} is of another student than the config describes: {len(other)} weights differ in name or "
                f"shape, {other[0]!r} first."
            )
        return data
