"""Small generated image folders, and weights that stand for trained ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from classification import main_base, main_mgd

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = ("ant", "bee", "cat")

Run = Callable[..., int]


def make_folder(root: Path, train: int = 8, valid: int = 5, classes: tuple[str, ...] = CLASSES) -> Path:
    """Coloured noise, a colour per class, so that a class can be told."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("valid", valid)):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 100, (40, 44, 3))
                pixels[..., number % 3] += 120
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{index}.png")
    return root


def settled(network: nn.Module) -> nn.Module:
    """Fresh weights with running statistics that fit them, so that maps have a sane size."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        nn.init.normal_(norm.bias, std=0.5)
    network.train()
    with torch.no_grad():
        for _ in range(2):
            network(torch.randn(8, 3, 64, 64))
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def resnet18_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of the classes of ``data``."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "resnet18.pth"
    network = settled(torchvision.models.resnet18(num_classes=len(CLASSES)))
    torch.save({"state_dict": network.state_dict(), "arch": "resnet18", "epoch": 3}, path)
    return path


@pytest.fixture(scope="session")
def torch_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with files under torchvision's names, for 1,000 classes, as after a download."""
    torch.manual_seed(2)
    home = tmp_path_factory.mktemp("torch_home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    for name in ("resnet50", "mobilenet_v2"):
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        network = settled(torchvision.models.get_model(name))
        torch.save(network.state_dict(), home / "hub" / "checkpoints" / weights.url.rpartition("/")[2])
    return home


@pytest.fixture
def pretrained(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use that cache folder."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    return torch_home


SMALL = ["--image-size", "32", "--epochs", "1", "--batch-size", "8", "--workers", "0", "--device", "cpu"]


@pytest.fixture
def base(tmp_path: Path) -> Run:
    """``main_base.py`` in this process; writes to ``tmp_path / "run"`` unless told otherwise."""
    return _runner(main_base.main, tmp_path)


@pytest.fixture
def mgd(tmp_path: Path) -> Run:
    """``main_mgd.py``, likewise."""
    return _runner(main_mgd.main, tmp_path)


def _runner(main: Callable[[list[str]], int], folder: Path) -> Run:
    def run(*arguments: object, small: bool = True) -> int:
        given = [str(argument) for argument in arguments]
        if not any(word in given for word in ("--output-dir", "--resume")):
            given += ["--output-dir", str(folder / "run")]
        defaults = SMALL if small else []
        return main([given[0], *defaults, *given[1:]])

    return run


def command(script: str, *arguments: object, launcher: tuple[str, ...] = ()) -> list[str]:
    """A command line of a script, as a user types it."""
    start = [sys.executable, *launcher] if launcher else [sys.executable]
    return [*start, str(REPOSITORY / "classification" / script), *map(str, arguments)]


def run_command(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line somewhere else than in the repository, where the package is not installed."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        words,
        cwd=folder,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


TIMES = ("seconds", "images_per_second")


def flat(value: object, name: str = "") -> dict[str, object]:
    """Nested containers as one level of names."""
    if isinstance(value, dict):
        return {key: v for k, inner in value.items() for key, v in flat(inner, f"{name}/{k}").items()}
    if isinstance(value, (list, tuple)):
        return {key: v for k, inner in enumerate(value) for key, v in flat(inner, f"{name}/{k}").items()}
    return {name: value}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, matchings, random numbers and metrics are equal; times and paths are not looked at."""
    for name in ("student_last.pth", "student_best.pth", "checkpoint.pth"):
        left, right = (flat(torch.load(run / name, weights_only=True)) for run in (one, other))
        left, right = ({k: v for k, v in d.items() if "/options/" not in k} for d in (left, right))
        assert left.keys() == right.keys()
        for key, value in left.items():
            if key.rpartition("/")[2] in TIMES:
                continue
            same = torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key]
            assert same, f"{name}: {key}"
    histories = [[json.loads(line) for line in (run / "metrics.json").read_text().splitlines()] for run in (one, other)]
    assert [{k: v for k, v in line.items() if k not in TIMES} for line in histories[0]] == [
        {k: v for k, v in line.items() if k not in TIMES} for line in histories[1]
    ]
