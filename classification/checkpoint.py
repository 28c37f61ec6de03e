"""The files of a run: checkpoints, from which a training resumes, and the student alone.

Checkpoints are ``checkpoint_epoch_0003.pth`` or ``checkpoint_epoch_0003_step_000120.pth``. ``checkpoint.pth`` links to
the newest; ``checkpoints.json`` lists their digests. ``student_last.pth`` and ``student_best.pth`` load in plain
torchvision: ``network.load_state_dict(torch.load("student_best.pth")["state_dict"])``.
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
FORMAT = 4


def checkpoints_of(folder: Path, keep: int = 0) -> Checkpoints:
    """The checkpoints of a run's folder; ``checkpoint.pth`` links to the last."""
    return Checkpoints(folder, r"checkpoint_epoch_\d+(_step_\d+)?\.pth", CHECKPOINT, link=True, keep=keep)


def save_student(content: dict[str, Any], path: Path, as_safetensors: bool) -> None:
    """Write a student's file; ``as_safetensors`` also writes a safetensors file, with the rest as JSON metadata.

    Raises:
        UserError: the file cannot be written.
    """
    with disk_errors(path):
        write_atomically(path, lambda file: torch.save(content, file))
        if as_safetensors:
            metadata = {key: json.dumps(value) for key, value in content.items() if key != "state_dict"}
            write_safetensors(str(path.with_suffix(".safetensors")), content["state_dict"], metadata)


def replace_file(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    with disk_errors(path):
        write_atomically(path, lambda file: file.write(text.encode()))


def read_training_state(path: Path, arch: str, classes: list[str]) -> dict[str, Any]:
    """Read the state from which a training resumes.

    Args:
        path: a ``checkpoint.pth``.
        arch: value of ``--arch``.
        classes: the data's class names.

    Raises:
        UserError: the file is missing, damaged, a student's file, or of another architecture or other classes.
    """
    architecture(arch)
    state = read_checkpoint(path, "the checkpoint")
    if "format" not in state or "optimizer" not in state:
        raise UserError(
            f"{path} contains no training state to resume from; to start from its weights use --student-resume."
        )
    if state["format"] != FORMAT:
        raise UserError(f"{path} has format {state['format']}, but this version reads format {FORMAT}.")
    if architecture_name(state["arch"]) != architecture_name(arch):
        raise UserError(f"the checkpoint {path} is of {state['arch']}, but --arch is {arch}.")
    if state["classes"] != classes:
        raise UserError(
            f"the checkpoint {path} has {len(state['classes'])} classes that are not the data's {len(classes)}."
        )
    return state
