"""The wheel in an otherwise empty folder, used away from the repository."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import CLASSES, write_coco

from d2_mgd import configs

ROOT = Path(__file__).resolve().parents[1]
IN_WHEEL = ("d2_mgd", "classification", "configs", "tools", "setup.py", "pyproject.toml", "README.md", "LICENSE")
CONFIG = "small/retinanet_narrow_FPN.yaml"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel and its commands; torch and the like are this Python's."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in IN_WHEEL:  # building writes beside the sources
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    subprocess.run(wheel, check=True)
    (path,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "installed", path], check=True)
    return folder / "installed"


def run(installed: Path, command: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c"] if command == "-c" else [str(installed / "bin" / command)]
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*program, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


def test_commands_and_configs_away_from_the_repository(installed: Path, tmp_path: Path) -> None:
    help_text = run(installed, "d2-mgd-classify", "--help", cwd=tmp_path)
    assert help_text.returncode == 0 and "--mgd-reducer" in help_text.stdout, help_text.stderr
    code = f"import d2_mgd.configs as configs, classification; print(configs.get('{CONFIG}'), *configs.names())"
    path, *names = run(installed, "-c", code, cwd=tmp_path).stdout.split()
    assert path == str(installed / "d2_mgd/_configs" / CONFIG)
    assert names == configs.names()
    checked = run(installed, "d2-mgd-check", *write_coco(tmp_path, "set", 3, seed=0), cwd=tmp_path)
    assert checked.returncode == 0 and "0 kinds of errors" in checked.stdout, checked.stderr


def test_one_step_of_training_away_from_the_repository(installed: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("detectron2") is None:
        pytest.skip("Detectron2 is not installed")
    json_file, images = write_coco(tmp_path, "set", 3, seed=0)
    overrides = {
        "DATASETS.TRAIN": "('set',)",
        "DATASETS.TEST": "('set',)",
        "MODEL.RETINANET.NUM_CLASSES": len(CLASSES),
        "MODEL.WEIGHTS": "",
        "MODEL.DEVICE": "cpu",
        "SOLVER.MAX_ITER": 1,
        "SOLVER.IMS_PER_BATCH": 2,
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "DATALOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": "run",
    }
    pairs = [word for pair in overrides.items() for word in pair]
    words = ["--register-coco", "set", json_file, images, "--config-file", CONFIG, *pairs]
    trained = run(installed, "d2-mgd-train", *words, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run/model_final.pth").is_file()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    compared = run(installed, "d2-mgd-compare", "run", "again", "--output", "page", cwd=tmp_path)
    assert compared.returncode == 0 and list((tmp_path / "page").glob("*.html")), compared.stderr
    words[words.index(CONFIG)] = "RetinaNet/mgd_levels_R50_R18_FPN_1x"
    wrong = run(installed, "d2-mgd-train", *words, cwd=tmp_path)
    assert wrong.returncode == 2 and str(ROOT) not in wrong.stderr
    assert "Nearest: RetinaNet/mgd_levels_R_50_R_18_FPN_1x.yaml" in wrong.stderr.splitlines()[-1]
