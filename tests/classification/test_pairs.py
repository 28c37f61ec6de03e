"""Networks outside the table, from the command line: taps and loss are found, or one sentence says why not."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from classification.models import build
from classification.options import parse_base, parse_mgd

Run = Callable[..., int]
Shown = pytest.CaptureFixture


@pytest.fixture
def run(mgd: Run, data: Path, tmp_path: Path) -> tuple[Run, Path]:
    """``main_mgd.py`` with images of 64 px, and a folder for files."""
    return (lambda *words: mgd(data, *words, "--image-size", 64)), tmp_path


def _weights(network: torch.nn.Module, folder: Path) -> Path:
    torch.save(network.state_dict(), folder / "teacher.pth")
    return folder / "teacher.pth"


@pytest.mark.parametrize(
    ("student", "teacher", "loss", "feature"),
    [
        ("mobilenetv3_small_100", "resnet10t", "partial_l2", "student blocks.3 (48, 4, 4), teacher layer3.0@pre (256"),
        ("mobilenetv3_small_100", "vit_tiny_patch16_224", "pearson", "teacher blocks.11 (192, 4, 4)"),
        ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "pearson", "teacher layers.2 (384, 4, 4)"),
    ],
)
def test_pairs_of_timm(
    student: str, teacher: str, loss: str, feature: str, run: tuple[Run, Path], capfd: Shown
) -> None:
    """The teacher's file is of 224 px, the images are of 64 px."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    train, folder = run
    file = _weights(timm.create_model(teacher, num_classes=3), folder)
    words = [f"timm:{student}", "--teacher-arch", f"timm:{teacher}", "--teacher-resume", file, "--lr", 0.001]
    words += ["--balance", "fixed"]  # auto would stop, because the teacher was never trained
    assert train("--arch", *words) == 0
    (line,) = (folder / "run" / "metrics.json").read_text().splitlines()
    assert json.loads(line)["train_loss_distill/stride16"] > 0
    shown = capfd.readouterr().err
    assert "feature stride16: " in shown and feature in shown and f"loss: {loss}, chosen" in shown
    options = json.loads((folder / "run" / "run.json").read_text())["options"]
    assert (options["loss"], options["mgd_metric"]) == (loss, "cosine" if loss == "partial_l2" else "pearson")
    assert train("--arch", *words, "--epochs", 2, "--resume", folder / "run" / "checkpoint.pth") == 0
    assert train("--evaluate", "--arch", *words, "--student-resume", folder / "run" / "student_last.pth") == 0


def test_networks_of_torchvision_need_no_features(run: tuple[Run, Path], capfd: Shown) -> None:
    train, folder = run
    file = _weights(torchvision.models.mobilenet_v3_small(num_classes=3), folder)
    words = ["--teacher-arch", "mobilenet_v3_small", "--teacher-resume", file]
    assert train("--arch", "squeezenet1_1", *words, "--lr", 0.001) == 0
    assert "loss: pearson" in capfd.readouterr().err


def test_an_image_size_that_a_network_does_not_take(run: tuple[Run, Path], capfd: Shown) -> None:
    file = _weights(torchvision.models.vit_b_32(num_classes=3), run[1])
    assert run[0]("--arch", "resnet18", "--teacher-arch", "vit_b_32", "--teacher-resume", file) == 2
    message = "error: vit_b_32 cannot run on images of shape (3, 64, 64): Wrong image height! Expected 224 but got 64!."
    assert f"{message} It is made for images of 224 px." in capfd.readouterr().err


def test_help_is_grouped_and_shows_every_default() -> None:
    for parse in (parse_base, parse_mgd):
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
            parse(["--help"])
        text = shown.getvalue()
        commands = re.findall(r"^  \S+ DATA --arch .*", text, re.MULTILINE)
        assert len(commands) == 3 and text.index(commands[-1]) < text.index("networks and images:")
        words = " ".join(text.split())
        assert "seed of new weights, and of the order, crops and flips of images (default: 0)" in words
        assert "default: False" not in words and "default: None" not in words


def test_a_teacher_whose_maps_come_from_several_batch_norms_has_no_margins(run: tuple[Run, Path], capfd: Shown) -> None:
    """A unit of ShuffleNet-V2 concatenates the channels that it passes with those of its batch-norm."""
    train, folder = run
    teacher = ["--teacher-arch", "shufflenet_v2_x0_5", "--teacher-resume"]
    teacher += [_weights(build("shufflenet_v2_x0_5", 3), folder)]
    assert train("--arch", "resnet18", *teacher, "--lr", 0.001) == 0
    assert "loss: pearson, chosen by the teacher's maps" in capfd.readouterr().err
    assert train("--arch", "resnet18", *teacher, "--loss", "partial_l2", "--output-dir", folder / "other") == 2
    assert "has 48 channels, but its last batch-norm has 24" in capfd.readouterr().err
