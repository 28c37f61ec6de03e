"""Rendered scenes: what is annotated is there, is visible, and follows from the seed; the files are COCO's format."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from demos import scenes
from demos.scene_items import DRAWN, Item, fractal_noise
from demos.scenes import CLASSES, render_scene, write_scenes
from PIL import Image
from pycocotools.coco import COCO


@functools.cache
def _scenes(count: int, width: int = 96, height: int = 96) -> list:
    return [render_scene(np.random.default_rng(seed), width, height) for seed in range(count)]


@pytest.mark.parametrize(("width", "height"), [(96, 96), (80, 128)])
def test_boxes_lie_in_the_image_and_hold_their_pixels(width: int, height: int) -> None:
    for image, objects in _scenes(40 if width == 96 else 10, width, height):
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        for thing in objects:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            assert 12 <= thing.area <= (x1 - x0) * (y1 - y0)


def test_scenes_are_varied() -> None:
    drawn = _scenes(60)
    objects = [thing for _, found in drawn for thing in found]
    assert {thing.category for thing in objects} == set(range(len(CLASSES)))
    sides = [max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]) for thing in objects]
    assert np.percentile(sides, 95) > 1.6 * np.percentile(sides, 5)
    assert len({len(found) for _, found in drawn}) == scenes.MOST_ITEMS
    # never flat: the pixels of the corners, which mostly show the ground, differ within a scene
    assert all(image[:24, :24].astype(float).std(axis=(0, 1)).max() > 2.0 for image, _ in drawn)


def test_no_object_covers_another(monkeypatch: pytest.MonkeyPatch) -> None:
    painted: list[np.ndarray] = []

    def paint(colours: np.ndarray, item: Item, window: tuple[slice, slice], light: float) -> None:
        painted.append(np.zeros(colours.shape[:2], dtype=int))
        painted[-1][window] = item.alpha > 0.5

    monkeypatch.setattr(scenes, "_paint", paint)
    for seed in range(20):
        painted.clear()
        _, found = render_scene(np.random.default_rng(seed))
        assert [thing.area for thing in found] == [mask.sum() for mask in painted]
        assert np.sum(painted, axis=0).max() == 1


@pytest.mark.parametrize("category", range(len(CLASSES)))
def test_the_largest_items_fit_into_a_scene(category: int) -> None:
    for seed in range(100):
        item = DRAWN[category](np.random.default_rng(seed), 96 * scenes.RADIUS[1], 0.0)
        assert max(item.alpha.shape) <= 96


def test_the_same_seed_gives_the_same_scene() -> None:
    first, objects = render_scene(np.random.default_rng(5))
    again, same = render_scene(np.random.default_rng(5))
    other, _ = render_scene(np.random.default_rng(6))
    assert (first == again).all()
    assert objects == same
    assert (first != other).any()


@pytest.mark.parametrize("category", range(len(CLASSES)))
@pytest.mark.parametrize("radius", [8.0, 40.0])
def test_items_are_whole_and_have_a_texture(category: int, radius: float) -> None:
    for seed in range(4):
        item = DRAWN[category](np.random.default_rng(seed), radius, 1.0)
        assert item.colours.shape == (*item.alpha.shape, 3)
        assert np.isfinite(item.colours).all()
        assert item.alpha.min() >= 0.0
        assert item.alpha.max() <= 1.0
        assert all(line.max() > 0 for line in (item.alpha[0], item.alpha[-1], item.alpha[:, 0], item.alpha[:, -1]))
        inside = item.colours[item.alpha > 0.5]
        assert len(inside) > 0.2 * radius**2
        assert inside.std(axis=0).max() > 0.03


def test_edges_are_anti_aliased() -> None:
    item = DRAWN[0](np.random.default_rng(0), 30.0, 0.0)
    partial = (item.alpha > 0.05) & (item.alpha < 0.95)
    assert 60 < partial.sum() < 0.25 * item.alpha.size


def test_noise_fills_its_range_smoothly() -> None:
    noise = fractal_noise(np.random.default_rng(0), (64, 96), 32.0)
    assert noise.shape == (64, 96)
    assert 0.0 <= noise.min() < 0.35
    assert 0.65 < noise.max() <= 1.0
    assert np.abs(np.diff(noise, axis=0)).mean() < 0.1


def test_files_are_a_coco_data_set(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    sizes = {"train": 5, "test": 3}
    paths = write_scenes(tmp_path, sizes, seed=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 8) for number in range(1, 9)]
    for split, count in (("train", 5), ("test", 3)):
        description, images = paths[split]
        coco = COCO(str(description))
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
        assert len(coco.getImgIds()) == count
        for record in coco.loadImgs(coco.getImgIds()):
            with Image.open(images / record["file_name"]) as image:
                assert image.size == (record["width"], record["height"])
        ids = [annotation["id"] for annotation in coco.dataset["annotations"]]
        assert len(set(ids)) == len(ids) > count
    assert json.loads(paths["train"][0].read_text()) != json.loads(paths["test"][0].read_text())


def test_a_longer_split_starts_with_a_shorter_one(tmp_path: Path) -> None:
    short = write_scenes(tmp_path / "short", {"train": 2}, seed=3)["train"][1]
    long = write_scenes(tmp_path / "long", {"test": 1, "train": 4}, seed=3)["train"][1]
    for name in ("000000.jpg", "000001.jpg"):
        assert (short / name).read_bytes() == (long / name).read_bytes()
    other = write_scenes(tmp_path / "other", {"train": 1}, seed=4)["train"][1]
    assert (short / "000000.jpg").read_bytes() != (other / "000000.jpg").read_bytes()
