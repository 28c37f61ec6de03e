from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from check_dataset import main as check
from convert_dataset import main
from label_files import write_voc, write_yolo
from training_runs import write_coco


def test_both_formats_become_a_json_that_is_checked_without_fault(tmp_path: Path, capsys: Any) -> None:
    coco = write_coco(tmp_path, "set", 4, seed=1)
    sources = {"yolo": write_yolo(tmp_path / "yolo", *coco), "voc": write_voc(tmp_path / "voc", *coco)}
    for form, source in sources.items():
        path = tmp_path / f"{form}.json"
        assert main([form, str(source), "train", str(path)]) == 0
        assert "4 images, 6 annotations, 3 categories" in capsys.readouterr().out
        assert len(json.loads(path.read_text())["annotations"]) == 6
        assert check([str(path), str(tmp_path / form)]) == 0
    capsys.readouterr()
    words = ["--register-yolo", "set", str(sources["yolo"]), "--register-voc", "birds", str(sources["voc"]), "train"]
    assert check(words) == 0
    out = capsys.readouterr().out
    assert "set_train: 0 kinds of errors" in out and "birds: 0 kinds of errors" in out


def test_faults_are_listed_and_nothing_is_written(tmp_path: Path, capsys: Any) -> None:
    source = write_yolo(tmp_path / "yolo", *write_coco(tmp_path, "set", 4, seed=1))
    (tmp_path / "yolo/labels/train/000.txt").write_text("7 .5 .5 .1 .1\n0 .5 .5 .1 .1 .9\n")
    (tmp_path / "yolo/labels/train/001.txt").unlink()
    assert main(["yolo", str(source), "train", str(tmp_path / "new.json")]) == 1
    captured = capsys.readouterr()
    assert "error: rows of an unknown class: 1 of " in captured.out
    assert "note: images without a label file: 1 of 4" in captured.out
    assert "new.json is not written" in captured.err and not (tmp_path / "new.json").exists()
    assert check(["--register-yolo", "set", str(source)]) == 1
    assert "error: rows of a wrong length: 1 of " in capsys.readouterr().out
    assert main(["yolo", str(source), "val", str(tmp_path / "set.json")]) == 2
    assert "has no split 'val'. Available: train." in capsys.readouterr().err
    assert check(["--register-voc", "set", str(tmp_path), "train"]) == 1
    assert "set: error: " in capsys.readouterr().out
