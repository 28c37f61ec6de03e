"""Data sets in Pascal VOC's format: an xml file of labels for each image.

Two layouts are read: the devkit's (``Annotations/``, ``JPEGImages/`` and a list ``ImageSets/Main/SPLIT.txt``), and a
folder SPLIT that holds images and xml files side by side. Coordinates are as Detectron2 reads Pascal VOC: pixels count
from 1 and the last one belongs to the box, so that xmin 1, xmax WIDTH is the whole width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from d2_mgd.data.labels import IMAGE_ENDINGS, LabelBuilder, LabelledSet, image_size, in_threads
from d2_mgd.errors import UserError

__all__ = ["read_voc"]

CLASSES = "classes.txt"  # beside the folders: one class name a line
_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class _Objects:
    """The content of an xml file.

    Args:
        fault: kind and clause of what makes the whole file unusable.
        size: (width, height) in pixels.
        file_name: the image's, as the file says.
        objects: (class, text of its four sides, whether it is difficult).
    """

    fault: tuple[str, str] | None = None
    size: tuple[int, int] = (0, 0)
    file_name: str = ""
    objects: list[tuple[str, list[str | None], bool]] = field(default_factory=list)


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type: its entities could expand to more text than fits into memory."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ElementTree.ParseError("it declares a document type")


def read_voc(folder: str, split: str) -> LabelledSet:
    """The images and labels of one split of a folder in Pascal VOC's format, in COCO form.

    Classes are those of ``FOLDER/classes.txt`` in its order, or else all that the folder's xml files name, sorted, so
    that every split of a folder has the same. Objects marked difficult become crowds: evaluation ignores them, as
    Pascal VOC's own does, and training leaves them out.

    Raises:
        UserError: the folder has neither layout, or no class.
    """
    listed = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
    if os.path.isfile(listed):
        images, labels = os.path.join(folder, "JPEGImages"), os.path.join(folder, "Annotations")
        stems, all_labels = [line.strip() for line in _lines(listed)], [labels]
    elif split and os.path.isdir(os.path.join(folder, split)):
        images = labels = os.path.join(folder, split)
        stems = sorted({os.path.splitext(name)[0] for name in _images_of(images)})
        all_labels = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    else:
        raise UserError(
            f"{folder} has no split {split!r}: neither the list {listed} exists, nor a folder {split!r} of images and "
            "xml files."
        )
    return _read(folder, images, labels, [stem for stem in stems if stem], all_labels)


def _read(folder: str, images: str, labels: str, stems: Sequence[str], all_labels: Sequence[str]) -> LabelledSet:
    paths = [os.path.join(place, name) for place in all_labels if os.path.isdir(place) for name in _xml_files(place)]
    parsed = dict(zip(paths, in_threads(_parsed, paths)))
    classes = _classes(folder, parsed.values())
    numbers = {name: number for number, name in enumerate(classes)}
    builder = LabelBuilder(folder, folder, dict(enumerate(classes)))
    files = _by_stem(images)
    builder.count("images", len(stems))
    for stem in stems:
        path = os.path.join(labels, f"{stem}.xml")
        found = parsed.get(path)
        image = _image_of(images, files.get(stem, []), found)
        if image is None:
            builder.add("missing images", f"{images} has no image {stem} (of the types {_endings()})", "images")
            continue
        if found is None:
            size = image_size(image)
            if isinstance(size, Exception):
                builder.size_fault(size, image)
                continue
            builder.image(os.path.relpath(image, folder), size)
            builder.without_labels(image, path)
        elif found.fault is not None:
            builder.add(f"xml files {found.fault[0]}", f"{path} {found.fault[1]}", "images")
        else:
            number = builder.image(os.path.relpath(image, folder), found.size)
            _add_objects(builder, numbers, number, path, found)
    return builder.built()


def _add_objects(builder: LabelBuilder, numbers: dict[str, int], image: int, path: str, found: _Objects) -> None:
    for index, (name, sides, difficult) in enumerate(found.objects, 1):
        builder.count("objects")
        where = f"{path}, object {index},"
        box = _box(sides)
        if not name:
            builder.add("objects without a name", f"{where} has no name", "objects")
        elif name not in numbers:
            example = f"{where} has the class {name!r}, which is not in {CLASSES}"
            builder.add("objects of an unknown class", example, "objects")
        elif box is None:
            shown = ", ".join(f"{key} {value}" for key, value in zip(_SIDES, sides))
            builder.add("objects without a box", f"{where} has no box of four finite numbers: {shown}", "objects")
        else:
            builder.annotation(image, numbers[name], box, crowd=difficult)


def _box(sides: Sequence[str | None]) -> list[float] | None:
    """[x, y, width, height] in pixels from zero; None if the sides are not numbers."""
    try:
        left, top, right, bottom = (float(side or "nan") for side in sides)
    except ValueError:
        return None
    box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
    return box if all(map(math.isfinite, box)) else None


def _parsed(path: str) -> _Objects:
    try:
        with open(path, "rb") as file:
            root = ElementTree.parse(file, ElementTree.XMLParser(target=_NoDoctype())).getroot()
    except (OSError, ElementTree.ParseError, ValueError) as error:  # ValueError: an encoding that is not known
        return _Objects(("that cannot be read", f"cannot be read: {error}"))
    size = root.find("size")
    width, height = (_whole(size, side) for side in ("width", "height"))
    if width < 1 or height < 1:
        return _Objects(("without size", "has no size: it needs <size> with <width> and <height> in pixels"))
    found = _Objects(size=(width, height), file_name=os.path.basename((root.findtext("filename") or "").strip()))
    for entry in root.findall("object"):
        box = entry.find("bndbox")
        sides = [None if box is None else box.findtext(side) for side in _SIDES]
        difficult = (entry.findtext("difficult") or "0").strip() not in ("0", "false", "False", "")
        found.objects.append(((entry.findtext("name") or "").strip(), sides, difficult))
    return found


def _whole(node: ElementTree.Element | None, key: str) -> int:
    """A number of pixels below a node; 0 if it is not there."""
    text = "" if node is None else (node.findtext(key) or "").strip()
    return int(text) if text.isdecimal() else 0


def _classes(folder: str, parsed: Iterable[_Objects]) -> list[str]:
    path = os.path.join(folder, CLASSES)
    if os.path.isfile(path):
        names = [line.strip() for line in _lines(path) if line.strip()]
        if len(set(names)) < len(names):
            raise UserError(f"{path} names a class twice.")
    else:
        names = sorted({name for one in parsed for name, _, _ in one.objects if name})
    if not names:
        raise UserError(f"{folder} has no class: no xml file has an object with a name, and there is no {path}.")
    return names


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _xml_files(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".xml"))


def _images_of(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_ENDINGS))


def _by_stem(folder: str) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for name in _images_of(folder) if os.path.isdir(folder) else ():
        files.setdefault(os.path.splitext(name)[0], []).append(name)
    return files


def _image_of(folder: str, names: Sequence[str], found: _Objects | None) -> str | None:
    """The path of the image of an xml file: the one that it names, if several have the same stem."""
    if not names:
        return None
    return os.path.join(folder, found.file_name if found is not None and found.file_name in names else names[0])


def _endings() -> str:
    return ", ".join(IMAGE_ENDINGS)
