"""Evaluations that leave a training as it was."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
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
            UserError: the data set has no ground truth for its evaluators, or an unknown type; or a package that they
                import is not installed.
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
    tasks = cfg.TEST.get("TASKS")  # without it, those of the predictions
    return COCOEvaluator(name, tasks, output_dir=folder, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)


def _sem_seg(cfg: CfgNode, name: str, folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(name, output_dir=folder)


@dataclass(frozen=True)
class _Evaluation:
    """How Detectron2 evaluates one ``evaluator_type``.

    Args:
        makers: make its evaluators from the config, the name of the data set and the output folder.
        ground_truth: the metadata of the data set that they read.
        package: what they import, beyond Detectron2's own dependencies.
    """

    makers: tuple[Callable[[CfgNode, str, str], DatasetEvaluator], ...]
    ground_truth: tuple[str, ...] = ()
    package: str = ""


_EVALUATIONS = {
    "coco": _Evaluation((_coco,)),
    "sem_seg": _Evaluation((_sem_seg,), ("stuff_classes",)),
    "coco_panoptic_seg": _Evaluation(
        (_sem_seg, _coco, lambda cfg, name, folder: COCOPanopticEvaluator(name, folder)),
        ("panoptic_json", "panoptic_root", "stuff_classes", "json_file"),
        "panopticapi",
    ),
    "lvis": _Evaluation((lambda cfg, name, folder: LVISEvaluator(name, output_dir=folder),), ("json_file",), "lvis"),
    "cityscapes_instance": _Evaluation(
        (lambda cfg, name, folder: CityscapesInstanceEvaluator(name),), ("gt_dir",), "cityscapesscripts"
    ),
    "cityscapes_sem_seg": _Evaluation(
        (lambda cfg, name, folder: CityscapesSemSegEvaluator(name),), ("gt_dir",), "cityscapesscripts"
    ),
    "pascal_voc": _Evaluation((lambda cfg, name, folder: PascalVOCDetectionEvaluator(name),), ("dirname", "split")),
}
_INSTALL = {"panopticapi": "git+https://github.com/cocodataset/panopticapi.git"}


def evaluator_of(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    """See :meth:`EvaluatingTrainer.build_evaluator`; results go to ``folder``."""
    built = [make(cfg, dataset_name, folder) for make in _evaluation(cfg, dataset_name).makers]
    return built[0] if len(built) == 1 else DatasetEvaluators(built)


def check_evaluators(cfg: CfgNode) -> None:
    """Check that every set of DATASETS.TEST can be evaluated, before a training that would end without results.

    Raises:
        UserError: see :meth:`EvaluatingTrainer.build_evaluator`.
    """
    for name in cfg.DATASETS.TEST:
        _evaluation(cfg, name)


def _evaluation(cfg: CfgNode, dataset_name: str) -> _Evaluation:
    """How a data set is evaluated; checks that it has the ground truth and that the package is installed."""
    known = MetadataCatalog.get(dataset_name)
    kind = known.get("evaluator_type", "coco")
    if kind not in _EVALUATIONS:
        raise UserError(f"data set {dataset_name!r} has evaluator_type {kind!r}; there are: {', '.join(_EVALUATIONS)}.")
    found = _EVALUATIONS[kind]
    keypoints = kind.startswith("coco") and cfg.MODEL.KEYPOINT_ON
    needed = (*found.ground_truth, *(["keypoint_names"] if keypoints else []))
    missing = [key for key in needed if known.get(key) is None]
    if missing:
        raise UserError(
            f"data set {dataset_name!r} has no ground truth for its evaluators ({kind}"
            f"{', keypoints' if keypoints else ''}): its metadata lack {', '.join(missing)}."
        )
    if found.package and importlib.util.find_spec(found.package) is None:
        raise UserError(
            f"data set {dataset_name!r} is evaluated ({kind}) with {found.package}, which is not installed: "
            f"pip install {_INSTALL.get(found.package, found.package)}; or leave it out of DATASETS.TEST."
        )
    return found


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
