"""Data sets that a command line names: in COCO's, YOLO's or Pascal VOC's format."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from d2_mgd.data.coco import read_coco
from d2_mgd.data.labels import LabelledSet
from d2_mgd.data.voc import read_voc
from d2_mgd.data.yolo import YoloFile, read_yolo
from d2_mgd.errors import UserError

__all__ = ["LabelFiles", "add_dataset_arguments", "coco_files", "label_files"]


@dataclass(frozen=True)
class LabelFiles:
    """A data set that is not read yet.

    Args:
        name: what DATASETS.TRAIN and DATASETS.TEST call it.
        source: its json, data.yaml or folder.
        image_root: the folder that its file names are relative to.
        read: reads it.
    """

    name: str
    source: str
    image_root: str
    read: Callable[[], LabelledSet]


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --register-coco, --register-yolo and --register-voc."""
    parser.add_argument(
        "--register-coco",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help="name a COCO-format data set, for DATASETS.TRAIN and DATASETS.TEST; any number of times",
    )
    parser.add_argument(
        "--register-yolo",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "DATA_YAML"),
        help="name the splits of a YOLO data.yaml: NAME_train, NAME_val, NAME_test, as far as the file has them",
    )
    parser.add_argument(
        "--register-voc",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "FOLDER", "SPLIT"),
        help="name a Pascal VOC data set: the list FOLDER/ImageSets/Main/SPLIT.txt, or the folder FOLDER/SPLIT",
    )


def coco_files(name: str, json_file: str, image_root: str) -> LabelFiles:
    """A data set in COCO's own format; reading it raises CocoError."""
    return LabelFiles(
        name, json_file, image_root, lambda: LabelledSet(json_file, read_coco(json_file), image_root, findings=[])
    )


def label_files(args: argparse.Namespace) -> list[LabelFiles]:
    """The sets of --register-yolo and --register-voc.

    Raises:
        UserError: a data.yaml cannot be read, or a name is given to two sets.
    """
    found: list[LabelFiles] = []
    for name, path in args.register_yolo:
        file = YoloFile.open(path)
        found += [
            LabelFiles(f"{name}_{split}", path, file.root, partial(read_yolo, file, split)) for split in file.splits
        ]
    for name, folder, split in args.register_voc:
        found.append(LabelFiles(name, folder, folder, partial(read_voc, folder, split)))
    names = [one.name for one in found] + [name for name, *_ in args.register_coco]
    twice = next((name for name in names[: len(found)] if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"the name {twice!r} is given to two data sets: register one of them under another name.")
    return found
