"""Files of classification runs through the command line that writes weights alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_weights import main

from classification.weights import load_file, read_checkpoint
from d2_mgd.training.weights_files import read_safetensors, write_safetensors

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["checkpoint.pth", "student_last.pth"])
def test_a_classification_student_goes_out_and_in(classification_runs: Path, tmp_path: Path, name: str) -> None:
    source, file, back = classification_runs / "distilled" / name, tmp_path / "s.safetensors", tmp_path / "s.pth"
    assert main([str(source), str(file)]) == 0
    assert main([str(file), str(back)]) == 0
    state = torch.load(source.with_name("student_last.pth"), weights_only=True)["state_dict"]
    for written in (file, back):
        tensors = load_file(written, "shufflenet_v2_x0_5", "the file")
        assert tensors.keys() == state.keys()
        assert all(torch.equal(tensors[key], state[key]) for key in state)
        described = read_checkpoint(written, "the file")
        assert (described["arch"], described["classes"]) == ("shufflenet_v2_x0_5", ["ant", "bee", "cat"])
    assert read_safetensors(str(file))[1]["source"] == name


def test_resnets_keep_the_names_of_torchvision(classification_runs: Path, tmp_path: Path) -> None:
    source, file, back = classification_runs / "teacher.pth", tmp_path / "t.safetensors", tmp_path / "t.pth"
    assert main([str(source), str(file)]) == main([str(file), str(back)]) == 0
    assert load_file(back, "resnet18", "the file").keys() == load_file(source, "resnet18", "the file").keys()


def test_files_of_others_may_say_anything_beside_their_weights(tmp_path: Path) -> None:
    file, written = tmp_path / "theirs.safetensors", tmp_path / "w.pth"
    write_safetensors(str(file), {"fc.weight": torch.ones(2)}, {"arch": "resnet18"})
    assert main([str(file), str(written)]) == 0
    assert torch.load(written, weights_only=True)["arch"] == "resnet18"
    torch.save({"arch": torch.zeros(1), "state_dict": {"module.fc.weight": torch.ones(2)}, "epoch": 3}, written)
    assert main([str(written), str(file)]) == 0
    assert list(read_safetensors(str(file))[0]) == ["fc.weight"]


def test_classification_needs_no_detectron2(classification_runs: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['detectron2'] = None; import export_weights; sys.exit(export_weights.main())"
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    for source, status in ((classification_runs / "teacher.pth", 0), (tmp_path / "detector.pth", 2)):
        words = [sys.executable, "-c", code, str(source), str(tmp_path / "w.safetensors")]
        done = subprocess.run(words, cwd=ROOT / "tools", capture_output=True, text=True, timeout=240)
        assert done.returncode == status, done.stderr
    assert "export_weights.py: error: d2_mgd.detection needs Detectron2" in done.stderr
    assert done.stderr.count("\n") == 1
