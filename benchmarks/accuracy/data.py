"""CIFAR-100 on the training device: subsets, shuffled batches, crops and flips.

Shape shorthand: N images, P pixels of a side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32
ARRAYS = ("x_train", "y_train", "x_test", "y_test")

# of CIFAR-100's training images, as in the CRD protocol
_MEAN = (0.5071, 0.4867, 0.4408)
_STD = (0.2675, 0.2565, 0.2761)


class StudyError(Exception):
    """A study, file or result that cannot be used. The message says why and what is accepted."""


@dataclass(frozen=True)
class Choice:
    """A part of the data set.

    Args:
        classes: first class and the one after the last, renumbered from 0. None is all.
        train_per_class, test_per_class: number of images of each class, the first of the file. None is all.
        pixels: side of the images, 32 or a divisor of it; smaller ones are means over squares.
    """

    classes: tuple[int, int] | None = None
    train_per_class: int | None = None
    test_per_class: int | None = None
    pixels: int = SIDE


@dataclass(frozen=True)
class Images:
    """Images (N, 3, P, P) uint8 and their classes (N,) int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """Training and test images, and the number of classes."""

    train: Images
    test: Images
    classes: int


def load_split(path: Path, choice: Choice, device: torch.device) -> Split:
    """Load the chosen part of an ``.npz`` with x_train, y_train, x_test, y_test, on a device.

    Raises:
        StudyError: no such file, arrays that are missing or of another form, classes or sizes that do not exist.
    """
    arrays = _read(path)
    known = int(arrays["y_train"].max()) + 1
    first, last = choice.classes or (0, known)
    if not 0 <= first < last <= known:
        raise StudyError(f"classes [{first}, {last}] do not fit {path}, which has the classes 0 to {known - 1}.")
    if choice.pixels < 1 or SIDE % choice.pixels:
        raise StudyError(f"pixels must divide {SIDE}, got {choice.pixels}.")
    parts = []
    for part, count in (("train", choice.train_per_class), ("test", choice.test_per_class)):
        labels = arrays[f"y_{part}"].astype(np.int64)
        kept = np.concatenate([_first_of(labels, number, count, part) for number in range(first, last)])
        kept.sort()  # the order of the file, in which classes are mixed
        images = torch.from_numpy(arrays[f"x_{part}"][kept]).permute(0, 3, 1, 2).contiguous()
        if choice.pixels != SIDE:
            images = F.avg_pool2d(images.float(), SIDE // choice.pixels).round_().to(torch.uint8)
        parts.append(Images(images.to(device), torch.from_numpy(labels[kept] - first).to(device)))
    return Split(parts[0], parts[1], last - first)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise StudyError(f"there is no data at {path}: give CIFAR-100 as one .npz with {', '.join(ARRAYS)}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file.files]
            arrays = {name: file[name] for name in ARRAYS if name in file.files}
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is no .npz that numpy can read: {error}.") from error
    if missing:
        raise StudyError(f"{path} lacks {', '.join(missing)}.")
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3) or labels.shape != images.shape[:1]:
            raise StudyError(
                f"{path}: x_{part} must be (N, {SIDE}, {SIDE}, 3) uint8 and y_{part} (N,), got {images.dtype} "
                f"{images.shape} and {labels.shape}."
            )
    return arrays


def _first_of(labels: np.ndarray, number: int, count: int | None, part: str) -> np.ndarray:
    found = np.flatnonzero(labels == number)
    if count is not None and len(found) < count:
        raise StudyError(f"class {number} has {len(found)} {part} images, and the study wants {count} of each.")
    return found[:count]


def normalised(images: Tensor) -> Tensor:
    """Convert (N, 3, P, P) uint8 to float32 of about mean 0 and deviation 1."""
    mean, std = _statistics(images.device)
    return (images.float() / 255.0 - mean) / std


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (1, 3, 1, 1). Cached, because each copy to a device is a synchronisation."""
    return tuple(torch.tensor(values).view(1, 3, 1, 1).to(device) for values in (_MEAN, _STD))  # type: ignore[return-value]


def batches(
    data: Images, size: int, generator: torch.Generator, order: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of shuffled, augmented, normalised batches, see :func:`shuffled` and :func:`drawn`."""
    for chosen in shuffled(data, size, order):
        yield drawn(data, chosen, generator)


def shuffled(data: Images, size: int, order: torch.Generator) -> Iterator[Tensor]:
    """Yield one epoch of batches as indices (size,); images that fill no whole batch are left out.

    Args:
        data: of which to draw.
        size: images of a batch; with fewer images, all of them.
        order: on the CPU; decides the order, the same on every device.
    """
    size = min(size, len(data))
    indices = torch.randperm(len(data), generator=order).to(data.labels.device)
    for start in range(0, len(data) - size + 1, size):
        yield indices[start : start + size]


def drawn(data: Images, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the augmented, normalised images (N, 3, P, P) and labels (N,) of the indices ``chosen``.

    Args:
        generator: on the data's device; decides crops and flips.
    """
    return normalised(_augmented(data.images[chosen], generator)), data.labels[chosen]


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad each side by an eighth, crop at random and mirror half of the images, in one gather."""
    count, _, height, width = images.shape
    border = height // 8
    padded = F.pad(images, (border,) * 4)
    top, left = torch.randint(2 * border + 1, (2, count, 1), device=images.device, generator=generator)
    mirrored = torch.rand((count, 1), device=images.device, generator=generator) < 0.5
    rows = top + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    image = torch.arange(count, device=images.device).view(-1, 1, 1)
    return padded[image, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)
