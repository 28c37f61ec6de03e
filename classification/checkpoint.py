"""Checkpoints: written whole or not at all, known by digest, read without running code of theirs.

A run's folder holds ``checkpoint_epoch_0003.pth`` or ``checkpoint_epoch_0003_step_000120.pth`` (all that training goes
on from), the newest of which ``checkpoint.pth`` points to; ``checkpoints.json`` knows the state in which they must be
found. Beside them is the student alone, last and best, as files that plain torchvision loads:
``network.load_state_dict(torch.load("student_best.pth")["state_dict"])``.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from classification.models import architecture
from classification.weights import architecture_name, read_checkpoint
from d2_mgd.errors import UserError
from d2_mgd.training import CheckpointManifest, system_reason, write_atomically

__all__ = [
    "CHECKPOINT",
    "STUDENT_BEST",
    "STUDENT_LAST",
    "Checkpoints",
    "read_training_state",
    "replace_file",
    "save_atomically",
    "save_safetensors",
]

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pth"
STUDENT_LAST = "student_last.pth"
STUDENT_BEST = "student_best.pth"

_FORMAT = 3


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a dictionary of tensors and plain values: the file appears whole, or the old one stays.

    Raises:
        UserError: the disk refuses.
    """
    _write(path, lambda file: torch.save(content, file))


def save_safetensors(content: dict[str, Any], path: Path) -> None:
    """Write a student's file as safetensors: its ``state_dict``, and what is beside it as metadata, each as json."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in content["state_dict"].items()}
    metadata = {key: json.dumps(value) for key, value in content.items() if key != "state_dict"}
    data = safetensors.torch.save(tensors, metadata)
    _write(path, lambda file: file.write(data))


def replace_file(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all.

    Raises:
        UserError: the disk refuses.
    """
    _write(path, lambda file: file.write(text.encode()))


def _write(path: Path, write: Any) -> None:
    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:  # torch's writer wraps a full disk in a RuntimeError
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} could not be written ({system_reason(error)}); earlier checkpoints are intact, and --resume goes on "
        "from the last of them."
    )


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the run's.
        keep: how many stay; older ones are removed after each that was written.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.manifest = CheckpointManifest(folder, _read, r"checkpoint_epoch_\d+(_step_\d+)?\.pth")

    def write(self, state: dict[str, Any], name: str, position: int) -> None:
        """Write what :func:`read_training_state` reads, move the pointer to it, and let old ones go.

        Args:
            state: of the training.
            name: of the file.
            position: in the training; grows as it goes on.

        Raises:
            UserError: the disk refuses; the earlier checkpoints and the pointer are untouched.
        """
        path = self.folder / name
        try:
            self.manifest.forget(name)  # a crash between two writes must not make a good file a bad one
            write_atomically(path, lambda file: torch.save({"format": _FORMAT, **state}, file))
            self.manifest.add(name, position)
            self._point_to(name)
            self.manifest.prune(self.keep)
        except (OSError, RuntimeError) as error:
            raise _refused(path, error) from error

    def _point_to(self, name: str) -> None:
        temporary = self.folder / f".{CHECKPOINT}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        os.replace(temporary, self.folder / CHECKPOINT)

    def whole(self, path: Path) -> Path:
        """A checkpoint, or the newest other that is whole, with a warning.

        Others are those before it, or where nothing says which those are, all of the folder.

        Raises:
            UserError: it is gone or damaged, and so are all others.
        """
        first = Path(os.readlink(path)).name if path.is_symlink() else path.name
        offences: dict[str, str] = {}
        for name in [first, *self.manifest.instead_of(first)]:
            offence = self.manifest.damage(name)
            if offence is None:
                break
            offences[name] = offence
        else:
            raise UserError(f"the checkpoint {self.folder / first} {offences[first]}; there is no whole one before it.")
        for bad, offence in offences.items():
            logger.warning("the checkpoint %s %s: %s is used.", self.folder / bad, offence, name)
            self.manifest.forget(bad)  # so that it does not count among those to keep
        return self.folder / name

    def there(self, path: Path) -> bool:
        """Whether a checkpoint is there; for the pointer, or what it should point to."""
        return path.is_file() or path.is_symlink() or (path.name == CHECKPOINT and bool(self.manifest.files()))

    def clear(self) -> None:
        """Remove all checkpoints."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        for name in {*self.manifest.read(), *self.manifest.files()}:
            (self.folder / name).unlink(missing_ok=True)
        Path(self.manifest.path).unlink(missing_ok=True)


def _read(path: str) -> dict[str, Any]:
    try:
        return read_checkpoint(Path(path), "it")
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"it {Path(path)} ").rstrip(".")) from error


def read_training_state(path: Path, arch: str, classes: list[str]) -> dict[str, Any]:
    """What training goes on from.

    Args:
        path: a ``checkpoint.pth``.
        arch: the student that the options ask for.
        classes: the data's class names.

    Raises:
        UserError: the file is missing, cut short, of a student alone, of another architecture, or of other classes.
    """
    architecture(arch)
    state = read_checkpoint(path, "the checkpoint")
    if "format" not in state or "optimizer" not in state:
        raise UserError(
            f"{path} holds no training state to go on from; to start from its weights use --student-resume."
        )
    if state["format"] != _FORMAT:
        raise UserError(f"{path} has format {state['format']}, and this version reads format {_FORMAT}.")
    if architecture_name(state["arch"]) != architecture_name(arch):
        raise UserError(f"the checkpoint {path} is of {state['arch']}, and --arch is {arch}.")
    if state["classes"] != classes:
        raise UserError(
            f"the checkpoint {path} was trained on {len(state['classes'])} other classes than these {len(classes)}."
        )
    return state
