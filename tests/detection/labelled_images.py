"""A tiny data set with every kind of ground truth: boxes, masks, keypoints, semantic and panoptic segmentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances, register_coco_panoptic_separated
from PIL import Image

THINGS = ("disc", "box", "cross")  # category ids 1, 2, 3
STUFF = ("things", "sky", "grass")  # labels 0, 1, 2; category ids 0, 4, 5
_SIZE = 64
_STUFF_IDS = {1: 4, 2: 5}  # label -> category id


def register_labelled(folder: Path, name: str, images: int = 4) -> None:
    """Write the set to ``folder`` and register ``NAME_keypoints``, ``NAME_separated`` and ``NAME_stuffonly``."""
    if f"{name}_keypoints" in DatasetCatalog.list():
        return
    instances, panoptic = _write(folder, images)
    register_coco_instances(f"{name}_keypoints", {}, str(instances), str(folder / "images"))
    metadata = {
        "thing_classes": list(THINGS),
        "stuff_classes": list(STUFF),
        "thing_dataset_id_to_contiguous_id": {index + 1: index for index in range(len(THINGS))},
        "stuff_dataset_id_to_contiguous_id": {0: 0, **{category: label for label, category in _STUFF_IDS.items()}},
    }
    roots = (str(folder / "panoptic"), str(panoptic), str(folder / "semantic"), str(instances))
    register_coco_panoptic_separated(name, metadata, str(folder / "images"), *roots)


def _write(folder: Path, images: int) -> tuple[Path, Path]:
    """The files of instances and of panoptic segments."""
    random = np.random.default_rng(3)
    for kind in ("images", "semantic", "panoptic"):
        (folder / kind).mkdir(parents=True)
    records: list[Any] = []
    instances: list[Any] = []
    panoptic: list[Any] = []
    for number in range(1, images + 1):
        pixels = random.integers(0, 256, (_SIZE, _SIZE, 3), dtype=np.uint8)
        semantic = np.ones((_SIZE, _SIZE), np.uint8)
        semantic[_SIZE // 2 :] = 2
        x, y, w, h = (*random.integers(2, 24, 2).tolist(), *random.integers(16, 36, 2).tolist())
        pixels[y : y + h, x : x + w] = random.integers(0, 256, 3, dtype=np.uint8)
        semantic[y : y + h, x : x + w] = 0
        category = number % len(THINGS) + 1
        instances.append(_instance(number, category, (x, y, w, h)))
        files = [f"{number}.jpg", f"{number}.png"]
        Image.fromarray(pixels).save(folder / "images" / files[0])
        Image.fromarray(semantic).save(folder / "semantic" / files[1])
        ids = {0: category, **_STUFF_IDS}  # each segment's id is its category's
        colours = np.zeros((_SIZE, _SIZE, 3), np.uint8)
        colours[..., 0] = np.vectorize(ids.get)(semantic)
        Image.fromarray(colours).save(folder / "panoptic" / files[1])
        segments = [_segment(ids[label], semantic == label) for label in np.unique(semantic).tolist()]
        panoptic.append({"image_id": number, "file_name": files[1], "segments_info": segments})
        records.append({"id": number, "file_name": files[0], "width": _SIZE, "height": _SIZE})
    points = {"keypoints": ["head", "left_ear", "right_ear"]}
    things = [{"id": index, "name": name, "isthing": 1, **points} for index, name in enumerate(THINGS, 1)]
    stuff = [{"id": category, "name": STUFF[label], "isthing": 0} for label, category in _STUFF_IDS.items()]
    written = {
        folder / "instances.json": {"images": records, "annotations": instances, "categories": things},
        folder / "panoptic.json": {"images": records, "annotations": panoptic, "categories": things + stuff},
    }
    for path, content in written.items():
        path.write_text(json.dumps(content))
    first, second = written
    return first, second


def _instance(number: int, category: int, box: tuple[int, int, int, int]) -> dict[str, Any]:
    x, y, w, h = box
    points = [(x + w // 2, y + 2), (x + 2, y + h // 2), (x + w - 2, y + h // 2)]
    return {
        "id": number,
        "image_id": number,
        "category_id": category,
        "bbox": list(box),
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        "keypoints": [value for point in points for value in (*point, 2)],
        "num_keypoints": len(points),
    }


def _segment(category: int, mask: np.ndarray) -> dict[str, Any]:
    rows, columns = np.nonzero(mask)
    x, y = int(columns.min()), int(rows.min())
    box = [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]
    return {"id": category, "category_id": category, "area": int(mask.sum()), "bbox": box, "iscrowd": 0}
