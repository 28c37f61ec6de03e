from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg
from training_runs import CLASSES, write_coco

from d2_mgd.detection import add_mgd_config
from d2_mgd.detection.datasets import (
    Inspection,
    check_classes,
    check_coco,
    check_datasets,
    register_coco,
)
from d2_mgd.errors import UserError


def checked(path: Path, root: Path, allow_outside: bool = False, **wanted: Any) -> None:
    check_coco("mine", str(path), str(root), Inspection(**wanted), allow_outside=allow_outside)


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> tuple[Path, Path]:
    """A valid set of six images after ``change`` of its json."""
    path, root = write_coco(folder, "set", 6, seed=0)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path, root


def box(*numbers: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["annotations"][0].update(bbox=list(numbers))


def test_a_valid_set_passes(tmp_path: Path) -> None:
    checked(*write_coco(tmp_path, "set", 6, seed=0))


OFFENCES = {
    "outside": (
        box(90, 10, 30, 20),
        r"annotation 1 of image 000\.png has a box outside its image: .* reaches 24 ",
    ),
    "outside on the left": (box(-30, 10, 40, 20), "reaches 30 pixels beyond the 96 x 64 image"),
    "nan": (box(1, 2, float("nan"), 4), r"not finite or has a negative side: \[1, 2, nan, 4\]"),
    "negative": (box(1, 2, -3, 4), r"not finite or has a negative side"),
    "text": (box(1, 2, "3", 4), "no box of four numbers"),
    "three numbers": (box(1, 2, 3), "no box of four numbers"),
    "no box": (lambda content: content["annotations"][0].pop("bbox"), "no box of four numbers"),
    "category": (lambda c: c["annotations"][2].update(category_id=9), "annotation 3 of image .* unknown category, 9"),
    "twice": (lambda c: c["annotations"][1].update(id=1), "annotation 1 .* shares its id"),
    "ignore": (lambda content: content["annotations"][0].update(ignore=1), "mark it 'iscrowd'"),
    "no annotations": (lambda content: content.update(annotations=[]), "no annotation to train on"),
    "only crowds": (
        lambda content: [annotation.update(iscrowd=1) for annotation in content["annotations"]],
        "no annotation to train on",
    ),
    "no images": (lambda content: content.update(images=[]), "has no images"),
    "no categories": (lambda content: content.update(categories=[]), "has no categories"),
    "not coco": (lambda content: content.pop("images"), "not in COCO's format"),
    "no width": (lambda content: content["images"][0].pop("width"), "image without a valid id"),
    "zero height": (
        lambda content: content["images"][0].update(height=0),
        "image without a valid id",
    ),
    "image twice": (lambda content: content["images"][1].update(id=1), "two images with the id 1"),
    "category without name": (lambda content: content["categories"][0].pop("name"), "category without id or name"),
    "annotation without id": (lambda content: content["annotations"][0].pop("id"), "annotation without id"),
}


@pytest.mark.parametrize("offence", OFFENCES)
def test_an_offence_is_named_in_one_sentence(tmp_path: Path, offence: str) -> None:
    change, message = OFFENCES[offence]
    with pytest.raises(UserError, match=f"^data set 'mine': .*{message}") as caught:
        checked(*changed(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_all_of_a_kind_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(9 of 9 annotations are like this\)"):
        checked(*changed(tmp_path, lambda c: [a.update(category_id=77) for a in c["annotations"]]))


def test_missing_files_are_named(tmp_path: Path) -> None:
    path, root = write_coco(tmp_path, "set", 6, seed=0)
    (root / "003.png").unlink()
    (root / "004.png").unlink()
    with pytest.raises(UserError, match=r"the image .*003\.png does not exist \(2 of 6 images are like this\)"):
        checked(path, root)
    with pytest.raises(UserError, match=r"its image folder .*nowhere does not exist"):
        checked(path, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"its annotations .*none\.json do not exist"):
        checked(tmp_path / "none.json", root)
    path.write_text('{"images": [')
    with pytest.raises(UserError, match="is not readable json"):
        checked(path, root)


def test_images_in_subfolders_are_found(tmp_path: Path) -> None:
    path, root = changed(tmp_path, lambda content: content["images"][0].update(file_name="deep/000.png"))
    with pytest.raises(UserError, match=r"deep/000\.png does not exist"):
        checked(path, root)
    (root / "deep").mkdir()
    (root / "000.png").rename(root / "deep" / "000.png")
    checked(path, root)


TOLERATED = {
    "rounding": (box(-1.5, -0.5, 98.5, 66), ""),
    "crowd": (lambda content: content["annotations"][0].update(iscrowd=1), ""),
    "no area": (
        box(5, 5, 0, 10),
        "annotation 1 of image 000.png has a box without area and is left out (1 of 9 annotations are like this)",
    ),
    "other image": (
        lambda content: content["annotations"][0].update(image_id=99),
        "annotation 1 belongs to image 99, which is not in the set, and is left out (1 of 9 annotations are like this)",
    ),
    "unused class": (
        lambda content: content["categories"].insert(0, {"id": 0, "name": "thing"}),
        "the class 'thing' has no annotation, but counts as a class (1 of 4 classes are like this)",
    ),
}


@pytest.mark.parametrize("case", TOLERATED)
def test_what_training_goes_on_with(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    change, warning = TOLERATED[case]
    with caplog.at_level(logging.WARNING):
        checked(*changed(tmp_path, change))
    assert warning in caplog.text if warning else not caplog.text


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_what_evaluation_needs_is_wanted_where_it_evaluates(tmp_path: Path, key: str) -> None:
    """pycocotools finds out after the training."""
    path, root = changed(tmp_path, lambda content: content["annotations"][2].pop(key))
    checked(path, root)
    with pytest.raises(UserError, match=rf"annotation 3 of image .* has no '{key}' .*which evaluation needs: None"):
        checked(path, root, evaluate=True)


MASKS = {
    "absent": (None, "no segmentation, which MODEL.MASK_ON needs"),
    "nan": ([[1, 2, float("nan"), 4, 5, 6]], "a segmentation that is not made of finite numbers"),
    "text": ("mask", "a segmentation that is not made of finite numbers"),
    "two points": ([[1, 2, 3, 4]], "no polygon of three points or more"),
    "run-length": ({"size": [9, 9], "counts": "x"}, "a run-length code of another size than its image"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_are_checked_where_they_are_trained(tmp_path: Path, case: str) -> None:
    mask, message = MASKS[case]

    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation["segmentation"] = [[1, 2, 3, 4, 5, 6]]
        content["annotations"][1]["segmentation"] = mask

    path, root = changed(tmp_path, change)
    checked(path, root)
    with pytest.raises(UserError, match=rf"annotation 2 of image .* has {message}"):
        checked(path, root, masks=True)


def test_an_image_of_which_resizing_leaves_nothing_is_named(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["images"][0].update(width=20_000, height=1)
        content["annotations"][0]["bbox"] = [0, 0, 50, 1]

    path, root = changed(tmp_path, change)
    checked(path, root)
    with pytest.raises(UserError, match=r"the image 000.png of 20000 x 1 pixels becomes 1333 x 0 when it is resized"):
        checked(path, root, sizes=[(800, 1333)])


@pytest.mark.parametrize("name", ["../set.json", "/etc/passwd", "link.png"])
def test_file_names_stay_in_the_image_folder_unless_told_otherwise(tmp_path: Path, name: str) -> None:
    path, root = changed(tmp_path, lambda content: content["images"][0].update(file_name=name))
    (root / "link.png").symlink_to(path)
    with pytest.raises(UserError, match=rf"the image {name} leads to .*MGD.DATA.ALLOW_OUTSIDE_ROOT True allows it\.$"):
        checked(path, root)
    checked(path, root, allow_outside=True)


def test_a_set_without_annotations_may_be_tested_on(tmp_path: Path) -> None:
    checked(*changed(tmp_path, lambda content: content.pop("annotations")), train=False)


# --- names and classes ---


def test_a_name_stands_for_one_set(tmp_path: Path) -> None:
    first, second = (write_coco(tmp_path, name, 3, seed=0) for name in ("a", "b"))
    register_coco("named_once", *map(str, first))
    register_coco("named_once", *map(str, first))
    with pytest.raises(UserError, match="already a data set 'named_once'"):
        register_coco("named_once", *map(str, second))
    with pytest.raises(UserError, match="a data set needs a name, not ''"):
        register_coco("", *map(str, first))
    with pytest.raises(UserError, match="already a data set 'coco_2017_train'"):
        register_coco("coco_2017_train", *map(str, first))


def test_the_sets_of_a_config_are_checked(tmp_path: Path) -> None:
    cfg = get_cfg()
    add_mgd_config(cfg)
    with pytest.raises(UserError, match=r"DATASETS.TRAIN names no data set"):
        check_datasets(cfg)
    cfg.DATASETS.TEST = ("unheard_of",)
    with pytest.raises(UserError, match=r"no data set 'unheard_of'; .* --register-coco unheard_of JSON IMAGES"):
        check_datasets(cfg, train=False)
    register_coco("crowd_only", *map(str, changed(tmp_path, OFFENCES["only crowds"][0])))
    cfg.DATASETS.TEST = ("crowd_only",)
    check_datasets(cfg, train=False)
    cfg.DATASETS.TRAIN = ("crowd_only",)
    with pytest.raises(UserError, match=r"'crowd_only': .* no annotation to train on"):
        check_datasets(cfg)


def test_a_config_allows_names_that_leave_their_folder(tmp_path: Path) -> None:
    register_coco("leaves", *map(str, changed(tmp_path, lambda c: c["images"][0].update(file_name="../set.json"))))
    cfg = get_cfg()
    add_mgd_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("leaves",), ()
    with pytest.raises(UserError, match=r"leads to .*set\.json, outside the image folder"):
        check_datasets(cfg)
    cfg.MGD.DATA.ALLOW_OUTSIDE_ROOT = True
    check_datasets(cfg)


class Detector(nn.Module):
    def __init__(self, classes: int, roi: bool = False) -> None:
        super().__init__()
        if roi:
            self.roi_heads = Detector(classes)
        else:
            self.num_classes = classes


def test_classes_must_agree(tmp_path: Path) -> None:
    register_coco("three", *map(str, write_coco(tmp_path, "three", 3, seed=0)))
    other = [{"id": index, "name": name} for index, name in enumerate(["disc", "ring", "cross"], 1)]
    register_coco("others", *map(str, write_coco(tmp_path, "others", 3, seed=0, categories=other)))
    check_classes(["three"], Detector(3))
    check_classes(["three"], Detector(3, roi=True))
    check_classes(["three"], nn.Module())
    with pytest.raises(UserError, match=rf"80 classes but .* 3 \({', '.join(CLASSES)}\): set MODEL.RETINANET"):
        check_classes(["three"], Detector(80))
    with pytest.raises(UserError, match=r"set MODEL.ROI_HEADS.NUM_CLASSES 3"):
        check_classes(["three"], Detector(80, roi=True))
    with pytest.raises(UserError, match=r"'three' and 'others' differ in their classes: .* 'box' and 'ring' first"):
        check_classes(["three", "others"], Detector(3))
