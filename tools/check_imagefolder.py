"""Says what is wrong with a folder of images, before a training finds out.

    python tools/check_imagefolder.py data/cub200
    python tools/check_imagefolder.py data/cub200 --workers 16 --json > report.json

The folder has train/ and valid/ (or val/), and test/ if there is one, with a folder per class. It is read as a training
reads it: at any depth, hidden folders passed over, links followed, but not round in a circle. Every image is decoded to
its last pixel. Problems are images that cannot be read (cut short, empty, of another format, ...), by name; classes
without an image; classes that one split has and another lacks: a loader that numbers each split's folders by itself
then gives the same class two numbers. The exit status is 0 where all is well, 1 where there is a problem.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installation too

from d2_mgd.data.class_folders import EXTENSIONS, class_names, files_below
from d2_mgd.data.images import ImageError, read_rgb

SPLITS = ("train", "valid", "val", "test")

_PORTION = 4096


@dataclasses.dataclass
class SplitReport:
    """What one split holds. Paths are relative to the checked folder, with forward slashes."""

    images: dict[str, int]  # class -> number of images, also those that cannot be read
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)  # path -> why
    ignored: list[str] = dataclasses.field(default_factory=list)  # files that a loader passes over
    inaccessible: dict[str, str] = dataclasses.field(default_factory=dict)  # folder -> why

    @property
    def num_images(self) -> int:
        return sum(self.images.values())

    @property
    def empty_classes(self) -> list[str]:
        return [name for name, count in self.images.items() if count == 0]


@dataclasses.dataclass
class FolderReport:
    """What a folder holds, and what is wrong with it: ``problems``, one sentence each."""

    root: str
    splits: dict[str, SplitReport]
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        splits = {
            name: {
                "num_classes": len(split.images),
                "num_images": split.num_images,
                "images_per_class": split.images,
                "empty_classes": split.empty_classes,
                "unreadable": split.unreadable,
                "inaccessible_folders": split.inaccessible,
                "ignored_files": split.ignored,
            }
            for name, split in self.splits.items()
        }
        return {"root": self.root, "ok": not self.problems, "problems": self.problems, "splits": splits}


def reason_unreadable(path: Path) -> str | None:
    """The end of a sentence "PATH ..." for an image that a training cannot decode; None for one that it can."""
    try:
        read_rgb(path, upright=False)
    except ImageError as error:
        return str(error)
    return None


def _reason_of_item(item: tuple[SplitReport, Path]) -> str | None:
    return reason_unreadable(item[1])


def check_folder(root: Path, workers: int = 1, progress: bool = False) -> FolderReport:
    """Checks every split of ``root`` and decodes all of its images.

    Args:
        root: has train/ and valid/ or val/ with a folder per class.
        workers: images that are decoded at the same time (threads: decoding runs outside Python's lock).
        progress: show a bar.

    Raises:
        NotADirectoryError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder.")
    splits: dict[str, SplitReport] = {}
    paths: list[tuple[SplitReport, Path]] = []
    for name in SPLITS:
        if (root / name).is_dir():
            splits[name], found = _list_split(root, name)
            paths += [(splits[name], path) for path in found]
    with ThreadPoolExecutor(max_workers=workers) as pool:
        # In portions, so that neither memory nor Ctrl-C suffers from a million images in the queue.
        portions = (paths[start : start + _PORTION] for start in range(0, len(paths), _PORTION))
        reasons = (reason for portion in portions for reason in pool.map(_reason_of_item, portion))
        bar = tqdm(reasons, total=len(paths), unit="image", desc="decoding", disable=not progress)
        for (split, path), reason in zip(paths, bar):
            if reason is not None:
                split.unreadable[path.relative_to(root).as_posix()] = reason
    return FolderReport(root=str(root), splits=splits, problems=list(_problems(root, splits)))


def _list_split(root: Path, name: str) -> tuple[SplitReport, list[Path]]:
    report = SplitReport(images={})
    images: list[Path] = []
    classes = class_names(root / name)
    for entry in sorted((root / name).iterdir()):
        if entry.name not in classes:
            report.ignored.append(entry.relative_to(root).as_posix())
            continue
        found = list(_files(entry, root, report))
        of_class = [path for path in found if _is_image(path)]
        report.ignored += [path.relative_to(root).as_posix() for path in found if not _is_image(path)]
        report.images[entry.name] = len(of_class)
        images += of_class
    return report, images


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(EXTENSIONS)


def _files(folder: Path, root: Path, report: SplitReport) -> Iterator[Path]:
    """All files at any depth below a class."""

    def refused(error: OSError) -> None:
        report.inaccessible[Path(error.filename).relative_to(root).as_posix()] = error.strerror or str(error)

    for parent, names in files_below(folder, refused):
        yield from (Path(parent, name) for name in names)


def _problems(root: Path, splits: dict[str, SplitReport]) -> Iterator[str]:
    if "train" not in splits:
        yield f"{root} has no train/."
    if "valid" not in splits and "val" not in splits:
        yield f"{root} has neither valid/ nor val/."
    for name, split in splits.items():
        if len(split.images) < 2:
            yield f"{name} has {_count(list(split.images), 'class folder')}; a training needs two at least."
        if split.empty_classes:
            yield f"{name} has {_count(split.empty_classes, 'class')} without an image: {_some(split.empty_classes)}."
        for path, reason in split.inaccessible.items():
            yield f"{path} cannot be listed: {reason}."
        for path, reason in split.unreadable.items():
            yield f"{path} {reason}."
    for name, split in splits.items():
        if name == "train" or "train" not in splits:
            continue
        train, here = splits["train"].images, split.images
        lacking, unknown = [c for c in train if c not in here], [c for c in here if c not in train]
        if lacking:
            yield (
                f"{name} lacks {len(lacking)} of the {len(train)} classes of train (a loader must number classes by "
                f"train's folders): {_some(lacking)}."
            )
        if unknown:
            yield f"{name} has {_count(unknown, 'class')} that train lacks: {_some(unknown)}."


def _count(items: list[str], noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{len(items)} {noun if len(items) == 1 else plural}"


def _some(names: list[str], most: int = 30) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def summary(report: FolderReport) -> str:
    """The report as text: a line per split, then the problems."""
    lines = []
    for name, split in report.splits.items():
        counts = split.images.values()
        spread = f", {min(counts):,} to {max(counts):,} a class" if counts else ""
        ignored = f"; passed over: {len(split.ignored):,} other files" if split.ignored else ""
        lines.append(f"{name}: {split.num_images:,} images of {len(counts):,} classes{spread}{ignored}")
    lines += [f"problem: {problem}" for problem in report.problems]
    lines.append(f"{report.root}: {_count(report.problems, 'problem') if report.problems else 'no problem'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="has train/ and valid/ (or val/) with a folder per class")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="images decoded at the same time")
    parser.add_argument("--json", action="store_true", help="the report as json instead of text")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}.")
    # Odd metadata is no problem for a training, and its warnings would hide the report.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        report = check_folder(arguments.folder, arguments.workers, progress=True)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report.as_json(), indent=2) if arguments.json else summary(report))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
