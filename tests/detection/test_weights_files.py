"""Weights files into detectors, through the command lines: safetensors, and files that ask for code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import export_weights
import train_net as command_line
from training_runs import in_process_trainer, same_tensors

from d2_mgd.detection.config_loaders import build_evaluation_loader, build_train_loader
from d2_mgd.training import weights_files
from d2_mgd.training.weights_files import read_safetensors


class Malice:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture(autouse=True)
def _nothing_trusted() -> Iterator[None]:
    yield
    weights_files._TRUSTED.clear()


def test_a_student_goes_out_and_in_as_safetensors(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    trainer = in_process_trainer(workplace, tmp_path / "out")
    trainer.iter = 0
    trainer.save_checkpoint("model_final")
    checkpoint, file = tmp_path / "out" / "model_final.pth", tmp_path / "student.safetensors"
    assert export_weights.main([str(checkpoint), str(file)]) == 0
    assert f"{file}: " in capsys.readouterr().out
    student = torch.load(checkpoint, weights_only=True)["model"]
    tensors, metadata = read_safetensors(str(file))
    assert same_tensors(tensors, student) and metadata["source"] == "model_final.pth"
    other = in_process_trainer(workplace, tmp_path / "other", "MODEL.WEIGHTS", str(file), "SEED", "99")
    assert same_tensors(other._plain_state(), student)
    assert export_weights.main([str(file), str(tmp_path / "back.pth")]) == 0
    assert same_tensors(torch.load(tmp_path / "back.pth", weights_only=True)["model"], student)


def test_a_teacher_comes_in_as_safetensors(workplace: Any, tmp_path: Path) -> None:
    file = tmp_path / "teacher.safetensors"
    assert export_weights.main([str(workplace.teacher_weights), str(file)]) == 0
    trainer = in_process_trainer(workplace, tmp_path / "out", "MGD.TEACHER.WEIGHTS", str(file))
    expected = in_process_trainer(workplace, tmp_path / "expected").detector.teacher.model.state_dict()
    assert same_tensors(trainer.detector.teacher.model.state_dict(), expected)


def test_export_names_what_it_cannot_do(tmp_path: Path, capsys: Any) -> None:
    malicious = tmp_path / "bad.pkl"
    malicious.write_bytes(pickle.dumps({"model": Malice(tmp_path / "trace")}))
    (tmp_path / "empty.pth").touch()
    cases = [
        ("none.pth", "a.safetensors", "none.pth does not exist"),
        (str(tmp_path / "empty.pth"), "a.safetensors", "empty.pth is damaged or cut short"),
        (str(malicious), "a.safetensors", "asks for the python object"),
        (str(malicious), "a.onnx", "must end in .safetensors or .pth"),
    ]
    for source, target, sentence in cases:
        assert export_weights.main([source, str(tmp_path / target)]) == 2
        text = capsys.readouterr().err
        assert text.startswith("export_weights.py: error: ") and sentence in text and text.count("\n") == 1
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("entry", ["MODEL.WEIGHTS", "MGD.TEACHER.WEIGHTS", "--resume", "--eval-only"])
def test_a_malicious_file_is_refused_wherever_it_comes_in(
    workplace: Any, tmp_path: Path, capsys: Any, entry: str, suffix: str
) -> None:
    trace, output = tmp_path / "trace", tmp_path / "out"
    output.mkdir()
    file = output / f"model_0000001{'.pth' if entry == '--resume' else suffix}"
    data = {"model": {"conv.weight": Malice(trace)}, "__author__": "me", "iteration": 1, "training": {}}
    if file.suffix == ".pkl":
        file.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, file)
    (output / "last_checkpoint").write_text(file.name)
    flags = (entry,) if entry.startswith("--") else ()
    key = entry if not flags else "MODEL.WEIGHTS"
    with pytest.raises(SystemExit) as caught:
        command_line.main(workplace.arguments(output, key, file, flags=flags))
    assert caught.value.code == 2 and not trace.exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and str(file) in lines[0] and "--trust-weights" in lines[0], lines


def test_an_old_file_is_read_where_the_command_line_names_it(workplace: Any, tmp_path: Path, capsys: Any) -> None:
    old = tmp_path / "old.pth"
    state = torch.load(workplace.teacher_weights, weights_only=True)["model"]
    torch.save({"model": state, "scale": np.float64(3)}, old)
    words = workplace.arguments(tmp_path / "out", "MODEL.WEIGHTS", old, "DATASETS.TEST", "('tiny_valid',)")
    words[words.index(str(workplace.config))] = str(workplace.teacher_config)
    with pytest.raises(SystemExit):
        command_line.main([*words[:-6], "--eval-only", *words[-6:]])
    assert "--trust-weights" in capsys.readouterr().err
    command_line.main(["--trust-weights", str(old), "--eval-only", *words])
    assert (tmp_path / "out" / "inference" / "tiny_valid" / "results.json").exists()


def test_proposals_that_ask_for_code_are_refused(workplace: Any, tmp_path: Path) -> None:
    """Detectron2 itself would run them."""
    trace, file = tmp_path / "trace", tmp_path / "proposals.pkl"
    file.write_bytes(pickle.dumps({"ids": Malice(trace)}))
    cfg = in_process_trainer(workplace, tmp_path / "out").cfg.clone()
    cfg.defrost()
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = (str(file),)
    for build in (lambda: build_train_loader(cfg, 0), lambda: build_evaluation_loader(cfg, "tiny_valid")):
        with pytest.raises(ValueError, match=rf"{file} asks for the python object"):
            build()
    assert not trace.exists()
