"""Distil random pairs of timm's networks from the command line, without --features, and print which taps were chosen:

    python -m tests.pairs [--only 0 1 2] [--image-size 224]

On CPUs, PyTorch 2.14.1 crashes in the backward pass of fastvit_mci0 (pair 0) with images in channels_last, without this
project too. Each pair trains three steps of two noise images, from a teacher with random
weights, in a process of its own. A pair that cannot work must end in one sentence. Needs timm; takes minutes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("ant", "bee")
# Drawn once from timm 1.0.31: students of at most 12, teachers of at most 45 million parameters, every second teacher
# with attention.
PAIRS = (
    ("fastvit_mci0", "resnetv2_101d"),
    ("mobilenetv1_125", "vit_medium_patch32_clip_224"),
    ("densenet121", "tf_mixnet_m"),
    ("xcit_tiny_12_p16_384", "xcit_small_12_p16_224"),
    ("convnextv2_femto", "edgenext_base"),
    ("mobilenetv4_conv_small_035", "coatnet_0_224"),
    ("lcnetv2_base", "convnext_femto"),
    ("mnasnet_075", "swinv2_tiny_window8_256"),
    ("efficientnet_lite2", "efficientnet_blur_b0"),
    ("efficientvit_b0", "efficientvit_m0"),
    ("pit_ti_distilled_224", "efficientnet_em"),
    ("tf_efficientnet_lite3", "tiny_vit_5m_224"),
    ("convnext_femto", "starnet_s100"),
    ("pit_xs_distilled_224", "vit_small_patch16_dinov3"),
    ("starnet_s4", "convnext_femto_ols"),
    ("repvit_m3", "maxxvitv2_nano_rw_256"),
    ("pit_xs_224", "resnet61q"),
    ("eca_resnext26ts", "vit_small_patch32_224"),
    ("spnasnet_100", "efficientvim_m1"),
    ("crossvit_tiny_240", "vit_wee_patch16_reg1_gap_256"),
)


def write_images(root: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 3), ("valid", 1)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype="uint8")).save(folder / f"{index}.png")
    return root


def train(student: str, teacher: str, data: Path, folder: Path, image_size: int) -> list[str]:
    """Cells of a row: the loss and the features, or the error."""
    import timm

    torch.manual_seed(0)
    weights = folder / f"{teacher}.pth"
    torch.save(timm.create_model(teacher, num_classes=len(CLASSES)).state_dict(), weights)
    command = [
        sys.executable, str(ROOT / "classification" / "main_mgd.py"), str(data), "--arch", f"timm:{student}",
        "--teacher-arch", f"timm:{teacher}", "--teacher-resume", str(weights), "--image-size", str(image_size),
        "--epochs", "1", "--batch-size", "2", "--learning-rate", "0.001", "--workers", "0", "--device", "cpu",
        "--print-freq", "1", "--output-dir", str(folder / "run"), "--overwrite",
        "--balance", "fixed",  # auto would stop where the student is better than a teacher of random weights
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    weights.unlink()
    features = re.findall(r" feature (.*)", done.stderr)
    loss = re.search(r" loss: (\w+),", done.stderr)
    if done.returncode == 0 and len(re.findall(r"step \d of 3: loss_class", done.stderr)) == 3 and loss:
        return [loss[1], "; ".join(features)]
    errors = [line for line in done.stderr.splitlines() if ": error: " in line]
    if done.returncode == 2 and len(errors) == 1:
        return ["", errors[0]]
    return ["", f"FAILED with status {done.returncode}: {done.stderr.strip().splitlines()[-1]}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", default=range(len(PAIRS)), metavar="PAIR", help="from 0")
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(Path(folder) / "images")
        for index in options.only:
            cells = train(*PAIRS[index], data, Path(folder), options.image_size)
            rows.append([str(index), *PAIRS[index], *cells])
            print(rows[-1], file=sys.stderr, flush=True)
    print(markdown(["pair", "student", "teacher", "loss", "features, or error"], rows, numbers=False))
    return int(any("FAILED" in row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
