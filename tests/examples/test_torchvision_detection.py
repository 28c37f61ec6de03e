"""The core in torchvision's RetinaNet, without Detectron2: end to end, and the parts that could go wrong quietly."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_format import CocoImages, evaluate, show_detections
from PIL import Image
from torch import Tensor, nn
from torchvision_detection import FpnDistillation, build_detector, main

from d2_mgd.distill import load_reports

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "torchvision_detection.py"


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """Two sizes of images, ids with gaps, a crowd, an image without annotations."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    records, annotations = [], []
    for key, (width, height) in enumerate([(96, 64), (64, 64), (64, 96), (64, 64)], start=11):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(images / f"{key}.png")
        records.append({"id": key, "file_name": f"{key}.png", "width": width, "height": height})
        if key < 14:
            for category, box in ((3, [4, 8, 30, 20]), (70, [20.5, 30, 24, 32])):
                annotations.append(_thing(len(annotations) + 1, key, category, box))
    annotations.append(_thing(90, 11, 3, [1, 1, 60, 60], iscrowd=1))
    categories = [{"id": 70, "name": "pear"}, {"id": 3, "name": "apple"}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": categories}))
    return path, images


def _thing(key: int, image: int, category: int, box: list[float], iscrowd: int = 0) -> dict:
    return {
        "id": key, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": iscrowd
    }  # fmt: skip


def test_demo_end_to_end_without_detectron2(tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()  # as where Detectron2 cannot be installed: importing it fails
    (tmp_path / "without" / "detectron2.py").write_text("raise ImportError('this machine has no Detectron2')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "without")}
    command = [sys.executable, str(EXAMPLE), "--demo", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["network"] for row in rows] == ["teacher", "student alone", "student distilled"]
    assert all(0 <= row["AP"] <= row["AP50"] <= 100 for row in rows)
    assert rows[1]["parameters"] == rows[2]["parameters"] < rows[0]["parameters"]
    report = (tmp_path / "report.md").read_text()
    assert all(f"| {row['network']} | {row['AP']:.1f} |" in report for row in rows)
    assert report.startswith("# The teacher is worth ")
    assert Image.open(tmp_path / "figures" / "detections.png").width > 500
    first = load_reports(tmp_path / "matching" / "iter_0000000.npz")
    assert set(first) == {"p3", "p4", "p5"}


def test_own_data_and_going_on(data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = map(str, data)
    command = ["--train-json", annotations, "--train-images", images, "--valid-json", annotations]
    command += ["--valid-images", images, "--output", str(tmp_path / "out"), "--device", "cpu", "--size", "64"]
    command += ["--steps", "2", "--batch-size", "2", "--workers", "0"]
    assert main(command) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    stored = torch.load(tmp_path / "out" / "student_distilled.pth", weights_only=True)
    build_detector("student", 2, 64).load_state_dict(stored["model"])  # the plain student and nothing else
    (tmp_path / "out" / "student_distilled.pth").unlink()  # as if interrupted before the last network
    kept = (tmp_path / "out" / "teacher.pth").stat().st_mtime_ns
    assert main(command) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (tmp_path / "out" / "teacher.pth").stat().st_mtime_ns == kept
    assert [row["AP"] for row in again] == [row["AP"] for row in rows]
    weights = torch.load(tmp_path / "out" / "student_distilled.pth", weights_only=True)["model"]
    assert all(torch.equal(weights[key], value) for key, value in stored["model"].items())
    assert main([*command, "--seed", "1"]) == 0  # another run: nothing of the first is used
    assert (tmp_path / "out" / "teacher.pth").stat().st_mtime_ns != kept
    capsys.readouterr()


def test_images_in_coco_format(data: tuple[Path, Path]) -> None:
    images = CocoImages(*data, mirror=False)
    assert (len(images), len(CocoImages(*data, mirror=True))) == (4, 3)
    images.coco.imgToAnns[11].append(_thing(91, 11, 3, [1, 1, 0, 60]))  # of no width
    image, target = images[0]
    assert image.shape == (3, 64, 96) and image.min() >= 0 and image.max() <= 1
    assert target["boxes"].tolist() == [[4, 8, 34, 28], [20.5, 30, 44.5, 62]]
    assert target["labels"].tolist() == [1, 2] and images.names == ["apple", "pear"]
    assert images[3][1]["boxes"].shape == (0, 4)
    mirrored = CocoImages(*data, mirror=True)
    found = {tuple(mirrored[0][1]["boxes"][0].tolist()) for _ in range(20)}
    assert found == {(4, 8, 34, 28), (62, 8, 92, 28)}


class _Perfect(nn.Module):
    """Finds what is annotated, in the order of the data."""

    def __init__(self, data: CocoImages, shift: float) -> None:
        super().__init__()
        self.targets = [data[index][1] for index in range(len(data))]
        self.shift = shift

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        targets, self.targets = self.targets[: len(images)], self.targets[len(images) :]
        return [{**t, "boxes": t["boxes"] + self.shift, "scores": torch.ones(len(t["labels"]))} for t in targets]


def test_average_precision(data: tuple[Path, Path], tmp_path: Path) -> None:
    images = CocoImages(*data, mirror=False)
    assert evaluate(_Perfect(images, 0.0), images, "cpu", 3) == pytest.approx({"AP": 100.0, "AP50": 100.0})
    assert evaluate(_Perfect(images, 40.0), images, "cpu", 3)["AP"] == 0.0
    assert evaluate(_Perfect(images, 3.0), images, "cpu", 3)["AP"] < 60
    figure = show_detections({"perfect": _Perfect(images, 0.0)}, images, "cpu", 0.5)
    drawn = [len(axes.patches) for axes in figure.axes]
    assert drawn[::2] == drawn[1::2] and max(drawn) > 0  # a column of annotations, and an equal one


def test_padding_is_not_data(tmp_path: Path) -> None:
    """The maps of the padded part may hold anything."""
    student, teacher = build_detector("student", 2, 64), build_detector("teacher", 2, 64)
    guide = FpnDistillation(student, teacher, steps=8, weight=1.0, reports=tmp_path)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 128)]
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}] * 2
    student.train()(images, targets)
    guide.losses(images, 0)

    def losses(spoil: float) -> list[float]:
        def spoiled(_module: nn.Module, _inputs: tuple, maps: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: torch.cat([_spoil(level[:1], spoil), level[1:]]) for key, level in maps.items()}

        handle = teacher.backbone.register_forward_hook(spoiled, prepend=True)
        torch.manual_seed(0)
        student(images, targets)
        found = guide.losses(images, 1)
        handle.remove()
        return [loss.item() for loss in found.values()]

    assert losses(0.0) == losses(1e3)


def _spoil(level: Tensor, value: float) -> Tensor:
    half = (level.shape[-1] + 1) // 2  # the first image is half as wide as the batch
    return torch.cat([level[..., :half], torch.full_like(level[..., half:], value)], dim=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --demo, or all of"),
        (["--demo", "--train-json", "x.json"], "give --demo, or all of"),
        (["--train-json", "x.json"], "give --demo, or all of"),
    ],
)
def test_wrong_command_lines(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--output", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_wrong_data(data: tuple[Path, Path], tmp_path: Path) -> None:
    annotations, images = data
    with pytest.raises(SystemExit, match=r"nowhere\.json does not exist"):
        CocoImages(tmp_path / "nowhere.json", images, mirror=False)
    content = json.loads(annotations.read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**content, "categories": [{"id": 3, "name": "apple"}]}))
    given = argparse.Namespace(train=annotations, valid=other, images=images)
    command = ["--train-json", str(given.train), "--train-images", str(images), "--valid-json", str(given.valid)]
    with pytest.raises(SystemExit, match="different categories"):
        main([*command, "--valid-images", str(images), "--output", str(tmp_path / "out")])
    other.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(SystemExit, match="no annotated images"):
        CocoImages(other, images, mirror=True)
    (images / "12.png").unlink()
    with pytest.raises(SystemExit, match=r"12\.png does not exist \(1 such images\)"):
        CocoImages(annotations, images, mirror=False)
