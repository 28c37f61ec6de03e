"""Batches of images, whose order and augmentation depend only on seed, epoch and position.

Shape shorthand: N images, H, W.

Batches are the same with any number of dataloader workers, and a run that was stopped within an epoch resumes with the
batches that it has not seen. Images move to the device as uint8 and are normalised there (:func:`normalize`).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from d2_mgd.data.class_folders import Folder
from d2_mgd.data.images import ImageError, read_rgb
from d2_mgd.errors import UserError
from d2_mgd.training.loading import keyed_loader

_LONGEST = 100  # longer side of an image over its shorter side


class Key(NamedTuple):
    """The index of an image, and the seed of its augmentation."""

    number: int
    seed: int = 0


class Item(NamedTuple):
    """An image and its class."""

    image: Tensor | None  # (3, H, W) uint8; None if it cannot be read
    target: int
    broken: tuple[str, ...]  # unreadable files that were tried before this one


class Batch(NamedTuple):
    """A batch of a loader.

    Args:
        images: (N, 3, H, W) uint8, channels last.
        targets: (N,) int64.
        broken: files that could not be read; they are left out, or replaced by other images.
    """

    images: Tensor
    targets: Tensor
    broken: list[str]


class ImageDataset(Dataset[Item]):
    """Images of a folder, transformed as published: random crop and flip, or resize and centre crop.

    Args:
        folder: the images.
        size: side of the network's square input; before a centre crop, the shorter side is resized to 256/224 of it.
        augment: crop and flip at random, by the key's seed.
        replace_broken: replace an unreadable image by the next readable one, so that batches keep their size.
    """

    def __init__(self, folder: Folder, size: int, augment: bool, replace_broken: bool = False) -> None:
        self.folder = folder
        self.augment = augment
        cut = (
            [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
            if augment
            else [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        )
        self.transform = transforms.Compose([*cut, transforms.PILToTensor()])
        self.attempts = min(len(folder), 100) if replace_broken else 1

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: Key) -> Item:
        broken: list[str] = []
        for index in range(key.number, key.number + self.attempts):
            index %= len(self.folder)
            try:
                image = read_rgb(self.folder.path(index), upright=False)
            except ImageError:
                broken.append(str(self.folder.path(index)))
            else:
                return Item(self._transformed(image, key.seed), int(self.folder.targets[index]), tuple(broken))
        return Item(None, -1, tuple(broken))

    def _transformed(self, image: Image.Image, seed: int) -> Tensor:
        if not self.augment:
            return self.transform(_middle(image))
        state = torch.default_generator.get_state()  # without workers, this is the training's global RNG
        torch.default_generator.manual_seed(seed)
        try:
            return self.transform(image)
        finally:
            torch.default_generator.set_state(state)


def _middle(image: Image.Image) -> Image.Image:
    """Crop a very long image to its centre, which contains the later centre crop.

    Resizing all of an image of 1 x 20,000 pixels would take gigabytes.
    """
    width, height = image.size
    longest = _LONGEST * min(width, height)
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, width - left, height - top)) if left or top else image


def _collate(items: list[Item]) -> Batch:
    """Stack the readable images into a batch."""
    pixels = [item.image.permute(1, 2, 0) for item in items if item.image is not None]  # (H, W, 3), as decoded
    images = torch.stack(pixels).permute(0, 3, 1, 2) if pixels else torch.empty(0, 3, 0, 0)
    targets = torch.tensor([item.target for item in items if item.image is not None], dtype=torch.int64)
    return Batch(images, targets, [path for item in items for path in item.broken])


# ---- normalisation


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel of a network's training images, in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_BYTES = Statistics((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # the normalisation that uint8 images have


def image_statistics(network: nn.Module) -> Statistics:
    """Image statistics that a network expects: those of timm's config, ImageNet's for other networks."""
    known: Any = getattr(network, "pretrained_cfg", None) or {}
    return Statistics(tuple(known.get("mean", IMAGENET.mean)), tuple(known.get("std", IMAGENET.std)))


class Renormalize(nn.Module):
    """Converts images from one normalisation to another: (N, 3, H, W) -> float32."""

    def __init__(self, before: Statistics, after: Statistics) -> None:
        super().__init__()
        (mean, std), (new_mean, new_std) = (map(torch.tensor, one) for one in (before, after))
        self.register_buffer("scale", (std / new_std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - new_mean) / new_std).view(1, 3, 1, 1), persistent=False)
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.float(), self.scale)


def normalize(statistics: Statistics = IMAGENET) -> nn.Module:
    """Module that normalises images: (N, 3, H, W) uint8 -> float32."""
    return Renormalize(_BYTES, statistics)


def renormalize(before: Statistics, after: Statistics) -> nn.Module:
    """Module that converts images from one network's normalisation to another's; the identity if they are equal."""
    return nn.Identity() if before == after else Renormalize(before, after)


# ---- order of images


def _seed(*numbers: int) -> int:
    """A 63-bit hash of the numbers."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def _permutation(length: int, *seed: int) -> np.ndarray:
    return torch.randperm(length, generator=torch.Generator().manual_seed(_seed(*seed))).numpy()


class ShuffledBatches:
    """Batch sampler of one rank for one epoch of training.

    With ``B`` images on all ranks, step ``s`` uses positions ``s * B`` to ``(s + 1) * B`` of the epoch's order. The
    last step may be smaller: it is filled up from the start of the order until all ranks have equally many images, and
    left out if a rank would have a single image, which batch-norm cannot normalise.

    Args:
        length: number of images.
        batch_size: images of one rank.
        seed: of the run.
        rank, world: this rank, and the world size.

    Raises:
        UserError: there are too few images for one step.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.set_epoch(0)
        whole, rest = divmod(length, batch_size * world)
        self.steps = whole + (math.ceil(rest / world) >= min(2, batch_size))
        if self.steps == 0:
            raise UserError(f"{length} training images are too few for {world} processes: use fewer processes.")

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Draw the order of an epoch, and start it with ``first_step``."""
        self.epoch, self.first_step = epoch, first_step
        self._order = _permutation(self.length, self.seed, 0, epoch)

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.keys, range(self.first_step, self.steps))

    def keys(self, step: int) -> list[Key]:
        """The keys of this rank in a step of the epoch."""
        together = self.batch_size * self.world
        end = min((step + 1) * together, math.ceil(self.length / self.world) * self.world)
        positions = range(step * together + self.rank, end, self.world)
        return [Key(int(self._order[p % self.length]), _seed(self.seed, 1, self.epoch, p)) for p in positions]


def strided_batches(
    indices: Sequence[int] | np.ndarray, batch_size: int, rank: int = 0, world: int = 1
) -> list[list[Key]]:
    """Batches of one rank in a pass in which all ranks together read each image once.

    Args:
        indices: of the images; each rank takes every ``world``-th.
        batch_size: images of one rank.
        rank, world: this rank, and the world size.
    """
    own = [Key(int(index)) for index in indices[rank::world]]
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def rematch_indices(length: int, wanted: int, seed: int, epoch: int) -> np.ndarray:
    """Indices of ``wanted`` random images (or all), another draw for every epoch."""
    return _permutation(length, seed, 2, epoch)[:wanted]


def loader(
    dataset: ImageDataset, batches: Iterable[list[Key]], workers: int, device: torch.device, keep: bool = False
) -> DataLoader:
    """A dataloader of :class:`Batch`, in pinned memory for a GPU; arguments as in :func:`keyed_loader`."""
    pin = device.type == "cuda"
    return keyed_loader(dataset, batches, workers, _collate, pin_memory=pin, keep_workers=keep)
