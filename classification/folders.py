"""A data set on disk: ``train/`` and a split to evaluate on, with a folder of images per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from d2_mgd.data.class_folders import class_names, files_below
from d2_mgd.errors import UserError, reason

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folder:
    """The images of one split.

    Args:
        root: the split's folder.
        classes: class names, in the order of their numbers.
        files: paths relative to ``root``, encoded, by class and name; an array, which worker processes share.
        targets: (len(files),) int64 class numbers.
    """

    root: Path
    classes: tuple[str, ...]
    files: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.files[index])


def find_classes(data: Path, evaluation: str | None = None) -> tuple[Path, Path, tuple[str, ...]]:
    """``train/``, the split to evaluate on, and the class names, numbered by the folders of ``train/``.

    Args:
        data: the data set's folder.
        evaluation: name of the split to evaluate on; by default ``valid``, or ``val``.

    Raises:
        UserError: a folder is missing, there are fewer than two classes, or the evaluation split has a class that
            ``train/`` lacks.
    """
    if not data.is_dir():
        raise UserError(f"there is no folder {data}: the first argument is a folder with train/ and valid/ in it.")
    train = data / "train"
    if evaluation is None:
        evaluation = "val" if (data / "val").is_dir() and not (data / "valid").is_dir() else "valid"
    for split in (train, data / evaluation):
        if not split.is_dir():
            there = ", ".join(sorted(f"{entry.name}/" for entry in data.iterdir() if entry.is_dir())) or "no folder"
            raise UserError(
                f"there is no folder {split}: {data} needs train/ and valid/ (or val/, or --val-split); has {there}."
            )
    classes = tuple(class_names(train))
    if len(classes) < 2:
        raise UserError(f"{train} has {len(classes)} class folder(s): a classifier needs two or more.")
    unknown = sorted(set(class_names(data / evaluation)) - set(classes))
    if unknown:
        raise UserError(
            f"{data / evaluation} has {len(unknown)} class folder(s) that {train} lacks, such as {unknown[0]!r}."
        )
    return train, data / evaluation, classes


def find_folders(data: Path, evaluation: str | None = None) -> tuple[Folder, Folder]:
    """The images of ``train/`` and of the split to evaluate on; arguments as in :func:`find_classes`.

    Raises:
        UserError: as in :func:`find_classes`; a class without a training image; or nothing to evaluate on.
    """
    train, valid, classes = find_classes(data, evaluation)
    training, held_out = _scan(train, classes), _scan(valid, classes)
    empty = [name for number, name in enumerate(classes) if not (training.targets == number).any()]
    if empty:
        raise UserError(f"{train} has {len(empty)} class folder(s) without an image, such as {empty[0]!r}.")
    if not len(held_out):
        raise UserError(f"{valid} has no image ({', '.join(IMG_EXTENSIONS)}).")
    present = len(np.unique(held_out.targets))
    if present < len(classes):
        logger.info("%s has images of %d of the %d classes.", held_out.root, present, len(classes))
    return training, held_out


def _scan(root: Path, classes: Sequence[str]) -> Folder:
    files: list[bytes] = []
    targets: list[int] = []
    for number, name in enumerate(classes):
        for folder, names in files_below(root / name, _refused):
            inside = os.path.relpath(folder, root)
            found = [os.fsencode(os.path.join(inside, file)) for file in names if file.lower().endswith(IMG_EXTENSIONS)]
            files += found
            targets += [number] * len(found)
    return Folder(root, tuple(classes), np.array(files, dtype=np.bytes_), np.array(targets, dtype=np.int64))


def _refused(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # the evaluation split may lack a class
        raise UserError(f"the folder {error.filename} cannot be listed: {reason(error)}.") from error
