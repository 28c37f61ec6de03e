"""Trainings of a few steps, made by the real command lines, for programs that show trainings."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SPECIES = ("ant", "bee", "cat")


def _images(root: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("valid", 3)):
        for number, name in enumerate(SPECIES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 100, (40, 44, 3))
                pixels[..., number] += 120
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def classification_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data ``insects`` and the runs ``alone`` and ``distilled``, of two epochs.

    The command lines name the data from this folder; whoever shows the runs stands in another.
    """
    from classification import main_base, main_mgd

    folder = tmp_path_factory.mktemp("classification")
    data = _images(folder / "insects")
    torch.manual_seed(1)
    teacher = torchvision.models.resnet18(num_classes=len(SPECIES))
    torch.save({"state_dict": teacher.state_dict(), "arch": "resnet18"}, folder / "teacher.pth")
    small = f"--image-size 32 --epochs 2 --batch-size 6 --lr 0.01 --workers 0 --device cpu {data.name}".split()
    base = [*small, "--arch", "shufflenet_v2_x0_5"]
    distil = ["--teacher-arch", "resnet18", "--teacher-resume", str(folder / "teacher.pth"), "--mgd-reducer", "amp"]
    distil += ["--mgd-update-freq", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main_base.main([*base, "--output-dir", str(folder / "alone")]) == 0
        assert main_mgd.main([*base, *distil, "--output-dir", str(folder / "distilled")]) == 0
    return folder


@pytest.fixture(scope="session")
def detection_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, the teacher, and the runs ``alone`` and ``distilled``, of six iterations."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from training_runs import Workplace, run

    folder = tmp_path_factory.mktemp("detection")
    workplace = Workplace(folder)
    lines = [
        workplace.arguments(folder / "alone", "MGD.ENABLED", False),
        workplace.arguments(folder / "distilled", "MODEL.RETINANET.SCORE_THRESH_TEST", 0.001),
    ]
    # in one process, to load PyTorch once
    code = "import sys, json, train_net\nfor line in json.loads(sys.argv[1]): train_net.main(line)"
    run([sys.executable, "-c", code, json.dumps(lines)], PYTHONPATH=f"{ROOT}:{ROOT / 'tools'}")
    return folder
