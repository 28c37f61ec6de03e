"""Rendered scenes: a small detection data set in COCO format, made from a seed, for demonstrations and tests.

Six kinds of things lie on textured ground, at many sizes and angles, lit from a side, partly hidden by each other and
by clutter that borrows their textures. Colours are free, so what tells the kinds apart is shape and texture. Everything
is drawn from implicit functions on a pixel grid with NumPy, so edges are anti-aliased at any size.

Shape shorthand: H, W pixels of a scene; h, w pixels of one item's canvas.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from demos.scene_items import CLASSES, DRAWN, Item, clutter, fractal_noise, palette

__all__ = ["CLASSES", "SceneObject", "render_scene", "write_scenes"]

_LEAST_VISIBLE = 0.45  # of an object's own pixels, whatever is drawn over it and where the scene ends
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class SceneObject:
    """One annotated object.

    Args:
        category: index into :data:`CLASSES`.
        box: x0, y0, x1, y1 in pixels around what is visible of it.
        area: number of visible pixels.
    """

    category: int
    box: tuple[float, float, float, float]
    area: int


def render_scene(rng: np.random.Generator, width: int = 128, height: int = 128) -> tuple[np.ndarray, list[SceneObject]]:
    """Draw one scene.

    Args:
        rng: all randomness comes from it: the same state gives the same scene.
        width: W.
        height: H.

    Returns:
        tuple: (H, W, 3) uint8 RGB image, and its objects. Every object that is drawn is annotated, and shows
        at least 45 percent of itself.
    """
    canvas = _Canvas(_ground(rng, height, width))
    light = rng.uniform(0.0, 2.0 * np.pi)
    for _ in range(int(rng.integers(2, 5))):
        canvas.place(clutter, None, rng, light)
    for _ in range(int(rng.integers(3, 8))):
        category = int(rng.integers(len(CLASSES)))
        canvas.place(DRAWN[category], category, rng, light)
    for _ in range(int(rng.integers(0, 4))):
        canvas.place(clutter, None, rng, light)
    return _photograph(canvas.colours, rng, light), canvas.objects()


def write_scenes(
    folder: str | os.PathLike[str],
    sizes: Mapping[str, int],
    seed: int = 0,
    width: int = 128,
    height: int = 128,
    progress: Callable[[int, int], object] | None = None,
    workers: int = 1,
) -> dict[str, tuple[Path, Path]]:
    """Write splits of scenes as ``folder/<split>/000000.jpg`` ... with ``folder/<split>.json`` in COCO format.

    A scene depends on the seed, its split's name and its number alone, so a longer split starts with a shorter one.

    Args:
        folder: made if it is not there.
        sizes: split -> number of scenes, such as ``{"train": 800, "test": 200}``.
        seed: of everything.
        width: W of every scene.
        height: H of every scene.
        progress: called with the number of scenes written so far, and of all.
        workers: processes that draw; they change nothing in what is drawn.

    Returns:
        dict: split -> (json file, image folder).
    """
    written, total, paths = 0, sum(sizes.values()), {}
    with _workers(workers) as run:
        for split, size in sizes.items():
            images = Path(folder) / split
            images.mkdir(parents=True, exist_ok=True)
            write = functools.partial(_write_scene, images, (seed, *split.encode()), width, height)
            records: list[dict] = []
            annotations: list[dict] = []
            for number, (name, objects) in enumerate(run(write, range(size))):
                records.append({"id": number + 1, "file_name": name, "width": width, "height": height})
                annotations.extend(_annotations(objects, number + 1, len(annotations) + 1))
                written += 1
                if progress is not None:
                    progress(written, total)
            description = Path(folder) / f"{split}.json"
            description.write_text(json.dumps(_coco(records, annotations, seed)), encoding="utf-8")
            paths[split] = (description, images)
    return paths


@contextmanager
def _workers(count: int) -> Iterator[Callable[..., Iterable]]:
    """A ``map`` over so many processes."""
    if count <= 1:
        yield map
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield functools.partial(pool.map, chunksize=16)


def _write_scene(
    images: Path, seed: tuple[int, ...], width: int, height: int, number: int
) -> tuple[str, list[SceneObject]]:
    image, objects = render_scene(np.random.default_rng([*seed, number]), width, height)
    name = f"{number:06d}.jpg"
    Image.fromarray(image).save(images / name, quality=_JPEG_QUALITY)
    return name, objects


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


def _coco(records: list[dict], annotations: list[dict], seed: int) -> dict:
    return {
        "info": {"description": f"rendered scenes, seed {seed}"},
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)],
        "images": records,
        "annotations": annotations,
    }


class _Canvas:
    """What is drawn so far, and which item each pixel shows."""

    def __init__(self, colours: np.ndarray) -> None:
        self.colours = colours  # (H, W, 3) float, 0 to 1
        self.owner = np.full(colours.shape[:2], -1)
        self.size: tuple[int, int] = (colours.shape[0], colours.shape[1])
        self.categories: list[int | None] = []
        self.pixels: list[int] = []  # of the whole item, hidden parts too

    def place(
        self, draw: Callable[..., Item], category: int | None, rng: np.random.Generator, light: float, tries: int = 12
    ) -> None:
        """Draw an item where nothing that matters is hidden; give up after some tries."""
        height, width = self.size
        largest = 0.30 if category is not None else 0.18
        radius = min(height, width) * math.exp(rng.uniform(math.log(0.10), math.log(largest)))
        item = draw(rng, radius, light)
        for _ in range(tries):
            x, y = rng.uniform(0, width), rng.uniform(0, height)
            if self._fits(item, x, y, category):
                self._paint(item, x, y, category, light)
                return

    def objects(self) -> list[SceneObject]:
        found = []
        for index, category in enumerate(self.categories):
            if category is not None:
                rows, columns = np.nonzero(self.owner == index)
                box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
                found.append(SceneObject(category, box, len(rows)))
        return found

    def _window(self, item: Item, x: float, y: float) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where the item lies on the scene, and which part of the item that is."""
        h, w = item.alpha.shape
        top, left = round(y - h / 2), round(x - w / 2)
        height, width = self.size
        scene = (slice(max(top, 0), min(top + h, height)), slice(max(left, 0), min(left + w, width)))
        part = tuple(slice(s.start - first, s.stop - first) for s, first in zip(scene, (top, left)))
        return scene, part  # type: ignore[return-value]

    def _fits(self, item: Item, x: float, y: float, category: int | None) -> bool:
        scene, part = self._window(item, x, y)
        solid = item.alpha[part] > 0.5
        whole = int((item.alpha > 0.5).sum())
        if category is not None and (solid.sum() < 0.6 * whole or whole < 20):
            return False
        hidden = np.bincount(self.owner[scene][solid & (self.owner[scene] >= 0)], minlength=len(self.categories))
        for index, pixels in enumerate(self.pixels):
            if self.categories[index] is not None and hidden[index]:
                left = int((self.owner == index).sum()) - int(hidden[index])
                if left < max(_LEAST_VISIBLE * pixels, 12):
                    return False
        return True

    def _paint(self, item: Item, x: float, y: float, category: int | None, light: float) -> None:
        scene, part = self._window(item, x, y)
        self._shade(item, x, y, light)
        alpha = item.alpha[part][..., None]
        self.colours[scene] = self.colours[scene] * (1 - alpha) + item.colours[part] * alpha
        self.owner[scene][item.alpha[part] > 0.5] = len(self.categories)
        self.categories.append(category)
        self.pixels.append(int((item.alpha > 0.5).sum()))

    def _shade(self, item: Item, x: float, y: float, light: float) -> None:
        """A soft shadow on the side away from the light."""
        offset = max(1.0, 0.07 * item.alpha.shape[0])
        soft = Image.fromarray((item.alpha * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(offset))
        shadow = Item(item.colours, np.asarray(soft, dtype=np.float32) / 255.0)
        scene, part = self._window(shadow, x - offset * math.cos(light), y - offset * math.sin(light))
        self.colours[scene] *= 1 - 0.5 * shadow.alpha[part][..., None]


# ---- the ground and the light


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) textured background, 0 to 1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    cosine, sine = math.cos(angle), math.sin(angle)
    along, across = x * cosine + y * sine, y * cosine - x * sine
    texture = _GROUNDS[int(rng.integers(len(_GROUNDS)))](rng, along, across)
    first, second = palette(rng, 2, saturation=(0.05, 0.6), value=(0.2, 0.85))
    mixed = first + (second - first) * texture[..., None] * rng.uniform(0.35, 1.0)
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


def _stripes(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    wave = np.sin(along * 2 * np.pi / rng.uniform(9.0, 30.0))
    return 0.5 + 0.5 * np.tanh(4.0 * wave) * rng.uniform(0.4, 1.0)


def _clouds(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    return np.clip(1.6 * fractal_noise(rng, along.shape, rng.uniform(15.0, 60.0)) - 0.3, 0.0, 1.0)


def _gravel(rng: np.random.Generator, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Cells around random points, dark where two meet."""
    spacing = rng.uniform(8.0, 16.0)
    height, width = along.shape
    count = max(4, int(height * width / spacing**2))
    points = rng.uniform(0, 1, (count, 2)) * (height, width)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    first = np.full(along.shape, np.inf, dtype=np.float32)
    second, nearest = first.copy(), np.zeros(along.shape, dtype=np.int64)
    for index, (row, column) in enumerate(points.astype(np.float32)):
        distance = (y - row) ** 2 + (x - column) ** 2
        closer = distance < first
        second = np.where(closer, first, np.minimum(second, distance))
        first = np.where(closer, distance, first)
        nearest[closer] = index
    seam = np.clip((np.sqrt(second) - np.sqrt(first)) / 2.5, 0.0, 1.0)
    return seam * rng.uniform(0.3, 1.0, count)[nearest]


_GROUNDS = (_wood, _tiles, _weave, _stripes, _clouds, _gravel)


def _photograph(colours: np.ndarray, rng: np.random.Generator, light: float) -> np.ndarray:
    """Light that falls off across the scene, a tint, a little blur and sensor noise; (H, W, 3) uint8."""
    height, width = colours.shape[:2]
    x, y = np.linspace(-1, 1, width, dtype=np.float32)[None, :], np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    slope = 1.0 + rng.uniform(0.1, 0.4) * (x * math.cos(light) + y * math.sin(light))
    tint = rng.uniform(0.9, 1.1, 3).astype(np.float32)
    lit = np.clip(colours * slope[..., None] * tint * rng.uniform(0.75, 1.15), 0.0, 1.0)
    blurred = Image.fromarray((lit * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.7)))
    noise = rng.standard_normal(colours.shape, dtype=np.float32) * rng.uniform(1.0, 7.0)
    noisy = np.asarray(blurred, dtype=np.float32) + noise
    return np.clip(noisy, 0, 255).astype(np.uint8)
