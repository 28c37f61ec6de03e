"""Distil torchvision's RetinaNet with the core of d2_mgd, without Detectron2.

    python examples/torchvision_detection.py --demo --output demo_output
    python examples/torchvision_detection.py --output run --train-json train.json --train-images images \\
        --valid-json valid.json --valid-images images --size 320 --steps 5000

Trains a teacher, a small student alone, and a student with the same initial weights distilled on its FPN levels. Writes
report.html with their COCO AP and detections, results.json, and weights that plain torchvision loads. The command of an
interrupted run continues with the first unfinished network.

Shape shorthand: N images, C channels, H, W.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # for a repository that is not installed

import torch
import torch.nn.functional as F
from coco_format import CocoImages, evaluate, show_detections
from demos.results import start_report, terminal_table
from demos.scenes import write_scenes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm

from d2_mgd.distill import FeatureTaps, MatchingGuidedDistiller, RematchSchedule, Tap, save_reports

LEVELS = {"p3": "0", "p4": "1", "p5": "2"}  # feature -> its key in the output of torchvision's FPN
NETWORKS = {"teacher": (48, 2, 96), "student": (24, 1, 48)}  # width of the first stage, blocks a stage, FPN width


def build_detector(kind: str, num_classes: int, size: int) -> RetinaNet:
    """Build a RetinaNet from torchvision's parts: BasicBlocks, FPN, heads with group-norm."""
    width, blocks, fpn_width = NETWORKS[kind]
    body: OrderedDict[str, nn.Module] = OrderedDict()
    body["stem"] = nn.Sequential(Conv2dNormActivation(3, width, 3, 2), Conv2dNormActivation(width, width, 3, 2))
    before, widths = width, [width * 2**stage for stage in range(4)]
    for stage, after in enumerate(widths):
        stride = 1 if stage == 0 else 2
        shortcut = Conv2dNormActivation(before, after, 1, stride, activation_layer=None)
        first = BasicBlock(before, after, stride, None if before == after else shortcut)
        body[f"layer{stage + 1}"] = nn.Sequential(first, *(BasicBlock(after, after) for _ in range(blocks - 1)))
        before = after
    stages = {"layer2": "0", "layer3": "1", "layer4": "2"}
    backbone = BackboneWithFPN(nn.Sequential(body), stages, widths[1:], fpn_width)  # adds a fourth level by pooling
    anchors = AnchorGenerator(
        tuple((round(1.75 * stride), round(2.5 * stride)) for stride in (8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 4
    )
    norm = functools.partial(nn.GroupNorm, 8)
    head = RetinaNetHead(fpn_width, anchors.num_anchors_per_location()[0], num_classes + 1, norm_layer=norm)
    return RetinaNet(
        backbone, num_classes + 1, size, 2 * size, anchor_generator=anchors, head=head, detections_per_img=100
    )


class FpnDistillation:
    """Distils the FPN levels of a teacher: all that distillation adds to a training loop."""

    def __init__(self, student: RetinaNet, teacher: RetinaNet, steps: int, weight: float, reports: Path) -> None:
        taps = {name: Tap("backbone", key=key) for name, key in LEVELS.items()}
        self.student, self.teacher = FeatureTaps(student, taps), FeatureTaps(teacher.eval().requires_grad_(False), taps)
        channels = {name: (student.backbone.out_channels, teacher.backbone.out_channels) for name in LEVELS}
        self.distiller = MatchingGuidedDistiller(
            channels, loss="pearson", metric="pearson", weights=dict.fromkeys(LEVELS, weight)
        )
        self.schedule = RematchSchedule([max(1, steps // 40), max(1, steps // 8)], [max(1, steps // 8)])
        self.transform, self.reports = student.transform, reports

    def losses(self, images: list[Tensor], step: int) -> dict[str, Tensor]:
        """Distillation losses of the batch that the student has just processed; observes it, and rematches if due."""
        student_maps = self.student.collect()
        with torch.no_grad():
            teacher_maps = self.teacher.run(images)  # the forward pass ends at the FPN: no head, no NMS
            batch, _ = self.transform(images)
        real = torch.zeros(len(images), 1, *batch.tensors.shape[-2:])
        for mask, (height, width) in zip(real, batch.image_sizes):
            mask[:, :height, :width] = 1
        valid = {name: F.interpolate(real, m.shape[-2:]).bool().to(m.device) for name, m in student_maps.items()}
        self.distiller.observe(student_maps, teacher_maps, valid)
        if self.schedule.due(step):
            save_reports(self.reports / f"iter_{step:07d}.npz", self.distiller.rematch())
        return self.distiller(student_maps, teacher_maps, valid)


def endless(loader: torch.utils.data.DataLoader) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    while True:
        yield from loader


def train(model: RetinaNet, data: CocoImages, options: argparse.Namespace, name: str, steps: int, teacher: Any) -> None:
    """Train with AdamW and a one-cycle learning rate; distil if there is a teacher."""
    model.to(options.device).train()
    guide = FpnDistillation(model, teacher, steps, options.weight, options.output / "matching") if teacher else None
    if guide:
        guide.distiller.to(options.device)
    parameters = [*model.parameters(), *(guide.distiller.parameters() if guide else ())]
    optimizer = torch.optim.AdamW(parameters, options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, steps + 1, pct_start=0.15)
    batches = endless(data.batches(options.batch_size, options.seed, options.workers))
    for step in (bar := tqdm(range(steps), desc=name)):
        images, targets = next(batches)
        images = [image.to(options.device) for image in images]
        losses = model(images, [{key: value.to(options.device) for key, value in target.items()} for target in targets])
        losses |= guide.losses(images, step) if guide else {}
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            raise SystemExit(f"error: {name}: the loss is not finite at step {step}: {losses}.")
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix({key.split("/")[-1]: f"{value.item():.2f}" for key, value in losses.items()})


def run_stage(name: str, data: dict[str, CocoImages], options: argparse.Namespace, teacher: Any = None) -> Any:
    """Train a network, or load it if a run with the same settings has finished it; returns it and its results."""
    kind = "teacher" if name == "teacher" else "student"
    torch.manual_seed(options.seed)  # the same initial weights for every student
    model = build_detector(kind, len(data["train"].categories), options.size)
    steps = round(options.steps * (1.5 if kind == "teacher" else 1))
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("device", "workers", "output")}
    path = options.output / f"{name.replace(' ', '_')}.pth"
    if path.exists():
        stored = torch.load(path, map_location="cpu", weights_only=True)
        if stored["settings"] == settings:
            model.load_state_dict(stored["model"])
            return model.to(options.device).eval(), stored["row"]
    start = time.perf_counter()
    train(model, data["train"], options, name, steps, teacher)
    seconds = time.perf_counter() - start
    found = evaluate(model, data["valid"], options.device, options.batch_size, options.workers)
    row = {"network": name, **found, "steps": steps, "seconds": seconds}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    partial = path.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "row": row, "settings": settings}, partial)
    partial.replace(path)
    return model, row


def write_report(rows: list[dict[str, Any]], detections: Figure, data: str, output: Path) -> str:
    """Write report.md, report.html and results.json; returns the summary for the terminal."""
    report = start_report({row["network"]: row["AP"] for row in rows}, "AP", data)
    header = ["network", "AP", "AP50", "parameters", "steps", "seconds"]
    cells = [
        [row["network"], *(f"{row[key]:.1f}" for key in ("AP", "AP50")), f"{row['parameters']:,}", str(row["steps"])]
        for row in rows
    ]
    cells = [[*line, f"{row['seconds']:.0f}"] for line, row in zip(cells, rows)]
    report.heading("Results")
    report.table(header, cells, emphasised=[2])
    report.heading("Detections")
    report.figure(
        "detections", detections, "Detections with a score of 40% or more; dashed if there is no such object."
    )
    markdown, page = report.write(output)
    (output / "results.json").write_text(json.dumps(rows, indent=2))
    return f"{report.headline}\n\n{terminal_table(header, cells)}\n\n{markdown}\n{page}"


def demo_data(options: argparse.Namespace) -> None:
    """Render scenes, and use them as the data."""
    sizes = {"train": 24, "valid": 8} if options.quick else {"train": 1500, "valid": 200}
    with tqdm(total=sum(sizes.values()), desc="rendering scenes") as bar:
        paths = write_scenes(
            options.output / "scenes", sizes, options.seed, options.size, lambda done, _: bar.update(done - bar.n)
        )
    (options.train_json, options.train_images), (options.valid_json, options.valid_images) = paths.values()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="render scenes and train on them")
    parser.add_argument("--quick", action="store_true", help="with --demo: only a few images and steps, as a test")
    for split in ("train", "valid"):
        parser.add_argument(f"--{split}-json", type=Path, help="annotations in COCO format")
        parser.add_argument(f"--{split}-images", type=Path, help="folder of the images")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--size", type=int, default=64, help="shorter side of the images (longer: twice that at most)")
    parser.add_argument(
        "--steps", type=int, default=400, help="steps of the students; the teacher trains 1.5 times as many"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight", type=float, default=1.0, help="weight of the distillation loss of each FPN level")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="image-loading processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    given = [options.train_json, options.train_images, options.valid_json, options.valid_images]
    if options.demo == any(given) or not (options.demo or all(given)):
        parser.error("give --demo, or all of --train-json, --train-images, --valid-json and --valid-images.")
    if options.quick:
        options.steps, options.batch_size, options.workers = 2, 4, 0
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.demo:
        demo_data(options)
    data = {
        "train": CocoImages(options.train_json, options.train_images, mirror=True),
        "valid": CocoImages(options.valid_json, options.valid_images, mirror=False),
    }
    if data["train"].categories != data["valid"].categories:
        raise SystemExit(f"error: {options.train_json} and {options.valid_json} have different categories.")
    models: dict[str, RetinaNet] = {}
    rows = []
    for name in ("teacher", "student alone", "student distilled"):
        models[name], row = run_stage(name, data, options, models.get("teacher") if "distilled" in name else None)
        rows.append(row)
    detections = show_detections(models, data["valid"], options.device, least=0.4)
    print(write_report(rows, detections, f"{len(data['valid'])} images", options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
