"""Checks of a json file in COCO format: findings by kind, with counts and examples.

Training refuses a data set with an *error*. A *warning* means that training leaves something out or counts something
that does not exist. A *note* is information. Only the json is checked here; `inspection` also checks the image files.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from d2_mgd.data.images import resized
from d2_mgd.errors import UserError

__all__ = ["CocoError", "Finding", "Inspection", "inspect_coco", "read_coco"]

# Annotation tools round, and some count pixels from one: Detectron2 cuts such boxes at the border.
_BORDER_TOLERANCE = 2.0  # pixels
_EXAMPLES = 5
_NARROW = 16  # pixels
_SHOWN = 200  # characters of an entry of the json
_NO_AREA = "no 'area' that is finite and not negative, which evaluation needs"

ERROR, WARNING, NOTE = "error", "warning", "note"


class CocoError(UserError):
    """A file that is not in COCO format; the message is a sentence without its full stop."""


@dataclass
class Finding:
    """All findings of one kind.

    Args:
        kind: short description, the same for all of them.
        severity: "error", "warning" or "note".
        things: what is counted: "annotations", "images", "categories"; empty for a fault of the file itself.
        of: number of these things in the file.
        count: number of findings.
        examples: the first findings, each as a sentence without its full stop.
    """

    kind: str
    severity: str
    things: str = ""
    of: int = 0
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The first example, and the number of findings."""
        counted = f" ({self.count} of {self.of} {self.things} are like this)" if self.things else ""
        return f"{self.examples[0]}{counted}"


class Findings:
    """Findings by kind, in the order of their first occurrence."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Finding] = {}

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._by_kind.values())

    def add(self, kind: str, example: str, *, severity: str = ERROR, things: str = "", of: int = 0) -> None:
        finding = self._by_kind.setdefault(kind, Finding(kind, severity, things, of))
        finding.count += 1
        if len(finding.examples) < _EXAMPLES:
            finding.examples.append(example)


@dataclass(frozen=True)
class Inspection:
    """Intended use of a data set.

    Args:
        train: for training, which needs annotations.
        evaluate: for evaluation, which needs the fields that pycocotools reads.
        masks: annotations must have a segmentation (MODEL.MASK_ON).
        sizes: (shortest, longest) sides that images are resized to.
    """

    train: bool = True
    evaluate: bool = False
    masks: bool = False
    sizes: Sequence[tuple[int, int]] = ()


def read_coco(path: str) -> dict[str, Any]:
    """Read a json file that has the lists ``images`` and ``categories``.

    Raises:
        CocoError: the file does not exist, cannot be read, or is not a json file in COCO format.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise CocoError(f"its annotations {path} do not exist") from None
    except RecursionError:
        raise CocoError(f"{path} is not readable json: it is nested too deeply") from None
    except (OSError, ValueError) as error:  # unreadable, not text, not json
        raise CocoError(f"{path} is not readable json: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("images", "categories")):
        raise CocoError(f"{path} is not in COCO's format: it lacks images or categories")
    if not isinstance(content.get("annotations", []), (list, type(None))):
        raise CocoError(f"{path} is not in COCO's format: its annotations are no list")
    return content


def inspect_coco(
    content: dict[str, Any], source: str, wanted: Inspection
) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Check the content of a json file.

    Args:
        content: of :func:`read_coco`.
        source: name of the file in messages.
        wanted: the intended use.

    Returns:
        the findings, and the json entries of all valid images.
    """
    found = Findings()
    classes = _inspect_categories(content["categories"], source, found)
    images = _inspect_images(content["images"], source, found, wanted.sizes)
    annotations = content.get("annotations") or []  # test sets may have none
    _Annotations(annotations, images, classes, source, wanted, found).inspect()
    return list(found), list(images.values())


def _inspect_categories(categories: list[Any], source: str, found: Findings) -> dict[Any, str]:
    classes: dict[Any, str] = {}
    for category in categories:
        if (
            not isinstance(category, dict)
            or not _is_id(category.get("id"))
            or not isinstance(category.get("name"), str)
        ):
            example = f"{source} has a category without id or name: {_shown(category)}"
            found.add("categories without id or name", example, things="categories", of=len(categories))
        elif category["id"] in classes:
            example = f"{source} has two categories with the id {category['id']}"
            found.add("category ids that are used twice", example, things="categories", of=len(categories))
        else:
            classes[category["id"]] = category["name"]
    _inspect_ids("categories", classes, source, found)
    if not categories:
        found.add("no categories", f"{source} has no categories")
    for name, number in Counter(classes.values()).items():
        if number > 1:
            example = f"{source} has {number} categories of the name {name!r}, which count as different classes"
            found.add("class names that are used twice", example, severity=WARNING)
    return classes


def _inspect_images(
    images: list[Any], source: str, found: Findings, sizes: Sequence[tuple[int, int]]
) -> dict[Any, dict[str, Any]]:
    known: dict[Any, dict[str, Any]] = {}
    names: set[str] = set()
    for image in images:
        if not isinstance(image, dict) or not _is_id(image.get("id")) or not _is_image(image):
            example = f"{source} has an image without a valid id, file_name, width or height: {_shown(image)}"
            found.add("images without id, file name or size", example, things="images", of=len(images))
            continue
        if image["id"] in known:
            example = f"{source} has two images with the id {image['id']}"
            found.add("image ids that are used twice", example, things="images", of=len(images))
            continue
        known[image["id"]] = image
        if image["file_name"] in names:
            example = f"the image {image['file_name']} is listed more than once, each time with annotations of its own"
            found.add("images listed more than once", example, severity=WARNING, things="images", of=len(images))
        names.add(image["file_name"])
        _inspect_shape(image, sizes, found, len(images))
    _inspect_ids("images", known, source, found)
    if not images:
        found.add("no images", f"{source} has no images")
    return known


def _inspect_ids(things: str, known: Iterable[Any], source: str, found: Findings) -> None:
    """Check that ids are of one type: Detectron2 sorts them."""
    if len({type(key) for key in known}) > 1:
        found.add(f"ids of {things} of two types", f"some {things} of {source} have numbers as ids and some have text")


def _inspect_shape(image: dict[str, Any], sizes: Sequence[tuple[int, int]], found: Findings, total: int) -> None:
    """Check that resizing leaves enough pixels of a long and narrow image."""
    width, height = image["width"], image["height"]
    left = min((resized(height, width, *size) for size in sizes), key=min, default=(height, width))
    if min(left) >= _NARROW or min(left) == min(height, width):
        return
    what = (
        f"the image {image['file_name']} of {width} x {height} pixels becomes {left[1]} x {left[0]} when it is resized"
    )
    if min(left) < 1:
        what += ", which has no pixel: cut the image into several"
        found.add("images too long and narrow to train on", what, things="images", of=total)
    else:
        found.add("long and narrow images", what, severity=WARNING, things="images", of=total)


class _Annotations:
    """Checks of the annotations, given the valid images and classes."""

    def __init__(
        self,
        annotations: list[Any],
        images: dict[Any, dict[str, Any]],
        classes: dict[Any, str],
        source: str,
        wanted: Inspection,
        found: Findings,
    ) -> None:
        self.annotations, self.images, self.classes = annotations, images, classes
        self.source, self.wanted, self.found = source, wanted, found

    def inspect(self) -> None:
        seen: set[Any] = set()
        used: set[Any] = set()
        annotated: set[Any] = set()
        trainable = 0
        for annotation in self.annotations:
            if not isinstance(annotation, dict) or not _is_id(annotation.get("id")):
                self.add("annotations without id", f"{self.source} has an annotation without id: {_shown(annotation)}")
                continue
            where = self._where(annotation)
            if where is None:
                continue
            if annotation["id"] in seen:
                self.add("annotation ids that are used twice", f"{where} shares its id with another")
            seen.add(annotation["id"])
            annotated.add(annotation["image_id"])
            used.add(annotation["category_id"])
            if self._inspect_one(annotation, where):
                trainable += not annotation.get("iscrowd", 0) and min(annotation["bbox"][2:]) > 0
        if self.wanted.train and not trainable:
            self.found.add("nothing to train on", f"{self.source} has no annotation to train on")
        self._inspect_unused(used, annotated)

    def add(self, kind: str, example: str, severity: str = ERROR) -> None:
        self.found.add(kind, example, severity=severity, things="annotations", of=len(self.annotations))

    def _where(self, annotation: dict[str, Any]) -> str | None:
        """How sentences call an annotation; None where its image is not in the set."""
        image = annotation.get("image_id")
        for key in ("image_id", "category_id"):  # Detectron2 and pycocotools look these up of all of them
            if not _is_id(annotation.get(key)):
                example = f"annotation {annotation['id']} has no valid {key}: {_shown(annotation.get(key))}"
                self.add(f"annotations without a valid {key}", example)
                return None
        if image in self.images:
            return f"annotation {annotation['id']} of image {self.images[image]['file_name']}"
        example = (
            f"annotation {annotation['id']} belongs to image {_shown(image)}, which is not in the set, and is left out"
        )
        self.add("annotations of an image that is not in the set", example, WARNING)
        return None

    def _inspect_one(self, annotation: dict[str, Any], where: str) -> bool:
        """Add the findings of one annotation; returns whether training can use it."""
        fault = self._fault(annotation)
        if fault is not None:
            kind, detail = fault
            self.add(f"annotations with {kind}", f"{where} has {kind}{detail}")
            return False
        if annotation.get("iscrowd", 0):
            self.add("crowds", f"{where} is a crowd: not trained on, and ignored in evaluation", NOTE)
        if annotation["id"] == 0 and self.wanted.evaluate:
            self.add("annotations with the id 0", f"{where} has the id 0, which pycocotools counts as missed", WARNING)
        if not self.wanted.evaluate and not _has_area(annotation):
            self.add(f"annotations with {_NO_AREA}", f"{where} has {_NO_AREA}", NOTE)
        if min(annotation["bbox"][2:]) == 0:
            self.add("annotations with a box without area", f"{where} has a box without area and is left out", WARNING)
        return True

    def _fault(self, annotation: dict[str, Any]) -> tuple[str, str] | None:
        """The fault of an annotation as its kind and its details; None without a fault."""
        category = annotation["category_id"]
        if category not in self.classes:
            return "an unknown category", f", {_shown(category)}"
        box = annotation.get("bbox")
        if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(_is_number(side) for side in box):
            return "no box of four numbers [x, y, width, height]", f": {_shown(box)}"
        x, y, width, height = box
        if not all(_is_finite(side) for side in box) or width < 0 or height < 0:
            return "a box that is not finite or has a negative side", f": {_shown(box)}"
        image = self.images[annotation["image_id"]]
        outside = max(-x, -y, x + width - image["width"], y + height - image["height"])
        if outside > _BORDER_TOLERANCE:
            return "a box outside its image", (
                f": {box} reaches {outside:g} pixels beyond the {image['width']} x {image['height']} image"
            )
        return self._fault_beyond_box(annotation, image)

    def _fault_beyond_box(self, annotation: dict[str, Any], image: dict[str, Any]) -> tuple[str, str] | None:
        if annotation.get("ignore", 0):
            return "the mark 'ignore', which Detectron2 does not support", "; mark it 'iscrowd' or leave it out"
        crowd = annotation.get("iscrowd", None if self.wanted.evaluate else 0)
        if not isinstance(crowd, int) or crowd not in (0, 1):
            return "no 'iscrowd' of 0 or 1, which evaluation needs", f": {_shown(annotation.get('iscrowd'))}"
        if self.wanted.evaluate and not _has_area(annotation):
            return _NO_AREA, f": {_shown(annotation.get('area'))}"
        if self.wanted.masks and not crowd:
            return _mask_fault(annotation.get("segmentation"), image)
        return None

    def _inspect_unused(self, used: set[Any], annotated: set[Any]) -> None:
        """Find classes and images without annotations.

        Exports often list a supercategory as a class. It takes an output of the head, and its AP is NaN.
        """
        if not self.annotations:
            return
        for key, name in self.classes.items():
            if key not in used:
                example = f"the class {name!r} has no annotation, but counts as a class"
                severity = WARNING if self.wanted.train else NOTE
                self.found.add(
                    "classes without annotations", example, severity=severity, things="classes", of=len(self.classes)
                )
        for key, image in self.images.items():
            if self.wanted.train and key not in annotated:
                allowed = "unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
                example = f"the image {image['file_name']} has no annotation: left out of training {allowed}"
                self.found.add(
                    "images without annotations", example, severity=NOTE, things="images", of=len(self.images)
                )


def _mask_fault(segmentation: Any, image: dict[str, Any]) -> tuple[str, str] | None:
    """The fault of a mask (polygons or run-length code) as its kind and its details; None without a fault."""
    if not segmentation:
        return "no segmentation, which MODEL.MASK_ON needs", ""
    if isinstance(segmentation, dict):
        size = [image["height"], image["width"]]
        if segmentation.get("size") != size or not isinstance(segmentation.get("counts"), (str, list)):
            return "a run-length code of another size than its image", f": {_shown(segmentation.get('size'))}"
        return None
    polygons: list[Any] = segmentation if isinstance(segmentation, list) else [None]
    if not all(isinstance(polygon, list) and all(map(_is_finite, polygon)) for polygon in polygons):
        return "a segmentation that is not made of finite numbers", f": {_shown(segmentation)}"
    if not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons):
        return "no polygon of three points or more", f": {_shown(segmentation)}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """Whether a value is a finite number within float64."""
    try:
        return _is_number(value) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _has_area(annotation: dict[str, Any]) -> bool:
    area: Any = annotation.get("area")
    return _is_finite(area) and area >= 0


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_image(image: dict[str, Any]) -> bool:
    name: Any = image.get("file_name")
    sides: list[Any] = [image.get("width"), image.get("height")]
    valid = isinstance(name, str) and "\0" not in name
    return valid and all(_is_finite(side) and side > 0 and side == int(side) for side in sides)


def _shown(value: Any) -> str:
    """A value of the json as text, shortened."""
    text = str(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
