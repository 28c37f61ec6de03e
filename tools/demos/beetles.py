"""Draws a fine-grained data set: beetles whose species differ by the marks on their wing covers alone.

Colour, size, pose, light, ground, and what lies in front of a beetle vary freely and say nothing about its species, so
a network must find the marks. Used by the demo and by tests, which may download nothing.

Shape shorthand: H, W height and width of an image (equal); all coordinates on a beetle are in units of its half length.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

Array = np.ndarray
# (p, q, jitter) -> bool: which points of the wing covers are marked; p across (0: the seam, 1: the edge), q along
# (-1: the front, 1: the tail), jitter (4,) the beetle's own deviation from its species, about -0.05 to 0.05.
Marks = Callable[[Array, Array, Array], Array]


def _spots(p: Array, q: Array, jitter: Array, rows: tuple[float, ...]) -> Array:
    radius = 0.2 + 0.4 * jitter[3]
    distances = [np.hypot(0.75 * (p - 0.45 - jitter[2]), q - row - shift) for row, shift in zip(rows, jitter)]
    return np.min(distances, axis=0) < radius


def _bands(p: Array, q: Array, jitter: Array, rows: tuple[float, ...], slope: float = 0.0) -> Array:
    distances = [np.abs(q - row - shift - slope * p) for row, shift in zip(rows, jitter)]
    return np.min(distances, axis=0) < 0.11 + 0.3 * jitter[3]


def _stripe(p: Array, q: Array, jitter: Array) -> Array:
    return np.abs(p - 0.45 - jitter[0]) < 0.12 + 0.3 * jitter[3]


def _rim(p: Array, q: Array, jitter: Array) -> Array:
    return np.hypot(p, q) > 0.76 + jitter[3]


SPECIES: dict[str, Marks] = {
    "four-spotted": partial(_spots, rows=(-0.35, 0.4)),
    "six-spotted": partial(_spots, rows=(-0.5, 0.02, 0.55)),
    "two-banded": partial(_bands, rows=(-0.3, 0.35)),
    "three-banded": partial(_bands, rows=(-0.5, 0.0, 0.5)),
    "forward-arrowed": partial(_bands, rows=(-0.5, 0.1), slope=0.5),
    "backward-arrowed": partial(_bands, rows=(0.0, 0.6), slope=-0.5),
    "striped": _stripe,
    "rimmed": _rim,
}


class _Beetle(NamedTuple):
    """One individual."""

    centre: Array  # (2,) x, y, relative to the side of the image
    length: float  # half length, in shares of the image
    angle: float  # radians, 0: head up
    width: float  # of the wing covers against their length
    cover: Array  # (3,) RGB in 0..1
    mark: Array  # (3,)
    body: Array  # (3,) head, legs, antennae
    jitter: Array  # (4,) of the marks


def _rgb(hue: float, saturation: float, value: float) -> Array:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _draw_individual(rng: np.random.Generator) -> _Beetle:
    hue = rng.uniform()
    dark = _rgb(hue, rng.uniform(0.4, 0.95), rng.uniform(0.1, 0.3))
    pale = _rgb(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.2, 0.75), rng.uniform(0.75, 1))
    return _Beetle(
        centre=rng.uniform(0.45, 0.55, 2),
        length=rng.uniform(0.34, 0.41),
        angle=rng.normal(0, 0.25),
        width=rng.uniform(0.55, 0.72),
        cover=dark,
        mark=pale,
        body=dark * rng.uniform(0.4, 0.9),
        jitter=np.clip(rng.normal(0, 0.03, 4), -0.06, 0.06),
    )


def _noise(rng: np.random.Generator, size: int, octaves: tuple[int, ...], stretch: int = 1) -> Array:
    """(H, W) smooth random texture in about -1..1: random grids of ``octaves`` cells, enlarged and summed."""
    total = np.zeros((size, size), np.float32)
    for weight, cells in enumerate(octaves, start=1):
        grid = rng.normal(size=(max(2, cells // stretch), cells)).astype(np.float32)
        total += np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)) / weight
    return total / 2


def _ground(rng: np.random.Generator, size: int) -> Array:
    """(H, W, 3) bark, sand, moss or leaf."""
    kinds = {  # hue, saturation, octaves, stretch
        "bark": (0.07, 0.45, (6, 16, 40), 4),
        "sand": (0.11, 0.35, (3, 24, 64), 1),
        "moss": (0.28, 0.55, (4, 12, 48), 1),
        "leaf": (0.33, 0.65, (3, 10, 20), 3),
    }
    hue, saturation, octaves, stretch = kinds[rng.choice(list(kinds))]
    colour = _rgb(hue + rng.normal(0, 0.03), saturation, rng.uniform(0.35, 0.75))
    light = _noise(rng, size, octaves, stretch)[..., None]
    tint = _noise(rng, size, (3, 8))[..., None] * rng.normal(0, 0.06, 3)
    ground = colour * (1 + 0.3 * light) + tint
    for _ in range(rng.integers(0, 4)):  # pebbles and seeds, which look a little like spots
        x, y, radius = *rng.uniform(0, 1, 2), rng.uniform(0.015, 0.05)
        ground[_distance(size, (x, y)) < radius] *= rng.uniform(0.5, 1.6)
    return np.rot90(ground, int(rng.integers(4)))


def _grid(size: int) -> tuple[Array, Array]:
    """x and y of every pixel's middle, in shares of the image, each (H, W)."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    return x, y


def _distance(size: int, point: tuple[float, float]) -> Array:
    x, y = _grid(size)
    return np.hypot(x - point[0], y - point[1])


def _segment(u: Array, v: Array, start: tuple[float, float], end: tuple[float, float]) -> Array:
    """Distance of every point to a line segment."""
    du, dv = end[0] - start[0], end[1] - start[1]
    share = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / (du * du + dv * dv), 0, 1)
    return np.hypot(u - start[0] - share * du, v - start[1] - share * dv)


_LIMBS = (  # of the right side: legs, then the antenna; the left side mirrors them
    ((0.3, -0.45), (0.8, -0.75), (0.95, -1.0)),
    ((0.45, 0.05), (0.95, 0.05), (1.15, 0.25)),
    ((0.4, 0.45), (0.85, 0.75), (0.95, 1.1)),
    ((0.1, -0.95), (0.35, -1.25), (0.65, -1.35)),
)


def _paint(image: Array, where: Array, colour: Array) -> None:
    image[where] = (np.broadcast_to(colour, image.shape))[where]


def _paint_beetle(image: Array, beetle: _Beetle, marks: Marks, rng: np.random.Generator) -> None:
    """Draws a beetle on ``image``, (H, W, 3) in 0..1, in place: legs, head, neck shield, wing covers, gloss."""
    size = image.shape[0]
    x, y = _grid(size)
    cos, sin = np.cos(beetle.angle), np.sin(beetle.angle)
    across, along = (x - beetle.centre[0]) / beetle.length, (y - beetle.centre[1]) / beetle.length
    u, v = cos * across + sin * along, cos * along - sin * across
    side = np.abs(u)

    shadow = np.exp(-2.5 * np.maximum(0, np.hypot((u + 0.12) / (beetle.width + 0.1), (v - 0.12) / 1.05) - 0.85))
    image *= 1 - 0.45 * shadow[..., None]
    wobble = rng.normal(0, 0.05, (len(_LIMBS), 2))
    for limb, (dx, dy) in zip(_LIMBS, wobble):
        first, joint, last = limb[0], (limb[1][0] + dx, limb[1][1] + dy), limb[2]
        reach = np.minimum(_segment(side, v, first, joint), _segment(side, v, joint, last))
        _paint(image, reach < 0.045, beetle.body)

    gloss = 0.75 + 0.45 * np.clip(1 - np.hypot(u + 0.25, v + 0.1) / 1.1, 0, 1)[..., None]
    for centre, width, height in ((-0.83, 0.42 * beetle.width, 0.18), (-0.52, 0.8 * beetle.width, 0.29)):
        _paint(image, np.hypot(u / width, (v - centre) / height) < 1, beetle.body * 1.3 * gloss)
    p, q = side / beetle.width, (v - 0.27) / 0.75
    on_covers = p**2 + np.abs(q) ** 2.3 < 1
    _paint(image, on_covers, beetle.cover * gloss)
    _paint(image, on_covers & marks(p, q, beetle.jitter), beetle.mark * gloss)
    _paint(image, on_covers & (p < 0.025), beetle.cover * 0.5)


def _paint_grass(image: Array, rng: np.random.Generator) -> None:
    """Blades in front of the beetle, drawn in place."""
    u, v = _grid(image.shape[0])
    for _ in range(rng.integers(0, 3)):
        start, end = rng.uniform(-0.1, 1.1, 2), rng.uniform(-0.1, 1.1, 2)
        if np.hypot(*(start - end)) < 0.3:
            continue
        blade = _segment(u, v, (start[0], start[1]), (end[0], end[1])) < rng.uniform(0.008, 0.022)
        _paint(image, blade, _rgb(rng.uniform(0.1, 0.33), 0.6, rng.uniform(0.3, 0.7)))


def render_beetle(species: str, rng: np.random.Generator, size: int = 80) -> Array:
    """One beetle of a species as an image, (H, W, 3) uint8, fully determined by ``rng``."""
    large = 2 * size  # halved in the end, for smooth edges
    image = _ground(rng, large).astype(np.float64).copy()
    _paint_beetle(image, _draw_individual(rng), SPECIES[species], rng)
    _paint_grass(image, rng)
    slope = np.add(*(axis * weight for axis, weight in zip(_grid(large), rng.normal(0, 0.25, 2))))
    image *= (rng.uniform(0.75, 1.2) + slope - slope.mean())[..., None] * rng.normal(1, 0.06, 3)
    image += rng.normal(0, 0.02, image.shape)
    picture = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6)))
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


def write_image_folder(root: Path, counts: dict[str, int], size: int = 80, seed: int = 0) -> None:
    """Write ``root/<split>/<species>/<number>.jpg``; images that exist are kept.

    Args:
        root: for these images alone.
        counts: images a species for each split, as ``{"train": 80, "valid": 40}``.
        size: H = W.
        seed: of everything; images of different seeds or splits have nothing in common.
    """
    jobs = [
        (root / split / name / f"{number:04d}.jpg", name, size, (seed, split_index, species_index, number))
        for split_index, (split, count) in enumerate(sorted(counts.items()))
        for species_index, name in enumerate(SPECIES)
        for number in range(count)
    ]
    missing = [job for job in jobs if not job[0].exists()]
    for folder in {job[0].parent for job in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    for path, species, side, seeds in tqdm(missing, unit="image", desc="drawing beetles", disable=not missing):
        partial = path.with_suffix(".partial")
        image = Image.fromarray(render_beetle(species, np.random.default_rng(seeds), side))
        image.save(partial, format="JPEG", quality=92)
        partial.replace(path)
