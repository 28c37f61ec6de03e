"""The command line that exports the students of trainings."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from export_student import main

ROOT = Path(__file__).resolve().parents[2]


def checked(folder: Path) -> dict:
    return json.loads((folder / "check.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _other_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process have registered other files under the same names."""
    data = sys.modules.get("detectron2.data")
    for catalog in () if data is None else (data.DatasetCatalog, data.MetadataCatalog):
        monkeypatch.setattr(catalog, "data", {k: v for k, v in catalog.data.items() if not k.startswith("tiny_")})


@pytest.mark.parametrize("words", [[], ["--int8", "6", "--tolerance", "100"], ["--size", "dynamic", "--half"]])
def test_a_classifier_leaves_its_run(classification_runs: Path, tmp_path: Path, words: list[str]) -> None:
    pytest.importorskip("onnxruntime")
    run, out = classification_runs / "distilled", tmp_path / "out"
    own = ["--baseline", str(classification_runs / "alone"), "--check", "5", "--output", str(out)]
    assert main([str(run), *own, *words]) == 0
    assert checked(out)["images"] == 5
    card = (out / "model_card.md").read_text(encoding="utf-8")
    assert "| teacher | resnet18, teacher.pth (SHA-256 " in card
    assert "the student trained alone | top-1 error, %" in card and "main_mgd" not in card.split("exported by")[1]
    assert ("(batch, 3, height, width)" in card) == ("dynamic" in words)


def test_a_detector_leaves_its_run(detection_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    run, out = detection_runs / "distilled", tmp_path / "out"
    assert main([str(run), "--output", str(out), "--safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "box AP, %" in printed and "student.onnx: " in printed and "compared on 4 images" in printed
    assert checked(out)["differences"]["detections without a match"] == 0
    assert "| teacher | " in (out / "model_card.md").read_text(encoding="utf-8")
    assert (out / "hub" / "model.safetensors").is_file()


@pytest.mark.parametrize("config", ["student.yaml", "lazy_tiny.py"])
def test_a_plain_detectron2_student(detection_runs: Path, tmp_path: Path, config: str) -> None:
    pytest.importorskip("onnxruntime")
    run = detection_runs / "distilled"
    shutil.copy(run / "student.yaml", tmp_path / "student.yaml")
    path = tmp_path / config if config.endswith("yaml") else ROOT / "tests" / "detection" / config
    places = json.loads((run / "datasets.json").read_text(encoding="utf-8"))
    registered = [word for name, one in places.items() for word in ("--register-coco", name, *one.values())]
    words = ["--config-file", str(path), "--weights", str(run / "model_final.pth"), *registered]
    words += ["--int8", "3", "--tolerance", "100", "--check", "2", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert checked(tmp_path / "out")["images"] == 2


def test_bad_input_is_one_sentence(
    detection_runs: Path, classification_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, kept in ((detection_runs, "config.yaml"), (classification_runs, "run.json")):
        (tmp_path / source.name).mkdir()
        shutil.copy(source / "distilled" / kept, tmp_path / source.name / kept)
    shutil.copytree(classification_runs / "alone", tmp_path / "elsewhere")
    record = json.loads((tmp_path / "elsewhere" / "run.json").read_text(encoding="utf-8"))
    record["options"]["data"] = "/data/birds"
    (tmp_path / "elsewhere" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    shutil.copytree(classification_runs / "alone", tmp_path / "incomplete")
    torch.save({"arch": "shufflenet_v2_x0_5", "state_dict": {}}, tmp_path / "incomplete" / "student_last.pth")
    shutil.copytree(detection_runs / "alone", tmp_path / "damaged")
    (tmp_path / "damaged" / "datasets.json").write_text("{")
    ts = ["--format", "torchscript"]
    lines = {
        "alone is a detection run, and the student is of classification: name a classification run.": [
            *(classification_runs / "distilled", "--baseline", detection_runs / "alone", *ts)
        ],
        "alone is a classification run, and the student is of detection: name a detection run.": [
            *(detection_runs / "distilled", "--baseline", classification_runs / "alone", *ts)
        ],
        "elsewhere was evaluated on /data/birds, and ": [
            *(classification_runs / "distilled", "--baseline", tmp_path / "elsewhere", *ts)
        ],
        "has no student yet: its training has written no checkpoint.": [tmp_path / detection_runs.name, *ts],
        "has no student yet: its training has not finished an epoch.": [tmp_path / classification_runs.name, *ts],
        "is not the folder of a training": [tmp_path, *ts],
        "name the folder of a RUN, or --config-file and --weights.": ["--config-file", "student.yaml", *ts],
        "--weights has no effect on the classification run ": [
            *(classification_runs / "alone", "--weights", "other.pth", *ts)
        ],
        "--register-coco has no effect on the classification run ": [
            *(classification_runs / "alone", "--register-coco", "name", "a.json", "images", *ts)
        ],
        "--config-file has no effect on the detection run ": [
            *(detection_runs / "alone", "--config-file", "student.yaml", *ts)
        ],
        "--baseline: there is no folder nowhere.": [classification_runs / "alone", "--baseline", "nowhere", *ts],
        "student_last.pth lacks classes, image_size, so no training": [tmp_path / "incomplete", *ts],
        "datasets.json is damaged: ": [tmp_path / "damaged", *ts],
        "argument --check: must be 1 or more, not 0": [classification_runs / "alone", "--check", "0", *ts],
        "is not of this student: ": [
            *(detection_runs / "alone", "--weights", detection_runs / "teacher.pth", *ts, "--output", tmp_path / "out")
        ],
        "--size is '64': give HEIGHTxWIDTH": [classification_runs / "alone", "--size", "64", *ts],
        "takes images of 64 x 64 px, and this one has 32 x 32": [
            *(classification_runs / "alone", "--size", "64x64", *ts, "--output", tmp_path / "out")
        ],
    }
    for message, words in lines.items():
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("export_student.py: error: ") and error.count("\n") == 1


def test_a_timm_classifier(classification_runs: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    run = tmp_path / "run"
    shutil.copytree(classification_runs / "alone", run)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["options"]["arch"] = "timm:test_resnet"
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    network = timm.create_model("test_resnet", num_classes=3)
    content = torch.load(run / "student_last.pth", weights_only=True)
    torch.save({**content, "arch": "timm:test_resnet", "state_dict": network.state_dict()}, run / "student_last.pth")
    assert main([str(run), "--format", "pt2", "--output", str(tmp_path / "out"), "--safetensors"]) == 0
    assert "library_name: timm" in (tmp_path / "out" / "model_card.md").read_text(encoding="utf-8")
