"""Checkpoints: written whole or not at all, read without running code of theirs.

A run's folder holds ``checkpoint.pth`` (all that training goes on from), and beside it the student alone, last and
best, as files that plain torchvision loads: ``network.load_state_dict(torch.load("student_best.pth")["state_dict"])``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from classification.errors import UserError
from classification.models import architecture
from classification.weights import architecture_name, read_checkpoint

__all__ = ["CHECKPOINT", "STUDENT_BEST", "STUDENT_LAST", "read_training_state", "replace_file", "save_atomically"]

CHECKPOINT = "checkpoint.pth"
STUDENT_LAST = "student_last.pth"
STUDENT_BEST = "student_best.pth"

_FORMAT = 1


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a dictionary of tensors and plain values: the file appears whole, or the old one stays.

    Raises:
        UserError: the disk refuses.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer wraps a full disk in a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} could not be written ({str(error).splitlines()[0]}); the one before it is intact."
        ) from error


def replace_file(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _rename(temporary, path)


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, outlives a loss of power
    finally:
        os.close(folder)


def save_training_state(state: dict[str, Any], path: Path) -> None:
    """Write what :func:`read_training_state` reads."""
    save_atomically({"format": _FORMAT, **state}, path)


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
