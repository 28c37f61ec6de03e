"""A set with every kind of fault: each is named, counted and shown, and nothing else is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_dataset import main
from odd_images import HEIGHT, READABLE, UNREADABLE, WIDTH
from PIL import Image
from training_runs import Workplace, write_coco

ROOT = Path(__file__).resolve().parents[2]
LAST = "{} kinds of errors, {} kinds of warnings, {} kinds of notes"


def checked(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    """Exit status and standard output of the command line."""
    status = main([str(word) for word in words])
    return status, capsys.readouterr().out


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> tuple[Path, Path]:
    """Six valid images after ``change`` of their json."""
    path, root = write_coco(folder, "set", 6, seed=0)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path, root


def first(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["annotations"][0].update(values)


def first_image(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["images"][0].update(values)


def test_nothing_wrong(tmp_path: Path, capsys: Any) -> None:
    path, root = write_coco(tmp_path, "fish", 6, seed=0)
    status, text = checked(capsys, path, root, "--workers", 2)
    assert status == 0
    assert text.splitlines() == [f"fish: {path} with 6 images in {root}", f"fish: {LAST.format(0, 0, 0)}"]


# what is changed -> the line that counts it, words of the example, (errors, warnings, notes)
ANNOTATIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str, tuple[int, int, int]]] = {
    "nan": (
        first(bbox=[1, 2, float("nan"), 4]),
        "error: annotations with a box that is not finite or has a negative side: 1 of 9 annotations",
        "annotation 1 of image 000.png has a box that is not finite or has a negative side: [1, 2, nan, 4]",
        (1, 0, 0),
    ),
    "infinite": (
        first(bbox=[1, float("inf"), 3, 4]),
        "error: annotations with a box that is not finite",
        "inf",
        (1, 0, 0),
    ),
    "huge": (first(bbox=[1, 10**400, 3, 4]), "error: annotations with a box that is not finite", "000 ...", (1, 0, 0)),
    "negative": (first(bbox=[9, 9, -3, 4]), "error: annotations with a box that is not finite", "-3", (1, 0, 0)),
    "without area": (
        first(bbox=[9, 9, 0, 4]),
        "warning: annotations with a box without area",
        "is left out",
        (0, 1, 0),
    ),
    "outside": (
        first(bbox=[90, 10, 30, 20]),
        "error: annotations with a box outside its image: 1 of 9 annotations",
        "reaches 24 pixels beyond the 96 x 64 image",
        (1, 0, 0),
    ),
    "crowd": (first(iscrowd=1), "note: crowds: 1 of 9 annotations", "is a crowd: not trained on", (0, 0, 1)),
    "unknown category": (
        first(category_id=77),
        "error: annotations with an unknown category: 1 of 9 annotations",
        "annotation 1 of image 000.png has an unknown category, 77",
        (1, 0, 0),
    ),
    "category that is none": (
        first(category_id=[1]),
        "error: annotations without a valid category_id: 1 of 9 annotations",
        "annotation 1 has no valid category_id: [1]",
        (1, 0, 1),  # and an image without annotations
    ),
    "image that is none": (
        lambda content: content["annotations"][0].pop("image_id"),
        "error: annotations without a valid image_id: 1 of 9 annotations",
        "annotation 1 has no valid image_id: None",
        (1, 0, 1),
    ),
    "unknown image": (
        first(image_id=99),
        "warning: annotations of an image that is not in the set: 1 of 9 annotations",
        "annotation 1 belongs to image 99",
        (0, 1, 1),  # and an image without annotations
    ),
    "id twice": (
        lambda content: content["annotations"][1].update(id=1),
        "error: annotation ids that are used twice: 1 of 9 annotations",
        "annotation 1 of image 001.png shares its id",
        (1, 0, 0),
    ),
    "image id twice": (
        lambda content: content["images"][1].update(id=1),
        "error: image ids that are used twice: 1 of 6 images",
        "two images with the id 1",
        (1, 1, 0),  # and its annotations belong to nothing
    ),
    "image listed twice": (
        lambda content: content["images"][3].update(file_name="000.png"),
        "warning: images listed more than once: 1 of 6 images",
        "the image 000.png is listed more than once",
        (0, 1, 0),
    ),
    "category id twice": (
        lambda content: content["categories"].append({"id": 1, "name": "again"}),
        "error: category ids that are used twice: 1 of 4 categories",
        "two categories with the id 1",
        (1, 0, 0),
    ),
    "ids of two types": (
        lambda content: content["categories"].append({"id": "1", "name": "text"}),
        "error: ids of categories of two types",
        "some have text",
        (1, 1, 0),
    ),
    "class name twice": (
        lambda content: content["categories"][1].update(name="disc"),
        "warning: class names that are used twice",
        "2 categories of the name 'disc'",
        (0, 1, 0),
    ),
    "class without annotations": (
        lambda content: content["categories"].insert(0, {"id": 0, "name": "thing"}),
        "warning: classes without annotations: 1 of 4 classes",
        "the class 'thing' has no annotation",
        (0, 1, 0),
    ),
    "no annotations": (
        lambda content: content.update(annotations=[]),
        "error: nothing to train on",
        "has no annotation to train on",
        (1, 0, 0),
    ),
    "no images": (lambda content: content.update(images=[]), "error: no images", "has no images", (2, 2, 0)),
    "no categories": (
        lambda content: content.update(categories=[]),
        "error: no categories",
        "has no categories",
        (3, 0, 0),
    ),
    "no size": (
        lambda content: content["images"][0].pop("width"),
        "error: images without id, file name or size: 1 of 6 images",
        "'file_name': '000.png'",
        (1, 1, 0),
    ),
    "zero size": (first_image(height=0), "error: images without id, file name or size", "'height': 0", (1, 1, 0)),
    "area for evaluation": (
        first(area=float("nan")),
        "note: annotations with no 'area' that is finite and not negative, which evaluation needs: 1 of 9 annotations",
        "annotation 1 of image 000.png",
        (0, 0, 1),
    ),
}


@pytest.mark.parametrize("case", ANNOTATIONS)
def test_what_the_json_says_wrong_is_named_and_counted(tmp_path: Path, capsys: Any, case: str) -> None:
    change, counted, example, numbers = ANNOTATIONS[case]
    path, root = changed(tmp_path, change)
    if case == "image listed twice":  # of the same size, as the same file is
        shutil.copy(root / "000.png", root / "003.png")
    status, text = checked(capsys, path, root)
    assert status == (1 if numbers[0] else 0)
    assert any(line.strip().startswith(counted) for line in text.splitlines()), text
    assert example in text
    assert text.splitlines()[-1] == f"set: {LAST.format(*numbers)}"


def test_many_of_a_kind_are_counted_and_few_shown(tmp_path: Path, capsys: Any) -> None:
    path, root = changed(tmp_path, lambda content: [a.update(category_id=77) for a in content["annotations"]])
    _, text = checked(capsys, path, root)
    assert "9 of 9 annotations\n" in text and text.count("has an unknown category, 77") == 5 and "and 4 more" in text


NO_COCO = {
    "cut": ('{"images": [', "is not readable json"),
    "list": ("[1]", "not in COCO's format"),
    "bytes": ("\xff", "is not readable json"),
    "deep": ("[" * 100_000, "is not readable json"),
    "annotations": ('{"images": [], "categories": [], "annotations": {}}', "its annotations are no list"),
}


@pytest.mark.parametrize("case", NO_COCO)
def test_a_json_that_is_none(tmp_path: Path, capsys: Any, case: str) -> None:
    text, reason = NO_COCO[case]
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin1"))
    status, out = checked(capsys, path, tmp_path)
    assert status == 1 and out.startswith("a: error: ") and reason in out and out.count("\n") == 1


def image_set(folder: Path, kind: str) -> tuple[Path, Path, Path]:
    """A json, an image folder and in it one image of a kind."""
    path, root = changed(folder, lambda content: None)
    write = {**{k: v[0] for k, v in READABLE.items()}, **{k: v[0] for k, v in UNREADABLE.items()}}[kind]
    odd = write(root)
    content = json.loads(path.read_text())
    content["images"].append({"id": 7, "file_name": odd.name, "width": WIDTH, "height": HEIGHT})
    content["annotations"].append({"id": 99, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12})
    path.write_text(json.dumps(content))
    return path, root, odd


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, capsys: Any, kind: str) -> None:
    path, root, odd = image_set(tmp_path, kind)
    status, text = checked(capsys, path, root)
    counted_as, reason = UNREADABLE[kind][1:]
    assert status == 1 and text.splitlines()[-1] == f"set: {LAST.format(1, 0, 0)}"
    line, example = text.splitlines()[1:3]
    assert line.startswith("  error: ") and counted_as in line and line.endswith(": 1 of 7 images")
    assert example.strip().startswith(f"{odd} ") and reason in example


@pytest.mark.parametrize("kind", READABLE)
def test_what_training_does_with_an_odd_image_is_told(tmp_path: Path, capsys: Any, kind: str) -> None:
    path, root, odd = image_set(tmp_path, kind)
    status, text = checked(capsys, path, root)
    assert status == 0 and "error:" not in text and "warning:" not in text
    note = READABLE[kind][2]
    assert any(str(odd) in line and note in line for line in text.splitlines()) if note else "note:" not in text


def test_sizes_that_differ_are_named(tmp_path: Path, capsys: Any) -> None:
    path, root, odd = image_set(tmp_path, "EXIF 6")
    content = json.loads(path.read_text())
    content["images"][-1].update(width=HEIGHT, height=WIDTH)
    content["images"][0].update(width=95)
    path.write_text(json.dumps(content))
    status, text = checked(capsys, path, root)
    assert status == 1
    assert "error: images of another size than in the json: 2 of 7 images" in text
    assert f"{root / '000.png'} has 96 x 64 pixels, but 95 x 64 in the json\n" in text
    assert f"{odd} has {WIDTH} x {HEIGHT} pixels, but {HEIGHT} x {WIDTH} in the json, its size before the EXIF" in text


def test_missing_images_are_named_and_the_others_still_read(tmp_path: Path, capsys: Any) -> None:
    path, root, odd = image_set(tmp_path, "empty")
    (root / "002.png").unlink()
    (root / "003.png").unlink()
    status, text = checked(capsys, path, root)
    assert status == 1
    assert f"error: missing images: 2 of 7 images\n    the image {root / '002.png'} does not exist" in text
    assert f"{odd} is an empty file" in text


@pytest.mark.parametrize(("width", "numbers"), [(20_000, (1, 0, 0)), (600, (0, 1, 0))])
def test_images_of_extreme_shape_are_named(tmp_path: Path, capsys: Any, width: int, numbers: Any) -> None:
    path, root = changed(tmp_path, first_image(width=width, height=1))
    Image.fromarray(np.zeros((1, width, 3), np.uint8)).save(root / "000.png")
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [0, 0, 30, 1]
    path.write_text(json.dumps(content))
    status, text = checked(capsys, path, root)
    assert status == numbers[0] and text.splitlines()[-1] == f"set: {LAST.format(*numbers)}"
    assert f"the image 000.png of {width} x 1 pixels becomes 1333 x " in text


# --- names that leave the image folder ---


@pytest.mark.parametrize("how", ["dots", "absolute", "link"])
def test_names_that_leave_the_folder_are_refused_unless_allowed(tmp_path: Path, capsys: Any, how: str) -> None:
    secret = tmp_path / "secret.png"
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(secret)
    name = {"dots": "../secret.png", "absolute": str(secret), "link": "link.png"}[how]
    path, root = changed(tmp_path, first_image(file_name=name))
    if how == "link":
        (root / "link.png").symlink_to(secret)
    status, text = checked(capsys, path, root)
    assert status == 1 and f"the image {name} leads to {secret}, outside the image folder {root}" in text
    assert "--allow-outside-root" in text
    status, text = checked(capsys, path, root, "--allow-outside-root")
    assert status == 0 and text.splitlines()[-1] == f"set: {LAST.format(0, 0, 0)}"


# --- the command line ---


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is nothing to check: give JSON IMAGES, --register-coco, --register-yolo or --register-voc."),
        (["a.json"], "give JSON IMAGES alone"),
        (["a.json", "b", "--register-coco", "n", "j", "i"], "give JSON IMAGES alone"),
        (["a.json", "b", "--workers", "0"], "--workers must be at least 1, got 0."),
        (["a.json", "."], "a.json does not exist."),
        ([__file__, "b"], "b does not exist."),
        (["--register-voc", "n", "VOC", "train"], "VOC does not exist."),
    ],
)
def test_a_command_line_that_cannot_work(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    monkeypatch.setattr("sys.argv", ["bin/d2-mgd-check"])
    assert main(words) == 2
    text = capsys.readouterr().err
    assert text.startswith("d2-mgd-check: error: ") and sentence in text and text.count("\n") == 1


def test_several_sets_without_detectron2(tmp_path: Path) -> None:
    one, other = (write_coco(tmp_path, name, 3, seed=0) for name in ("one", "other"))
    (other[1] / "001.png").write_bytes(b"")
    code = (
        "import sys; sys.modules['detectron2'] = None; sys.path.insert(0, 'tools'); import check_dataset;"
        "sys.exit(check_dataset.main(sys.argv[1:]))"
    )
    words = ["--register-coco", "first", *map(str, one), "--register-coco", "second", *map(str, other)]
    run = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stderr
    assert f"first: {LAST.format(0, 0, 0)}" in run.stdout and f"second: {LAST.format(1, 0, 0)}" in run.stdout
    assert "decoding" in run.stderr and "3/3" in run.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    return Workplace(tmp_path_factory.mktemp("workplace"))


def test_sets_are_checked_for_their_use_at_the_configs_sizes(workplace: Workplace, tmp_path: Path, capsys: Any) -> None:
    trained, evaluated = write_coco(tmp_path, "used_train", 3, seed=0), write_coco(tmp_path, "used_test", 3, seed=0)
    for path, _ in (trained, evaluated):
        content = json.loads(path.read_text())
        content["annotations"][0].pop("area")
        path.write_text(json.dumps(content))
    words = ["--register-coco", "used_train", *trained, "--register-coco", "used_test", *evaluated]
    words += ["--config-file", workplace.config, "DATASETS.TRAIN", "('used_train',)", "DATASETS.TEST"]
    status, text = checked(capsys, *words, "('used_test',)")
    assert status == 1
    assert f"used_train: {LAST.format(0, 0, 1)}" in text and "error: annotations with no 'area'" in text
    status, text = checked(capsys, *words, "()", "INPUT.MAX_SIZE_TRAIN", "15")
    assert "warning: long and narrow images: 3 of 3 images" in text
    status, text = checked(capsys, *words, "()", "MODEL.MASK_ON", "True")
    assert status == 1 and "error: annotations with no segmentation, which MODEL.MASK_ON needs: 4 of 4" in text


def test_a_config_that_cannot_work(workplace: Workplace, capsys: Any) -> None:
    words = ["--config-file", str(workplace.config), "--register-coco", "known", "j", "i"]
    assert main([*words, "DATASETS.TRAIN", "('unheard_of',)"]) == 2
    assert "there is no data set 'unheard_of'" in capsys.readouterr().err
    assert main([*words, "MGD.NONSENSE", "1"]) == 2
    assert "MGD.NONSENSE" in capsys.readouterr().err
    assert main([*words, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]) == 2
    assert "names no data set in COCO's format" in capsys.readouterr().err
