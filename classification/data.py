"""Images as batches, in an order and with an augmentation that follow from seed, epoch and position alone.

Shape shorthand: N images, H, W.

Any number of worker processes gives the same batches, and a run that was stopped in the middle of an epoch goes on with
exactly those that it has not seen. Images are moved as uint8; :func:`normalize` runs where the network does.
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
from torchvision.transforms import v2

from d2_mgd.data.class_folders import Folder
from d2_mgd.data.images import ImageError, read_rgb
from d2_mgd.errors import UserError
from d2_mgd.training.loading import keyed_loader

_LONGEST = 100  # times the shorter side


class Key(NamedTuple):
    """The number of an image, and the seed of its augmentation."""

    number: int
    seed: int = 0


class Item(NamedTuple):
    image: Tensor | None  # (3, H, W) uint8; None: it cannot be read
    target: int
    broken: tuple[str, ...]  # files that could not be read in its place


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
        cut = (
            [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
            if augment
            else [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
        )
        self.transform = v2.Compose([*cut, v2.PILToTensor()])
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
        state = torch.default_generator.get_state()  # without worker processes it is the training's own
        torch.default_generator.manual_seed(seed)
        try:
            return self.transform(image)
        finally:
            torch.default_generator.set_state(state)


def _middle(image: Image.Image) -> Image.Image:
    """The centre of a very long image, beyond which the centre crop never sees.

    Resized as a whole, an image of 1 x 20,000 pixels would take gigabytes.
    """
    width, height = image.size
    longest = _LONGEST * min(width, height)
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, width - left, height - top)) if left or top else image


def _collate(items: list[Item]) -> Batch:
    """The readable images of some items as a batch."""
    good = [item for item in items if item.image is not None]
    images = torch.stack([item.image for item in good if item.image is not None]) if good else torch.empty(0, 3, 0, 0)
    targets = torch.tensor([item.target for item in good], dtype=torch.int64)
    return Batch(images, targets, [path for item in items for path in item.broken])


# ---- normalisation


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel of the images that a network is made for, white being 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_BYTES = Statistics((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # images of uint8 are "normalised" by these


def image_statistics(network: nn.Module) -> Statistics:
    """The statistics of timm's networks; ImageNet's for all others."""
    known: Any = getattr(network, "pretrained_cfg", None) or {}
    return Statistics(tuple(known.get("mean", IMAGENET.mean)), tuple(known.get("std", IMAGENET.std)))


class Renormalize(nn.Module):
    """(N, 3, H, W) normalised by some statistics -> float32, by others."""

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
    """(N, 3, H, W) uint8 -> float32 with a mean of 0 and a standard deviation of 1 over such images."""
    return Renormalize(_BYTES, statistics)


def renormalize(before: Statistics, after: Statistics) -> nn.Module:
    """(N, 3, H, W) normalised by one network's statistics -> by another's; the same images where these agree."""
    return nn.Identity() if before == after else Renormalize(before, after)


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
        order = _permutation(self.length, self.seed, 0, self.epoch)
        return (self._keys(order, step) for step in range(self.first_step, self.steps))

    def keys(self, step: int) -> list[Key]:
        """What this process gets in a step of the epoch."""
        return self._keys(_permutation(self.length, self.seed, 0, self.epoch), step)

    def _keys(self, order: np.ndarray, step: int) -> list[Key]:
        together = self.batch_size * self.world
        end = min((step + 1) * together, math.ceil(self.length / self.world) * self.world)
        positions = range(step * together + self.rank, end, self.world)
        return [Key(int(order[p % self.length]), _seed(self.seed, 1, self.epoch, p)) for p in positions]


def strided_batches(
    indices: Sequence[int] | np.ndarray, batch_size: int, rank: int = 0, world: int = 1
) -> list[list[Key]]:
    """One process's batches of a pass that reads every image once over all processes.

    Args:
        indices: numbers of the images, of which every ``world``-th is this process's.
        batch_size: of one process.
        rank, world: this process, and how many there are.
    """
    own = [Key(int(index)) for index in indices[rank::world]]
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def rematch_indices(length: int, wanted: int, seed: int, epoch: int) -> np.ndarray:
    """Numbers of ``wanted`` images (or all), drawn anew for every rematch."""
    return _permutation(length, seed, 2, epoch)[:wanted]


def loader(
    dataset: ImageDataset, batches: Iterable[list[Key]], workers: int, device: torch.device, keep: bool = False
) -> DataLoader:
    """A loader of :class:`Batch`, in pinned memory for a GPU; arguments as in :func:`keyed_loader`."""
    pin = device.type == "cuda"
    return keyed_loader(dataset, batches, workers, _collate, pin_memory=pin, keep_workers=keep)
