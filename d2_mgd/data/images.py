"""Image files: as upright 8-bit pixels, and what is peculiar about one.

Pillow and Detectron2 read nearly every image as one expects. Three kinds they do not: what has more than 8 bits and one
channel is clipped, so that a greyscale image of 16 bits becomes white; a turned TIFF, which Pillow makes upright while
it loads, is turned once more; and of a damaged PNG the error is lost, since asking for EXIF data decodes it first, and
that error is taken for one of the EXIF data. :func:`prepared` reads all right.
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
    """An image file that cannot be decoded; the message is the end of a sentence "PATH ...".

    Args:
        text: the message.
        kind: what the error has in common with others like it.
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
        raise ImageError("is no image that Pillow knows", "files that are no image") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"is refused: {reason(error)}", "images of too many pixels") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and others
        kind = "truncated images" if "truncated" in str(error).lower() else "unreadable images"
        raise ImageError(f"cannot be read: {reason(error)}", kind) from error


def read_rgb(path: str | os.PathLike[str], upright: bool = True) -> Image.Image:
    """An image file decoded to its last pixel, with 8 bits in each of three channels.

    Args:
        path: of the file.
        upright: turn it as its EXIF data say; otherwise only TIFFs are turned, as Pillow always does.

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
    """Whether an opened image holds numbers above 255, which Pillow would clip."""
    return image.mode in (*_SIXTEEN_BITS, "I", "F")


def _orientation(image: Image.Image) -> int:
    """What the EXIF data say: 1 is upright, 2 to 8 are turned or mirrored. A PNG must have been loaded."""
    try:
        with decoding():
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except ImageError:  # broken metadata do not make an image unreadable
        return 1
    return found if found in range(2, 9) else 1


def needs_preparation(image: Image.Image) -> bool:
    """Whether an opened image, not yet loaded, is one that :func:`prepared` reads right and Detectron2 does not."""
    return _needs_scaling(image) or image.format == "PNG" or (image.format == "TIFF" and _orientation(image) != 1)


def prepared(image: Image.Image) -> Image.Image:
    """An opened image, loaded, upright, with 8 bits a channel.

    Args:
        image: opened from a file object: given a path, Pillow reads turned TIFFs that are not compressed wrongly.

    Raises:
        ValueError: as in :func:`eight_bits`; and whatever a decoder raises.
    """
    image.load()
    upright = eight_bits(image)
    if image.format == "TIFF" or _orientation(image) == 1:  # Pillow has turned a TIFF itself
        return upright
    return upright.transpose(_TURNS[_orientation(image)])


def eight_bits(image: Image.Image) -> Image.Image:
    """An image as it is, or one of 16 bits a pixel by the upper 8, as Pillow reads 16-bit colour.

    Raises:
        ValueError: it holds 32-bit numbers, whose range nobody knows.
    """
    if not _needs_scaling(image):
        return image
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in _SIXTEEN_BIT_FILES):
        upper = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(upper.astype(np.uint8))
    numbers = "floating-point" if image.mode == "F" else "32-bit"
    raise ValueError(f"it holds {numbers} numbers, whose range is not known: convert it to 8 or 16 bits")


def resized(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) after resizing to a shortest side, unless the longest would exceed its limit (Detectron2's way).

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
    """(width, height) of an image file after it is turned as its EXIF says; pixels are not decoded."""
    with Image.open(path) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # its ``size`` depends on Pillow's version
            width, height = image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength]
        # A PNG without EXIF before its pixels is not asked for it, since that would decode them.
        turned = (image.format != "PNG" or "exif" in image.info) and _orientation(image) >= 5
    return (height, width) if turned else (width, height)


@dataclass(frozen=True)
class ImageFacts:
    """What :func:`inspect_image` finds.

    Args:
        error: why it cannot be trained on, as the end of a sentence "PATH ..."; empty if it can.
        kind: what an error has in common with others like it.
        size: (width, height) upright, in pixels; (0, 0) if that cannot be known.
        stored: the same before it is turned upright.
        notes: what training does with it that one should know; each the end of a sentence "PATH ...".
    """

    error: str = ""
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    stored: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()


def inspect_image(path: str | os.PathLike[str]) -> ImageFacts:
    """Decode an image to its last pixel, as training does."""
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
    """What is known only before an image is loaded."""

    def __init__(self, image: Image.Image) -> None:
        raw_modes = " ".join(str(getattr(tile, "args", "")) for tile in getattr(image, "tile", ()))
        self.deep = _needs_scaling(image) or ";16" in raw_modes
        self.frames = getattr(image, "n_frames", 1)
        self.turned = image.format == "TIFF" and _orientation(image) != 1


def _notes(image: Image.Image, stored: _Stored) -> list[str]:
    """What is peculiar about a loaded image."""
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
        notes.append("is partly transparent: alpha is dropped, and the colours beneath are seen")
    if stored.turned or _orientation(image) != 1:
        notes.append("is stored turned: made upright as its EXIF says (classification takes it as it is stored)")
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
