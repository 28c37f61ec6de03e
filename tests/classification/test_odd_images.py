"""Every kind of image that a folder may hold, through the data set that training and evaluation use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from odd_images import READABLE, UNREADABLE
from PIL import Image

from classification.data import ImageDataset, Key
from d2_mgd.data.class_folders import Folder

# As torchvision's ImageFolder, classification takes an image as it is stored; Pillow itself makes a TIFF upright.
TURNED = [kind for kind in READABLE if kind.startswith("EXIF") and "tiff" not in kind]


def folder_of(path: Path) -> Folder:
    return Folder(path.parent, ("only",), np.array([path.name.encode()]), np.zeros(1, dtype=np.int64))


@pytest.mark.parametrize("kind", [kind for kind in READABLE if kind not in TURNED])
def test_the_network_sees_the_pixels_that_one_expects(tmp_path: Path, kind: str) -> None:
    write, pixels, _ = READABLE[kind]
    path = write(tmp_path)
    plain = tmp_path / "plain.png"
    Image.fromarray(np.ascontiguousarray(pixels)).save(plain)
    for augment in (True, False):
        odd, expected = (
            ImageDataset(folder_of(file), size=32, augment=augment)[Key(0, 5)].image for file in (path, plain)
        )
        assert odd is not None and torch.equal(odd, expected)


@pytest.mark.parametrize("kind", TURNED)
def test_images_are_taken_as_they_are_stored(tmp_path: Path, kind: str) -> None:
    path = READABLE[kind][0](tmp_path)
    assert ImageDataset(folder_of(path), size=32, augment=False)[Key(0, 0)].broken == ()


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_images_are_named(tmp_path: Path, kind: str) -> None:
    path = UNREADABLE[kind][0](tmp_path)
    item = ImageDataset(folder_of(path), size=32, augment=True)[Key(0, 0)]
    assert item.image is None and item.broken == (str(path),)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (401, 4)])
def test_long_images_are_seen_in_their_middle(tmp_path: Path, size: tuple[int, int]) -> None:
    longest = max(size)
    pixels = np.zeros((longest, min(size), 3), np.uint8)
    pixels[longest // 4 : -longest // 4] = 200
    pixels = pixels if size[1] == longest else np.ascontiguousarray(pixels.swapaxes(0, 1))
    path = tmp_path / "long.png"
    Image.fromarray(pixels).save(path)
    for augment in (True, False):
        image = ImageDataset(folder_of(path), size=64, augment=augment)[Key(0, 0)].image
        assert image is not None and image.shape == (3, 64, 64)
        assert augment or (image == 200).all()
