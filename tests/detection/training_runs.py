"""Tiny data sets and models for tests of training, and the real command line on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("disc", "box", "cross")

TINY_MODEL = {
    "META_ARCHITECTURE": "RetinaNet",
    "MASK_ON": False,
    "PIXEL_MEAN": [103.5, 116.3, 123.7],
    "PIXEL_STD": [57.4, 57.1, 58.4],
    "WEIGHTS": "",
    "DEVICE": "cpu",
    "BACKBONE": {"NAME": "build_retinanet_resnet_fpn_backbone", "FREEZE_AT": 1},
    "RESNETS": {
        "DEPTH": 50,
        "STEM_OUT_CHANNELS": 4,
        "RES2_OUT_CHANNELS": 8,
        "WIDTH_PER_GROUP": 2,
        "OUT_FEATURES": ["res3", "res4", "res5"],
    },
    "FPN": {"IN_FEATURES": ["res3", "res4", "res5"], "OUT_CHANNELS": 8},
    "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64], [128]]},
    "RETINANET": {"NUM_CLASSES": len(CLASSES), "NUM_CONVS": 1, "SCORE_THRESH_TEST": 0.0, "TOPK_CANDIDATES_TEST": 20},
}

TINY_RUN = {
    "DATASETS": {"TRAIN": ["tiny_train"], "TEST": ["tiny_valid"]},
    "DATALOADER": {"NUM_WORKERS": 0},
    "INPUT": {"MIN_SIZE_TRAIN": [48, 64, 80], "MAX_SIZE_TRAIN": 96, "MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 96},
    "SOLVER": {
        "IMS_PER_BATCH": 2,
        "BASE_LR": 0.01,
        "MAX_ITER": 6,
        "STEPS": [4],
        "WARMUP_ITERS": 2,
        "CHECKPOINT_PERIOD": 3,
    },
    "TEST": {"EVAL_PERIOD": 2, "DETECTIONS_PER_IMAGE": 10},
    "SEED": 7,
}

TINY_MGD = {
    "ENABLED": True,
    "TEACHER": {"EVALUATE": False},
    "FEATURES": ["res4", "p4"],
    "BALANCE": "fixed",  # auto distils from the third step on
    "LOSS": "partial_l2,mse",
    "REDUCER": "rd",  # draws random numbers in every step
    "REMATCH": {"SOURCE": "pass", "PERIODS": [2], "MILESTONES": [], "NUM_IMAGES": 5, "BATCH_SIZE": 2},
}


def write_coco(folder: Path, name: str, images: int, seed: int, **changes: Any) -> tuple[Path, Path]:
    """Noise images with rectangles, wide and high ones, and their annotations.

    Returns:
        The json and the image folder. ``changes`` replace top-level entries of the json.
    """
    random = np.random.default_rng(seed)
    root = folder / f"{name}_images"
    root.mkdir(parents=True)
    records, annotations = [], []
    for index in range(images):
        width, height = [(96, 64), (64, 96), (80, 80)][index % 3]
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for kind in range(1 + index % 2):
            x, y = random.integers(0, 30, 2).tolist()
            w, h = random.integers(12, 30, 2).tolist()
            pixels[y : y + h, x : x + w] = random.integers(0, 256, 3, dtype=np.uint8)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": (index + kind) % len(CLASSES) + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        file_name = f"{index:03d}.png"
        Image.fromarray(pixels).save(root / file_name)
        records.append({"id": index + 1, "file_name": file_name, "width": width, "height": height})
    content = {
        "images": records,
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": label} for index, label in enumerate(CLASSES)],
        **changes,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path, root


def merged(*trees: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts in one; later ones win."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def write_yaml(path: Path, *trees: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"VERSION": 2, **merged(*trees)}))
    return path


class Workplace:
    """A folder with a training set, a validation set, a trained-looking teacher and a config that distils it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.train = write_coco(folder, "tiny_train", 8, seed=1)
        self.valid = write_coco(folder, "tiny_valid", 4, seed=2)
        self.teacher_config = write_yaml(
            folder / "teacher.yaml",
            {"MODEL": merged(TINY_MODEL, {"RESNETS": {"RES2_OUT_CHANNELS": 16}, "FPN": {"OUT_CHANNELS": 12}})},
            {"INPUT": {"FORMAT": "RGB", "MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 96}},
        )
        self.teacher_weights = folder / "teacher.pth"
        _write_teacher(self.teacher_config, self.teacher_weights)
        self.config = write_yaml(
            folder / "student.yaml",
            {"MODEL": TINY_MODEL, "MGD": TINY_MGD, **TINY_RUN},
            {"MGD": {"TEACHER": {"CONFIG_FILE": str(self.teacher_config), "WEIGHTS": str(self.teacher_weights)}}},
        )

    def arguments(self, output: Path, *overrides: Any, flags: tuple[str, ...] = ()) -> list[str]:
        """Of a command line that trains into ``output``."""
        sets = [("tiny_train", *self.train), ("tiny_valid", *self.valid)]
        register = [str(word) for one in sets for word in ("--register-coco", *one)]
        words = [*register, "--config-file", str(self.config), *flags, "OUTPUT_DIR", str(output)]
        return [*words, *(str(word) for word in overrides)]


def _write_teacher(config: Path, weights: Path) -> None:
    """A teacher whose batch-norms have statistics, as those of a trained one."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    torch.manual_seed(11)
    model = build_model(cfg)
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    torch.save({"model": model.state_dict()}, weights)


def train_net(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run tools/train_net.py in a process of its own."""
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), *arguments]
    return run(command, check, **environment)


def run(command: list[str], check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert not check or done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def in_process_trainer(workplace: Workplace, output: Path, *overrides: str, resume: bool = False) -> Any:
    """A trainer in this process, its weights loaded."""
    import train_net as command_line

    from d2_mgd.detection import Trainer

    args = command_line.parser().parse_args(workplace.arguments(output, "TEST.EVAL_PERIOD", 0, *overrides))
    for name, json_file, images in args.register_coco:
        command_line.register_coco(name, json_file, images)
    cfg, _ = command_line.build_config(args)
    output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer
