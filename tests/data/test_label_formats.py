"""YOLO's and Pascal VOC's labels in COCO form, and one sentence for each kind of bad input."""

from __future__ import annotations

import contextlib
import io
import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from label_files import write_voc, write_yolo
from odd_images import READABLE
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from training_runs import CLASSES, write_coco

from d2_mgd.data.coco import ERROR, Inspection, inspect_coco
from d2_mgd.data.formats import add_dataset_arguments, label_files
from d2_mgd.data.images import upright_size
from d2_mgd.data.labels import LabelledSet
from d2_mgd.data.voc import read_voc
from d2_mgd.data.yolo import YoloFile, read_yolo
from d2_mgd.errors import UserError


def yolo(path: Path, split: str = "train") -> LabelledSet:
    return read_yolo(YoloFile.open(str(path)), split)


def small_yolo(folder: Path, rows: str | None, **keys: Any) -> Path:
    """One image of 100 x 50 pixels beside its label file."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (100, 50)).save(folder / "a.png")
    if rows is not None:
        (folder / "a.txt").write_text(rows)
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({"train": ".", "names": ["cat", "dog"], **keys}))
    return path


XML = (
    "<annotation><filename>a.png</filename><size><width>100</width><height>50</height></size>"
    "<object><name>{name}</name><difficult>{difficult}</difficult>"
    "<bndbox><xmin>{xmin}</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object></annotation>"
)
VALUES = {"name": "cat", "difficult": 0, "xmin": 11}


def small_voc(folder: Path, xml: str | None, images: tuple[str, ...] = ("a.png",)) -> Path:
    """The folder train with images of 100 x 50 pixels and one xml file."""
    (folder / "train").mkdir(parents=True)
    for name in images:
        Image.new("RGB", (100, 50)).save(folder / "train" / name)
    if xml is not None:
        (folder / "train/a.xml").write_text(xml)
    return folder


def average_precision(content: dict[str, Any], kind: str = "bbox") -> float:
    """pycocotools' AP of detections that are the annotations."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(content))
        truth.createIndex()
        found = [{**a, "score": 0.9} for a in json.loads(json.dumps(content["annotations"])) if not a["iscrowd"]]
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def errors(labelled: LabelledSet) -> list[str]:
    checked, _ = inspect_coco(labelled.content, "set", Inspection(evaluate=True))
    return [str(finding) for finding in [*labelled.findings, *checked] if finding.severity == ERROR]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_coco(tmp_path_factory.mktemp("coco"), "set", 6, seed=3)


@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_images_boxes_and_classes_are_those_of_coco(tmp_path: Path, coco: tuple[Path, Path], form: str) -> None:
    labelled = (
        yolo(write_yolo(tmp_path, *coco)) if form == "yolo" else read_voc(str(write_voc(tmp_path, *coco)), "train")
    )
    expected = json.loads(coco[0].read_text())
    assert not errors(labelled) and not labelled.findings
    assert labelled.content["categories"] == expected["categories"]
    for own, image in zip(labelled.content["images"], expected["images"], strict=True):
        assert {**own, "file_name": Path(own["file_name"]).name} == image
        assert (Path(labelled.image_root) / own["file_name"]).is_file()
    for own, annotation in zip(labelled.content["annotations"], expected["annotations"], strict=True):
        assert own["bbox"] == pytest.approx(annotation.pop("bbox"))
        assert own["area"] == pytest.approx(annotation.pop("area"))
        assert {**annotation, "bbox": own["bbox"], "area": own["area"]} == own
    assert average_precision(labelled.content) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", READABLE)
def test_the_size_of_an_image_is_of_the_upright_one(tmp_path: Path, kind: str) -> None:
    write, pixels, _ = READABLE[kind]
    assert upright_size(write(tmp_path)) == pixels.shape[1::-1]


# --- YOLO ---


def test_polygons_become_masks_with_their_box_and_area(tmp_path: Path) -> None:
    labelled = yolo(small_yolo(tmp_path, "1 0.1 0.2 0.5 0.2 0.1 0.6\n0 0.5 0.5 0.2 0.4\n"))
    triangle, box = labelled.content["annotations"]
    assert triangle["bbox"] == pytest.approx([10, 10, 40, 20]) and triangle["area"] == pytest.approx(400)
    assert triangle["segmentation"] == [pytest.approx([10, 10, 50, 10, 10, 30])]
    assert box["bbox"] == pytest.approx([40, 15, 20, 20]) and "segmentation" not in box
    assert average_precision(labelled.content) == pytest.approx(1.0)
    labelled.content["annotations"].remove(box)
    assert average_precision(labelled.content, "segm") == pytest.approx(1.0)


def test_class_lists_in_any_order(tmp_path: Path) -> None:
    labelled = yolo(small_yolo(tmp_path, "2 0.5 0.5 0.2 0.4\n", names={2: "ant", 0: "cow", 1: "bee"}))
    categories = labelled.content["categories"]
    assert [(category["id"], category["name"]) for category in categories] == [(1, "cow"), (2, "bee"), (3, "ant")]
    assert labelled.content["annotations"][0]["category_id"] == 3


@pytest.mark.parametrize("rows", [None, ""])
def test_an_image_without_labels_is_background(tmp_path: Path, rows: str | None) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("0 0.5 0.5 0.2 0.4")
    labelled = yolo(small_yolo(tmp_path, rows))
    assert len(labelled.content["images"]) == 2 and len(labelled.content["annotations"]) == 1
    said = [str(finding) for finding in labelled.findings]
    assert said == ([] if rows is not None else [
        f"the image {tmp_path / 'a.png'} has no label file {tmp_path / 'a.txt'}: it is background "
        "(1 of 2 images are like this)"
    ])  # fmt: skip


ROWS = {
    "six numbers": ("0 0.5 0.5 0.2 0.4 0.9", r"a.txt, line 1, has 6 numbers; a box has 5 .*, a polygon 7, 9, 11, "),
    "class": ("0 .5 .5 .2 .4\n2 .5 .5 .2 .4", r"line 2, has the class 2, but names has 0 to 1 .* \(1 of 2 rows"),
    "text": ("cat .5 .5 .2 .4", "line 1, is not made of finite numbers: 'cat .5"),
    "nan": ("0 nan .5 .2 .4", "line 1, is not made of finite numbers"),
    "pixels": ("0 50 25 20 20", r"line 1, has 50; coordinates are shares of the image's width and height, from 0 to 1"),
    "outside": ("0 .99 .5 .2 .4", r"has a box outside its image: .* reaches 9 pixels beyond"),
    "bytes": ("\xff", "a.txt cannot be read: 'utf-8' codec"),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_one_sentence(tmp_path: Path, case: str) -> None:
    path = small_yolo(tmp_path, "")
    (tmp_path / "a.txt").write_bytes(ROWS[case][0].encode("latin1"))
    found = errors(yolo(path))
    with pytest.raises(AssertionError, match=ROWS[case][1]):
        raise AssertionError(found[0])
    assert "\n" not in found[0]


def test_a_row_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    labelled = yolo(small_yolo(tmp_path, "0 .5 .5 .2 .4\n\n0 .5 .5 .2 .4\n"))
    assert len(labelled.content["annotations"]) == 1
    assert "line 3, repeats an earlier row and is left out (1 of 2 rows" in str(labelled.findings[0])


YAMLS = {
    "no yaml": ("[", "is not readable yaml"),
    "list": ("[1]", "has no keys"),
    "no names": ("train: .", "names must be a list"),
    "nc": ("{train: ., names: [a, b], nc: 3}", "nc is 3, but names has 2 classes"),
    "norway": ("{train: ., names: [se, no]}", "the name of class 1 is False, not text: put it in quotes"),
    "keys": ("{train: ., names: {a: b}}", "the key 'a', which is not a class number"),
    "no split": ("{names: [a]}", "names no images: set one of train, val"),
    "no folder": ("{train: nowhere, names: [a]}", "train names nowhere, which does not exist in"),
    "path": ("{train: ., path: nowhere, names: [a]}", "its path 'nowhere' is not a folder"),
    "keypoints": ("{train: ., names: [a], kpt_shape: [17, 3]}", "keypoint labels are not supported"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_a_bad_data_yaml_is_one_sentence(tmp_path: Path, case: str) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(YAMLS[case][0])
    with pytest.raises(UserError, match=YAMLS[case][1]) as caught:
        YoloFile.open(str(path))
    assert "\n" not in str(caught.value)


def test_splits_are_folders_lists_and_what_roboflow_exports(tmp_path: Path) -> None:
    small_yolo(tmp_path / "train/images", None)
    (tmp_path / "some.txt").write_text("./train/images/a.png\ntrain/images/gone.png\n")
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"train": "../train/images", "val": ["some.txt"], "names": ["a"]}))
    for split, faults in (("train", 0), ("val", 1)):
        labelled = yolo(path, split)
        assert [image["file_name"] for image in labelled.content["images"]] == ["train/images/a.png"]
        assert len(errors(labelled)) - 1 == faults  # and there is nothing to train on
    assert "gone.png does not exist (1 of 2 images" in errors(labelled)[0]


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    path = small_yolo(tmp_path, "")
    (tmp_path / "a.png").write_bytes(b"no image")
    assert "a.png cannot be read: cannot identify image file" in errors(yolo(path))[0]


# --- Pascal VOC ---


def test_difficult_objects_are_ignored_in_evaluation_and_training(tmp_path: Path) -> None:
    labelled = read_voc(str(small_voc(tmp_path, XML.format(**{**VALUES, "difficult": 1}))), "train")
    (annotation,) = labelled.content["annotations"]
    assert annotation["iscrowd"] == 1 and annotation["bbox"] == [10, 5, 20, 20]
    normal = {**annotation, "id": 2, "iscrowd": 0, "bbox": [50, 5, 20, 20]}
    labelled.content["annotations"].append(normal)
    assert average_precision(labelled.content) == pytest.approx(1.0)  # the difficult one is not found, and not missed
    assert not errors(labelled)


def test_classes_are_those_of_all_splits_unless_listed(tmp_path: Path) -> None:
    folder = small_voc(tmp_path, XML.format(**VALUES))
    (folder / "valid").mkdir()
    (folder / "valid/b.xml").write_text(XML.format(**{**VALUES, "name": "ant"}))
    assert [one["name"] for one in read_voc(str(folder), "train").content["categories"]] == ["ant", "cat"]
    (folder / "classes.txt").write_text("cat\nbee\nant\n")
    assert [one["name"] for one in read_voc(str(folder), "train").content["categories"]] == ["cat", "bee", "ant"]
    (folder / "classes.txt").write_text("bee\n")
    assert (
        "a.xml, object 1, has the class 'cat', which is not in classes.txt" in errors(read_voc(str(folder), "train"))[0]
    )


def test_an_image_without_xml_is_background(tmp_path: Path) -> None:
    labelled = read_voc(str(small_voc(tmp_path, XML.format(**VALUES), images=("a.png", "b.png"))), "train")
    assert [image["file_name"] for image in labelled.content["images"]] == ["train/a.png", "train/b.png"]
    assert "b.png has no label file" in str(labelled.findings[0]) and "(1 of 2 images" in str(labelled.findings[0])


ENTITIES = '<!DOCTYPE a [<!ENTITY b "bb">]><annotation>&b;</annotation>'
XMLS = {
    "size": (XML.replace("width", "wide").format(**VALUES), "a.xml has no size: it needs <size> with <width>"),
    "no xml": ("<annotation>", "a.xml cannot be read: no element found"),
    "entities": (ENTITIES, "a.xml cannot be read: it declares a document type"),
    "box": (XML.replace("bndbox", "box").format(**VALUES), "object 1, has no box of four finite numbers: xmin None"),
    "text": (
        XML.format(**{**VALUES, "xmin": "left"}),
        "object 1, has no box of four finite numbers: xmin left, ymin 6",
    ),
    "name": (XML.format(**{**VALUES, "name": ""}), "object 1, has no name"),
    "negative": (XML.format(**{**VALUES, "xmin": 40}), "has a box that is not finite or has a negative side"),
}


@pytest.mark.parametrize("case", XMLS)
def test_a_bad_xml_file_is_one_sentence(tmp_path: Path, case: str) -> None:
    folder = small_voc(tmp_path, XMLS[case][0])
    (folder / "classes.txt").write_text("cat")
    found = errors(read_voc(str(folder), "train"))
    assert XMLS[case][1] in found[0] and "\n" not in found[0]


def test_a_folder_that_is_no_voc_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no split 'train': neither the list .*train.txt exists, nor a folder"):
        read_voc(str(tmp_path), "train")
    with pytest.raises(UserError, match="has no class: no xml file has an object with a name"):
        read_voc(str(small_voc(tmp_path, None)), "train")


# --- the command line ---


def test_sets_of_a_command_line(tmp_path: Path, coco: tuple[Path, Path]) -> None:
    parser = ArgumentParser()
    add_dataset_arguments(parser)
    path = write_yolo(tmp_path / "yolo", *coco, test="images/train")
    folder = write_voc(tmp_path / "voc", *coco)
    words = ["--register-yolo", "fish", str(path), "--register-voc", "birds", str(folder), "train"]
    sets = label_files(parser.parse_args(words))
    assert [one.name for one in sets] == ["fish_train", "fish_test", "birds"]
    assert all(len(one.read().content["categories"]) == len(CLASSES) for one in sets)
    with pytest.raises(UserError, match="the name 'fish_test' is given to two data sets"):
        label_files(parser.parse_args([*words, "--register-voc", "fish_test", str(folder), "train"]))
