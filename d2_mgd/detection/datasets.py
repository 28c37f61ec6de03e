"""COCO-format data sets named on the command line, and what is checked in every COCO-format set before training.

An error names the data set, the first offence and how many there are. What Detectron2 handles by itself, crowds, boxes
that leave their image by rounding, boxes without area, is no error.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager
from torch import nn

__all__ = ["DatasetError", "check_classes", "check_coco", "check_datasets", "register_coco"]

logger = logging.getLogger(__name__)

# Annotation tools round, and some count pixels from one: Detectron2 cuts such boxes at the border.
_BORDER_TOLERANCE = 2.0  # pixels


class DatasetError(ValueError):
    """A data set that cannot be trained on or evaluated; the message is one sentence."""


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """Make a COCO-format data set known to Detectron2 under ``name``; the same one twice is fine.

    Args:
        name: what DATASETS.TRAIN and DATASETS.TEST call it.
        json_file: annotations in COCO's instance format.
        image_root: the folder that the json's file names are relative to.

    Raises:
        DatasetError: another data set has that name.
    """
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name)
        if (known.get("json_file"), known.get("image_root")) != (json_file, image_root):
            raise DatasetError(f"there is already a data set {name!r}; register yours under another name.")
        return
    register_coco_instances(name, {}, json_file, image_root)


def check_datasets(cfg: CfgNode, train: bool = True) -> None:
    """Check the data sets of a config: DATASETS.TEST, and DATASETS.TRAIN where ``train``.

    Files are listed, not read: 100,000 images take seconds. Sets in other formats than COCO's are only looked up.

    Raises:
        DatasetError: see :func:`check_coco`; or a set is not registered, or there is none to train on.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise DatasetError("DATASETS.TRAIN names no data set.")
    for name in dict.fromkeys([*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]):
        if name not in DatasetCatalog.list():
            raise DatasetError(
                f"there is no data set {name!r}; a set in COCO's format is named by --register-coco {name} JSON IMAGES."
            )
        known = MetadataCatalog.get(name)
        if known.get("evaluator_type") == "coco":
            for_training = train and name in cfg.DATASETS.TRAIN
            check_coco(
                name,
                known.json_file,
                known.image_root,
                train=for_training,
                masks=for_training and cfg.MODEL.MASK_ON,
            )


def check_coco(name: str, json_file: str, image_root: str, *, train: bool = True, masks: bool = False) -> None:
    """Check a COCO-format data set, so that no training stops in its middle because of it.

    Args:
        name: for the messages.
        json_file, image_root: as in :func:`register_coco`.
        train: whether it is trained on, so that there must be annotations.
        masks: whether annotations must have a segmentation.

    Raises:
        DatasetError: the json or the image folder is missing or invalid, an image is missing, an annotation's box is
            not finite, negative or outside its image, its category unknown, its mask missing, or all is empty.
    """
    content = _Content(name, json_file, _read_json(name, json_file))
    content.check_images()
    _check_files(name, image_root, [image["file_name"] for image in content.images.values()])
    content.check_annotations(masks)
    if train and not any(not annotation.get("iscrowd", 0) for annotation in content.annotations):
        raise DatasetError(f"data set {name!r}: {json_file} has no annotation to train on.")
    content.report_unused()


def check_classes(names: Iterable[str], model: nn.Module, way_out: str = "") -> None:
    """Check that data sets agree on their classes, and ``model`` with them on their number.

    Args:
        names: registered data sets.
        model: a plain Detectron2 detector; one without classes, such as a proposal network, fits all.
        way_out: what the message advises; by default the override that would be right.

    Raises:
        DatasetError: they do not.
    """
    first: tuple[str, list[str]] | None = None
    for name in dict.fromkeys(names):
        classes = _classes(name)
        if classes is None:
            continue
        first = first or (name, classes)
        if classes != first[1]:
            other = next((f"{a!r} and {b!r}" for a, b in zip(first[1], classes) if a != b), None)
            raise DatasetError(
                f"the data sets {first[0]!r} and {name!r} differ in their classes: {len(first[1])} and {len(classes)} "
                f"of them{f', {other} first' if other else ''}; both must list the same ones in the same order."
            )
    wanted = _number_of_classes(model)
    if first is not None and wanted is not None and wanted != len(first[1]):
        raise DatasetError(
            f"the {type(model).__name__} has {wanted} classes but the data set {first[0]!r} has {len(first[1])} "
            f"({_short_list(first[1])}): {way_out or f'set {_classes_key(model)} {len(first[1])}'}."
        )


def _classes(name: str) -> list[str] | None:
    """The class names of a data set, read from its json where Detectron2 has not done so yet."""
    if MetadataCatalog.get(name).get("thing_classes") is None:
        DatasetCatalog.get(name)
    return MetadataCatalog.get(name).get("thing_classes")


def _number_of_classes(model: nn.Module) -> int | None:
    head = getattr(model, "roi_heads", model)
    number = getattr(head, "num_classes", None)
    return number if isinstance(number, int) else None


def _classes_key(model: nn.Module) -> str:
    """The config key that holds a model's number of classes."""
    return "MODEL.ROI_HEADS.NUM_CLASSES" if hasattr(model, "roi_heads") else "MODEL.RETINANET.NUM_CLASSES"


def _short_list(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _read_json(name: str, json_file: str) -> dict[str, Any]:
    path = PathManager.get_local_path(json_file)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise DatasetError(f"data set {name!r}: its annotations {json_file} do not exist.") from None
    except (OSError, ValueError) as error:  # unreadable, not text, not json
        raise DatasetError(f"data set {name!r}: {json_file} is not readable json: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "categories")):
        raise DatasetError(f"data set {name!r}: {json_file} is not in COCO's format: it lacks images or categories.")
    return content


def _check_files(name: str, image_root: str, file_names: Sequence[str]) -> None:
    """All images exist. Folders are listed, once each, which is faster than asking for every file."""
    if not os.path.isdir(PathManager.get_local_path(image_root)):
        raise DatasetError(f"data set {name!r}: its image folder {image_root} does not exist.")
    listed: dict[str, set[str]] = {}
    missing = []
    for file_name in file_names:
        folder, base = os.path.split(os.path.join(image_root, file_name))
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in listed[folder]:
            missing.append(os.path.join(folder, base))
    if missing:
        raise DatasetError(
            f"data set {name!r}: the image {missing[0]} does not exist ({len(missing)} of {len(file_names)} like it)."
        )


@dataclass
class _Content:
    """A COCO json, and its offences as sentences."""

    name: str
    json_file: str
    json: dict[str, Any]

    def __post_init__(self) -> None:
        self.annotations: list[dict[str, Any]] = self.json.get("annotations") or []  # test sets may have none
        self.classes: dict[Any, str] = {}
        self.images: dict[Any, dict[str, Any]] = {}

    def fail(self, what: str) -> None:
        raise DatasetError(f"data set {self.name!r}: {what}.")

    def check_images(self) -> None:
        """Categories and images have what Detectron2 reads of them."""
        for category in self.json["categories"]:
            if not isinstance(category, dict) or not _is_id(category.get("id")) or "name" not in category:
                self.fail(f"{self.json_file} has a category without id or name: {category}")
            self.classes[category["id"]] = category["name"]
        if not self.classes:
            self.fail(f"{self.json_file} has no categories")
        for image in self.json["images"]:
            if not isinstance(image, dict) or not _is_id(image.get("id")) or not _is_image(image):
                self.fail(f"{self.json_file} has an image without a valid id, file_name, width or height: {image}")
            if image["id"] in self.images:
                self.fail(f"{self.json_file} has two images with the id {image['id']}")
            self.images[image["id"]] = image
        if not self.images:
            self.fail(f"{self.json_file} has no images")

    def check_annotations(self, masks: bool) -> None:
        """Raises at the first kind of offence, with the number of annotations that have it."""
        offences: dict[str, list[str]] = {}
        flat = strangers = 0
        seen = set()
        for annotation in self.annotations:
            if not isinstance(annotation, dict) or not _is_id(annotation.get("id")):
                self.fail(f"{self.json_file} has an annotation without id: {annotation}")
            if annotation.get("image_id") not in self.images:
                strangers += 1  # Detectron2 leaves them out
                continue
            offence = self._offence(annotation, masks)
            if offence is None and annotation["id"] in seen:
                offence = ("shares its id with another", "")
            seen.add(annotation["id"])
            if offence is not None:
                kind, detail = offence
                image = self.images[annotation["image_id"]]
                where = f"annotation {annotation['id']} of image {image['file_name']}"
                offences.setdefault(kind, []).append(f"{where} {kind}{detail}")
            else:
                flat += min(annotation["bbox"][2:]) == 0
        for found in offences.values():
            self.fail(f"{found[0]} ({len(found)} of {len(self.annotations)} annotations are like this)")
        for number, what in ((flat, "a box without area"), (strangers, "no image in the set")):
            if number:
                logger.warning("data set %r: %d annotations have %s and are left out.", self.name, number, what)

    def _offence(self, annotation: dict[str, Any], masks: bool) -> tuple[str, str] | None:
        """What is wrong with an annotation: the kind, and the details of this one."""
        if annotation.get("category_id") not in self.classes:
            return "has an unknown category", f", {annotation.get('category_id')}"
        box = annotation.get("bbox")
        if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(_is_number(side) for side in box):
            return "has no box of four numbers [x, y, width, height]", f": {box}"
        x, y, width, height = box
        if not all(math.isfinite(side) for side in box) or width < 0 or height < 0:
            return "has a box that is not finite or has a negative side", f": {box}"
        image = self.images[annotation["image_id"]]
        outside = max(-x, -y, x + width - image["width"], y + height - image["height"])
        if outside > _BORDER_TOLERANCE:
            return "has a box outside its image", (
                f": {box} reaches {outside:g} pixels beyond the {image['width']} x {image['height']} image"
            )
        if annotation.get("ignore", 0):
            return "is marked 'ignore', which Detectron2 does not know", "; mark it 'iscrowd' or leave it out"
        if masks and not annotation.get("segmentation") and not annotation.get("iscrowd", 0):
            return "has no segmentation, which MODEL.MASK_ON needs", ""
        return None

    def report_unused(self) -> None:
        """Exports often list a supercategory as a class: it costs an output, and its AP is not a number."""
        used = {annotation.get("category_id") for annotation in self.annotations}
        unused = [name for key, name in self.classes.items() if key not in used]
        if unused and self.annotations:
            logger.warning(
                "data set %r: %d of its %d classes have no annotation, but count as classes: %s.",
                self.name,
                len(unused),
                len(self.classes),
                _short_list(unused),
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_image(image: dict[str, Any]) -> bool:
    sides: list[Any] = [image.get("width"), image.get("height")]
    return isinstance(image.get("file_name"), str) and all(_is_number(side) and side > 0 for side in sides)
