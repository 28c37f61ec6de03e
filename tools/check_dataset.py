#!/usr/bin/env python
"""Says what is wrong with data sets in COCO, YOLO or Pascal VOC format, before a training finds out.

    python tools/check_dataset.py fish/train.json fish/images
    python tools/check_dataset.py --register-yolo fish fish/data.yaml
    python tools/check_dataset.py --register-coco fish_train fish/train.json fish/images \\
        --register-coco fish_valid fish/valid.json fish/images --config-file configs/small/retinanet_R_18_FPN.yaml

Every image is decoded to its last pixel, every annotation looked at, and everything found is told kind by kind: how
many there are, and examples. An error is what a training refuses, or would stop at; a warning what it goes on with,
leaving something out or counting something that is not there; a note what one may want to know, such as how an image
that is not plain RGB becomes it. The exit status is 0 where there is no error, 1 where there is one, 2 for a command
line that cannot work.

With a config (and KEY VALUE overrides at the end) the sets of DATASETS.TRAIN and DATASETS.TEST are checked for what
they are used for, at the sizes that the config resizes images to. Without one, the named sets are checked as for
training on boxes at Detectron2's own sizes; Detectron2 is not needed then.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installation too

from d2_mgd._warnings import ignore_deprecations
from d2_mgd.data.coco import ERROR, NOTE, WARNING, Finding, Inspection
from d2_mgd.data.formats import LabelFiles, add_dataset_arguments, coco_files, label_files
from d2_mgd.data.inspection import OUTSIDE, inspect_content, inspect_pixels
from d2_mgd.errors import UserError
from d2_mgd.training import lasting_output

BAD_INPUT = 2  # exit status, as argparse has it
_DETECTRON2_SIZES = ((800, 1333),)  # its defaults


class CheckedSet(NamedTuple):
    """A data set and what it is used for."""

    files: LabelFiles
    wanted: Inspection
    allow_outside: bool


def parser() -> argparse.ArgumentParser:
    built = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built.add_argument(
        "words",
        nargs="*",
        metavar="JSON IMAGES | KEY VALUE",
        help="a set's annotations and image folder; or with --config-file, overrides of the config",
    )
    add_dataset_arguments(built)
    built.add_argument("--config-file", default="", metavar="FILE", help="of the training that the sets are for")
    built.add_argument(
        "--allow-outside-root",
        action="store_true",
        help="let file names and links leave the image folder, as MGD.DATA.ALLOW_OUTSIDE_ROOT does",
    )
    built.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="images decoded at the same time"
    )
    return built


def chosen_sets(args: argparse.Namespace) -> list[CheckedSet]:
    """The sets that a command line names.

    Raises:
        ValueError: it names none, or some in a way that is not understood; one sentence.
    """
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}.")
    if args.config_file:
        return _sets_of_config(args)
    sets = [*(coco_files(*one) for one in args.register_coco), *label_files(args)]
    if len(args.words) == 2 and not sets:
        sets.append(coco_files(os.path.splitext(os.path.basename(args.words[0]))[0], *args.words))
    elif args.words:
        raise UserError(f"give JSON IMAGES alone, or --register-coco NAME JSON IMAGES, not {' '.join(args.words)}.")
    if not sets:
        raise UserError(
            "there is nothing to check: give JSON IMAGES, --register-coco, --register-yolo or --register-voc."
        )
    missing = next((path for one in sets for path in (one.source, one.image_root) if not os.path.exists(path)), None)
    if missing is not None:
        raise UserError(f"{missing} does not exist.")
    wanted = Inspection(train=True, sizes=_DETECTRON2_SIZES)
    return [CheckedSet(files, wanted, args.allow_outside_root) for files in sets]


def _sets_of_config(args: argparse.Namespace) -> list[CheckedSet]:
    """The sets of a config's DATASETS that are in a format that can be checked."""
    from train_net import build_config
    from train_net import parser as parser_of_training

    from d2_mgd.detection.datasets import register_coco, registered, wanted_of

    for one in args.register_coco:
        register_coco(*one)
    # evaluation's config: nothing of a teacher is needed to look at data
    told = parser_of_training().parse_args(["--config-file", args.config_file, "--eval-only", *args.words])
    cfg, _ = build_config(told)
    allowed = args.allow_outside_root or cfg.MGD.DATA.ALLOW_OUTSIDE_ROOT
    others = {files.name: files for files in label_files(args)}
    sets = []
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        if name in others:
            sets.append(CheckedSet(others[name], wanted_of(cfg, name), allowed))
            continue
        known = registered(name)
        if known.get("evaluator_type") == "coco":
            files = coco_files(name, known.json_file, known.image_root)
            sets.append(CheckedSet(files, wanted_of(cfg, name), allowed))
        else:
            print(f"{name} is not in COCO's format and is not checked.")
    if not sets:
        raise UserError(f"{args.config_file} names no data set in COCO's format: set DATASETS.TRAIN and DATASETS.TEST.")
    return sets


def check(one: CheckedSet, workers: int) -> tuple[list[Finding], int]:
    """Everything found in one set, and the number of its images whose files are there.

    Raises:
        CocoError, UserError: it is not in its format at all.
    """
    labelled = one.files.read()
    root = labelled.image_root
    findings, images = inspect_content(labelled.content, labelled.source, root, one.wanted, one.allow_outside)
    pixels = inspect_pixels(root, images, workers, progress=True)
    return [*labelled.findings, *findings, *pixels], len(images)


def report(one: CheckedSet, findings: Sequence[Finding], num_images: int) -> str:
    """What was found as text: errors first, then warnings, then notes; and a last line that counts the kinds."""
    name = one.files.name
    lines = [f"{name}: {one.files.source} with {num_images:,} images in {one.files.image_root}"]
    for severity in (ERROR, WARNING, NOTE):
        for finding in findings:
            if finding.severity == severity:
                lines += lines_of(finding)
    numbers = Counter(finding.severity for finding in findings)
    kinds = ", ".join(f"{numbers[severity]} kinds of {severity}s" for severity in (ERROR, WARNING, NOTE))
    lines.append(f"{name}: {kinds}")
    return "\n".join(lines)


def lines_of(finding: Finding) -> list[str]:
    """A finding as text: its kind and count, then the examples."""
    head = f"{finding.severity}: {finding.kind}"
    if finding.things:
        head += f": {finding.count:,} of {finding.of:,} {finding.things}"
    lines = [f"  {head}", *(f"    {example}" for example in finding.examples)]
    if finding.count > len(finding.examples):
        lines.append(f"    and {finding.count - len(finding.examples):,} more")
    if finding.kind == OUTSIDE:
        lines.append("    --allow-outside-root, and MGD.DATA.ALLOW_OUTSIDE_ROOT True in training, allow it")
    return lines


@lasting_output()
def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parser().parse_args(arguments)
    ignore_deprecations()
    # Odd metadata is no problem for a training, and its warnings would hide the report.
    warnings.filterwarnings("ignore", module="PIL")
    failed = False
    try:
        sets = chosen_sets(args)
    except (UserError, ImportError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    for one in sets:
        try:
            findings, num_images = check(one, args.workers)
        except UserError as error:
            print(f"{one.files.name}: error: {' '.join(str(error).split()).rstrip('.')}.")
            failed = True
            continue
        print(report(one, findings, num_images))
        failed |= any(finding.severity == ERROR for finding in findings)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
