#!/usr/bin/env python
"""Check a data set with a folder of images per class before a training.

    python tools/check_imagefolder.py data/cub200
    python tools/check_imagefolder.py data/cub200 --workers 16 --json > report.json

The folder has train/ and valid/ (or val/), and optionally test/, with a folder per class. It is read as in training: at
any depth, without hidden folders, through links but not in circles. Every image is decoded to its last pixel. Problems
are images that cannot be read (cut short, empty, of another format), by name; classes without an image; and classes
that train/ lacks. A split that lacks classes of train/ is a note. The exit status is 0 without a problem, 1 with one, 2
for a folder that cannot be checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installation too

from d2_mgd.data.class_folders import EXTENSIONS, class_names, files_below
from d2_mgd.data.inspection import inspected_images

SPLITS = ("train", "valid", "val", "test")


@dataclasses.dataclass
class SplitReport:
    """The content of a split. Paths are relative to the checked folder, with forward slashes.

    Args:
        images_per_class: also of those that cannot be read.
        unreadable: path of an image -> why it cannot be read.
        inaccessible_folders: path -> why it cannot be listed.
        ignored_files: files that training skips.
    """

    images_per_class: dict[str, int] = dataclasses.field(default_factory=dict)
    unreadable: dict[str, str] = dataclasses.field(default_factory=dict)
    inaccessible_folders: dict[str, str] = dataclasses.field(default_factory=dict)
    ignored_files: list[str] = dataclasses.field(default_factory=list)

    @property
    def num_images(self) -> int:
        return sum(self.images_per_class.values())


@dataclasses.dataclass
class FolderReport:
    """The content of a folder, its problems, and notes on what a training accepts; one sentence each."""

    root: str
    splits: dict[str, SplitReport]
    problems: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        splits = {
            name: {**dataclasses.asdict(split), "num_images": split.num_images} for name, split in self.splits.items()
        }
        found = {"ok": not self.problems, "problems": self.problems, "notes": self.notes}
        return {"root": self.root, **found, "splits": splits}


def check_folder(root: Path, workers: int = 1, progress: bool = False) -> FolderReport:
    """Check every split of ``root`` and decode all of its images.

    Args:
        root: has train/ and valid/ or val/ with a folder per class.
        workers: images that are decoded at the same time, in threads.
        progress: show a progress bar.

    Raises:
        NotADirectoryError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder.")
    splits: dict[str, SplitReport] = {}
    paths: list[tuple[SplitReport, Path]] = []
    for name in SPLITS:
        if (root / name).is_dir():
            splits[name] = SplitReport()
            paths += [(splits[name], path) for path in _list_split(root, name, splits[name])]
    facts = inspected_images([path for _, path in paths], workers)
    bar = tqdm(facts, total=len(paths), unit="image", desc="decoding", disable=not progress)
    for known, (split, path) in zip(bar, paths):
        if known.error:
            split.unreadable[path.relative_to(root).as_posix()] = known.error
    return FolderReport(str(root), splits, problems=list(_problems(root, splits)), notes=list(_notes(splits)))


def _list_split(root: Path, name: str, report: SplitReport) -> Iterator[Path]:
    """Yield the images of a split; adds everything else to the report."""

    def refused(error: OSError) -> None:
        path = Path(error.filename).relative_to(root).as_posix()
        report.inaccessible_folders[path] = error.strerror or str(error)

    classes = class_names(root / name)
    for entry in sorted((root / name).iterdir()):
        if entry.name not in classes:
            report.ignored_files.append(entry.relative_to(root).as_posix())
            continue
        files = [Path(parent, file) for parent, names in files_below(entry, refused) for file in names]
        images = [path for path in files if path.name.lower().endswith(EXTENSIONS)]
        others = [path for path in files if not path.name.lower().endswith(EXTENSIONS)]
        report.ignored_files += [path.relative_to(root).as_posix() for path in others]
        report.images_per_class[entry.name] = len(images)
        yield from images


def _problems(root: Path, splits: dict[str, SplitReport]) -> Iterator[str]:
    if "train" not in splits:
        yield f"{root} has no train/."
    if "valid" not in splits and "val" not in splits:
        yield f"{root} has neither valid/ nor val/."
    for name, split in splits.items():
        if len(split.images_per_class) < 2:
            yield f"{name} has {_count([*split.images_per_class], 'class folder')}; a training needs at least two."
        empty = [kind for kind, count in split.images_per_class.items() if count == 0]
        if empty:
            yield f"{name} has {_count(empty, 'class')} without an image: {_some(empty)}."
        for path, reason in split.inaccessible_folders.items():
            yield f"{path} cannot be listed: {reason}."
        for path, reason in split.unreadable.items():
            yield f"{path} {reason}."
    for name, split in splits.items():
        if name == "train" or "train" not in splits:
            continue
        unknown = [kind for kind in split.images_per_class if kind not in splits["train"].images_per_class]
        if unknown:
            yield f"{name} has {_count(unknown, 'class')} that train lacks: {_some(unknown)}."


def _notes(splits: dict[str, SplitReport]) -> Iterator[str]:
    train = splits["train"].images_per_class if "train" in splits else {}
    for name, split in splits.items():
        lacking = [kind for kind in train if kind not in split.images_per_class]
        if lacking:
            yield (
                f"{name} lacks {len(lacking)} of the {len(train)} classes of train (a loader must number classes by "
                f"train's folders): {_some(lacking)}."
            )


def _count(items: list[str], noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{len(items)} {noun if len(items) == 1 else plural}"


def _some(names: list[str], most: int = 30) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def summary(report: FolderReport) -> str:
    """Return the report as text: a line per split, then the problems."""
    lines = []
    for name, split in report.splits.items():
        counts = split.images_per_class.values()
        spread = f", {min(counts):,} to {max(counts):,} a class" if counts else ""
        ignored = f"; skipped: {len(split.ignored_files):,} other files" if split.ignored_files else ""
        lines.append(f"{name}: {split.num_images:,} images of {len(counts):,} classes{spread}{ignored}")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"problem: {problem}" for problem in report.problems]
    lines.append(f"{report.root}: {_count(report.problems, 'problem') if report.problems else 'no problem'}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="has train/ and valid/ (or val/) with a folder per class")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="images decoded at the same time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}.")
    # unusual metadata do not affect training
    warnings.filterwarnings("ignore", module="PIL")
    try:
        report = check_folder(arguments.folder, arguments.workers, progress=True)
    except OSError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.as_json(), indent=2) if arguments.json else summary(report))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
