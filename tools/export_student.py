#!/usr/bin/env python
"""Export the student of a training as ONNX, TorchScript or torch.export file, and check that the file answers the same.

    python tools/export_student.py output/distilled
    python tools/export_student.py output/classification/RUN --int8 200
    python tools/export_student.py --config-file student.yaml --weights model_final.pth --register-coco NAME JSON IMAGES

Writes RUN/export/FORMAT: student.onnx (.ts, .pt2), model_card.md, and check.json with accuracy, differences and latency
of PyTorch and of the file. If the accuracy differs by more than --tolerance, the status is 1, and the file is named
rejected_student.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works without an installation too

from classification_export import ExportableClassifier
from run_folder import BAD_INPUT, Run, open_run
from run_numbers import Compared

from d2_mgd import configs
from d2_mgd._warnings import ignore_deprecations
from d2_mgd.data.formats import add_dataset_arguments, label_files
from d2_mgd.errors import UserError, located
from d2_mgd.export import FORMATS, Exported, Options, Student, export
from d2_mgd.training import lasting_output
from d2_mgd.training.options import Parser, number, whole
from d2_mgd.training.tables import table

REJECTED = 1  # exit status


def parser() -> argparse.ArgumentParser:
    """The command line."""
    built = Parser("%(prog)s [RUN] [options]", str(__doc__))
    add = built.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="folder of a detection or classification run")
    add("--config-file", help="in place of RUN: config of a Detectron2 model; a .py file is executed")
    add("--weights", help="of --config-file, or another checkpoint of a detection RUN")
    add("--format", default="onnx", help=f"{', '.join(FORMATS)}")
    add(
        "--size",
        default="",
        metavar="HxW",
        help="fixed height and width in pixels, or dynamic (default: of a detector dynamic, of a classifier the run's)",
    )
    add("--int8", nargs="?", type=whole(1), const=100, default=0, metavar="N", help="quantise on N (100) images")
    add("--half", action="store_true", help="weights and convolutions in float16")
    add("--check", type=whole(1), metavar="N", help="validation images to compare on (default: all)")
    add("--tolerance", type=number(0), metavar="POINTS", help="of the accuracy (default: 0.1, with --int8 1.0)")
    add("--output", type=Path, metavar="FOLDER", help="default: export/FORMAT in RUN, or beside --weights")
    add("--safetensors", action="store_true", help="also write hub/: config, weights and card in the Hub's layout")
    add("--baseline", type=Path, metavar="RUN", help="the student trained alone, whose accuracy the card names too")
    add("--license", default="unknown", help="identifier of the weights' licence, for the card")
    add_dataset_arguments(built)
    return built


def run(args: argparse.Namespace) -> Exported:
    """Export the student of a command line.

    Raises:
        UserError: it cannot be exported.
    """
    options = Options(
        args.format, args.int8, args.half, args.check, args.tolerance, args.safetensors, licence=args.license
    )
    if (args.run is None) == (args.config_file is None or args.weights is None):
        raise UserError("name the folder of a RUN, or --config-file and --weights.")
    found = _open(args.run) if args.run else None
    if found is not None:
        _check_used(args, found)
    baseline = _baseline(args.baseline, found) if args.baseline else None
    folder = args.output or (args.run or Path(args.weights).parent) / "export" / options.name
    size = _size(args.size)
    student: Student = (
        ExportableClassifier(found, size)
        if found is not None and found.kind == "classification"
        else _detector(args, found, size, folder)
    )
    if baseline is not None:
        student.facts["the student trained alone"] = baseline
    student.facts["exported by"] = f"`{shlex.join(['python', *sys.argv])}`"
    return export(student, folder, options)


def _open(folder: Path) -> Run:
    """The run in a folder; a UserError if there is no folder, or no run in it."""
    found = open_run(folder)
    if found.kind == "matchings":
        raise UserError(f"{found.folder} is not the folder of a training: it has neither config.yaml nor run.json.")
    return found


def _check_used(args: argparse.Namespace, found: Run) -> None:
    """Check that no option has been given that has no effect on this run."""
    of_detectors = ("weights", "register_coco", "register_yolo", "register_voc")
    for name in ("config_file", *(of_detectors if found.kind == "classification" else ())):
        if getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} has no effect on the {found.kind} run {found.folder}: leave it out.")


def _size(text: str) -> tuple[int, int] | str:
    """(H, W), ``dynamic``, or an empty string for the default."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None and text not in ("", "dynamic"):
        raise UserError(f"--size is {text!r}: give HEIGHTxWIDTH, such as 480x640, or dynamic.")
    return (int(found[1]), int(found[2])) if found else text


def _detector(args: argparse.Namespace, found: Run | None, size: tuple[int, int] | str, output: Path) -> Student:
    try:
        from d2_mgd.detection import export as detection
        from d2_mgd.detection.datasets import register_coco
    except ImportError as error:
        raise UserError(f"{error}.") from error
    for name, json_file, images in args.register_coco:
        register_coco(name, json_file, images)
    fixed = None if isinstance(size, str) else size
    if found is None:
        path = configs.find(args.config_file)
        if path.endswith(".py"):
            return detection.from_lazy_config(path, args.weights, fixed)
        return detection.from_config(path, args.weights, label_files(args), output, fixed)
    plain = found.folder / "student.yaml"  # also readable if keys of the MGD node have changed since the training
    path = str(plain if plain.is_file() else found.folder / "config.yaml")
    student = detection.from_config(path, args.weights, label_files(args), output, fixed)
    if found.settings.get("MGD.ENABLED"):
        student.facts["config of the teacher"] = str(found.settings["MGD.TEACHER.CONFIG_FILE"])
    return student


def _baseline(folder: Path, student: Run | None) -> str:
    """The last accuracy of a run, as text.

    Args:
        folder: of the run.
        student: the run of the student; None: a detector without a run.

    Raises:
        UserError: the run is of another task, or was evaluated on other data or not at all.
    """
    with located("--baseline: "):
        alone = _open(folder)
    kind = "detection" if student is None else student.kind
    if alone.kind != kind:
        raise UserError(f"--baseline {folder} is a {alone.kind} run, and the student is of {kind}: name a {kind} run.")
    if student is not None and alone.evaluated_on != student.evaluated_on:
        raise UserError(
            f"--baseline {folder} was evaluated on {alone.evaluated_on}, and {student.folder} on "
            f"{student.evaluated_on}: name a run on the same data."
        )
    compared = Compared({"": alone}, {"": alone.metrics()})
    last = [(measure, measure.last(compared.rows[""])) for measure in compared.measures()]
    found = [f"{measure.title} {row[measure.key]:.2f}" for measure, row in last if row is not None]
    if not found:
        raise UserError(f"--baseline {folder} has not been evaluated yet.")
    return ", ".join(found)


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    ignore_deprecations()
    try:
        result = run(parser().parse_args(arguments))
    except UserError as error:
        print(f"export_student.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(table(result.check.rows(), ("", "PyTorch", result.file.name)))
    print(f"{result.file}: {result.file.stat().st_size:,} bytes, compared on {result.check.images:,} images")
    if result.problem:
        print(f"export_student.py: {result.problem}: {result.file} is not to be used.", file=sys.stderr)
    return REJECTED if result.problem else 0


if __name__ == "__main__":
    sys.exit(main())
