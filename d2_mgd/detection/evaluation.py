"""Evaluations that leave a training as it was."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from torch import nn

from d2_mgd.detection.config_loaders import build_evaluation_loader
from d2_mgd.detection.teacher_evaluation import teacher_test_config
from d2_mgd.errors import UserError
from d2_mgd.training.modules import preserved_modes
from d2_mgd.training.processes import rank
from d2_mgd.training.randomness import preserved_randomness

logger = logging.getLogger(__name__)


class EvaluatingTrainer(DefaultTrainer):
    """Detectron2's trainer, with metrics in a file and evaluations of the teacher."""

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str, mapper: Callable[..., Any] | None = None) -> Any:
        """The images of one of DATASETS.TEST, one at a time. An override may return any loader with a length."""
        return build_evaluation_loader(cfg, dataset_name, mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """Detectron2's evaluators for the ``evaluator_type`` of a data set; COCO's for a set without one.

        Raises:
            UserError: the data set has no ground truth for its evaluator, or an unknown type.
        """
        return evaluator_of(cfg, dataset_name, output_folder or _inference_dir(cfg, dataset_name))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict[str, Any]:
        """Evaluate on every set of DATASETS.TEST, and write the metrics of each to ``inference/<set>/results.json``.

        The random state and the modes of ``model`` are restored.

        Returns:
            Task -> metric -> number; with several sets, set -> task -> metric -> number. Empty on ranks other than 0.
        """
        with preserved_randomness(), preserved_modes(model):
            results = super().test(cfg, model, evaluators)
        by_name = {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results
        if rank() == 0:
            for name, metrics in by_name.items():
                _write_results(os.path.join(_inference_dir(cfg, name), "results.json"), metrics)
        return results

    @classmethod
    def test_teacher(cls, cfg: CfgNode, teacher: Any) -> dict[str, Any]:
        """Evaluate the teacher alone, on the student's DATASETS.TEST with the teacher's own input settings.

        Args:
            cfg: the training's config.
            teacher: a :class:`~d2_mgd.detection.teacher.FrozenTeacher`.

        Raises:
            UserError: it cannot be evaluated there.
        """
        own = teacher_test_config(cfg, teacher)
        logger.info("Evaluating the teacher %s", teacher.weights_path)
        return cls.test(own, teacher.model)


def _coco(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return COCOEvaluator(name, cfg.TEST.get("TASKS"), output_dir=folder)  # without tasks, those of the predictions


# evaluator_type -> what makes the evaluators, and metadata of the ground truth that they read
_EVALUATORS: dict[str, tuple[list[Callable[[CfgNode, str, str], DatasetEvaluator]], tuple[str, ...]]] = {
    "coco": ([_coco], ()),
    "sem_seg": ([lambda cfg, name, folder: SemSegEvaluator(name, output_dir=folder)], ("stuff_classes",)),
    "coco_panoptic_seg": (
        [
            lambda cfg, name, folder: SemSegEvaluator(name, output_dir=folder),
            _coco,
            lambda cfg, name, folder: COCOPanopticEvaluator(name, folder),
        ],
        ("panoptic_json", "panoptic_root", "stuff_classes", "json_file"),
    ),
    "lvis": ([lambda cfg, name, folder: LVISEvaluator(name, output_dir=folder)], ("json_file",)),
    "cityscapes_instance": ([lambda cfg, name, folder: CityscapesInstanceEvaluator(name)], ("gt_dir",)),
    "cityscapes_sem_seg": ([lambda cfg, name, folder: CityscapesSemSegEvaluator(name)], ("gt_dir",)),
    "pascal_voc": ([lambda cfg, name, folder: PascalVOCDetectionEvaluator(name)], ("dirname", "split")),
}


def evaluator_of(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    """See :meth:`EvaluatingTrainer.build_evaluator`; results go to ``folder``."""
    known = MetadataCatalog.get(dataset_name)
    kind = known.get("evaluator_type", "coco")
    if kind not in _EVALUATORS:
        raise UserError(f"data set {dataset_name!r} has evaluator_type {kind!r}; there are: {', '.join(_EVALUATORS)}.")
    makers, needed = _EVALUATORS[kind]
    if kind.startswith("coco") and cfg.MODEL.KEYPOINT_ON:
        needed = (*needed, "keypoint_names")
    missing = [key for key in needed if known.get(key) is None]
    if missing:
        raise UserError(
            f"data set {dataset_name!r} has no ground truth for its evaluators ({kind}"
            f"{', keypoints' if cfg.MODEL.KEYPOINT_ON else ''}): its metadata lack {', '.join(missing)}."
        )
    built = [make(cfg, dataset_name, folder) for make in makers]
    return built[0] if len(built) == 1 else DatasetEvaluators(built)


def _inference_dir(cfg: CfgNode, dataset_name: str) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)


def _write_results(path: str, metrics: dict[str, Any]) -> None:
    """Metrics as strict json: what is not a number, such as the AP of a class without objects, is null."""
    plain = OrderedDict(
        (task, {name: None if math.isnan(value) else float(value) for name, value in numbers.items()})
        for task, numbers in metrics.items()
    )
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(plain, file, indent=2)
        file.write("\n")
