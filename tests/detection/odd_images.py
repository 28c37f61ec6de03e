"""Image files of every kind that a data set may hold, and the pixels that a training must see of them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 48, 32
FLAT = np.broadcast_to(np.array([200, 40, 90], dtype=np.uint8), (HEIGHT, WIDTH, 3))


def ramp() -> np.ndarray:
    """(HEIGHT, WIDTH) uint8 that no turn or mirror leaves as it is."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return (rows * 5 + columns).astype(np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def _saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def _sixteen() -> np.ndarray:
    """A ramp in the upper 8 of 16 bits, and something in the lower ones."""
    return ramp().astype(np.uint16) * 256 + 77


def _turned(folder: Path, suffix: str, orientation: int) -> Path:
    """Stored so that ``orientation`` makes it the upright ramp."""
    undo = {3: (2, False), 6: (1, False), 8: (3, False), 2: (0, True)}[orientation]  # quarter turns left, mirrored
    pixels = np.rot90(ramp(), undo[0])
    pixels = pixels[:, ::-1] if undo[1] else pixels
    exif = Image.Exif()
    exif[0x0112] = orientation
    name = folder / f"turned_{orientation}.{suffix}"
    return _saved(name, Image.fromarray(np.ascontiguousarray(pixels)), exif=exif)


def _turned_sixteen(folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _saved(folder / "turned16.png", Image.fromarray(np.ascontiguousarray(np.rot90(_sixteen()))), exif=exif)


def _transparent(folder: Path, mode: str) -> Path:
    image = Image.fromarray(grey(ramp())).convert("RGBA" if mode == "RGBA" else "LA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, WIDTH // 2, HEIGHT))
    image.putalpha(alpha)
    return _saved(folder / f"{mode}.png", image)


def _palette(folder: Path) -> Path:
    image = Image.frombytes("P", (WIDTH, HEIGHT), ramp().tobytes())
    image.putpalette([value for level in range(256) for value in (level, level, level)])
    return _saved(folder / "palette.png", image, transparency=3)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file by hand, of what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _colour_sixteen(folder: Path) -> Path:
    pixels = np.repeat(_sixteen()[..., None], 3, axis=2).astype(">u2")
    path = folder / "colour16.png"
    path.write_bytes(png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.tobytes() for row in pixels)))
    return path


def _pgm_sixteen(folder: Path) -> Path:
    path = folder / "grey16.pgm"
    path.write_bytes(b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + _sixteen().astype(">u2").tobytes())
    return path


# name -> (writes it into a folder, (H, W, 3) what training must see, words of the note about it or "")
READABLE: dict[str, tuple[Callable[[Path], Path], np.ndarray, str]] = {
    "colour": (lambda f: _saved(f / "colour.png", Image.fromarray(FLAT.copy())), FLAT, ""),
    "greyscale": (lambda f: _saved(f / "grey.png", Image.fromarray(ramp())), grey(ramp()), "is greyscale"),
    "one bit": (
        lambda f: _saved(f / "bit.png", Image.fromarray(ramp() > 99)),
        grey((ramp() > 99).astype(np.uint8) * 255),
        "is greyscale",
    ),
    "CMYK": (
        lambda f: _saved(f / "cmyk.tif", Image.new("CMYK", (WIDTH, HEIGHT), (55, 215, 165, 0))),
        FLAT,
        "is CMYK",
    ),
    "CMYK jpeg": (
        lambda f: _saved(f / "cmyk.jpg", Image.new("CMYK", (WIDTH, HEIGHT), (55, 215, 165, 0)), quality=100),
        FLAT,
        "is CMYK",
    ),
    "16-bit png": (lambda f: _saved(f / "g16.png", Image.fromarray(_sixteen())), grey(ramp()), "has 16 bits"),
    "16-bit tiff": (lambda f: _saved(f / "g16.tif", Image.fromarray(_sixteen())), grey(ramp()), "has 16 bits"),
    "16-bit pgm": (_pgm_sixteen, grey(ramp()), "has 16 bits"),
    "16-bit colour": (_colour_sixteen, grey(ramp()), "has 16 bits"),
    "12 bits of 16": (
        lambda f: _saved(f / "g12.png", Image.fromarray(_sixteen() >> 4)),
        grey(ramp() >> 4),
        "nearly black",
    ),
    "alpha": (lambda f: _transparent(f, "RGBA"), grey(ramp()), "is partly transparent"),
    "grey and alpha": (lambda f: _transparent(f, "LA"), grey(ramp()), "is partly transparent"),
    "palette": (_palette, grey(ramp()), "is partly transparent"),
    "EXIF 3": (lambda f: _turned(f, "png", 3), grey(ramp()), "is stored rotated"),
    "EXIF 6": (lambda f: _turned(f, "png", 6), grey(ramp()), "is stored rotated"),
    "EXIF 8": (lambda f: _turned(f, "png", 8), grey(ramp()), "is stored rotated"),
    "EXIF 2": (lambda f: _turned(f, "png", 2), grey(ramp()), "is stored rotated"),
    "EXIF 6 tiff": (lambda f: _turned(f, "tif", 6), grey(ramp()), "is stored rotated"),
    "EXIF 8 tiff": (lambda f: _turned(f, "tif", 8), grey(ramp()), "is stored rotated"),
    "EXIF 6, 16-bit": (_turned_sixteen, grey(ramp()), "has 16 bits"),
    "two frames": (
        lambda f: _saved(
            f / "frames.tif",
            Image.fromarray(FLAT.copy()),
            save_all=True,
            append_images=[Image.fromarray(grey(ramp()))],
        ),
        FLAT,
        "several frames",
    ),
}


def _bytes_of(suffix: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, suffix)
    return stream.getvalue()


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _cut(folder: Path, suffix: str, kind: str) -> Path:
    data = _bytes_of(kind)
    return _written(folder / f"cut.{suffix}", data[: len(data) * 2 // 3])


def _damaged(folder: Path) -> Path:
    data = _saved(folder / "damaged.png", Image.fromarray(ramp())).read_bytes()
    return _written(folder / "damaged.png", data[:41] + b"\xff" * 20 + data[61:])


# name -> (writes it into a folder, the kind that check_dataset counts it under, words of the reason)
UNREADABLE: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "empty": (lambda f: _written(f / "empty.png", b""), "empty files", "is an empty file"),
    "no image": (lambda f: _written(f / "page.jpg", b"<html>not found</html>"), "no image", "is not an image"),
    "truncated png": (lambda f: _cut(f, "png", "PNG"), "truncated images", "truncated"),
    "truncated jpeg": (lambda f: _cut(f, "jpg", "JPEG"), "truncated images", "truncated"),
    "truncated tiff": (lambda f: _cut(f, "tif", "TIFF"), "truncated images", "truncated"),
    "truncated bmp": (lambda f: _cut(f, "bmp", "BMP"), "truncated images", "truncated"),
    "damaged": (_damaged, "unreadable images", "cannot be read"),
    "no pixels": (lambda f: _written(f / "zero.png", png(0, 5, 8, 2, b"")), "no image", "is not an image"),
    "too many pixels": (lambda f: _written(f / "bomb.png", png(60000, 60000, 1, 0, b"")), "too many", "is refused"),
    "32-bit numbers": (
        lambda f: _saved(f / "deep.tif", Image.fromarray(ramp().astype(np.int32) * 70000)),
        "unreadable images",
        "32-bit numbers of unknown range",
    ),
    "floating-point numbers": (
        lambda f: _saved(f / "float.tif", Image.fromarray(ramp().astype(np.float32) / 255)),
        "unreadable images",
        "floating-point numbers of unknown range",
    ),
}
