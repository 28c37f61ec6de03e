"""A Detectron2 project of its own, which knows this one by ``add_mgd_config`` alone.

``main`` runs in each of several ranks.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, HookBase, defaults
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from torch.nn.parallel import DistributedDataParallel

from d2_mgd.detection import add_mgd_config


@META_ARCH_REGISTRY.register()
class OwnDetector(RetinaNet):
    """Takes images upside down."""

    def preprocess_image(self, batched_inputs: Any) -> Any:
        return super().preprocess_image([{**sample, "image": sample["image"].flip(1)} for sample in batched_inputs])


class Losses(HookBase):
    """Keeps this rank's losses of each step."""

    def __init__(self) -> None:
        self.of_steps: list[dict[str, float]] = []

    def before_train(self) -> None:
        self.trainer.model.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, dict):
            self.of_steps.append({name: float(loss.detach()) for name, loss in output.items()})


class OwnTrainer(DefaultTrainer):
    """As Detectron2's tools/train_net.py has one."""

    def build_hooks(self) -> list[Any]:
        self.losses = Losses()
        return [*super().build_hooks(), self.losses]

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


def own_config(config: str, output: str, *overrides: Any) -> CfgNode:
    cfg = get_cfg()
    add_mgd_config(cfg)
    cfg.merge_from_file(config)
    own = ["MODEL.META_ARCHITECTURE", "TeacherStudentDetector", "MGD.STUDENT.META_ARCHITECTURE", "OwnDetector"]
    cfg.merge_from_list([*own, "MGD.REMATCH.SOURCE", "online", "OUTPUT_DIR", output, *overrides])
    os.makedirs(output, exist_ok=True)
    return cfg


def own_training(cfg: CfgNode, resume: bool = False) -> OwnTrainer:
    trainer = OwnTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def main(words: list[str]) -> None:
    """One rank of a training.

    Args:
        words: config, OUTPUT_DIR, json and images of the data set, then KEY VALUE overrides; and "--resume" anywhere.
    """
    config, output, json_file, images, *overrides = [word for word in words if word != "--resume"]
    dist.init_process_group("gloo")
    # Detectron2's own names a GPU on the CPU too
    defaults.create_ddp_model = lambda model, **options: DistributedDataParallel(model, **options)
    for name in ("tiny_train", "tiny_valid"):
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, json_file, images)
    cfg = own_config(config, output, "MGD.REMATCH.EVERY", 1, "TEST.EVAL_PERIOD", 0, *overrides)
    trainer = own_training(cfg, resume="--resume" in words)
    model = trainer.model.module
    found = {
        "losses": trainer.losses.of_steps,
        "groups": {name: one.groups.tolist() for name, one in model.distiller.matchings.items()},
        "student": model.student.state_dict(),
        "finished": model.rematcher.finished,
        "start": trainer.start_iter,
    }
    torch.save(found, os.path.join(output, f"rank_{dist.get_rank()}.pth"))
    dist.destroy_process_group()
