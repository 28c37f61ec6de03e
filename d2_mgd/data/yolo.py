"""Data sets in YOLO's format: a data.yaml, images, and a text file of labels for each image.

A row of a label file is ``class x_center y_center width height`` or a polygon ``class x1 y1 x2 y2 x3 y3 ...``, in
shares of the image's width and height. The label file of ``.../images/a.jpg`` is ``.../labels/a.txt``; where no folder
is named images, it is beside the image.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from d2_mgd.data.class_folders import files_below
from d2_mgd.data.coco import WARNING
from d2_mgd.data.labels import IMAGE_ENDINGS, LabelBuilder, LabelledSet, image_size, in_threads
from d2_mgd.errors import UserError

__all__ = ["YoloFile", "read_yolo"]

SPLITS = ("train", "val", "valid", "validation", "test")

_TOLERANCE = 0.01  # of width or height: exports round
_LENGTHS = "a box has 5 (class x_center y_center width height), a polygon 7, 9, 11, ... (class x1 y1 x2 y2 x3 y3 ...)"


@dataclass(frozen=True)
class YoloFile:
    """A data.yaml.

    Args:
        path: of the file.
        root: the folder that its splits are relative to.
        classes: class number -> name.
        splits: split -> folders of images, or text files that list images.
    """

    path: str
    root: str
    classes: dict[int, str]
    splits: dict[str, list[str]]

    @classmethod
    def open(cls, path: str) -> YoloFile:
        """Read a data.yaml.

        Raises:
            UserError: it is not one, or names a folder that does not exist.
        """
        try:
            with open(path, encoding="utf-8") as file:
                content = yaml.safe_load(file)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path} is not readable yaml: {' '.join(str(error).split())}.") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} has no keys: a data.yaml has names, and train, val or test.")
        if "kpt_shape" in content:
            raise UserError(f"{path} has kpt_shape: YOLO's keypoint labels are not supported, boxes and polygons are.")
        root = os.path.join(os.path.dirname(os.path.abspath(path)), str(content.get("path") or ""))
        if not os.path.isdir(root):
            raise UserError(f"{path}: its path {content['path']!r} is not a folder; it is relative to the yaml file.")
        root = os.path.normpath(root)
        splits = {name: _places(path, root, name, content[name]) for name in SPLITS if content.get(name)}
        if not splits:
            raise UserError(f"{path} names no images: set one of {', '.join(SPLITS)} to a folder or a list file.")
        return cls(path, root, _classes(path, content), splits)


def _classes(path: str, content: dict[Any, Any]) -> dict[int, str]:
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path}: names must be a list of class names, or a mapping from class number to name.")
    classes = {}
    for number, name in names.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise UserError(f"{path}: names has the key {number!r}, which is not a class number (0, 1, 2, ...).")
        if not isinstance(name, (str, int, float)) or isinstance(name, bool):
            raise UserError(f"{path}: the name of class {number} is {name!r}, not text: put it in quotes.")
        classes[number] = str(name)
    wanted = content.get("nc", len(classes))
    if wanted != len(classes):
        raise UserError(f"{path}: nc is {wanted!r}, but names has {len(classes)} classes.")
    return classes


def _places(path: str, root: str, split: str, value: Any) -> list[str]:
    """Folders and list files of a split."""
    values = value if isinstance(value, list) else [value]
    places = []
    for name in values:
        if not isinstance(name, str):
            raise UserError(f"{path}: {split} must be a folder, a text file or a list of them, not {value!r}.")
        place = os.path.join(root, name)
        if not os.path.exists(place) and name.startswith("../"):
            place = os.path.join(root, name[3:])  # Roboflow's exports have "../train/images" for "train/images"
        if not os.path.exists(place):
            raise UserError(f"{path}: {split} names {name}, which does not exist in {root}.")
        places.append(os.path.normpath(place))
    return places


def read_yolo(file: YoloFile, split: str) -> LabelledSet:
    """The images and labels of one split of a data.yaml, in COCO form.

    Images of a folder are sorted by path; those of a list file keep its order.

    Raises:
        UserError: a list file cannot be read.
    """
    builder = LabelBuilder(file.path, file.root, file.classes)
    names = [os.path.relpath(path, file.root) for path in dict.fromkeys(_images(file.splits[split]))]
    builder.count("images", len(names))
    for name, (size, lines) in zip(names, in_threads(lambda name: _read(os.path.join(file.root, name)), names)):
        path = os.path.join(file.root, name)
        if isinstance(size, Exception):
            builder.size_fault(size, path)
            continue
        image = builder.image(name, size)
        if lines is None:
            builder.without_labels(path, label_file(path))
        elif isinstance(lines, Exception):
            builder.add("unreadable label files", f"{label_file(path)} cannot be read: {lines}", "images")
        else:
            _add_rows(builder, file.classes, image, size, label_file(path), lines)
    return builder.built()


def _images(places: Sequence[str]) -> Iterator[str]:
    for place in places:
        if os.path.isdir(place):
            for folder, names in files_below(place):
                yield from (os.path.join(folder, name) for name in names if name.lower().endswith(IMAGE_ENDINGS))
        else:
            try:
                with open(place, encoding="utf-8") as file:
                    lines = [line.strip() for line in file]
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"the list of images {place} cannot be read: {error}.") from error
            yield from (os.path.normpath(os.path.join(os.path.dirname(place), line)) for line in lines if line)


def label_file(image: str) -> str:
    """The path of an image's label file."""
    before, images, after = image.rpartition("/images/")
    return os.path.splitext(f"{before}/labels/{after}" if images else image)[0] + ".txt"


def _read(path: str) -> tuple[tuple[int, int] | Exception, list[str] | Exception | None]:
    """The size of an image; and the rows of its label file, None where there is no file."""
    size = image_size(path)
    try:
        with open(label_file(path), encoding="utf-8") as file:
            return size, file.read().splitlines()
    except FileNotFoundError:
        return size, None
    except (OSError, UnicodeDecodeError) as error:
        return size, error


def _add_rows(
    builder: LabelBuilder, classes: dict[int, str], image: int, size: tuple[int, int], path: str, lines: list[str]
) -> None:
    seen = set()
    for index, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        builder.count("rows")
        where = f"{path}, line {index},"
        fault = _fault(words, classes)
        if fault is not None:
            builder.add(fault[0], f"{where} {fault[1]}", "rows")
        elif tuple(words) in seen:
            builder.add("rows that are there twice", f"{where} repeats an earlier row and is left out", "rows", WARNING)
        else:
            seen.add(tuple(words))
            box, polygon = _in_pixels([float(word) for word in words[1:]], *size)
            builder.annotation(image, int(float(words[0])), box, polygon)


def _fault(words: list[str], classes: dict[int, str]) -> tuple[str, str] | None:
    """What is wrong with a row: the kind, and a clause about this one."""
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        return "rows that are not numbers", f"is not made of finite numbers: {' '.join(words)[:80]!r}"
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        return "rows of a wrong length", f"has {len(values)} numbers; {_LENGTHS}"
    if values[0] not in classes:
        return "rows of an unknown class", (
            f"has the class {words[0]}, but names has {min(classes)} to {max(classes)} ({len(classes)} classes)"
        )
    outside = next(
        (word for word, value in zip(words[1:], values[1:]) if not -_TOLERANCE <= value <= 1 + _TOLERANCE), None
    )
    if outside is not None:
        return "rows with numbers outside 0 to 1", (
            f"has {outside}; coordinates are shares of the image's width and height, from 0 to 1"
        )
    return None


def _in_pixels(values: list[float], width: int, height: int) -> tuple[list[float], list[float]]:
    """The box [x, y, width, height] and the polygon of a row, empty for a box."""
    if len(values) == 4:
        x, y, w, h = values[0] * width, values[1] * height, values[2] * width, values[3] * height
        return [x - w / 2, y - h / 2, w, h], []
    polygon = [value * side for value, side in zip(values, [width, height] * (len(values) // 2))]
    xs, ys = polygon[::2], polygon[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)], polygon
