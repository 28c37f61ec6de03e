"""A folder of images with every kind of fault: each is named, and nothing else is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from check_imagefolder import check_folder, main
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from d2_mgd.data.class_folders import EXTENSIONS, find_folders
from d2_mgd.data.images import inspect_image
from d2_mgd.errors import UserError

CLASSES = ("auk", "bittern", "crane")


def _image(path: Path, mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("valid", 2)):
        for name in CLASSES:
            for number in range(count):
                _image(tmp_path / split / name / f"{number}.jpg", seed=number)
    return tmp_path


def test_nothing_wrong(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root), "--workers", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: 9 images of 3 classes, 3 to 3 a class"
    assert lines[1] == "valid: 6 images of 3 classes, 2 to 2 a class"
    assert lines[2].endswith("no problem")


def test_unreadable_images_are_named_with_the_reason(root: Path) -> None:
    folder = root / "train" / "auk"
    whole = _image(folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "page.jpeg").write_text("<html>not found</html>")
    (folder / "gone.jpg").symlink_to(root / "nowhere.jpg")
    png = _image(folder / "damaged.png").read_bytes()
    (folder / "damaged.png").write_bytes(png[:60] + bytes(40) + png[100:])
    for workers in (1, 3):
        report = check_folder(root, workers)
        reasons = {Path(path).name: reason for path, reason in report.splits["train"].unreadable.items()}
        assert reasons.keys() == {"cut.jpg", "empty.png", "page.jpeg", "gone.jpg", "damaged.png"}
        assert "truncated" in reasons["cut.jpg"]
        assert reasons["empty.png"] == "is an empty file"
        assert reasons["page.jpeg"] == "is not an image format that Pillow can read"
        assert reasons["gone.jpg"] == "does not exist"
        assert len(report.problems) == 5
        assert any(problem.startswith("train/auk/cut.jpg cannot be read: ") for problem in report.problems)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "LA", "CMYK"])
def test_unusual_images_are_fine(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    assert inspect_image(_image(tmp_path / f"image.{suffix}", mode)).error == ""


def test_cut_short_anywhere(tmp_path: Path) -> None:
    whole = _image(tmp_path / "image.jpg").read_bytes()
    for keep in range(0, len(whole) - 2, 97):  # without its last two bytes, the end marker, a JPEG is still whole
        (tmp_path / "image.jpg").write_bytes(whole[:keep])
        assert inspect_image(tmp_path / "image.jpg").error, keep


def test_classes_that_differ(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "valid" / "crane").rename(root / "crane")
    assert main([str(root)]) == 0  # what a split lacks, a training accepts
    assert "note: valid lacks 1 of the 3 classes of train" in capsys.readouterr().out
    (root / "crane").rename(root / "valid" / "dunlin")
    _image(root / "test" / "auk" / "0.jpg")
    _image(root / "test" / "bittern" / "0.jpg")
    assert main([str(root)]) == 1
    out = capsys.readouterr().out
    assert "valid lacks 1 of the 3 classes of train (a loader must number classes by train's folders): crane." in out
    assert "valid has 1 class that train lacks: dunlin." in out
    assert "test lacks 1 of the 3 classes of train" in out


def test_empty_classes_and_other_files(root: Path) -> None:
    for path in (root / "train" / "crane").iterdir():
        path.unlink()
    (root / "train" / "crane" / "notes.txt").write_text("none seen")
    _image(root / "train" / "stray.jpg")
    report = check_folder(root)
    assert report.problems == ["train has 1 class without an image: crane."]
    assert report.splits["train"].ignored_files == ["train/crane/notes.txt", "train/stray.jpg"]


def test_folders_below_a_class_and_links_in_a_circle(root: Path) -> None:
    _image(root / "train" / "auk" / "more" / "9.JPG")
    (root / "train" / "auk" / "more" / "back").symlink_to(root / "train" / "auk")
    report = check_folder(root)
    assert report.problems == []
    assert report.splits["train"].images_per_class["auk"] == 4


def test_the_training_sees_the_images_that_the_check_counts(root: Path) -> None:
    """Loops, two ways to one folder, links to other classes, hidden folders, and folders below a class."""
    train = root / "train"
    _image(train / ".ipynb_checkpoints" / "0.jpg")
    _image(train / "auk" / ".trash" / "deep" / "0.jpg")
    _image(train / "auk" / "more" / "deep" / "9.jpg")
    (train / "auk" / "loop").symlink_to(".")
    (train / "auk" / "also").symlink_to("more")
    (train / "bittern" / "up").symlink_to("..")
    (train / "dunlin").symlink_to("crane")
    report = check_folder(root)
    found, _ = find_folders(root)
    counts = {name: int((found.targets == number).sum()) for number, name in enumerate(found.classes)}
    assert (
        report.splits["train"].images_per_class == counts == {"auk": 4, "bittern": 3 + 4 + 3, "crane": 3, "dunlin": 3}
    )
    assert report.splits["train"].ignored_files == ["train/.ipynb_checkpoints"]
    assert all(found.path(index).is_file() for index in range(len(found)))


def test_missing_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent")]) == 2
    assert "absent is not a folder" in capsys.readouterr().err
    _image(tmp_path / "train" / "auk" / "0.jpg")
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "has neither valid/ nor val/" in out
    assert "train has 1 class folder;" in out
    (tmp_path / "train").rename(tmp_path / "val")
    assert main([str(tmp_path)]) == 1
    assert "has no train/" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that this user cannot read")
def test_folder_that_cannot_be_listed(root: Path) -> None:
    closed = root / "train" / "auk" / "closed"
    closed.mkdir(mode=0o000)
    assert check_folder(root).problems == ["train/auk/closed cannot be listed: Permission denied."]
    with pytest.raises(UserError, match=r"train/auk/closed cannot be listed: Permission denied\.$"):
        find_folders(root)


def test_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "valid" / "auk" / "bad.jpg").write_bytes(b"bad")
    assert main([str(root), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["problems"] == ["valid/auk/bad.jpg is not an image format that Pillow can read."]
    assert report["splits"]["valid"]["unreadable"] == {
        "valid/auk/bad.jpg": "is not an image format that Pillow can read"
    }
    assert report["splits"]["valid"]["num_images"] == 7
    assert report["splits"]["train"]["images_per_class"] == {"auk": 3, "bittern": 3, "crane": 3}


def test_same_extensions_as_torchvision() -> None:
    assert set(EXTENSIONS) == set(IMG_EXTENSIONS)
