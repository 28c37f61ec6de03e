"""Evaluating a teacher on the student's data: whether it is possible, with which config, and only once.

Metrics are kept in Detectron2's cache folder (``$FVCORE_CACHE``, by default ``~/.torch/iopath_cache``), by the digests
of the weights, of the data sets' json files, of a python config's file, and of what else the metrics depend on in the
teacher's config: the model, the input sizes, the number of detections, the sigmas of keypoints.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import PanopticFPN, ProposalNetwork, SemanticSegmentor
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir
from torch import nn

from d2_mgd.detection.config import UNTRAINED
from d2_mgd.detection.datasets import check_classes
from d2_mgd.detection.image_network import ImageNetwork
from d2_mgd.errors import UserError, reason
from d2_mgd.training import file_digest, write_atomically
from d2_mgd.training.processes import failing_together, from_main, rank

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]

_SEGMENTS = {"sem_seg": "sem_seg", "cityscapes_sem_seg": "sem_seg", "coco_panoptic_seg": "panoptic_seg"}
_INPUT = ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST")


def teacher_test_config(cfg: CfgNode, teacher: Any) -> CfgNode:
    """The teacher's own config for an evaluation on the student's DATASETS.TEST, in the tasks that both have.

    Raises:
        UserError: the teacher predicts nothing, or not what the data sets are evaluated by, or other classes.
    """
    _check_evaluable(cfg, teacher)
    own = teacher.cfg.clone()
    own.defrost()
    own.DATASETS.TEST = cfg.DATASETS.TEST
    own.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    own.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "teacher")
    own.MODEL.PIXEL_MEAN = cfg.MGD.TEACHER.PIXEL_MEAN or own.MODEL.PIXEL_MEAN
    own.MODEL.PIXEL_STD = cfg.MGD.TEACHER.PIXEL_STD or own.MODEL.PIXEL_STD
    heads = getattr(teacher.model, "roi_heads", None)
    own.MODEL.MASK_ON = cfg.MODEL.MASK_ON and getattr(heads, "mask_on", False)
    same_points = own.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    own.MODEL.KEYPOINT_ON = cfg.MODEL.KEYPOINT_ON and getattr(heads, "keypoint_on", False) and same_points
    own.TEST.KEYPOINT_OKS_SIGMAS = cfg.TEST.KEYPOINT_OKS_SIGMAS
    # by default those of the predictions, for which a student's data may have no ground truth
    more = {"segm": own.MODEL.MASK_ON, "keypoints": own.MODEL.KEYPOINT_ON}
    own.TEST.TASKS = ["bbox", *(task for task, wanted in more.items() if wanted)]
    own.freeze()
    return own


def _check_evaluable(cfg: CfgNode, teacher: Any) -> None:
    model = teacher.model
    predicted = _predictions(model) if teacher.cfg is not None else ()
    for name in cfg.DATASETS.TEST:
        known = MetadataCatalog.get(name)
        needed = _SEGMENTS.get(known.get("evaluator_type", ""), "instances")
        if needed not in predicted:
            raise UserError(f"the teacher {type(model).__name__} predicts no {needed}, by which {name!r} is evaluated.")
        classes = known.get("stuff_classes")
        own = teacher.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        if needed != "instances" and classes is not None and len(classes) != own:
            raise UserError(f"the teacher has {own} semantic classes but the data set {name!r} has {len(classes)}.")
    check_classes(cfg.DATASETS.TEST, model, "a teacher of other classes can teach, but not be evaluated here")


def _predictions(model: nn.Module) -> tuple[str, ...]:
    if isinstance(model, PanopticFPN):
        return ("instances", "sem_seg", "panoptic_seg")
    if isinstance(model, SemanticSegmentor):
        return ("sem_seg",)
    return () if isinstance(model, (ImageNetwork, ProposalNetwork)) else ("instances",)


def evaluate_once(cfg: CfgNode, teacher: Any, test: Callable[[], Any]) -> Metrics | None:
    """Metrics of a teacher by their full names, from the cache or by ``test`` (collective).

    Args:
        cfg: the training's config.
        teacher: a :class:`~d2_mgd.detection.teacher.FrozenTeacher`.
        test: evaluates the teacher; returns task -> metric -> number on rank 0.

    Returns:
        None, after a line in the log, for an untrained teacher and for one that cannot be evaluated on this data.

    Raises:
        CommonError: the ground truth or the python config cannot be read.
    """
    if not cfg.DATASETS.TEST:
        return None
    try:
        if teacher.weights_path == UNTRAINED:
            raise UserError("it is untrained.")
        own = teacher_test_config(cfg, teacher)
    except UserError as error:
        logger.info("The teacher is not evaluated: %s", error)
        return None
    with failing_together():
        path = cache_path(own, teacher.digest) if rank() == 0 else None
    known = from_main(None if path is None else _read(path))
    if known is not None:
        logger.info("The teacher was evaluated before, see %s", path)
        return known
    measured = from_main(flatten_results_dict(test()))
    found = {name: float(value) for name, value in measured.items()}  # some evaluators return numpy's numbers
    if rank() == 0:
        remember(path, found)
    return found


def cache_path(cfg: CfgNode, weights: str) -> str | None:
    """File of the metrics of a model on its DATASETS.TEST; None where weights or ground truth have no digest.

    Args:
        cfg: the model's plain config.
        weights: SHA-256 of its weights.

    Raises:
        UserError: the ground truth or the python config cannot be read.
    """
    sets = [MetadataCatalog.get(name) for name in cfg.DATASETS.TEST]
    if not weights or not all(known.get("json_file") for known in sets):
        return None
    model = yaml.safe_load(cfg.MODEL.dump())
    described = {
        "weights": weights,
        "model": {key: value for key, value in model.items() if key not in ("WEIGHTS", "DEVICE")},
        "input": [cfg.INPUT[key] for key in _INPUT],
        "detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "keypoints": cfg.TEST.KEYPOINT_OKS_SIGMAS,
        "program": _digest(model["LAZY_CONFIG"], "the python config") if "LAZY_CONFIG" in model else "",
        "data": [[known.get("evaluator_type", "coco"), known.get("image_root", ""), *_truth(known)] for known in sets],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    return os.path.join(get_cache_dir(), "d2_mgd", "evaluations", f"{digest}.json")


def _truth(known: Any) -> list[str]:
    """Digests of a data set's ground truth."""
    files = [known.get(key) for key in ("json_file", "panoptic_json")]
    return [_digest(file, f"the ground truth of data set {known.name!r}") for file in files if file]


def _digest(file: str, what: str) -> str:
    try:
        return file_digest(PathManager.get_local_path(file))
    except OSError as error:
        raise UserError(f"{what} cannot be read: {reason(error)}: {file}.") from error


def _read(path: str) -> Metrics | None:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def remember(path: str | None, metrics: Metrics) -> None:
    """Keep metrics; None keeps nothing, and a cache that cannot be written costs another evaluation."""
    if path is None:
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_atomically(path, lambda file: file.write(json.dumps(metrics).encode()))
    except OSError as error:
        logger.info("The evaluation is not kept in %s: %s", path, error.strerror)
