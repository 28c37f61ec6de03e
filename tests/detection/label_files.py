"""Data sets in COCO's format, written as YOLO's and Pascal VOC's."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml


def _by_image(content: dict[str, Any]) -> dict[Any, list[dict[str, Any]]]:
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


def _link(image: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(image, to)


def write_yolo(folder: Path, json_file: Path, images: Path, **changes: Any) -> Path:
    """A data.yaml with the split train: images/train, labels/train. ``changes`` replace its keys."""
    content = json.loads(json_file.read_text())
    numbers = {category["id"]: number for number, category in enumerate(content["categories"])}
    annotations = _by_image(content)
    (folder / "labels/train").mkdir(parents=True)
    for image in content["images"]:
        name, sides = Path(image["file_name"]), [image["width"], image["height"]]
        _link(images / name, folder / "images/train" / name)
        rows = []
        for annotation in annotations[image["id"]]:
            x, y, w, h = annotation["bbox"]
            values = [(x + w / 2) / sides[0], (y + h / 2) / sides[1], w / sides[0], h / sides[1]]
            for polygon in annotation.get("segmentation", []):
                values = [value / side for value, side in zip(polygon, sides * (len(polygon) // 2))]
            rows.append(" ".join(str(value) for value in [numbers[annotation["category_id"]], *values]))
        if rows:
            (folder / "labels/train" / name.with_suffix(".txt").name).write_text("\n".join(rows) + "\n")
    path = folder / "data.yaml"
    names = [category["name"] for category in content["categories"]]
    path.write_text(yaml.safe_dump({"train": "images/train", "names": names, **changes}))
    return path


def write_voc(folder: Path, json_file: Path, images: Path) -> Path:
    """The devkit's layout, with the split train and classes.txt in the json's order."""
    content = json.loads(json_file.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    annotations = _by_image(content)
    for place in ("Annotations", "ImageSets/Main"):
        (folder / place).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(names.values()))
    stems = [Path(image["file_name"]).stem for image in content["images"]]
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(stems) + "\n")
    for image in content["images"]:
        name = Path(image["file_name"])
        _link(images / name, folder / "JPEGImages" / name)
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = name.name
        size = ElementTree.SubElement(root, "size")
        for key in ("width", "height"):
            ElementTree.SubElement(size, key).text = str(image[key])
        for annotation in annotations[image["id"]]:
            x, y, w, h = annotation["bbox"]
            entry = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(entry, "name").text = names[annotation["category_id"]]
            ElementTree.SubElement(entry, "difficult").text = str(annotation.get("iscrowd", 0))
            box = ElementTree.SubElement(entry, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h)):
                ElementTree.SubElement(box, key).text = str(value)
        ElementTree.ElementTree(root).write(folder / "Annotations" / name.with_suffix(".xml").name)
    return folder
