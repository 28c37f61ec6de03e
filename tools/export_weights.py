#!/usr/bin/env python
"""Writes the student of a checkpoint, and nothing else of it, as safetensors: a file that can hold no code.

    python tools/export_weights.py output/model_final.pth student.safetensors
    python tools/export_weights.py student.safetensors student.pth
    python tools/export_weights.py output/classification/RUN/checkpoint.pth student.safetensors

Reads what MODEL.WEIGHTS reads: checkpoints of a training, files of the model zoo, safetensors. MODEL.WEIGHTS and
MGD.TEACHER.WEIGHTS take the file that is written. Plain Detectron2 reads no safetensors: the second line is for it.
Reads the files of a classification run too, without Detectron2; --student-resume and --teacher-resume take what is
written, with its architecture and classes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installation too

import torch
from torch import Tensor

from classification.weights import read_checkpoint
from d2_mgd.errors import UserError
from d2_mgd.training import file_digest, write_atomically
from d2_mgd.training.weights_files import trust, write_safetensors

BAD_INPUT = 2  # exit status, as argparse has it
_DESCRIPTION = ("arch", "classes", "image_size")  # what classification's files say of their weights


def export(source: str, target: str) -> int:
    """Write the weights of ``source``; returns how many tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or ``target`` is of another kind.
        OSError: the disk refuses; an old ``target`` is intact.
    """
    kind = os.path.splitext(target)[1]
    if kind not in (".safetensors", ".pth"):
        raise UserError(f"{target} must end in .safetensors or .pth.")
    path = _local(source)
    name, tensors, description = _read(path)
    if kind == ".safetensors":
        origin = {"source": os.path.basename(path), "sha256_of_source": file_digest(path)}
        write_safetensors(
            target, tensors, {**{key: json.dumps(value, default=str) for key, value in description.items()}, **origin}
        )
    else:
        write_atomically(target, lambda file: torch.save({**description, name: tensors}, file))
    return len(tensors)


def _local(source: str) -> str:
    if os.path.isfile(source):
        return source
    from d2_mgd.detection.weights import local_weights_file  # only for what it alone finds: it needs Detectron2

    return local_weights_file(source)


def _read(path: str) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The key of weights in such a file, the weights, and what the file says of them."""
    found = _read_classification(path)
    if found is not None:
        return "state_dict", *found
    from d2_mgd.detection.weights import read_model

    return "model", {name: torch.as_tensor(value) for name, value in read_model(path)["model"].items()}, {}


def _read_classification(path: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The student and its description in a file of classification; None for another file."""
    if path.endswith(".pkl"):
        return None
    content = read_checkpoint(Path(path), "the file")
    state = content.get("state_dict", content.get("student"))
    if not isinstance(state, Mapping) or (path.endswith(".safetensors") and "arch" not in content):
        return None
    tensors = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights by name.")
    return tensors, {key: content[key] for key in _DESCRIPTION if isinstance(content.get(key), (str, int, list))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="CHECKPOINT", help="a path, a URL, detectron2://... or torchvision://...")
    parser.add_argument("target", metavar="FILE", help="to write: ends in .safetensors or .pth")
    parser.add_argument("--trust-weights", action="store_true", help="read CHECKPOINT even if it runs code")
    args = parser.parse_args(arguments)
    try:
        if args.trust_weights:
            trust(_local(args.source))
        number = export(args.source, args.target)
    except (ImportError, OSError, UserError) as error:
        print(f"export_weights.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"{args.target}: {number} tensors of {args.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
