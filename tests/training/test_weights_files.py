"""No weights file runs code, in whatever way it is read; what needs more is read by name only."""

from __future__ import annotations

import argparse
import ast
import io
import logging
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from d2_mgd.training import weights_files
from d2_mgd.training.weights_files import (
    UntrustedFileError,
    read_pickled_arrays,
    read_safetensors,
    read_tensors,
    trust,
    write_safetensors,
)

ROOT = Path(__file__).resolve().parents[2]


class Malice:
    """Runs a command when it is unpickled by anything that trusts it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture(autouse=True)
def _nothing_trusted() -> Iterator[None]:
    yield
    weights_files._TRUSTED.clear()


def _write(path: Path, data: Any) -> None:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, path)


def _write_old(path: Path, data: Any) -> None:
    """As PyTorch wrote before 1.6: pickles one after the other."""
    torch.save(data, path, _use_new_zipfile_serialization=False)


def _write_tar(path: Path, data: Any) -> None:
    """As PyTorch wrote before 0.2: which it reads, up to 2.5, without the restriction."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(data)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("write", [_write, _write_old, _write_tar])
def test_a_malicious_pth_does_not_run_and_the_sentence_says_the_flag(tmp_path: Path, write: Any) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    write(path, {"model": Malice(trace)})
    with pytest.raises(
        UntrustedFileError, match=rf"^{path} .*--trust-weights {path} loads it and runs its code"
    ) as caught:
        read_tensors(str(path))
    assert not trace.exists() and "\n" not in str(caught.value)


def test_a_malicious_pkl_does_not_run_and_the_sentence_says_the_flag(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "weights.pkl"
    _write(path, {"model": Malice(trace)})
    with pytest.raises(UntrustedFileError, match=rf"^{path} asks for the python object \w+\.system, .*--trust-weights"):
        read_pickled_arrays(str(path))
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_file_that_is_trusted_by_name_is_read_with_a_warning_and_no_other(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    read = read_pickled_arrays if suffix == ".pkl" else read_tensors
    old = {"model": {"w": np.ones(2)}, "args": argparse.Namespace(lr=0.1)}
    path, other = tmp_path / f"old{suffix}", tmp_path / f"other{suffix}"
    _write(path, old)
    _write(other, old)
    (tmp_path / "alias").symlink_to(path)
    trust(tmp_path / "alias")
    with caplog.at_level(logging.WARNING):
        assert read(str(path))["args"].lr == 0.1
    assert f"{path} is trusted: reading it runs any code" in caplog.text
    with pytest.raises(UntrustedFileError, match=str(other)):
        read(str(other))


def test_the_environment_does_not_loosen_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    test_a_malicious_pth_does_not_run_and_the_sentence_says_the_flag(tmp_path, _write)


def test_a_program_in_torchs_own_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pth"
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
    with pytest.raises(UntrustedFileError, match=f"^{path}"):
        read_tensors(str(path))


@pytest.mark.parametrize("read", [read_tensors, read_pickled_arrays, read_safetensors])
@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04.", b"PK\x03\x04", b"\xff" * 8 + b"{}", bytes(600)])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, read: Any, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UntrustedFileError, match=rf"^{path} .*\.$") as caught:
        read(str(path))
    assert "\n" not in str(caught.value)


def test_an_exported_network_is_no_question_of_trust(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    with pytest.raises(UntrustedFileError, match=r"a\.onnx is an exported network; give the weights"):
        read_tensors(str(tmp_path / "a.onnx"))


def test_safetensors_are_what_was_written(tmp_path: Path) -> None:
    path = str(tmp_path / "w.safetensors")
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": shared,
        "b": shared.t(),
        "half": torch.ones(2).half(),
        "count": torch.tensor(3),
        "none": torch.empty(0),
    }
    write_safetensors(path, tensors, {"from": "here"})
    read, metadata = read_safetensors(path)
    assert metadata == {"from": "here", "format": "pt"}
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(read[name], value) and read[name].dtype == value.dtype


# --- nothing reads around it ---


def _calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file, with the dotted name of what is called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _says(call: ast.Call, name: str, value: object) -> bool:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    given = keywords.get(name)
    return isinstance(given, ast.Constant) and given.value is value


@pytest.mark.parametrize("folder", ["d2_mgd", "classification", "tools", "examples", "benchmarks"])
def test_no_code_loads_what_may_run(folder: str) -> None:
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path == ROOT / "d2_mgd" / "training" / "weights_files.py":
            continue
        for name, call in _calls(path):
            bad = name in (
                "eval",
                "exec",
                "pickle.load",
                "pickle.loads",
                "pickle.Unpickler",
                "yaml.unsafe_load",
                "yaml.load",
            )
            bad |= name == "torch.load" and not _says(call, "weights_only", True)
            bad |= name.endswith("get_state_dict") and not _says(call, "weights_only", True)
            bad |= name == "np.load" and not _says(call, "allow_pickle", False)
            bad |= name.endswith(".merge_from_file") and path.name != "config_files.py"  # runs python by default
            bad |= any(keyword.arg == "shell" for keyword in call.keywords)
            if bad:
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno}: {name}")
    assert not wrong


# --- the programs ---


def images(folder: Path) -> Path:
    from PIL import Image

    for split in ("train", "valid"):
        for name in ("one", "two"):
            (folder / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(folder / split / name / "0.png")
    return folder


@pytest.mark.parametrize("option", ["--student-resume", "--resume", "--teacher-resume"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_classification_refuses_a_malicious_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, suffix: str
) -> None:
    from classification.main_base import main

    trace, path = tmp_path / "trace", tmp_path / "run" / f"checkpoint{suffix}"
    path.parent.mkdir()
    _write(path, {"model": Malice(trace)})
    folder = path.parent if option == "--resume" else tmp_path / "out"
    words = [images(tmp_path / "data"), "--image-size", 32, "--arch", "resnet18", "--output-dir", folder, option, path]
    status = main([str(word) for word in [*words, *(["--evaluate"] if option == "--teacher-resume" else [])]])
    assert status == 2 and not trace.exists()
    assert ("--trust-weights" if suffix == ".pth" else "damaged") in capsys.readouterr().err.splitlines()[-1]


def test_classification_refuses_a_malicious_file_in_torchvisions_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import ResNet18_Weights

    from classification.main_base import main

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    trace = tmp_path / "trace"
    place = tmp_path / "home" / "hub" / "checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    _write(place, {"model": Malice(trace)})
    words = [images(tmp_path / "data"), "--image-size", 32, "--arch", "resnet18", "--use-pretrained", 1]
    status = main([str(word) for word in [*words, "--output-dir", tmp_path / "out"]])
    assert status == 2 and not trace.exists()
    assert f"{place} asks for python objects" in capsys.readouterr().err.splitlines()[-1]


def test_classification_reads_an_old_file_that_is_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from classification.main_base import main
    from classification.models import build

    path = tmp_path / "old.pth"
    old = {"arch": "resnet18", "args": argparse.Namespace(lr=0.1), "state_dict": build("resnet18", 2).state_dict()}
    torch.save(old, path)
    words = [
        images(tmp_path / "data"),
        "--image-size",
        32,
        "--arch",
        "resnet18",
        "--evaluate",
        "--student-resume",
        path,
    ]
    words = [str(word) for word in [*words, "--output-dir", tmp_path / "out"]]
    assert main(words) == 2
    assert main([*words, "--trust-weights", str(path)]) == 0
    assert "resnet18" in capsys.readouterr().out
