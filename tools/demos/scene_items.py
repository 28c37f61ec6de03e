"""Draws the six kinds of items of a rendered scene.

An item is drawn in its own coordinates u, v (about -1 to 1, v pointing down), which are turned, stretched and scaled,
so one drawing serves all sizes and angles. A part is an implicit function, negative inside, with a colour a pixel.

Shape shorthand: h, w pixels of an item's canvas.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

Array = np.ndarray
Random = np.random.Generator


@dataclass(frozen=True)
class Item:
    """A drawing: ``colours`` (h, w, 3) and ``alpha`` (h, w), both 0 to 1."""

    colours: Array
    alpha: Array


def palette(
    rng: Random,
    hue: float,
    count: int,
    saturation: tuple[float, float] = (0.55, 0.95),
    value: tuple[float, float] = (0.4, 1.0),
) -> list[Array]:
    """Colours (3,) near a hue, each of another brightness than the one before."""
    colours: list[Array] = []
    brightness, low, span = rng.uniform(*value), value[0], value[1] - value[0]
    hue += rng.uniform(-0.04, 0.04)
    for place in range(count):
        rgb = colorsys.hsv_to_rgb((hue + 0.08 * place) % 1.0, rng.uniform(*saturation), brightness)
        colours.append(np.array(rgb, dtype=np.float32))
        brightness = low + (brightness - low + rng.uniform(0.35, 0.65) * span) % span
    return colours


def fractal_noise(rng: Random, shape: tuple[int, ...], cell: float) -> Array:
    """Smooth noise of ``shape``, 0 to 1: octaves of random grids, the coarsest with cells of ``cell`` pixels."""
    height, width = shape
    total, weight, noise = 0.0, 1.0, np.zeros(shape, dtype=np.float32)
    while True:
        grid = rng.uniform(0, 1, (max(2, round(height / cell) + 1), max(2, round(width / cell) + 1)))
        enlarged = Image.fromarray(grid.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        noise += weight * np.asarray(enlarged)
        total, weight, cell = total + weight, weight / 2, cell / 2
        if cell < 2.0:
            return np.clip(noise / total, 0.0, 1.0)


def _grid(rng: Random, radius: float, turn: float, stretch: float = 0.15) -> tuple[Array, Array]:
    """u, v (h, w) of an item with ``radius`` pixels, turned by up to ``turn`` radians, mirrored and stretched."""
    half = int(np.ceil(radius * 1.5)) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / radius
    angle = rng.uniform(-turn, turn)
    cosine, sine = math.cos(angle), math.sin(angle)
    u, v = x * cosine + y * sine, y * cosine - x * sine
    ratio = math.exp(rng.uniform(-stretch, stretch))
    u = u * (ratio if rng.uniform() < 0.5 else -ratio) + rng.uniform(-stretch, stretch) * v
    return u, v / ratio


def _coverage(implicit: Array) -> Array:
    """Share of each pixel that is inside, from the distance to the boundary in pixels."""
    dy, dx = np.empty_like(implicit), np.empty_like(implicit)
    dy[1:-1], dx[:, 1:-1] = implicit[2:] - implicit[:-2], implicit[:, 2:] - implicit[:, :-2]
    dy[[0, -1]] = 2 * (implicit[[1, -1]] - implicit[[0, -2]])
    dx[:, [0, -1]] = 2 * (implicit[:, [1, -1]] - implicit[:, [0, -2]])
    slope = np.sqrt(dy * dy + dx * dx) + np.float32(1e-9)  # twice the change from pixel to pixel
    return np.clip(0.5 - 2 * implicit / slope, 0.0, 1.0)


def _ellipse(u: Array, v: Array, x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Array:
    p, q = u - x, v - y
    if angle:
        cosine, sine = math.cos(angle), math.sin(angle)
        p, q = p * cosine + q * sine, q * cosine - p * sine
    return (np.hypot(p / rx, q / ry) - 1.0) * min(rx, ry)


def _stack(u: Array, v: Array, parts: list[tuple[Array, Array]], light: float, rng: Random) -> Item:
    """Paint parts (implicit (h, w), colour (3,) or (h, w, 3)) over each other, then grain and a slope of light."""
    colours, alpha = np.zeros((*u.shape, 3), dtype=np.float32), np.zeros(u.shape, dtype=np.float32)
    for implicit, colour in parts:
        share = _coverage(implicit)
        colours += (colour - colours) * share[..., None]
        alpha += (1 - alpha) * share
    with np.errstate(invalid="ignore", divide="ignore"):
        colours = np.where(alpha[..., None] > 1e-6, colours / alpha[..., None], 0.0)
    x = np.linspace(-1.5, 1.5, u.shape[0], dtype=np.float32)
    slope = x[None, :] * math.cos(light) + x[:, None] * math.sin(light)
    lit = 1.0 + 0.22 * slope + 0.18 * (fractal_noise(rng, u.shape, 5.0) - 0.5)
    rows, columns = np.nonzero(alpha > 0)
    drawn = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    return Item(np.clip(colours * lit[..., None], 0.0, 1.0)[drawn], alpha[drawn])


def _mix(first: Array, second: Array, share: Array) -> Array:
    return first + (second - first) * np.clip(share, 0.0, 1.0)[..., None]


def _wave(t: Array, period: float, sharpness: float = 3.0) -> Array:
    return 0.5 + 0.5 * np.tanh(sharpness * np.sin(t * 2 * np.pi / period))


def _spots(u: Array, v: Array, period: float, size: float) -> Array:
    """1 inside dots on a staggered grid, 0 between them."""
    row = np.floor(v / period)
    p = (u / period + 0.5 * (row % 2)) % 1.0 - 0.5
    q = (v / period) % 1.0 - 0.5
    return np.clip((size - np.hypot(p, q)) * 8.0 + 0.5, 0.0, 1.0)


# ---- the six kinds


def _ball(rng: Random, radius: float, light: float) -> Item:
    """A ball of gores, as on a beach, with a highlight."""
    u, v = _grid(rng, radius * 0.9, np.pi, stretch=0.05)
    first, second = palette(rng, 0.0, 2)
    distance = np.hypot(u, v)
    depth = np.sqrt(np.clip(1.0 - distance**2, 0.02, 1.0))
    tilt = rng.uniform(-0.5, 0.5)
    meridian = np.arctan2(u, depth * math.cos(tilt) - v * math.sin(tilt))
    colour = _mix(first, second, _wave(meridian, math.pi / float(rng.choice([2.5, 3.75])), 5.0))
    colour = colour * (0.55 + 0.5 * depth[..., None])
    return _stack(u, v, [(distance - 1.0, colour)], light, rng)


def _butterfly(rng: Random, radius: float, light: float) -> Item:
    """Four wings with dark edges and spots, a thin body."""
    u, v = _grid(rng, radius, np.pi)
    wing, spot, body = palette(rng, 0.6, 3)
    side = np.abs(u)
    fold = rng.uniform(0.75, 1.0)
    upper = _ellipse(side / fold, v, 0.55, -0.35, 0.62, 0.42, -0.6)
    lower = _ellipse(side / fold, v, 0.42, 0.45, 0.45, 0.36, 0.5)
    wings = np.minimum(upper, lower)
    upper_dot = _ellipse(side / fold, v, 0.68, -0.45, 0.17, 0.17)
    dots = np.minimum(upper_dot, _ellipse(side / fold, v, 0.47, 0.48, 0.14, 0.14))
    parts = [
        (wings, wing * 0.3),
        (wings + 0.09, _mix(wing, wing * 0.55, _wave(np.arctan2(v, side), 0.35))),
        (dots, spot),
        (_ellipse(u, v, 0.0, 0.05, 0.09, 0.62), body * 0.45),
    ]
    return _stack(u, v, parts, light, rng)


def _fish(rng: Random, radius: float, light: float) -> Item:
    """A scaled body with a forked tail, fins and an eye."""
    u, v = _grid(rng, radius, 0.7)
    body, fin, belly = palette(rng, 0.08, 3)
    height = rng.uniform(0.38, 0.52)
    hull = _ellipse(u, v, 0.12, 0.0, 0.82, height)
    spread = 0.12 + 0.75 * np.clip(-u - 0.55, 0.0, 1.0)
    tail = np.maximum(np.maximum(np.abs(v) - spread, -u - 1.0 - 0.35 * np.abs(v)), u + 0.5)
    top = np.maximum(_ellipse(u, v, 0.05, -height, 0.38, 0.28), v + 0.2)
    scales = _spots(u, v, 0.26, 0.42)
    skin = _mix(_mix(body * 0.6, body, scales), belly, (v / height - 0.1) * 1.5)
    parts = [
        (tail, _mix(fin, fin * 0.55, _wave(v / (0.3 + np.abs(u)), 0.22))),
        (top, _mix(fin, fin * 0.55, _wave(u, 0.18))),
        (hull, skin),
        (_ellipse(u, v, 0.62, -0.1, 0.12, 0.12), np.array([0.95, 0.95, 0.92])),
        (_ellipse(u, v, 0.64, -0.1, 0.06, 0.06), np.array([0.05, 0.05, 0.08])),
    ]
    return _stack(u, v, parts, light, rng)


def _leaf(rng: Random, radius: float, light: float) -> Item:
    """A pointed blade with a midrib, side veins and a stalk."""
    u, v = _grid(rng, radius, np.pi)
    blade, vein = palette(rng, 0.3, 2)
    width = rng.uniform(0.38, 0.55)
    bend = u + 0.15 * np.sin(2.0 * v)
    along = np.clip((v + 0.95) / 1.7, 0.0, 1.0)
    outline = width * np.sin(np.pi * along**0.8) ** 0.9 * (1 + 0.06 * np.sin(v * 28.0))
    hull = np.maximum(np.abs(bend) - outline, np.abs(v + 0.1) - 0.85)
    veins = np.exp(-(((v + 0.75 * np.abs(bend)) % 0.27 - 0.135) ** 2) / 0.0016)
    colour = _mix(blade, vein, 0.8 * veins)
    rib = np.maximum(np.abs(bend) - 0.045, np.abs(v - 0.05) - 0.95)
    return _stack(u, v, [(rib, vein), (hull, colour), (np.maximum(rib, hull), vein)], light, rng)


def _mug(rng: Random, radius: float, light: float) -> Item:
    """A banded cylinder seen from above its rim, with a handle."""
    u, v = _grid(rng, radius, 0.35, stretch=0.12)
    body, band, inside = palette(rng, 0.47, 3)
    left, right, taper = -0.75, 0.45, 0.08 * v
    middle, half = (left + right) / 2, (right - left) / 2
    around = np.clip((u - middle) / (half - taper), -1.0, 1.0)
    wall = np.minimum(
        np.maximum(np.abs(u - middle) - half + taper, np.abs(v - 0.05) - 0.72),
        _ellipse(u, v, middle, 0.77, half - 0.06, 0.17),
    )
    outer, inner = _ellipse(u, v, right, 0.05, 0.48, 0.46), _ellipse(u, v, right, 0.05, 0.30, 0.28)
    bands = _wave(v - 0.12 * np.sqrt(1 - around**2), rng.uniform(0.4, 0.6), 6.0)
    shade = (0.62 + 0.45 * np.sqrt(1 - (0.9 * around) ** 2))[..., None]
    parts = [
        (np.maximum(outer, -inner), body * 0.75),
        (wall, _mix(body, band, bands) * shade),
        (_ellipse(u, v, middle, -0.66, half + 0.05, 0.2), body),
        (_ellipse(u, v, middle, -0.66, half - 0.05, 0.13), inside * 0.4),
    ]
    return _stack(u, v, parts, light, rng)


def _mushroom(rng: Random, radius: float, light: float) -> Item:
    """A dotted cap on a pale stem."""
    u, v = _grid(rng, radius, 0.5)
    cap, dot = palette(rng, 0.8, 2)
    stem_colour = palette(rng, 0.1, 1, saturation=(0.05, 0.25), value=(0.6, 0.95))[0]
    girth = rng.uniform(0.18, 0.26)
    stem = np.maximum(np.abs(u) - girth - 0.08 * np.clip(v, 0, 1) ** 2, np.abs(v - 0.4) - 0.55)
    dome = np.maximum(_ellipse(u, v, 0.0, 0.05, 0.95, 0.92), v - 0.12 - 0.06 * np.cos(3 * u))
    gills = _ellipse(u, v, 0.0, 0.1, 0.88, 0.16)
    dots = _spots(u / np.sqrt(np.clip(1.15 - u**2, 0.15, 1.0)), v * 1.2, 0.5, 0.3)
    parts = [
        (stem, _mix(stem_colour, stem_colour * 0.6, np.abs(u) / girth - 0.3)),
        (gills, stem_colour * 0.5),
        (dome, _mix(cap, dot, dots)),
    ]
    return _stack(u, v, parts, light, rng)


CLASSES = ("ball", "butterfly", "fish", "leaf", "mug", "mushroom")
"""The annotated kinds, in the order of their category numbers."""

DRAWN: tuple[Callable[[Random, float, float], Item], ...] = (_ball, _butterfly, _fish, _leaf, _mug, _mushroom)
"""What draws each of :data:`CLASSES`: random state, radius in pixels, direction of the light in radians -> item."""
