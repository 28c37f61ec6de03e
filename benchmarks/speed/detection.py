"""RetinaNet R50 teaches RetinaNet R18, at the FPN levels and at the backbone stages, with the shipped configs.

The floor is the plain student's losses, backward and optimiser step, and the plain teacher's backbone without a graph.
On a GPU both are in channels_last and everything runs in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.speed.measure import Row, in_turn, ratio_row

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "RetinaNet"
_KINDS = {"FPN levels": "mgd_levels_R_50_R_18_FPN_1x.yaml", "backbone stages": "mgd_stages_R_50_R_18_FPN_1x.yaml"}


def rows(quick: bool) -> Iterator[Row]:
    """Yield the rows of the CPU, for each kind of feature."""
    sizes, rounds = (((96, 128),), 1) if quick else (((320, 480), (320, 416)), 7)
    for kind, config in _KINDS.items():
        yield from _rows(_Step(config, "cpu", sizes), f"{kind}, CPU", 0.75, rounds, 1)


def gpu_rows(quick: bool, device: str = "cuda") -> Iterator[Row]:
    """Yield the rows of a GPU, for each kind of feature."""
    sizes, rounds, calls = (((96, 128),), 1, 1) if quick else (((800, 1216),) * 16, 7, 3)
    for kind, config in _KINDS.items():
        step = _Step(config, device, sizes, bfloat16=True)
        yield from _rows(step, f"{kind}, GPU, bf16, batch {len(sizes)}", 0.9, rounds, calls)


def _rows(step: _Step, where: str, goal: float, rounds: int, calls: int) -> Iterator[Row]:
    things = {"floor": step.floor, "distilled": step.distilled, "student alone": step.student_alone}
    seconds = in_turn(things, rounds, warmup=2 if calls > 1 else 1, calls=calls)
    sizes = dict.fromkeys(f"{sample['height']}x{sample['width']}" for sample in step.batch)
    note = f"RetinaNet R50 to R18, {step.config}, images of {', '.join(sizes)}"
    yield ratio_row(f"step, detection, {where} / floor", goal, seconds, "distilled", "floor", note)
    name = f"step, detection, {where} / student alone"
    yield ratio_row(name, None, seconds, "distilled", "student alone", note)


class _Step:
    """Both networks plain, and the same two in the distilling model.

    Args:
        config: file name of the model's config.
        device: of networks and images.
        sizes: (height, width) of each image of the batch.
        bfloat16: run all in bfloat16, and the floor in channels_last.
    """

    def __init__(self, config: str, device: str, sizes: tuple[tuple[int, int], ...], bfloat16: bool = False) -> None:
        from detectron2.config import get_cfg
        from detectron2.utils.events import EventStorage

        from d2_mgd.detection import TeacherStudentDetector, add_mgd_config
        from d2_mgd.detection.config_files import merge_file

        cfg = get_cfg()
        add_mgd_config(cfg)
        merge_file(cfg, str(CONFIGS / config), allow_unsafe=False)
        cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, "MGD.TEACHER.WEIGHTS", "untrained",
            "MGD.TEACHER.PRECISION", "auto",
        ])  # fmt: skip
        torch.manual_seed(0)
        self.config, self.device, self.bfloat16 = config, device, bfloat16
        self.model = TeacherStudentDetector(cfg).train()
        parts = TeacherStudentDetector.from_config(cfg)  # the same networks without hooks
        backbone = parts["teacher"].model.backbone
        self.plain_teacher: nn.Module = backbone if "levels" in config else backbone.bottom_up
        self.plain_student: Any = parts["student"].train()
        if bfloat16:
            for network in (self.plain_teacher, self.plain_student):
                network.to(memory_format=torch.channels_last)
        self.batch = [_sample(height, width, device) for height, width in sizes]
        self.pixels = self.plain_student.preprocess_image(self.batch).tensor
        self.storage = EventStorage()
        self.optimizers = {
            id(model): torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-5, momentum=0.9)
            for model in (self.model, self.plain_student)
        }
        with self.storage, self._precision():
            self.model.distiller.observe(*self.model.extract_maps(self.batch))
        self.model.distiller.rematch()

    def floor(self) -> None:
        with torch.no_grad(), self._precision():
            self.plain_teacher(self.pixels)
        self.student_alone()

    def student_alone(self) -> None:
        self._optimise(self.plain_student)

    def distilled(self) -> None:
        self._optimise(self.model)

    def _optimise(self, model: Any) -> None:
        with self.storage, self._precision():
            losses = model(self.batch)
        optimizer = self.optimizers[id(model)]
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bfloat16)


def _sample(height: int, width: int, device: str) -> dict[str, Any]:
    from detectron2.structures import Boxes, Instances

    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, width / 2, height / 2]], device=device))
    instances.gt_classes = torch.zeros(1, dtype=torch.int64, device=device)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, device=device)
    return {"image": image, "instances": instances, "height": height, "width": width}
