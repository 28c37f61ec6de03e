"""Every kind of image that a data set may hold, through the mapper and the loaders that training uses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode, get_cfg
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode
from odd_images import HEIGHT, READABLE, UNREADABLE, WIDTH
from PIL import Image
from training_runs import write_coco

from d2_mgd.detection.images import ImageMapper
from d2_mgd.detection.loader import SampleError, TrainLoader, evaluation_pass, rematch_pass

BOX = {"bbox": [4, 5, 20, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "iscrowd": 0}


def config(channels: str = "RGB") -> CfgNode:
    """Images keep their size and are not mirrored."""
    cfg = get_cfg()
    cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP = channels, "none"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (HEIGHT,), HEIGHT
    return cfg


def record(path: Path, **changes: Any) -> dict[str, Any]:
    sized = {"file_name": str(path), "width": WIDTH, "height": HEIGHT, "image_id": 1}
    return {**sized, "annotations": [dict(BOX)], **changes}


def training(path: Path, workers: int = 0, **changes: Any) -> TrainLoader:
    return TrainLoader(
        DatasetFromList([record(path, **changes)], copy=False),
        ImageMapper(config(), is_train=True),
        lambda seed: TrainingSampler(1, seed=seed),
        batch_size=1,
        num_workers=workers,
        group=True,
        seed=0,
    )


def first_sample(loader: Any) -> dict[str, Any]:
    return next(itertools.islice(iter(loader), 1))[0]


@pytest.mark.parametrize("kind", READABLE)
def test_training_sees_the_pixels_that_one_expects(tmp_path: Path, kind: str) -> None:
    write, pixels, _ = READABLE[kind]
    path = write(tmp_path)
    sample = first_sample(training(path))
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), pixels)
    assert sample["file_name"] == str(path)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[4, 5, 24, 15]]
    swapped = ImageMapper(config("BGR"), is_train=False)(record(path))
    assert np.array_equal(swapped["image"].permute(1, 2, 0).numpy(), pixels[..., ::-1])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["truncated jpeg", "truncated png", "32-bit numbers"])
def test_an_unreadable_image_is_named_by_every_loader(tmp_path: Path, kind: str, workers: int) -> None:
    path = UNREADABLE[kind][0](tmp_path)
    records, mapper = DatasetFromList([record(path)], copy=False), ImageMapper(config(), is_train=False)
    rematch = rematch_pass(records, mapper, num_images=1, batch_size=1, num_workers=workers, seed=(0,))
    for loader in (training(path, workers), rematch, evaluation_pass(records, mapper, workers)):
        with pytest.raises(SampleError, match=rf"^cannot read {path}: ") as caught:
            first_sample(loader)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_every_unreadable_image_is_named(tmp_path: Path, kind: str) -> None:
    path = UNREADABLE[kind][0](tmp_path)
    with pytest.raises(SampleError, match=rf"^cannot read {path}: "):
        first_sample(training(path))


@pytest.mark.parametrize("kind", ["colour", "16-bit png"])
def test_another_size_than_the_json_says_is_named(tmp_path: Path, kind: str) -> None:
    path = READABLE[kind][0](tmp_path)
    with pytest.raises(SampleError, match=rf"^cannot read {path}: .* for image {path}, got"):
        first_sample(training(path, width=HEIGHT, height=WIDTH))


@pytest.mark.parametrize("width", [600, 20_000])
def test_one_pixel_high_is_trained_on_while_something_is_left_of_it(tmp_path: Path, width: int) -> None:
    path = tmp_path / "long.png"
    Image.fromarray(np.full((1, width, 3), 7, np.uint8)).save(path)
    box = {**BOX, "bbox": [0, 0, width, 1]}
    loader = training(path, width=width, height=1, annotations=[box])
    if width == 600:  # 1333 x 2
        assert first_sample(loader)["image"].shape == (3, 2, 1333)
    else:
        with pytest.raises(RuntimeError, match=rf"mapper failed on {path}$"):
            first_sample(loader)


@pytest.mark.parametrize("box", [[1, 2, float("nan"), 4], [1, float("inf"), 3, 4], [9, 9, -3, 4]])
def test_a_box_that_is_none_is_named_in_sets_of_other_formats_too(tmp_path: Path, box: list[float]) -> None:
    path = READABLE["colour"][0](tmp_path)
    loader = training(path, annotations=[dict(BOX), {**BOX, "bbox": box}])
    with pytest.raises(SampleError, match=rf"{path}: .*the box of its annotation 2 of 2 is not finite or has a neg"):
        first_sample(loader)


def test_crowds_and_boxes_without_area_are_left_out(tmp_path: Path) -> None:
    path = READABLE["colour"][0](tmp_path)
    crowd, flat = {**BOX, "iscrowd": 1, "category_id": 2}, {**BOX, "bbox": [4, 4, 0, 3]}
    sample = first_sample(training(path, annotations=[crowd, dict(BOX), flat]))
    assert sample["instances"].gt_classes.tolist() == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_in_order(tmp_path: Path, workers: int) -> None:
    path = READABLE["colour"][0](tmp_path)
    records = DatasetFromList([record(path, image_id=number) for number in range(5)], copy=False)
    loader = evaluation_pass(records, ImageMapper(config(), is_train=False), workers)
    assert [[sample["image_id"] for sample in batch] for batch in loader] == [[0], [1], [2], [3], [4]]
    assert len(loader) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_before_evaluation_is_named(
    workplace: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    import train_net as command_line

    name = f"breaks_in_evaluation_{workers}"
    path, root = write_coco(tmp_path, name, 4, seed=0)
    (root / "002.png").write_bytes((root / "002.png").read_bytes()[:200])
    wanted = ["DATASETS.TEST", f"('{name}',)", "MODEL.WEIGHTS", workplace.teacher_weights]
    wanted += ["DATALOADER.NUM_WORKERS", workers]
    arguments = workplace.arguments(tmp_path / "out", *wanted, flags=("--eval-only",))
    arguments[arguments.index(str(workplace.config))] = str(workplace.teacher_config)
    with pytest.raises(SystemExit) as caught:
        command_line.main(["--register-coco", name, str(path), str(root), *arguments])
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert lines == [f"train_net.py: error: cannot read {root / '002.png'}: image file is truncated."]
