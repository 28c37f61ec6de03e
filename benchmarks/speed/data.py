"""Images per second of our loaders, over those of torchvision's reference and of Detectron2 on the same files."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.speed.measure import Row, in_turn, ratio_row
from classification.data import ImageDataset, ShuffledBatches, loader, normalize, strided_batches
from d2_mgd.data.class_folders import find_folders

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WORKERS = 2
_BOXES = 7  # of an image, as in COCO

Epoch = Callable[[], object]


def rows(quick: bool) -> Iterator[Row]:
    """Yield each pair of loaders, over an epoch of generated JPEG files of ImageNet's usual size."""
    images, side, rounds = (16, 96, 1) if quick else (384, 500, 5)
    batch = 8 if quick else 32
    note = f"{images} JPEG files of {side} x {side * 3 // 4} px, {_WORKERS} workers"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, images, side)
        pairs = {
            "training": (_ours(folder, batch, True), _torchvision(folder, batch, True)),
            "evaluation": (_ours(folder, batch, False), _torchvision(folder, batch, False)),
        }
        for use, (ours, other) in pairs.items():
            yield _row(f"{use} images / torchvision's reference", ours, other, rounds, f"{note}, batch {batch}")
        if importlib.util.find_spec("detectron2") is not None:
            for use, (ours, other) in _detection(folder, side, images).items():
                yield _row(f"detection, {use} images / Detectron2's loader", ours, other, rounds, note)


def _row(name: str, ours: Epoch, other: Epoch, rounds: int, note: str) -> Row:
    seconds = in_turn({"ours": ours, "theirs": other}, rounds, clock=time.perf_counter)  # other processes load
    row = ratio_row(f"data: {name}", 1.0, seconds, "theirs", "ours", note)
    row.at_least = True
    return row


def _write(folder: Path, images: int, side: int) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(images):
            path = folder / split / f"class{index % 2}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            rough.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(path, quality=90)


def _ours(folder: Path, batch: int, train: bool) -> Epoch:
    data = ImageDataset(find_folders(folder)[0 if train else 1], 224, augment=train)
    order = ShuffledBatches(len(data), batch, 0) if train else strided_batches(range(len(data)), batch)
    batches = loader(data, order, _WORKERS, torch.device("cpu"), keep=True)
    to_floats = normalize()

    def epoch() -> None:
        for one in batches:
            to_floats(one.images)

    return epoch


def _torchvision(folder: Path, batch: int, train: bool) -> Epoch:
    """As in torchvision's references/classification, with its default backend."""
    cut: list[Any] = [transforms.Resize(256), transforms.CenterCrop(224)]
    if train:
        cut = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    floats = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(_MEAN, _STD)]
    data = datasets.ImageFolder(str(folder / ("train" if train else "val")), transforms.Compose(cut + floats))
    batches: Any = DataLoader(data, batch, shuffle=train, num_workers=_WORKERS, persistent_workers=True)

    def epoch() -> None:
        for images, _ in batches:
            images.contiguous(memory_format=torch.channels_last)

    return epoch


def _detection(folder: Path, side: int, images: int) -> dict[str, tuple[Epoch, Epoch]]:
    """Our loader and Detectron2's for each use, with the default augmentation at 400 px."""
    from detectron2.config import get_cfg
    from detectron2.data import build_detection_test_loader, build_detection_train_loader
    from detectron2.data.datasets import register_coco_instances

    from d2_mgd.detection.config_loaders import build_evaluation_loader, build_train_loader

    name, file = str(folder), folder / "boxes.json"
    file.write_text(json.dumps(_boxes(folder, side)), encoding="utf-8")
    register_coco_instances(name, {}, str(file), str(folder))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.DATALOADER.NUM_WORKERS = _WORKERS
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (400,), 400

    def endless(batches: Iterator[Any]) -> Epoch:
        return lambda: [next(batches) for _ in range(images // 8)]

    loaders: Any = (build_evaluation_loader(cfg, name), build_detection_test_loader(cfg, name))
    ours, theirs = loaders
    return {
        "training": (endless(iter(build_train_loader(cfg, 0))), endless(iter(build_detection_train_loader(cfg)))),
        "evaluation": (lambda: list(ours), lambda: list(theirs)),
    }


def _boxes(folder: Path, side: int) -> dict[str, list[dict[str, Any]]]:
    paths = sorted((folder / "train").rglob("*.jpg"))
    images = [
        {"id": number, "file_name": str(path.relative_to(folder)), "width": side, "height": side * 3 // 4}
        for number, path in enumerate(paths)
    ]
    boxes = [
        {"id": number + 1, "image_id": number // _BOXES, "category_id": 1, "bbox": [8, 8, 40, 40], "area": 1600}
        for number in range(len(paths) * _BOXES)
    ]
    return {
        "images": images,
        "annotations": [{**box, "iscrowd": 0} for box in boxes],
        "categories": [{"id": 1, "name": "object"}],
    }
