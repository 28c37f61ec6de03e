"""A training on YOLO's or Pascal VOC's labels is the training on the same set in COCO's format."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import train_net as command_line
from label_files import write_voc, write_yolo
from training_runs import ROOT, TINY_MODEL, TINY_RUN, train_net, write_coco, write_yaml

from d2_mgd.data.formats import label_files
from d2_mgd.detection import Trainer
from d2_mgd.detection.datasets import register_coco, register_label_files
from d2_mgd.errors import UserError

SHARED = Path(os.environ.get("D2_MGD_SHARED_DATA", ROOT.parent / "shared" / "data"))


def one_step(folder: Path, name: str, classes: int, *register: Any) -> dict[str, float]:
    """Losses of the first step of a student alone."""
    config = write_yaml(folder / f"{name}.yaml", {"MODEL": TINY_MODEL}, TINY_RUN)
    words = [*register, "--config-file", config, "OUTPUT_DIR", folder / name, "MODEL.RETINANET.NUM_CLASSES", classes]
    words += ["DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0]
    args = command_line.parser().parse_args([str(word) for word in words])
    for one in args.register_coco:
        register_coco(*one)
    cfg, _ = command_line.build_config(args)
    (folder / name).mkdir()
    register_label_files(label_files(args), cfg)
    trainer = Trainer(cfg)
    trainer.train()
    return {key: value for key, (value, _) in trainer.storage.latest().items() if "loss" in key}


@pytest.mark.parametrize("data", ["generated", "aquarium"])
def test_the_first_losses_are_those_of_coco(tmp_path: Path, data: str) -> None:
    if data == "generated":
        json_file, images = write_coco(tmp_path, "set", 6, seed=5)
    else:
        whole = SHARED / "aquarium" / "train.json"
        if not whole.is_file():
            pytest.skip(f"{whole} does not exist; D2_MGD_SHARED_DATA names another folder")
        content = json.loads(whole.read_text())
        content["images"] = content["images"][:12]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in ids]
        json_file, images = tmp_path / "set.json", whole.parent / "images"
        json_file.write_text(json.dumps(content))
    classes = len(json.loads(json_file.read_text())["categories"])
    yolo, voc = write_yolo(tmp_path / "yolo", json_file, images), write_voc(tmp_path / "voc", json_file, images)
    coco = one_step(tmp_path, f"{data}_coco", classes, "--register-coco", f"{data}_coco", json_file, images)
    assert set(coco) >= {"loss_cls", "loss_box_reg", "total_loss"}
    name = f"{data}_yolo"
    assert one_step(tmp_path, f"{name}_train", classes, "--register-yolo", name, yolo) == pytest.approx(coco, rel=1e-5)
    name = f"{data}_voc"
    assert one_step(tmp_path, name, classes, "--register-voc", name, voc, "train") == pytest.approx(coco, rel=1e-5)


def test_trained_on_yolo_and_evaluated_on_voc(tmp_path: Path) -> None:
    yolo = write_yolo(tmp_path / "yolo", *write_coco(tmp_path, "one", 6, seed=6))
    (tmp_path / "yolo/labels/train/001.txt").unlink()
    voc = write_voc(tmp_path / "voc", *write_coco(tmp_path, "other", 3, seed=7))
    config = write_yaml(tmp_path / "tiny.yaml", {"MODEL": TINY_MODEL}, TINY_RUN)
    done = train_net(
        *("--register-yolo", "shapes", str(yolo), "--register-voc", "shapes_test", str(voc), "train"),
        *("--config-file", str(config), "OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", "2"),
        *("DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_test',)"),
    )
    assert "it is background (1 of 6 images are like this)" in done.stdout
    places = json.loads((tmp_path / "run/datasets.json").read_text())
    assert (
        places["shapes_train"]["image_root"] == str(yolo.parent) and Path(places["shapes_test"]["json_file"]).is_file()
    )
    results = json.loads((tmp_path / "run/inference/shapes_test/results.json").read_text())
    assert results["bbox"]["AP"] >= 0  # not -1 or NaN, as where pycocotools finds nothing to count


def test_an_error_of_a_label_file_is_one_sentence(tmp_path: Path) -> None:
    yolo = write_yolo(tmp_path / "yolo", *write_coco(tmp_path, "one", 3, seed=6))
    (tmp_path / "yolo/labels/train/000.txt").write_text("0 1 2 3 4 5\n")
    with pytest.raises(UserError, match=r"^data set 'bad_train': .*000.txt, line 1, has 6 numbers"):
        one_step(tmp_path, "bad_train", 3, "--register-yolo", "bad", yolo)
