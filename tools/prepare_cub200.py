#!/usr/bin/env python
"""Convert the official CUB-200-2011 data set to the folders that the classification pipeline reads.

    python tools/prepare_cub200.py CUB_200_2011.tgz data/cub200
    python tools/prepare_cub200.py CUB_200_2011/ data/cub200 --mode hardlink

The source is the official archive or its unpacked folder (images.txt, train_test_split.txt, image_class_labels.txt,
classes.txt, images/). The output has train/ and valid/ with a folder per class: the official training and test halves.
The images of a folder are linked or copied, those of an archive are moved. To continue an interrupted run, start it
again.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installation too

from d2_mgd.errors import UserError, reason

LISTS = ("images.txt", "train_test_split.txt", "image_class_labels.txt", "classes.txt")
OFFICIAL_COUNTS = {"train": 5994, "valid": 5794}
OFFICIAL_CLASSES = 200
MODES = ("symlink", "hardlink", "copy")

_PARTIAL = ".partial"  # a file being written; image loaders ignore it


def parse_list(path: Path) -> dict[str, str]:
    """Return the ``<id> <value>`` lines of a list as id -> value."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not a text file ({error.reason} at byte {error.start}).") from error
    values: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        key, _, value = (part.strip() for part in line.strip().partition(" "))
        if key and not value:
            raise UserError(f"{path.name}, line {number}: expected '<id> <value>', found {line.strip()!r}.")
        if key in values:
            raise UserError(f"{path.name}, line {number}: the id {key} occurs twice.")
        if key:
            values[key] = value
    if not values:
        raise UserError(f"{path.name} is empty.")
    return values


def read_lists(root: Path) -> dict[str, str]:
    """Return all listed images: path below images/ -> path below the output, split/class/name."""
    paths, splits, labels, classes = (parse_list(root / name) for name in LISTS)
    for name, values in ((LISTS[1], splits), (LISTS[2], labels)):
        different = sorted(paths.keys() ^ values.keys())
        if different:
            where = name if different[0] in paths else "images.txt"
            raise UserError(f"the image id {different[0]} is missing in {where} ({len(different)} such ids).")
    twice = [path for path, count in collections.Counter(paths.values()).items() if count > 1]
    if twice:
        raise UserError(f"images.txt names {twice[0]} more than once.")
    return {path: _target(key, path, splits[key], labels[key], classes) for key, path in paths.items()}


def _target(key: str, path: str, split: str, label: str, classes: Mapping[str, str]) -> str:
    if split not in ("0", "1"):
        raise UserError(f"train_test_split.txt: image {key} has {split!r}, expected 0 or 1.")
    if label not in classes:
        raise UserError(f"image_class_labels.txt: image {key} has class {label}, which classes.txt does not have.")
    parts = PurePosixPath(path).parts
    harmless = len(parts) == 2 and ".." not in parts and not any(set(part) & set('\\:"\0') for part in parts)
    if not harmless or path.startswith("/"):
        raise UserError(f"images.txt: image {key} has the path {path!r}, expected 'class/name.jpg'.")
    if parts[0] != classes[label]:
        raise UserError(
            f"image {key} lies in {parts[0]} (images.txt) but is labelled {classes[label]} (image_class_labels.txt)."
        )
    return "/".join(("train" if split == "1" else "valid", *parts))


def check_counts(targets: list[str]) -> None:
    """Check that these are the 5,994 training and 5,794 test images of 200 classes each."""
    for split, expected in OFFICIAL_COUNTS.items():
        found = [PurePosixPath(target).parts[1] for target in targets if target.startswith(f"{split}/")]
        if len(found) != expected or len(set(found)) != OFFICIAL_CLASSES:
            raise UserError(
                f"{split} would have {len(found):,} images of {len(set(found))} classes, CUB-200-2011 has "
                f"{expected:,} of {OFFICIAL_CLASSES}; for a part of the data set add --subset."
            )


def check_output(output: Path, targets: set[str]) -> None:
    """Remove partly written files of an interrupted run; refuse a folder with other files."""
    for split in OFFICIAL_COUNTS:
        for folder, _, names in os.walk(output / split):
            for path in (Path(folder, name) for name in names):
                if path.name.startswith(".") and path.name.endswith(_PARTIAL):
                    path.unlink()
                elif path.relative_to(output).as_posix() not in targets:
                    raise UserError(f"{path} does not belong to this data set; give a new output folder.")


def place(source: Path, target: Path, mode: str) -> bool:
    """Link, copy or move an image, complete or not at all. Returns whether it was not there yet."""
    if target.is_file() and target.is_symlink() == (mode == "symlink"):
        same, equal = target.samefile(source), target.stat().st_size == source.stat().st_size
        if same if mode in ("symlink", "hardlink") else equal and not same:
            return False
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}{_PARTIAL}")
    if mode == "symlink":  # relative, so that both folders can be moved together
        partial.symlink_to(os.path.relpath(source, target.parent.resolve()))
    elif mode == "hardlink":
        os.link(source.resolve(), partial)
    elif mode == "move":
        os.replace(source, partial)
    else:
        shutil.copyfile(source, partial)
    os.replace(partial, target)
    return True


def prepare_folder(folder: Path, output: Path, mode: str, subset: bool) -> dict[str, int]:
    """Make ``output/train`` and ``output/valid`` from the unpacked data set; arguments as in :func:`prepare`."""
    roots = [path.resolve() for path in (folder, folder / "CUB_200_2011") if (path / LISTS[0]).is_file()]
    if not roots:
        raise UserError(f"{folder} has no images.txt, so it is not the CUB-200-2011 folder.")
    listed = read_lists(roots[0])
    images = {path: target for path, target in listed.items() if (roots[0] / "images" / path).is_file()}
    if subset and not images:
        raise UserError("none of the listed images is there.")
    if not subset:
        absent = [path for path in listed if path not in images]
        if absent:
            raise UserError(
                f"images/{absent[0]} is listed but absent ({len(absent):,} of {len(listed):,} images); for a part of "
                "the data set add --subset."
            )
        check_counts([*images.values()])
    check_output(output, {*images.values()})
    progress = tqdm(images.items(), unit="image", desc=str(output))
    new = sum(place(roots[0] / "images" / path, output / target, mode) for path, target in progress)
    return {**{split: sum(name.startswith(split) for name in images.values()) for split in OFFICIAL_COUNTS}, "new": new}


def prepare(source: Path, output: Path, mode: str | None = None, subset: bool = False) -> dict[str, int]:
    """Make ``output/train`` and ``output/valid`` from the data set at ``source``.

    Args:
        source: the official archive, or its unpacked folder.
        output: a new folder, or that of an interrupted run.
        mode: for a folder: ``symlink`` (default), ``hardlink`` or ``copy``.
        subset: allow a part of the data set: skip listed images that are absent, do not check the official counts.

    Returns:
        The numbers of images: ``train``, ``valid``, and ``new`` in this run.

    Raises:
        UserError: the source is not the data set, or the output has other files.
    """
    if source.is_dir():
        return prepare_folder(source, output, mode or "symlink", subset)
    if not source.is_file():
        raise UserError(f"{source} does not exist; it should be CUB_200_2011.tgz or the folder in it.")
    if mode not in (None, "copy"):
        raise UserError(f"there is nothing to {mode} in an archive; unpack it first, or leave out --mode.")
    # beside the output, on the same disk, so that images need no copy
    parent = next(folder for folder in output.resolve().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(dir=parent, prefix=".cub200_") as unpacked:
        try:
            with tarfile.open(source) as archive, tqdm(archive, desc="unpacking", unit="file", leave=False) as members:
                files = (member for member in members if member.isreg())
                archive.extractall(unpacked, files, filter="data")  # refuses to write outside the folder
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise UserError(f"{source} is not a tar archive, or is cut short or damaged ({reason(error)}).") from error
        return prepare_folder(Path(unpacked), output, "move", subset)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="CUB_200_2011.tgz, or its unpacked folder")
    parser.add_argument("output", type=Path, help="folder to write train/ and valid/ to")
    parser.add_argument("--mode", choices=MODES, help="how images of a folder are placed (default: symlink)")
    parser.add_argument("--subset", action="store_true", help="skip absent images, do not check the official counts")
    arguments = parser.parse_args(argv)
    try:
        counts = prepare(arguments.source, arguments.output, arguments.mode, arguments.subset)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{arguments.output}: {counts['train']:,} images in train, {counts['valid']:,} in valid, {counts['new']:,} new."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
