"""Decoding image files to upright 8-bit pixels, and reporting unusual properties.

Pillow and Detectron2 misread three kinds of images, which :func:`prepared` reads correctly:

- Greyscale images with more than 8 bits are clipped, so that a 16-bit image becomes white.
- Rotated TIFFs are rotated twice, because Pillow already makes them upright while it loads them.
- The error of a damaged PNG is lost: reading its EXIF data decodes it, and that error is taken for an EXIF error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from d2_mgd.errors import UserError, reason

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_SIXTEEN_BIT_FILES = ("PNG", "PPM")  # their numbers have 16 bits at most, also where Pillow says "I"
_DARK = 16  # of 255
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """An image file that cannot be decoded. The message continues a sentence that starts with the path.

    Args:
        text: the message.
        kind: the category under which errors are counted.
    """

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


@contextmanager
def decoding() -> Iterator[None]:
    """Context around Pillow's decoders, whose errors of any type become :class:`ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError("does not exist", "missing files") from None
    except UnidentifiedImageError:
        raise ImageError("is not an image format that Pillow can read", "files that are no image") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"is refused: {reason(error)}", "images of too many pixels") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and others
        kind = "truncated images" if "truncated" in str(error).lower() else "unreadable images"
        raise ImageError(f"cannot be read: {reason(error)}", kind) from error


def read_rgb(path: str | os.PathLike[str], upright: bool = True) -> Image.Image:
    """Decode an image file completely; returns an RGB image with 8 bits a channel.

    Args:
        path: of the file.
        upright: apply the EXIF orientation. Otherwise only TIFFs are rotated, which Pillow always does.

    Raises:
        ImageError: it cannot be decoded.
    """
    with decoding():
        _check_not_empty(path)
        with open(path, "rb") as file, Image.open(file) as image:
            return (prepared(image) if upright else eight_bits(image)).convert("RGB")


def _check_not_empty(path: str | os.PathLike[str]) -> None:
    if Path(path).stat().st_size == 0:
        raise ImageError("is an empty file", "empty files")


def _needs_scaling(image: Image.Image) -> bool:
    """Whether an opened image may contain values above 255, which Pillow would clip."""
    return image.mode in (*_SIXTEEN_BITS, "I", "F")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation: 1 is upright, 2 to 8 are rotated or mirrored. A PNG must have been loaded."""
    try:
        with decoding():
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except ImageError:  # damaged metadata does not make the pixels unreadable
        return 1
    return found if found in range(2, 9) else 1


def needs_preparation(image: Image.Image) -> bool:
    """Whether Detectron2 would misread an opened image, not yet loaded, that :func:`prepared` reads correctly."""
    return _needs_scaling(image) or image.format == "PNG" or (image.format == "TIFF" and _orientation(image) != 1)


def prepared(image: Image.Image) -> Image.Image:
    """Load an opened image; returns it upright, with 8 bits a channel.

    Args:
        image: opened from a file object. Opened from a path, Pillow misreads uncompressed rotated TIFFs.

    Raises:
        ValueError: as in :func:`eight_bits`. Errors of Pillow's decoders pass through.
    """
    image.load()
    upright = eight_bits(image)
    if image.format == "TIFF" or _orientation(image) == 1:  # Pillow has rotated a TIFF already
        return upright
    return upright.transpose(_TURNS[_orientation(image)])


def eight_bits(image: Image.Image) -> Image.Image:
    """Reduce 16 bits a pixel to the upper 8, as Pillow does for 16-bit colour; other images are returned unchanged.

    Raises:
        ValueError: the pixels are 32-bit numbers, whose range is unknown.
    """
    if not _needs_scaling(image):
        return image
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in _SIXTEEN_BIT_FILES):
        upper = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(upper.astype(np.uint8))
    numbers = "floating-point" if image.mode == "F" else "32-bit"
    raise ValueError(f"its pixels are {numbers} numbers of unknown range: convert it to 8 or 16 bits")


def resized(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) after Detectron2's resizing to a shortest side with a limit of the longest side.

    Args:
        height, width: of the image, in pixels.
        shortest: what the shorter side becomes; 0 resizes nothing.
        longest: what the longer side may be.
    """
    if shortest == 0:
        return height, width
    scale = min(shortest / min(height, width), longest / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) of an image file after its EXIF orientation is applied; pixels are not decoded."""
    with Image.open(path) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # its ``size`` depends on Pillow's version
            width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
        # Reading the EXIF data of a PNG would decode its pixels, unless they come before the pixels.
        turned = (image.format != "PNG" or "exif" in image.info) and _orientation(image) >= 5
    return (height, width) if turned else (width, height)


@dataclass(frozen=True)
class ImageFacts:
    """Result of :func:`inspect_image`.

    Args:
        error: why training cannot use the image, as the end of a sentence "PATH ..."; empty if it can.
        kind: the category under which errors are counted.
        size: (width, height) upright, in pixels; (0, 0) if unknown.
        stored: the same before the EXIF orientation is applied.
        notes: conversions that training applies; each is the end of a sentence "PATH ...".
    """

    error: str = ""
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    stored: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()


def inspect_image(path: str | os.PathLike[str]) -> ImageFacts:
    """Decode an image completely, as training does."""
    try:
        with decoding():
            _check_not_empty(path)
            with open(path, "rb") as file, Image.open(file) as image:
                stored, size = _Stored(image), image.size
                upright = prepared(image).convert("RGB")
                return ImageFacts(size=upright.size, stored=size, notes=tuple(_notes(image, stored)))
    except ImageError as error:
        return ImageFacts(str(error), error.kind)


class _Stored:
    """Properties that are available only before an image is loaded."""

    def __init__(self, image: Image.Image) -> None:
        raw_modes = " ".join(str(getattr(tile, "args", "")) for tile in getattr(image, "tile", ()))
        self.deep = _needs_scaling(image) or ";16" in raw_modes
        self.frames = getattr(image, "n_frames", 1)
        self.turned = image.format == "TIFF" and _orientation(image) != 1


def _notes(image: Image.Image, stored: _Stored) -> list[str]:
    """Unusual properties of a loaded image."""
    notes = []
    if image.getbands()[0] in ("L", "I", "1", "F"):
        notes.append("is greyscale: all three channels are the same")
    if image.mode == "CMYK":
        notes.append("is CMYK: converted to RGB, without its colour profile")
    if image.mode in ("LAB", "HSV", "YCbCr"):
        notes.append(f"is {image.mode}: converted to RGB")
    if stored.deep:
        notes.append("has 16 bits a channel: the upper 8 are used")
    if _is_dark(image):
        notes.append("has 16 bits a channel but uses few of them, so that it is nearly black: stretch its range")
    if _is_transparent(image):
        notes.append("is partly transparent: the alpha channel is dropped, the colours below it are used")
    if stored.turned or _orientation(image) != 1:
        notes.append("is stored rotated: the EXIF orientation is applied (classification does not apply it)")
    if stored.frames > 1:
        notes.append("has several frames: the first is used")
    return notes


def _is_dark(image: Image.Image) -> bool:
    if not _needs_scaling(image) or image.mode == "F":
        return False
    _, brightest = _extrema(image)
    return 0 < brightest < _DARK << 8


def _is_transparent(image: Image.Image) -> bool:
    if "transparency" in image.info:
        return _extrema(image.convert("RGBA").getchannel("A"))[0] < 255
    return "A" in image.getbands() and _extrema(image.getchannel("A"))[0] < 255


def _extrema(image: Image.Image) -> tuple[float, float]:
    found: Any = image.getextrema()
    return found
