"""Folders of images as batches, in an order and with an augmentation that only seed, epoch and position decide.

Shape shorthand: N images, H, W.

So any number of worker processes gives the same batches, and a run that was stopped in the middle of an epoch goes on
with exactly those that it has not seen. Images travel as uint8; :class:`Normalize` runs where the network does.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from d2_mgd.data.class_folders import class_names, files_below
from d2_mgd.data.images import ImageError, read_rgb
from d2_mgd.errors import UserError
from d2_mgd.training import loader_process_signals

__all__ = [
    "Batch",
    "Folder",
    "ImageDataset",
    "Key",
    "Normalize",
    "ShuffledBatches",
    "Statistics",
    "StridedBatches",
    "find_classes",
    "find_folders",
    "image_statistics",
    "loader",
    "rematch_indices",
    "renormalize",
]

logger = logging.getLogger(__name__)

_LONGEST = 100  # times the shorter side


@dataclass(frozen=True)
class Folder:
    """The images of one split.

    Args:
        root: the split's folder.
        classes: class names, in the order of their numbers.
        files: paths relative to ``root``, encoded, by class and name; an array, which worker processes share.
        targets: (len(files),) int64 class numbers.
    """

    root: Path
    classes: tuple[str, ...]
    files: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.files[index])


def find_classes(data: Path, evaluation: str | None = None) -> tuple[Path, Path, tuple[str, ...]]:
    """``train/``, the split to evaluate on, and the names of the classes, numbered by the folders of ``train/``.

    Args:
        data: the data set's folder.
        evaluation: name of the split to evaluate on; by default ``valid``, or ``val``.

    Raises:
        UserError: a folder is missing, there are fewer than two classes, or the evaluation split has a class that
            ``train/`` lacks.
    """
    if not data.is_dir():
        raise UserError(f"there is no folder {data}: the first argument is a folder with train/ and valid/ in it.")
    train = data / "train"
    if evaluation is None:
        evaluation = "val" if (data / "val").is_dir() and not (data / "valid").is_dir() else "valid"
    for split in (train, data / evaluation):
        if not split.is_dir():
            there = ", ".join(sorted(f"{entry.name}/" for entry in data.iterdir() if entry.is_dir())) or "no folder"
            raise UserError(
                f"there is no folder {split}: {data} needs train/ and valid/ (or val/, or --val-split); has {there}."
            )
    classes = tuple(class_names(train))
    if len(classes) < 2:
        raise UserError(f"{train} has {len(classes)} class folder(s), and telling classes apart needs two or more.")
    strangers = sorted(set(class_names(data / evaluation)) - set(classes))
    if strangers:
        raise UserError(
            f"{data / evaluation} has {len(strangers)} class folder(s) that {train} lacks, such as {strangers[0]!r}."
        )
    return train, data / evaluation, classes


def find_folders(data: Path, evaluation: str | None = None) -> tuple[Folder, Folder]:
    """The images of ``train/`` and of the split to evaluate on; arguments as in :func:`find_classes`.

    Raises:
        UserError: as in :func:`find_classes`; a class without a training image; or nothing to evaluate on.
    """
    train, valid, classes = find_classes(data, evaluation)
    training = _scan(train, classes)
    empty = [name for number, name in enumerate(classes) if not (training.targets == number).any()]
    if empty:
        raise UserError(f"{train} has {len(empty)} class folder(s) without an image, such as {empty[0]!r}.")
    held_out = _scan(valid, classes)
    if not len(held_out):
        raise UserError(f"{valid} has no image ({', '.join(IMG_EXTENSIONS)}).")
    present = len(np.unique(held_out.targets))
    if present < len(classes):
        logger.info("%s has images of %d of the %d classes.", held_out.root, present, len(classes))
    return training, held_out


def _scan(root: Path, classes: Sequence[str]) -> Folder:
    files: list[bytes] = []
    targets: list[int] = []
    for number, name in enumerate(classes):
        for folder, names in files_below(root / name, _refused):
            inside = os.path.relpath(folder, root)
            found = [os.fsencode(os.path.join(inside, file)) for file in names if file.lower().endswith(IMG_EXTENSIONS)]
            files += found
            targets += [number] * len(found)
    return Folder(root, tuple(classes), np.array(files, dtype=np.bytes_), np.array(targets, dtype=np.int64))


def _refused(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # the evaluation split may lack a class
        raise UserError(f"the folder {error.filename} cannot be listed: {error.strerror}.") from error


# ---- images


class Key(NamedTuple):
    """What a sampler asks of a data set: the number of an image, and the seed of what is random about it."""

    number: int
    seed: int


class Item(NamedTuple):
    image: Tensor | None  # (3, H, W) uint8; None: it cannot be read
    target: int
    broken: tuple[str, ...]  # files that could not be read on the way here


class Batch(NamedTuple):
    """What a loader yields.

    Args:
        images: (N, 3, H, W) uint8.
        targets: (N,) int64.
        broken: files that could not be read; N is smaller by them, or others took their place.
    """

    images: Tensor
    targets: Tensor
    broken: list[str]


def _training_transform(size: int) -> nn.Module:
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def _evaluation_transform(size: int) -> nn.Module:
    return v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])


class ImageDataset(Dataset[Item]):
    """Images of a folder, transformed as published: random crop and flip, or resize and centre crop.

    Args:
        folder: the images.
        size: side of the square that the network sees (224 as published; then images are resized to 256 px first).
        augment: crop and flip at random, by the key's seed.
        replace_broken: take the next readable image in place of one that is not, so that batches keep their size.
    """

    def __init__(self, folder: Folder, size: int, augment: bool, replace_broken: bool = False) -> None:
        self.folder = folder
        self.augment = augment
        self.transform = _training_transform(size) if augment else _evaluation_transform(size)
        self.attempts = min(len(folder), 100) if replace_broken else 1

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: Key) -> Item:
        broken: list[str] = []
        index = key.number
        for attempt in range(self.attempts):
            index = (key.number + attempt) % len(self.folder)
            try:
                image = read_rgb(self.folder.path(index), upright=False)
            except ImageError:
                broken.append(str(self.folder.path(index)))
                continue
            return Item(self._transformed(image, key.seed), int(self.folder.targets[index]), tuple(broken))
        return Item(None, int(self.folder.targets[index]), tuple(broken))

    def _transformed(self, image: Image.Image, seed: int) -> Tensor:
        if not self.augment:
            return self.transform(_middle(image))
        state = torch.default_generator.get_state()  # without worker processes it is the training's own
        torch.default_generator.manual_seed(seed)
        try:
            return self.transform(image)
        finally:
            torch.default_generator.set_state(state)


def _middle(image: Image.Image) -> Image.Image:
    """Of a very long image the part around its centre, which is all that the centre crop sees: enlarged as a whole, an
    image of 1 x 20,000 pixels would take gigabytes."""
    width, height = image.size
    longest = _LONGEST * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, width - left, height - top))


def _collate(items: list[Item]) -> Batch:
    good = [item for item in items if item.image is not None]
    images = torch.stack([item.image for item in good if item.image is not None]) if good else torch.empty(0, 3, 0, 0)
    targets = torch.tensor([item.target for item in good], dtype=torch.int64)
    return Batch(images, targets, [path for item in items for path in item.broken])


class Statistics(NamedTuple):
    """Of the images that a network is made for: mean and standard deviation of each channel, white being 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def image_statistics(network: nn.Module) -> Statistics:
    """timm's networks have their own; all others take ImageNet's."""
    known: Any = getattr(network, "pretrained_cfg", None) or {}
    return Statistics(tuple(known.get("mean", IMAGENET.mean)), tuple(known.get("std", IMAGENET.std)))


class _Affine(nn.Module):
    """(N, 3, H, W) -> float32, each channel scaled and shifted."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)


class Normalize(_Affine):
    """(N, 3, H, W) uint8 -> float32 with a mean of 0 and a standard deviation of 1 over such images."""

    def __init__(self, statistics: Statistics = IMAGENET) -> None:
        mean, std = torch.tensor(statistics.mean), torch.tensor(statistics.std)
        super().__init__(1.0 / (255.0 * std), -mean / std)


def renormalize(before: Statistics, after: Statistics) -> nn.Module:
    """(N, 3, H, W) normalised by one network's statistics -> by another's; the same images where these agree."""
    if before == after:
        return nn.Identity()
    mean, std = torch.tensor(after.mean), torch.tensor(after.std)
    return _Affine(torch.tensor(before.std) / std, (torch.tensor(before.mean) - mean) / std)


# ---- which images, in which order


def _seed(*numbers: int) -> int:
    """63 bits that any change of any number changes."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def _permutation(length: int, *seed: int) -> np.ndarray:
    return torch.randperm(length, generator=torch.Generator().manual_seed(_seed(*seed))).numpy()


class ShuffledBatches:
    """Batches of one process in one epoch of training.

    Step ``s`` of all processes together holds positions ``s * B`` to ``(s + 1) * B`` of the epoch's order, ``B`` being
    the batch of all processes. The last step may be smaller; it is filled up from the front of the order until all
    processes have equally many, and left out if a process would have one image, which batch-norm cannot take.

    Args:
        length: number of images.
        batch_size: of one process.
        seed: of the run.
        rank, world: this process, and how many there are.

    Raises:
        UserError: not even one step's worth of images.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.epoch = 0
        self.first_step = 0
        whole, rest = divmod(length, batch_size * world)
        self.steps = whole + (math.ceil(rest / world) >= min(2, batch_size))
        if self.steps == 0:
            raise UserError(f"{length} training images are too few for {world} processes.")

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order()
        for step in range(self.first_step, self.steps):
            yield self._keys(order, step)

    def keys(self, step: int) -> list[Key]:
        """What this process gets in a step of the epoch."""
        return self._keys(self._order(), step)

    def _order(self) -> np.ndarray:
        return _permutation(self.length, self.seed, 0, self.epoch)

    def _keys(self, order: np.ndarray, step: int) -> list[Key]:
        together = self.batch_size * self.world
        end = min((step + 1) * together, math.ceil(self.length / self.world) * self.world)
        positions = range(step * together + self.rank, end, self.world)
        return [Key(int(order[p % self.length]), _seed(self.seed, 1, self.epoch, p)) for p in positions]


class StridedBatches:
    """Every image once over all processes, none twice: every ``world``-th of a list is this process's.

    Args:
        indices: numbers of the images.
        batch_size: of one process.
        rank, world: this process, and how many there are.
    """

    def __init__(self, indices: Sequence[int] | np.ndarray, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.indices = np.asarray(indices)[rank::world]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [Key(int(index), 0) for index in self.indices[start : start + self.batch_size]]


def rematch_indices(length: int, wanted: int, seed: int, epoch: int) -> np.ndarray:
    """Numbers of ``wanted`` images (or all), drawn anew for every rematch."""
    return _permutation(length, seed, 2, epoch)[:wanted]


def loader(
    dataset: ImageDataset,
    batches: ShuffledBatches | StridedBatches,
    workers: int,
    device: torch.device,
    keep: bool = False,
) -> Any:
    """A loader of :class:`Batch`.

    Args:
        dataset: the images.
        batches: which of them.
        workers: number of worker processes; 0 loads in this one.
        device: where batches go; for a GPU they are put into pinned memory.
        keep: keep the workers from one epoch to the next.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=keep and workers > 0,
        worker_init_fn=loader_process_signals,
        generator=torch.Generator(),  # the loader draws from it; the training's own numbers stay as they are
    )
