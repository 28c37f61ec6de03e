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

import detectron2.utils.comm as comm
import torch
from torch import nn

from d2_mgd.detection.manifest import CheckpointManifest, write_atomically
from d2_mgd.detection.weights import SafeCheckpointer, file_digest, load_weights, local_weights_file, read_tensors
from d2_mgd.errors import UserError
from d2_mgd.training import remove_leftovers, system_reason
from d2_mgd.training.processes import first_failure

__all__ = [
    "CheckpointError",
    "SafeCheckpointer",
    "TrainingCheckpointer",
    "check_same_teacher",
    "file_digest",
    "load_weights",
    "local_weights_file",
    "read_tensors",
    "write_atomically",
]

logger = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint cannot be written; the message is one sentence."""


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
        self.keep = keep
        self.manifest = CheckpointManifest(save_dir)
        self.export = export or student.state_dict

    def save(self, name: str, **state: Any) -> None:
        """Write ``name``.pth with the plain student as ``model`` and ``state`` beside it, then move the pointer to it.

        A collective: what fails in the process that writes, fails in all.

        Raises:
            CheckpointError: the disk is full or not writable; earlier checkpoints and the pointer are untouched.
        """
        failure = ""
        if self.save_dir and self.save_to_disk:
            try:
                self._write(f"{name}.pth", state)
            except (OSError, RuntimeError) as error:  # of the disk, as torch tells of it
                reason = system_reason(error)
                failure = f"cannot write the checkpoint {name}.pth to {self.save_dir}: {reason}; the earlier ones are "
                failure += "intact, and --resume continues from the last of them."
        failure = first_failure(failure)
        if failure:
            raise CheckpointError(failure)

    def _write(self, file_name: str, state: dict[str, Any]) -> None:
        path = os.path.join(self.save_dir, file_name)
        data = {"model": dict(self.export()), **state}
        logger.info("Saving checkpoint to %s", path)
        for leftover in remove_leftovers(self.save_dir):
            logger.info("Removed %s, which a training that was killed had not written to its end", leftover)
        self.manifest.forget(file_name)  # a crash between two writes must not make a good file a bad one
        write_atomically(path, lambda file: torch.save(data, file))
        self.manifest.add(file_name, state["iteration"])
        self.tag_last_checkpoint(file_name)
        for old in self.manifest.prune(self.keep):
            logger.info("Removed the old checkpoint %s", old)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Point ``last_checkpoint`` to a file, whole or not at all."""
        pointer = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(pointer, lambda file: file.write(last_filename_basename.encode()))

    def has_checkpoint(self) -> bool:
        """Whether there is a pointer, or without one any checkpoint."""
        return super().has_checkpoint() or bool(self.save_dir and self.manifest.files())

    def newest_whole(self) -> str:
        """Path of the last checkpoint, or of the newest other that is whole, with a warning. A collective.

        Others are those before it, or where nothing says which those are, all of the folder.

        Raises:
            UserError: the pointer names no file, or one that is gone or damaged, and there is no whole one.
        """
        name, found = os.path.basename(self.get_checkpoint_file()), None
        if comm.is_main_process():
            found = self._first_whole(name)
        found = comm.all_gather(found)[0]
        assert found is not None
        whole, offences = found
        pointer, path = os.path.join(self.save_dir, "last_checkpoint"), os.path.join(self.save_dir, name)
        if whole is None:
            if not name:
                raise UserError(f"{pointer} names no checkpoint, and there is no whole one beside it.")
            if offences[name] == "is gone":
                raise UserError(f"{pointer} names {path}, which is gone, and there is no whole one before it.")
            raise UserError(f"the checkpoint {path} {offences[name]}; there is no whole one before it.")
        if not name:
            logger.warning("%s names no checkpoint: %s, the newest whole one, is used.", pointer, whole)
        for bad, offence in offences.items():
            logger.warning("The checkpoint %s %s: %s is used.", os.path.join(self.save_dir, bad), offence, whole)
        return os.path.join(self.save_dir, whole)

    def _first_whole(self, name: str) -> tuple[str | None, dict[str, str]]:
        offences: dict[str, str] = {}
        candidates = [name, *self.manifest.instead_of(name)] if name else self.manifest.instead_of(None)
        for candidate in candidates:
            offence = self.manifest.damage(candidate)
            if offence is None:
                return candidate, offences
            offences[candidate] = offence
        return None, offences

    def resume(self, path: str | None = None) -> dict[str, Any]:
        """Load the student from the last checkpoint.

        Args:
            path: of the file, by default that of :meth:`newest_whole`.

        Returns:
            The rest of the file: ``iteration``, ``training`` and, if it was distilled, ``distillation``.

        Raises:
            UserError: the pointer names a file that is gone; the file is no checkpoint of a training, or of another
                student than the config's.
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


def check_same_teacher(path: str, recorded: dict[str, str], weights_path: str, digest: str) -> None:
    """A training continues with the teacher that it began with.

    Args:
        path: the checkpoint's, for the message.
        recorded: ``weights`` and ``digest`` as written in the checkpoint.
        weights_path, digest: the teacher of now.

    Raises:
        ValueError: the digests differ. A file that was only moved is the same teacher.
    """
    if recorded["digest"] != digest:
        raise UserError(
            f"{path} was trained with the teacher {recorded['weights']} (SHA-256 {recorded['digest'][:12]}...), but "
            f"{weights_path} is another ({digest[:12]}...); to go on with another teacher give the checkpoint as "
            "MODEL.WEIGHTS, without --resume, in a new OUTPUT_DIR."
        )
    if recorded["weights"] != weights_path:
        logger.info("The teacher %s is the same file as %s", weights_path, recorded["weights"])
