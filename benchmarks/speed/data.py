"""Images per second of the classification loader, over torchvision's reference loader on the same files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.speed.measure import Row, in_turn, ratio_row
from classification.data import ImageDataset, ShuffledBatches, loader, normalize
from d2_mgd.data.class_folders import find_folders

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def row(quick: bool) -> Row:
    """Both loaders over an epoch of generated JPEG files of ImageNet's usual size, to normalised float batches."""
    images, side, rounds = (16, 96, 1) if quick else (384, 500, 5)
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), images, side)
        things = {"this loader": _ours(Path(folder)), "torchvision's": _torchvision(Path(folder) / "train")}
        seconds = in_turn(things, rounds, clock=time.perf_counter)  # other processes load
    note = f"{images} JPEG files of {side} x {side * 3 // 4} px, batch 32, 2 workers"
    found = ratio_row(
        "data: loader / torchvision's reference loader", 1.0, seconds, "torchvision's", "this loader", note
    )
    found.at_least = True
    return found


def _write(folder: Path, images: int, side: int) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 4)):
        for index in range(count):
            path = folder / split / f"class{index % 2}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            rough.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(path, quality=90)


def _ours(folder: Path) -> Callable[[], None]:
    data = ImageDataset(find_folders(folder)[0], 224, augment=True)
    order = ShuffledBatches(len(data), 8 if len(data) < 32 else 32, 0)
    batches = loader(data, order, 2, torch.device("cpu"), keep=True)
    to_floats = normalize()

    def epoch() -> None:
        for batch in batches:
            to_floats(batch.images).contiguous(memory_format=torch.channels_last)

    return epoch


def _torchvision(folder: Path) -> Callable[[], None]:
    """As in torchvision's references/classification, with its default backend."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(_MEAN, _STD),
        ]
    )
    data = datasets.ImageFolder(str(folder), transform)
    batch = 8 if len(data) < 32 else 32
    batches: Any = DataLoader(data, batch, shuffle=True, num_workers=2, persistent_workers=True)

    def epoch() -> None:
        for images, _ in batches:
            images.contiguous(memory_format=torch.channels_last)

    return epoch
