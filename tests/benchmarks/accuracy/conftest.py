"""What the tests of the accuracy studies share: a tiny study and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.accuracy.__main__ import main

STUDY = {
    "name": "tiny",
    "title": "A tiny study",
    "teacher": "resnet8x2",
    "student": "resnet8",
    "seeds": [0, 1],
    "data": {"pixels": 8},
    "recipe": {"epochs": 2, "batch": 16, "lr": 0.02, "drops": [1]},
    "distil": {"reduction": "mean", "weight": 1.0, "rematch": {"every": 1, "images": 20}},
    "methods": {"mgd-amp": {}, "mgd-pearson + dkd": {"loss": "pearson", "logits": {"name": "dkd"}}},
    "published": {"teacher": 80.0, "OFD": 70.5},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of coloured noise, 16 training and 4 test images of each, shuffled."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 48), ("test", 12)):
        labels = rng.permutation(np.arange(count) % 3).astype(np.uint8)
        images = rng.integers(0, 120, (count, 32, 32, 3))
        images[np.arange(count), :, :, labels] += 90
        arrays.update({f"x_{part}": images.astype(np.uint8), f"y_{part}": labels})
    path = tmp_path_factory.mktemp("data") / "cifar.npz"
    np.savez(path, **arrays)
    return path


def written(folder: Path, **changes: Any) -> Path:
    content = {**STUDY, **changes}
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def command(what: str, study: Path, folder: Path, *more: str) -> int:
    return main([what, str(study), "--results", str(folder / "results"), *more])


def run(study: Path, folder: Path, data: Path, *more: str) -> int:
    return command(
        "run", study, folder, "--data", str(data), "--weights", str(folder / "weights"), "--device", "cpu", *more
    )
