"""Renders scenes: a small detection data set in COCO format, made from a seed, for the demos and for tests.

Six kinds of items lie on textured ground, at many sizes and angles, lit from one side. Items differ in shape, texture
and hue. They are drawn from implicit functions on a pixel grid with NumPy, so edges are anti-aliased at any size.

Shape shorthand: H, W pixels of a scene; h, w pixels of one item.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from demos.scene_items import CLASSES, DRAWN, Item, fractal_noise, palette

MOST_ITEMS = 3  # in a scene
RADIUS = (0.17, 0.30)  # of an item, in sides of the scene
_TRIES = 20  # at placing an item where it covers no other
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class SceneObject:
    """One annotated object.

    Args:
        category: index into :data:`CLASSES`.
        box: x0, y0, x1, y1 in pixels.
        area: number of pixels.
    """

    category: int
    box: tuple[float, float, float, float]
    area: int


def render_scene(rng: np.random.Generator, width: int = 96, height: int = 96) -> tuple[np.ndarray, list[SceneObject]]:
    """Draw one scene.

    Args:
        rng: the only source of randomness: the same state gives the same scene.
        width: W.
        height: H.

    Returns:
        tuple: (H, W, 3) uint8 RGB image, and its objects, at least one. All are whole and none covers another.
    """
    colours = _ground(rng, height, width)
    taken = np.zeros((height, width), dtype=bool)
    light = rng.uniform(0.0, 2.0 * np.pi)
    objects = []
    for _ in range(int(rng.integers(1, MOST_ITEMS + 1))):
        category = int(rng.integers(len(CLASSES)))
        radius = min(height, width) * math.exp(rng.uniform(*np.log(RADIUS)))
        item = DRAWN[category](rng, radius, light)
        window = _free_window(rng, item, taken)
        if window is None:
            continue
        solid = item.alpha > 0.5
        taken[window] |= solid
        _paint(colours, item, window, light)
        rows, columns = np.nonzero(solid)
        top, left = window[0].start, window[1].start
        corners = (left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1)
        x0, y0, x1, y1 = map(float, corners)
        objects.append(SceneObject(category, (x0, y0, x1, y1), len(rows)))
    return _photograph(colours, rng, light), objects


def _free_window(rng: np.random.Generator, item: Item, taken: np.ndarray) -> tuple[slice, slice] | None:
    """A place where the item covers no other; None after some tries."""
    (h, w), (height, width) = item.alpha.shape, taken.shape
    for _ in range(_TRIES):
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        window = (slice(top, top + h), slice(left, left + w))
        if not taken[window][item.alpha > 0].any():
            return window
    return None


def _paint(colours: np.ndarray, item: Item, window: tuple[slice, slice], light: float) -> None:
    """Draw an item, and a soft shadow on the side away from the light, on ``colours`` in place."""
    covered = np.zeros(colours.shape[:2], dtype=np.float32)
    covered[window] = item.alpha
    offset = max(1.0, 0.07 * max(item.alpha.shape))
    shift = (1, 0, offset * math.cos(light), 0, 1, offset * math.sin(light))
    mask = Image.fromarray((covered * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(offset))
    shadow = np.asarray(mask.transform(mask.size, Image.Transform.AFFINE, shift), dtype=np.float32) / 255.0
    colours *= 1 - 0.5 * shadow[..., None]
    colours[window] += (item.colours - colours[window]) * item.alpha[..., None]


def write_scenes(
    folder: str | os.PathLike[str],
    sizes: Mapping[str, int],
    seed: int = 0,
    side: int = 96,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, tuple[Path, Path]]:
    """Write splits of scenes as ``folder/<split>/000000.jpg`` ... with ``folder/<split>.json`` in COCO format.

    A scene depends on the seed, its split's name and its number alone, so a longer split starts with a shorter one.

    Args:
        folder: created if it does not exist.
        sizes: split -> number of scenes, such as ``{"train": 800, "test": 200}``.
        seed: of all scenes.
        side: H and W.
        progress: called with the number of scenes written so far, and of all.

    Returns:
        dict: split -> (json file, image folder).
    """
    written, total, paths = 0, sum(sizes.values()), {}
    for split, size in sizes.items():
        images = Path(folder) / split
        images.mkdir(parents=True, exist_ok=True)
        records: list[dict] = []
        annotations: list[dict] = []
        for number in range(size):
            image, objects = render_scene(np.random.default_rng([seed, *split.encode(), number]), side, side)
            name = f"{number:06d}.jpg"
            Image.fromarray(image).save(images / name, quality=_JPEG_QUALITY)
            records.append({"id": number + 1, "file_name": name, "width": side, "height": side})
            annotations.extend(_annotations(objects, number + 1, len(annotations) + 1))
            written += 1
            if progress is not None:
                progress(written, total)
        content = {
            "info": {"description": f"rendered scenes, seed {seed}"},
            "categories": [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)],
            "images": records,
            "annotations": annotations,
        }
        description = Path(folder) / f"{split}.json"
        description.write_text(json.dumps(content), encoding="utf-8")
        paths[split] = (description, images)
    return paths


def _annotations(objects: list[SceneObject], image_id: int, first_id: int) -> Iterator[dict]:
    for offset, thing in enumerate(objects):
        x0, y0, x1, y1 = thing.box
        yield {
            "id": first_id + offset,
            "image_id": image_id,
            "category_id": thing.category + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": thing.area,
            "iscrowd": 0,
        }


# ---- the ground and the light


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) textured background, 0 to 1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    cosine, sine = math.cos(angle), math.sin(angle)
    along, across = x * cosine + y * sine, y * cosine - x * sine
    texture = _GROUNDS[int(rng.integers(len(_GROUNDS)))](rng, along, across)
    first, second = palette(rng, rng.uniform(), 2, saturation=(0.05, 0.3), value=(0.25, 0.8))
    mixed = first + (second - first) * texture[..., None] * rng.uniform(0.2, 0.7)
    return np.clip(mixed + 0.10 * (fractal_noise(rng, texture.shape, 3.0)[..., None] - 0.5), 0.0, 1.0)


def _wood(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    bent = across + 9.0 * fractal_noise(rng, along.shape, 40.0) + 0.05 * along
    rings = np.abs(np.sin(bent * np.pi / rng.uniform(5.0, 14.0))) ** 0.6
    return 0.75 * rings + 0.25 * fractal_noise(rng, along.shape, 4.0)


def _tiles(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    size = rng.uniform(12.0, 34.0)
    checks = (np.floor(along / size) + np.floor(across / size)) % 2
    return 0.7 * checks + 0.3 * fractal_noise(rng, along.shape, 8.0)


def _weave(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    period = rng.uniform(4.0, 9.0)
    threads = np.sin(along * 2 * np.pi / period) * np.sin(across * 2 * np.pi / period)
    return 0.5 + 0.3 * threads + 0.4 * (fractal_noise(rng, along.shape, 30.0) - 0.5)


def _clouds(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    return np.clip(1.6 * fractal_noise(rng, along.shape, rng.uniform(15.0, 60.0)) - 0.3, 0.0, 1.0)


_GROUNDS = (_wood, _tiles, _weave, _clouds)


def _photograph(colours: np.ndarray, rng: np.random.Generator, light: float) -> np.ndarray:
    """Light that falls off across the scene, a little blur and sensor noise; (H, W, 3) uint8."""
    height, width = colours.shape[:2]
    x, y = np.linspace(-1, 1, width, dtype=np.float32)[None, :], np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    slope = 1.0 + rng.uniform(0.1, 0.3) * (x * math.cos(light) + y * math.sin(light))
    lit = np.clip(colours * slope[..., None] * rng.uniform(0.8, 1.15), 0.0, 1.0)
    blurred = Image.fromarray((lit * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.5)))
    noise = rng.standard_normal(colours.shape, dtype=np.float32) * rng.uniform(1.0, 4.0)
    return np.clip(np.asarray(blurred, dtype=np.float32) + noise, 0, 255).astype(np.uint8)
