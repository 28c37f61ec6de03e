"""A data set with a folder of images per class in ``train/`` and a split to evaluate on.

Links are followed. Hidden folders (``.ipynb_checkpoints``, ``.git``) are skipped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d2_mgd.errors import UserError, reason

logger = logging.getLogger(__name__)

# What torchvision's ImageFolder takes for an image. Other files are skipped.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def class_names(split: str | os.PathLike[str]) -> list[str]:
    """Names of the class folders of a split, sorted."""
    with os.scandir(split) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name))


def files_below(
    folder: str | os.PathLike[str], refused: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Each folder at any depth below ``folder``, itself first, and the names of its files, all sorted.

    A folder is entered once, so that links in a circle end.

    Args:
        folder: of a class.
        refused: called with the error of each folder that cannot be listed.
    """
    entered: set[str] = set()
    for parent, children, names in os.walk(folder, followlinks=True, onerror=refused):
        real = os.path.realpath(parent)
        if real in entered:
            children.clear()
            continue
        entered.add(real)
        children[:] = sorted(child for child in children if not _is_hidden(child))
        yield parent, sorted(names)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


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
        raise UserError(f"{valid} has no image ({', '.join(EXTENSIONS)}).")
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
            found = [os.fsencode(os.path.join(inside, file)) for file in names if file.lower().endswith(EXTENSIONS)]
            files += found
            targets += [number] * len(found)
    return Folder(root, tuple(classes), np.array(files, dtype=np.bytes_), np.array(targets, dtype=np.int64))


def _refused(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # the evaluation split may lack a class
        raise UserError(f"the folder {error.filename} cannot be listed: {reason(error)}.") from error
