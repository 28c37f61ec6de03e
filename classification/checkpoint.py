"""Checkpoints: written whole or not at all, known by digest, read without running code of theirs.

A run's folder holds ``checkpoint_epoch_0003.pth`` or ``checkpoint_epoch_0003_step_000120.pth`` (all that training goes
on from), the newest of which ``checkpoint.pth`` points to; ``checkpoints.json`` knows the state in which they must be
found. Beside them is the student alone, last and best, as files that plain torchvision loads:
``network.load_state_dict(torch.load("student_best.pth")["state_dict"])``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from classification.models import architecture
from classification.weights import architecture_name, read_checkpoint
from d2_mgd.errors import UserError
from d2_mgd.training import Checkpoints, disk_errors, write_atomically
from d2_mgd.training.weights_files import write_safetensors

CHECKPOINT = "checkpoint.pth"
STUDENT_LAST = "student_last.pth"
STUDENT_BEST = "student_best.pth"
FORMAT = 3


def checkpoints_of(folder: Path, keep: int = 0) -> Checkpoints:
    """The checkpoints of a run's folder; ``checkpoint.pth`` links to the last."""
    return Checkpoints(folder, r"checkpoint_epoch_\d+(_step_\d+)?\.pth", CHECKPOINT, link=True, keep=keep)


def save_student(content: dict[str, Any], path: Path, as_safetensors: bool) -> None:
    """Write a student's file, and beside it as safetensors its ``state_dict``, with the rest as metadata in json.

    Raises:
        UserError: the disk refuses.
    """
    with disk_errors(path):
        write_atomically(path, lambda file: torch.save(content, file))
        if as_safetensors:
            metadata = {key: json.dumps(value) for key, value in content.items() if key != "state_dict"}
            write_safetensors(str(path.with_suffix(".safetensors")), content["state_dict"], metadata)


def replace_file(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all.

    Raises:
        UserError: the disk refuses.
    """
    with disk_errors(path):
        write_atomically(path, lambda file: file.write(text.encode()))


def read_training_state(path: Path, arch: str, classes: list[str]) -> dict[str, Any]:
    """The state that a training continues from.

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
    if state["format"] != FORMAT:
        raise UserError(f"{path} has format {state['format']}, and this version reads format {FORMAT}.")
    if architecture_name(state["arch"]) != architecture_name(arch):
        raise UserError(f"the checkpoint {path} is of {state['arch']}, and --arch is {arch}.")
    if state["classes"] != classes:
        raise UserError(
            f"the checkpoint {path} was trained on {len(state['classes'])} other classes than these {len(classes)}."
        )
    return state
