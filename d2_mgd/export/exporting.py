"""From a student to a checked file with its model card."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from d2_mgd.errors import UserError, reason
from d2_mgd.export.cards import CARD, HUB_FILES, card_text, versions, write_hub_folder, write_text
from d2_mgd.export.checking import Check, check
from d2_mgd.export.formats import FORMATS, Runtime, check_installed, halved, write
from d2_mgd.export.sizes import check_sizes, network_answers
from d2_mgd.export.students import Student
from d2_mgd.training import file_digest

_CHECK = "check.json"
_UNCHECKED = "unchecked_"  # before the name of a temporary folder
_REJECTED = "rejected_"  # before the names of a file that differs from PyTorch, and of its comparison


@dataclass(frozen=True)
class Options:
    """How a student is exported.

    Args:
        format: one of :data:`~d2_mgd.export.formats.FORMATS`.
        int8: training images that activations are measured on; 0 does not quantise.
        half: whether weights and convolutions are float16.
        images: validation images of the check; None: all.
        tolerance: points by which an accuracy may differ; None: 1.0 with int8, else 0.1.
        safetensors: whether to write the folder in the Hub's layout.
        licence: of the weights.

    Raises:
        UserError: the options contradict each other, or a library is missing.
    """

    format: str = "onnx"
    int8: int = 0
    half: bool = False
    images: int | None = None
    tolerance: float | None = None
    safetensors: bool = False
    licence: str = "unknown"

    def __post_init__(self) -> None:
        check_installed(self.format)
        if self.int8 and (self.half or self.format != "onnx"):
            raise UserError("--int8 needs --format onnx, without --half: ONNX Runtime quantises a float32 file.")

    @property
    def name(self) -> str:
        """Name of the export's folder, such as ``onnx_int8``."""
        return f"{self.format}{'_int8' if self.int8 else '_half' if self.half else ''}"


@dataclass(frozen=True)
class Exported:
    """The file that was written, its check, and why it is rejected (or an empty string)."""

    file: Path
    check: Check
    problem: str


def export(student: Student, folder: Path, options: Options) -> Exported:
    """Write the student to ``folder/student.*``, if it answers as PyTorch does, and the model card beside it.

    ``check.json`` has the comparison. A file that answers differently is named ``rejected_student.*``, its comparison
    ``rejected_check.json``, and an earlier export stays. Otherwise an earlier export is replaced at the end.

    Raises:
        UserError: the student cannot be written in the format or for the size, or the folder is not writable.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_UNCHECKED}*"):  # by an export that was killed
            shutil.rmtree(left)
        unchecked = tempfile.TemporaryDirectory(prefix=_UNCHECKED, dir=folder)
    with unchecked as name:
        file = Path(name) / f"student{FORMATS[options.format]}"
        _write(student, file, options)
        found = check(student, Runtime(file, options.format, student.signature), options.images)
        problem = _problem(found, options)
        with _writing(folder):
            if problem:
                file = file.rename(file.with_name(f"{_REJECTED}{file.name}"))
            _describe(student, file, found, problem, options)
            _move(file.parent, folder)
    return Exported(folder / file.name, found, problem)


def _describe(student: Student, file: Path, found: Check, problem: str, options: Options) -> None:
    """Write what belongs beside a file: its comparison and, unless it is rejected, the model card."""
    record = {"file": file.name, "bytes": file.stat().st_size, "sha256": file_digest(file), "problem": problem}
    text = json.dumps({**record, **asdict(found), "versions": versions()}, indent=2)
    write_text(file.with_name(f"{_REJECTED if problem else ''}{_CHECK}"), text)
    if not problem:
        card = card_text(student, file, found, options.licence)
        write_text(file.with_name(CARD), card)
        if options.safetensors:
            write_hub_folder(file.parent, student, card)


def _move(source: Path, folder: Path) -> None:
    """Move all files from ``source`` into ``folder``, and remove what they replace: an earlier or rejected export."""
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    files.sort(key=lambda path: path.name.endswith(_CHECK))  # last, because it describes the others
    for path in files:
        (folder / path).parent.mkdir(exist_ok=True)
        (source / path).replace(folder / path)
    rejected = [Path(f"{_REJECTED}{_CHECK}"), *(Path(f"{_REJECTED}student{ending}") for ending in FORMATS.values())]
    described = [Path(name) for name in (CARD, *HUB_FILES)] if Path(_CHECK) in files else []
    for path in {*rejected, *described}.difference(files):
        (folder / path).unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Context in which an OSError is that of the output folder; images are read outside it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {reason(error)}.") from error


def _write(student: Student, path: Path, options: Options) -> None:
    answers = network_answers(student)
    network = student.network
    if options.half:
        network = copy.deepcopy(network)
        halved(network, student.half_parts(network))
    with _writing(path.parents[1]):
        write(network, student.signature, options.format, path)
    if student.signature.dynamic_size:
        check_sizes(student, answers, Runtime(path, options.format, student.signature))
    if options.int8:
        from d2_mgd.export.quantization import quantize  # imports ONNX Runtime

        plain = path.rename(path.with_name(f"float_{path.name}"))
        quantize(plain, path, student.training_images(options.int8))
        plain.unlink()


def _problem(found: Check, options: Options) -> str:
    tolerance = options.tolerance if options.tolerance is not None else 1.0 if options.int8 else 0.1
    measure, change = found.largest_change()
    if change <= tolerance:
        return ""
    network, file = found.accuracy[measure]
    advice = ". More images of --int8, --half instead, or a larger --tolerance may help" if options.int8 else ""
    return (
        f"{measure} of the file is {file:.2f} and PyTorch's {network:.2f}, which --tolerance {tolerance} does not allow"
        f"{advice}"
    )
