#!/usr/bin/env python
"""Writes the student of a detector's checkpoint, and nothing else of it, as safetensors: a file that can hold no code.

    python tools/export_weights.py output/model_final.pth student.safetensors
    python tools/export_weights.py student.safetensors student.pth

Reads what MODEL.WEIGHTS reads: checkpoints of a training, files of the model zoo, safetensors. MODEL.WEIGHTS and
MGD.TEACHER.WEIGHTS take the file that is written. Plain Detectron2 reads no safetensors: the second line is for it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installation too

import torch

from d2_mgd.detection.weights import local_weights_file, read_model
from d2_mgd.reliability import file_digest, write_atomically
from d2_mgd.untrusted import trust, write_safetensors

BAD_INPUT = 2  # exit status, as argparse has it


def export(source: str, target: str) -> int:
    """Write the weights of ``source``; returns how many tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or ``target`` is of another kind.
        OSError: the disk refuses; an old ``target`` is intact.
    """
    kind = os.path.splitext(target)[1]
    if kind not in (".safetensors", ".pth"):
        raise ValueError(f"{target} must end in .safetensors or .pth.")
    path = local_weights_file(source)
    tensors = {name: torch.as_tensor(value) for name, value in read_model(path)["model"].items()}
    if kind == ".safetensors":
        write_safetensors(target, tensors, {"source": os.path.basename(path), "sha256_of_source": file_digest(path)})
    else:
        write_atomically(target, lambda file: torch.save({"model": tensors}, file))
    return len(tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="CHECKPOINT", help="a path, a URL, detectron2://... or torchvision://...")
    parser.add_argument("target", metavar="FILE", help="to write: ends in .safetensors or .pth")
    parser.add_argument("--trust-weights", action="store_true", help="read CHECKPOINT even if it runs code")
    args = parser.parse_args(arguments)
    try:
        if args.trust_weights:
            trust(local_weights_file(args.source))
        number = export(args.source, args.target)
    except (OSError, ValueError) as error:
        print(f"export_weights.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"{args.target}: {number} tensors of {args.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
