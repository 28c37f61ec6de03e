"""The model card, and a folder in the layout of the Hugging Face Hub."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from d2_mgd.export.checking import Check
from d2_mgd.export.formats import INPUT
from d2_mgd.export.students import Student
from d2_mgd.training import file_digest, write_atomically
from d2_mgd.training.weights_files import write_safetensors

CARD = "model_card.md"
HUB_FILES = ("hub/config.json", "hub/model.safetensors", "hub/README.md")
_LIBRARIES = ("d2_mgd", "torch", "torchvision", "detectron2", "timm", "onnx", "onnxruntime")


def card_text(student: Student, file: Path, check: Check, licence: str) -> str:
    """The model card in Markdown, with the front matter that the Hub reads.

    Args:
        student: has the facts.
        file: that was exported.
        check: of the file.
        licence: identifier of the weights' licence, such as ``mit``.
    """
    described, signature = student.description, student.signature
    shape = [signature.input_axes.get(axis, str(size)) for axis, size in enumerate(signature.example.shape)]
    files = [(one.name, f"{one.stat().st_size:,}", file_digest(one)) for one in (file, student.file)]
    return f"""---
license: {licence}
library_name: {described["library"]}
pipeline_tag: {described["task"]}
tags: [knowledge-distillation, d2_mgd]
---
# {described["architecture"]}

{_table(("", ""), [*student.facts.items(), ("licence", licence)])}

## PyTorch and {file.name}

On {check.images:,} validation images, {platform.machine()} processor:

{_table(("", "PyTorch", "file"), check.rows())}

## Input and output

`{INPUT}`: float32 ({", ".join(shape)}), {described["channels"]} pixels in 0..255, which the file normalises. Outputs:
{", ".join(f"`{name}`" for name in signature.outputs)}.

## Files and versions

{_table(("file", "bytes", "SHA-256"), files)}

{", ".join(f"{name} {version}" for name, version in versions().items())}
"""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed."""
    installed = {one.metadata["Name"].replace("-", "_"): one.version for one in importlib.metadata.distributions()}
    return {"python": platform.python_version(), **{name: installed[name] for name in _LIBRARIES if name in installed}}


def write_hub_folder(folder: Path, student: Student, card: str) -> None:
    """Write :data:`HUB_FILES` in ``folder``; nothing is uploaded."""
    config, weights, readme = (folder / name for name in HUB_FILES)
    config.parent.mkdir(exist_ok=True)
    write_text(config, json.dumps(student.description, indent=2) + "\n")
    write_safetensors(str(weights), student.weights())
    write_text(readme, card)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))
