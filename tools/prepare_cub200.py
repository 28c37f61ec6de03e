"""Turns the official CUB-200-2011 data set into the folders that the classification pipeline reads.

    python tools/prepare_cub200.py CUB_200_2011.tgz data/cub200
    python tools/prepare_cub200.py CUB_200_2011/ data/cub200 --mode hardlink

The source is the official archive or the folder that it unpacks to (images.txt, train_test_split.txt,
image_class_labels.txt, classes.txt, images/). The output has train/ and valid/ with a folder per class: the official
training half and the official test half. A folder is linked or copied, an archive is unpacked straight into place.
An interrupted run goes on where it stopped: start it again.

Where a file goes is decided by the four lists alone, never by a name inside the archive, so that an archive cannot
write outside the output.
"""

from __future__ import annotations

import argparse
import collections
import errno
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # works without an installation too

from d2_mgd.errors import UserError, reason

LISTS = ("images.txt", "train_test_split.txt", "image_class_labels.txt", "classes.txt")
OFFICIAL_COUNTS = {"train": 5994, "valid": 5794}
OFFICIAL_CLASSES = 200
MODES = ("symlink", "hardlink", "copy")

_PARTIAL = ".partial"  # a file being written; no image loader takes it for an image


class Image(NamedTuple):
    """One image of the lists."""

    source: str  # below images/, with forward slashes
    target: str  # below the output: split/class/name


def parse_list(name: str, text: str) -> dict[str, str]:
    """The ``<id> <value>`` lines of one list, as id -> value, in order."""
    values: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        value = value.strip()
        if not value:
            raise UserError(f"{name}, line {number}: expected '<id> <value>', found {line.strip()!r}.")
        if key in values:
            raise UserError(f"{name}, line {number}: the id {key} occurs twice.")
        values[key] = value
    if not values:
        raise UserError(f"{name} is empty.")
    return values


def read_images(lists: dict[str, str]) -> list[Image]:
    """All images of the data set, from the texts of the four lists by name."""
    paths, splits, labels, classes = (parse_list(name, lists[name]) for name in LISTS)
    for name, values in ((LISTS[1], splits), (LISTS[2], labels)):
        different = sorted(paths.keys() ^ values.keys())
        if different:
            where = name if different[0] in paths else "images.txt"
            raise UserError(f"the image id {different[0]} is missing in {where} ({len(different)} such ids).")
    images = [Image(paths[key], _target(key, paths[key], splits[key], labels[key], classes)) for key in paths]
    twice = [source for source, count in collections.Counter(image.source for image in images).items() if count > 1]
    if twice:
        raise UserError(f"images.txt names {twice[0]} more than once.")
    return images


def _target(key: str, path: str, split: str, label: str, classes: dict[str, str]) -> str:
    """split/class/name of one image, or why there is none."""
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


def check_counts(images: list[Image]) -> None:
    """That it is the whole official data set: 5,994 and 5,794 images of 200 classes each."""
    for split, expected in OFFICIAL_COUNTS.items():
        targets = [PurePosixPath(image.target).parts for image in images if image.target.startswith(f"{split}/")]
        classes = len({parts[1] for parts in targets})
        if len(targets) != expected or classes != OFFICIAL_CLASSES:
            raise UserError(
                f"{split} would have {len(targets):,} images of {classes} classes, CUB-200-2011 has {expected:,} of "
                f"{OFFICIAL_CLASSES}; for a part of the data set add --subset."
            )


class FolderSource:
    """The unpacked data set; its images are linked or copied."""

    def __init__(self, folder: Path, mode: str) -> None:
        found = [path for path in (folder, folder / "CUB_200_2011") if (path / LISTS[0]).is_file()]
        if not found:
            raise UserError(f"{folder} has no images.txt, so it is not the CUB-200-2011 folder.")
        self.root = found[0].resolve()
        self.mode = mode

    def lists(self) -> dict[str, str]:
        texts = {}
        for name in LISTS:
            if not (self.root / name).is_file():
                raise UserError(f"{self.root} has no {name}.")
            texts[name] = _decode(name, (self.root / name).read_bytes())
        return texts

    def present(self, images: list[Image]) -> list[Image]:
        return [image for image in images if (self.root / "images" / image.source).is_file()]

    def write(self, images: list[Image], output: Path) -> Iterator[bool]:
        """Yields per image whether it had to be made (False: it was there)."""
        for image in images:
            source, target = self.root / "images" / image.source, output / image.target
            yield not self._is_there(source, target) and self._make(source, target)

    def _is_there(self, source: Path, target: Path) -> bool:
        if not target.is_file() or target.is_symlink() != (self.mode == "symlink"):
            return False
        if self.mode == "copy":
            return not target.samefile(source) and target.stat().st_size == source.stat().st_size
        return target.samefile(source)

    def _make(self, source: Path, target: Path) -> bool:
        # A relative link survives moving both folders together, and a mount under another name.
        link = os.path.relpath(source, target.parent.resolve())
        makers: dict[str, Callable[[Path], object]] = {
            "symlink": lambda path: os.symlink(link, path),
            "hardlink": lambda path: os.link(source.resolve(), path),
            "copy": lambda path: shutil.copyfile(source, path),
        }
        try:
            _write_through_partial(target, makers[self.mode])
        except OSError as error:
            links_fail = self.mode != "copy" and error.errno not in (errno.EACCES, errno.ENOSPC, errno.EROFS)
            way_out = "; --mode copy does without links" if links_fail else ""
            raise UserError(f"cannot {self.mode} {target}: {error.strerror or error}{way_out}.") from error
        return True


class ArchiveSource:
    """The official archive; its images are unpacked straight into the output. The archive is read twice."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self._sizes: dict[str, int] = {}  # of the regular files below images/

    def lists(self) -> dict[str, str]:
        texts: dict[str, str] = {}
        for member, path, content in self._members("reading the lists"):
            if path.parts[0] == "images":
                self._sizes.setdefault("/".join(path.parts[1:]), member.size)
            elif str(path) in LISTS:
                texts.setdefault(str(path), _decode(str(path), content().read()))
        missing = [name for name in LISTS if name not in texts]
        if missing:
            raise UserError(f"{self.archive} has no {missing[0]}, so it is not the CUB-200-2011 archive.")
        return texts

    def present(self, images: list[Image]) -> list[Image]:
        return [image for image in images if image.source in self._sizes]

    def write(self, images: list[Image], output: Path) -> Iterator[bool]:
        """Yields per image whether it had to be made (False: it was there)."""
        todo = {}
        for image in images:
            target = output / image.target
            if target.is_file() and not target.is_symlink() and target.stat().st_size == self._sizes[image.source]:
                yield False
            else:
                todo[f"images/{image.source}"] = target
        for _, path, content in self._members("unpacking") if todo else ():
            target_or_none = todo.pop(str(path), None)
            if target_or_none is not None:
                self._unpack(content(), target_or_none)
                yield True

    @staticmethod
    def _unpack(content: IO[bytes], target: Path) -> None:
        def fill(path: Path) -> None:
            with path.open("wb") as stream:
                shutil.copyfileobj(content, stream)

        try:
            _write_through_partial(target, fill)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}.") from error

    def _members(self, doing: str) -> Iterator[tuple[tarfile.TarInfo, PurePosixPath, Callable[[], IO[bytes]]]]:
        """Regular files of the archive in order, with their path below the data set's folder. Links are passed over."""
        size = self.archive.stat().st_size
        try:
            with (
                self.archive.open("rb") as stream,
                tqdm.wrapattr(stream, "read", total=size, desc=doing, leave=False) as watched,
                tarfile.open(fileobj=cast(IO[bytes], watched), mode="r:*") as archive,
            ):
                for member in archive:
                    path = PurePosixPath(member.name)
                    if path.parts[:1] == ("CUB_200_2011",):
                        path = path.relative_to("CUB_200_2011")
                    if member.isreg() and path.parts:
                        yield member, path, lambda member=member: archive.extractfile(member)  # type: ignore[misc]
        except (tarfile.ReadError, EOFError, zlib.error) as error:
            raise UserError(
                f"{doing}: {self.archive} is not a tar archive, or is cut short or damaged ({reason(error)})."
            ) from error


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not a text file ({error.reason} at byte {error.start}).") from error


def _write_through_partial(target: Path, make: Callable[[Path], object]) -> None:
    """So that a target is complete or absent, also after a kill."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}{_PARTIAL}")
    partial.unlink(missing_ok=True)
    make(partial)
    os.replace(partial, target)


def check_output(output: Path, images: list[Image]) -> None:
    """Removes what an interrupted run left half written, and refuses to mix with other files."""
    expected = {image.target for image in images}
    for split in OFFICIAL_COUNTS:
        for folder, _, names in os.walk(output / split):
            for name in names:
                path = Path(folder, name)
                if name.startswith(".") and name.endswith(_PARTIAL):
                    path.unlink()
                elif path.relative_to(output).as_posix() not in expected:
                    raise UserError(f"{path} does not belong to this data set; give a new output folder.")


def prepare(source: Path, output: Path, mode: str | None = None, subset: bool = False) -> dict[str, int]:
    """Makes ``output/train`` and ``output/valid`` out of the data set at ``source``.

    Args:
        source: the official archive, or the folder that it unpacks to.
        output: a new folder, or one of an earlier, interrupted run.
        mode: for a folder: ``symlink`` (default), ``hardlink`` or ``copy``.
        subset: the source is a part of the data set: listed images that are absent are left out, and the official
            counts are not asked for.

    Returns:
        Number of images of ``train`` and ``valid``, and of those that were ``new`` in this run.

    Raises:
        UserError: one sentence; what was made before it stays, and the next run goes on from there.
    """
    if source.is_dir():
        found: FolderSource | ArchiveSource = FolderSource(source, mode or "symlink")
    elif source.is_file():
        if mode not in (None, "copy"):
            raise UserError(f"there is nothing to {mode} in an archive; unpack it first, or leave out --mode.")
        found = ArchiveSource(source)
    else:
        raise UserError(f"{source} does not exist; it should be CUB_200_2011.tgz or the folder in it.")
    images = read_images(found.lists())
    images = _checked_images(images, found.present(images), subset)
    check_output(output, images)
    new = sum(tqdm(found.write(images, output), total=len(images), unit="image", desc=str(output)))
    counts = {split: sum(image.target.startswith(f"{split}/") for image in images) for split in OFFICIAL_COUNTS}
    absent = [image.target for image in images if not (output / image.target).is_file()]
    if absent:
        raise UserError(f"{output / absent[0]} was not made ({len(absent)} such images); start again.")
    return {**counts, "new": new}


def _checked_images(listed: list[Image], present: list[Image], subset: bool) -> list[Image]:
    if subset and not present:
        raise UserError("none of the listed images is there.")
    if subset:
        return present
    if len(present) < len(listed):
        there = set(present)
        first = next(image for image in listed if image not in there)
        raise UserError(
            f"images/{first.source} is listed but absent ({len(listed) - len(present):,} of {len(listed):,} images); "
            "for a part of the data set add --subset."
        )
    check_counts(present)
    return present


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="CUB_200_2011.tgz, or the folder that it unpacks to")
    parser.add_argument("output", type=Path, help="gets train/ and valid/ with a folder per class")
    parser.add_argument("--mode", choices=MODES, help="how the images of a folder get into the output (symlink)")
    parser.add_argument("--subset", action="store_true", help="leave out absent images, do not check the counts")
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
