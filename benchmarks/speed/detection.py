"""RetinaNet R50 teaches RetinaNet R18, at the FPN levels and at the backbone stages, by the shipped configs.

The floor is the plain student's losses, backward and optimiser step, and the plain teacher's backbone without a graph.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.measure import NOT_ON_A_GPU, Row, in_turn, ratio_row

__all__ = ["rows"]

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "RetinaNet"
_KINDS = {"FPN levels": "mgd_levels_R_50_R_18_FPN_1x.yaml", "backbone stages": "mgd_stages_R_50_R_18_FPN_1x.yaml"}


def rows(quick: bool) -> list[Row]:
    """A row for each kind of feature, on the CPU and on the GPU."""
    try:
        import detectron2  # noqa: F401
    except ImportError:
        return [Row("step, detection, CPU / floor", 1.06, note="Detectron2 is not installed")]
    found = []
    for kind, config in _KINDS.items():
        batch, sizes, rounds = (1, ((96, 128),), 1) if quick else (2, ((320, 480), (320, 416)), 7)
        found.append(_row(kind, config, "cpu", 1.06, sizes[:batch], rounds))
        name = f"step, detection, {kind}, GPU, bf16, batch 16 / floor"
        if torch.cuda.is_available():
            found.append(_row(kind, config, "cuda", 1.04, ((800, 1216),) * 16, 5 if quick else 20))
        else:
            found.append(Row(name, 1.04, note=NOT_ON_A_GPU))
    return found


def _row(kind: str, config: str, device: str, goal: float, sizes: Any, rounds: int) -> Row:
    step = _Step(config, device, sizes)
    seconds = in_turn({"floor": step.floor, "distilled": step.distilled}, rounds)
    where = "CPU" if device == "cpu" else "GPU, bf16, batch 16"
    note = f"RetinaNet R50 to R18, {config}, images of {', '.join(f'{h}x{w}' for h, w in dict.fromkeys(sizes))}"
    return ratio_row(f"step, detection, {kind}, {where} / floor", goal, seconds, "distilled", "floor", note)


class _Step:
    def __init__(self, config: str, device: str, sizes: Any) -> None:
        from detectron2.config import get_cfg
        from detectron2.modeling import META_ARCH_REGISTRY
        from detectron2.structures import Boxes, Instances
        from detectron2.utils.events import EventStorage

        from d2_mgd.detection import add_mgd_config
        from d2_mgd.detection.config_files import merge_file

        cfg = get_cfg()
        add_mgd_config(cfg)
        merge_file(cfg, str(CONFIGS / config), allow_unsafe=False)
        cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, "MGD.TEACHER.WEIGHTS", "untrained"])
        torch.manual_seed(0)
        self.model = META_ARCH_REGISTRY.get("TeacherStudentDetector")(cfg).train()
        fresh = META_ARCH_REGISTRY.get("TeacherStudentDetector")(cfg)
        self.plain_student = fresh.student.train()
        fresh._watched.detach()
        self.plain_student.load_state_dict(copy.deepcopy(self.model.student.state_dict()))
        teacher = fresh.teacher.model.backbone
        self.plain_teacher = teacher if "levels" in config else teacher.bottom_up
        self.device = device
        self.batch = []
        for height, width in sizes:
            instances = Instances((height, width))
            instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, width / 2, height / 2]], device=device))
            instances.gt_classes = torch.zeros(1, dtype=torch.int64, device=device)
            image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, device=device)
            self.batch.append({"image": image, "instances": instances, "height": height, "width": width})
        self.storage = EventStorage()
        self.optimizers = {
            name: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-5, momentum=0.9)
            for name, model in (("distilled", self.model), ("floor", self.plain_student))
        }
        with self.storage:
            self.model.distiller.observe(*self.model.extract_maps(self.batch))
        self.model.distiller.rematch()

    def floor(self) -> None:
        with torch.no_grad(), self._precision():
            self.plain_teacher(self.plain_student.preprocess_image(self.batch).tensor)
        self._optimise(self.plain_student, "floor")

    def distilled(self) -> None:
        self._optimise(self.model, "distilled")

    def _optimise(self, model: Any, name: str) -> None:
        with self.storage, self._precision():
            losses = model(self.batch)
        self.optimizers[name].zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        self.optimizers[name].step()

    def _precision(self) -> Any:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device != "cpu")
