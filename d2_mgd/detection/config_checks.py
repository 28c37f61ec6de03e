"""The values of the `MGD` node: read, and checked against what a training can do."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode

from d2_mgd.detection.config import add_mgd_config, student_config, teacher_config
from d2_mgd.detection.config_files import check_mgd_types
from d2_mgd.detection.heads import head_options
from d2_mgd.detection.rematcher import SOURCES
from d2_mgd.distill import (
    ALIGNMENTS,
    BALANCES,
    FEATURE_LOSSES,
    MATCHED_ALIGNMENTS,
    NORMS,
    REDUCERS,
    REDUCTIONS,
    SPATIAL_WEIGHTS,
    RematchSchedule,
    WeightSchedule,
)
from d2_mgd.distill.stages import fitting_metric
from d2_mgd.distill.teacher_forward import TEACHER_PRECISIONS
from d2_mgd.errors import UserError, located
from d2_mgd.matching import METRICS, MODES

LAST_NORMS = ("affine", "sync_bn", "none")
SAMPLERS = (
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
    "WeightedCategoryTrainingSampler",
)  # those of Detectron2's training loader
PRECISIONS = ("", "float16", "bfloat16")
MARGIN_LOSSES = ("partial_l2",)  # need a teacher's pre-activations with the margins of their batch-norm
_FOLLOWS = -1  # MGD.SCHEDULE.WARMUP
_MOST_REMATCHES = 10_000


@dataclass(frozen=True)
class CheckedConfig:
    """What :func:`validate_config` found fit to train.

    Args:
        teacher: the teacher's own config; None where MGD.ENABLED is False.
    """

    teacher: CfgNode | None


@dataclass(frozen=True)
class Recipe:
    """MGD.METRIC, NORM, BALANCE, SCHEDULE.DECAY and SCHEDULE.WARMUP, with what follows from the rest of the config."""

    metric: str
    norm: str
    balance: str
    decay: str
    warmup: int

    @classmethod
    def of(cls, cfg: CfgNode) -> Recipe:
        mgd, losses = cfg.MGD, set(feature_losses(cfg).values())
        loss = losses.pop() if len(losses) == 1 else ""
        balance = mgd.BALANCE or ("fixed" if mgd.WEIGHTS or not mgd.FEATURES else "auto")
        return cls(
            metric=mgd.METRIC or fitting_metric(loss),
            norm=mgd.NORM or ("none" if loss == "pearson" else "gn"),
            balance=balance,
            decay=mgd.SCHEDULE.DECAY or ("cosine" if balance == "auto" else "constant"),
            warmup=_warmup(cfg, balance),
        )


def _warmup(cfg: CfgNode, balance: str) -> int:
    """Iterations of the weight's warm-up.

    Where nothing clips the gradients, one helped on average: docs/weight.md. The limit is for trainings shorter than
    Detectron2's warm-up of the learning rate, 1,000 iterations.
    """
    node = cfg.MGD.SCHEDULE
    if node.WARMUP != _FOLLOWS:
        return int(node.WARMUP)
    if balance != "auto" or cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        return 0
    stop = min(node.STOP or cfg.SOLVER.MAX_ITER, cfg.SOLVER.MAX_ITER)
    return min(cfg.SOLVER.WARMUP_ITERS, max(0, stop - node.START) // 5)


def feature_weights(cfg: CfgNode) -> dict[str, float]:
    """Feature name -> factor of its loss; 1 under the balance ``auto``.

    Raises:
        UserError: another number of weights than features or one; a weight that is negative or not finite.
    """
    features, weights = list(cfg.MGD.FEATURES), list(cfg.MGD.WEIGHTS) or [1.0]
    if Recipe.of(cfg).balance == "auto":
        return dict.fromkeys(features, 1.0)
    if len(weights) == 1:
        weights *= len(features)
    if len(weights) != len(features):
        raise UserError(
            f"MGD.WEIGHTS has {len(weights)} entries for the {len(features)} features {', '.join(features)}: give one "
            "for each, or one for all."
        )
    found = {}
    for name, weight in zip(features, weights):
        try:
            found[name] = float(weight)  # yaml reads 1e-9, without a point, as text
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"MGD.WEIGHTS: the weight {weight!r} of feature {name} is not a number.") from None
        if not (math.isfinite(found[name]) and found[name] >= 0):
            raise UserError(f"MGD.WEIGHTS: the weight of feature {name} must be finite and not negative, got {weight}.")
    return found


def feature_losses(cfg: CfgNode) -> dict[str, str]:
    """Feature name -> name of its loss.

    Raises:
        UserError: another number of losses than features or one; an unknown loss; one with margins where none are.
    """
    features = list(cfg.MGD.FEATURES)
    losses = [loss.strip() for loss in str(cfg.MGD.LOSS).split(",")]
    for loss in losses:
        _check_choice("MGD.LOSS", loss, [name for name, _ in FEATURE_LOSSES])
    if len(losses) == 1:
        losses *= len(features)
    if len(losses) != len(features):
        raise UserError(
            f"MGD.LOSS names {len(losses)} losses for the {len(features)} features {', '.join(features)}: name one for "
            "each, or one for all."
        )
    found = dict(zip(features, losses))
    for name, loss in found.items():
        if loss in MARGIN_LOSSES:
            _check_margin(name, loss, cfg.MGD.BEFORE_ACTIVATION)
    return found


def rematch_schedule(cfg: CfgNode) -> RematchSchedule:
    """When to rematch, in finished iterations: as MGD.REMATCH says it.

    Raises:
        UserError: numbers that do not fit together.
    """
    rematch = cfg.MGD.REMATCH
    with located("MGD.REMATCH: "):
        if not rematch.AT and not rematch.LOG_SPACED:
            return RematchSchedule(rematch.PERIODS, rematch.MILESTONES, rematch.START)
        if rematch.LOG_SPACED and len(rematch.LOG_SPACED) != 3:
            raise UserError(f"LOG_SPACED is [first, last, count], got {list(rematch.LOG_SPACED)}.")
        if rematch.LOG_SPACED and rematch.LOG_SPACED[2] > _MOST_REMATCHES:
            raise UserError(f"LOG_SPACED asks for {rematch.LOG_SPACED[2]} rematches; {_MOST_REMATCHES} are the most.")
        spaced = RematchSchedule.log_spaced(*rematch.LOG_SPACED).at if rematch.LOG_SPACED else []
        return RematchSchedule(start=rematch.START, at=[*rematch.AT, *spaced])


def weight_schedule(cfg: CfgNode) -> WeightSchedule:
    """The factor of the distillation losses by finished iterations, from MGD.SCHEDULE.

    Raises:
        UserError: numbers that do not fit together, or a distillation that would never begin.
    """
    node, last = cfg.MGD.SCHEDULE, cfg.SOLVER.MAX_ITER
    if last <= node.START:
        raise UserError(f"MGD.SCHEDULE.START is {node.START}, and SOLVER.MAX_ITER {last}: nothing would be distilled.")
    recipe = Recipe.of(cfg)
    with located("MGD.SCHEDULE: "):
        schedule = WeightSchedule(recipe.decay, node.START, node.STOP or last, recipe.warmup, node.END)
    always = recipe.decay == "constant" and not node.START and not recipe.warmup and not 0 < node.STOP < last
    return WeightSchedule() if always else schedule


def _check_margin(feature: str, loss: str, before_activation: bool) -> None:
    if re.fullmatch(r"p\d", feature):
        raise UserError(
            f"MGD.LOSS {loss} needs margins, which feature {feature} cannot have: an FPN level ends in a convolution, "
            "not in a batch-norm before an activation; use mse or pearson there."
        )
    if not before_activation:
        raise UserError(
            f"MGD.LOSS {loss} compares feature {feature} before its activation: set MGD.BEFORE_ACTIVATION to True, or "
            "use mse or pearson."
        )


def validate_config(cfg: CfgNode) -> CheckedConfig:
    """Check everything that needs no network: names, numbers, and that the teacher's config can be read.

    What needs the two networks (whether a feature exists in both, strides, margins, weights that fit) is checked when
    :class:`~d2_mgd.detection.TeacherStudentDetector` is built, before the first step too. Where MGD.ENABLED is False
    only what every training needs is checked.

    Raises:
        UserError: one sentence that names the key, the value, and what would be right.
    """
    mgd = cfg.MGD
    defaults = CfgNode()
    add_mgd_config(defaults)
    check_mgd_types(mgd, defaults.MGD)
    validate_running(cfg)
    for key in ("IMS_PER_BATCH", "MAX_ITER"):
        if cfg.SOLVER[key] < 1:
            raise UserError(f"SOLVER.{key} must be at least 1, got {cfg.SOLVER[key]}.")
    _check_choice("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, SAMPLERS)
    _check_milestones(cfg)
    if mgd.CHECKPOINT.KEEP < 0:
        raise UserError(f"MGD.CHECKPOINT.KEEP must be at least 0, which keeps all, got {mgd.CHECKPOINT.KEEP}.")
    if mgd.NONFINITE.SKIP < 0:
        raise UserError(f"MGD.NONFINITE.SKIP must be at least 0, which leaves out none, got {mgd.NONFINITE.SKIP}.")
    if mgd.ACCUMULATE < 1:
        raise UserError(f"MGD.ACCUMULATE must be at least 1, which cuts no batch, got {mgd.ACCUMULATE}.")
    if mgd.EARLY_STOP.PATIENCE < 0:
        raise UserError(
            f"MGD.EARLY_STOP.PATIENCE must be at least 0, which never stops, got {mgd.EARLY_STOP.PATIENCE}."
        )
    if mgd.EARLY_STOP.PATIENCE and not (cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST):
        raise UserError("MGD.EARLY_STOP.PATIENCE counts evaluations: set TEST.EVAL_PERIOD and DATASETS.TEST.")
    _check_choice("MGD.PRECISION", mgd.PRECISION, PRECISIONS)
    _check_choice("MGD.TEACHER.PRECISION", mgd.TEACHER.PRECISION, TEACHER_PRECISIONS)
    if mgd.TEACHER.PRECISION == "float16" and cfg.MODEL.DEVICE == "cpu":
        raise UserError("MGD.TEACHER.PRECISION float16 needs a GPU, and MODEL.DEVICE is cpu: use bfloat16 or auto.")
    if not mgd.ENABLED:
        return CheckedConfig(teacher=None)
    student_config(cfg)
    features = list(mgd.FEATURES)
    if not features and head_options(cfg) == (None, None):
        raise UserError(
            "MGD.FEATURES is empty, and neither MGD.DENSE_KD nor MGD.CROSS_HEAD is enabled: name at least one feature, "
            "such as p3 or res4."
        )
    if mgd.BALANCE == "auto" and not features:
        raise UserError("MGD.BALANCE is auto, and MGD.FEATURES is empty: name a feature, or leave MGD.BALANCE empty.")
    if len(set(features)) != len(features):
        raise UserError(f"MGD.FEATURES names a feature twice: {', '.join(features)}.")
    feature_weights(cfg)
    feature_losses(cfg)
    _check_choice("MGD.REDUCER", mgd.REDUCER, [name for name, _ in REDUCERS])
    _check_choice("MGD.REDUCTION", mgd.REDUCTION, REDUCTIONS)
    _check_choice("MGD.BALANCE", mgd.BALANCE, ["", *BALANCES])
    _check_choice("MGD.SPATIAL", mgd.SPATIAL, [name for name, _ in SPATIAL_WEIGHTS])
    _check_choice("MGD.METRIC", mgd.METRIC, ["", *METRICS])
    _check_choice("MGD.MODE", mgd.MODE, ["", *MODES])
    _check_choice("MGD.ALIGN", mgd.ALIGN, ALIGNMENTS)
    _check_choice("MGD.NORM", mgd.NORM, ["", *NORMS])
    _check_choice("MGD.STUDENT.TRAIN_LAST_NORM", mgd.STUDENT.TRAIN_LAST_NORM, LAST_NORMS)
    _check_rematch(cfg, needed=mgd.ALIGN in MATCHED_ALIGNMENTS and bool(features))
    head_options(cfg)
    weight_schedule(cfg)
    return CheckedConfig(teacher_config(cfg))


def validate_running(cfg: CfgNode) -> None:
    """Check what evaluations need as well as trainings: the device, and the processes that load images.

    Raises:
        UserError: one sentence that names the key, the value, and what would be right.
    """
    if cfg.DATALOADER.NUM_WORKERS < 0:
        raise UserError(
            f"DATALOADER.NUM_WORKERS must be at least 0, which starts none, got {cfg.DATALOADER.NUM_WORKERS}."
        )
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, which is no device: give cpu, cuda or cuda:N."
        ) from None


def _check_milestones(cfg: CfgNode) -> None:
    """Detectron2 leaves out milestones above MAX_ITER, with a warning, and no others."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return
    milestones, last = cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER
    if not all(isinstance(step, (int, float)) for step in milestones):
        raise UserError(f"SOLVER.STEPS must be numbers of iterations, got {milestones}.")
    if last in milestones:
        raise UserError(
            f"SOLVER.STEPS has {last}, which is SOLVER.MAX_ITER, so no step would follow that drop of the learning "
            "rate: leave it out of SOLVER.STEPS, or raise SOLVER.MAX_ITER."
        )
    kept = [0, *(step for step in milestones if step < last)]
    if any(step <= before for before, step in itertools.pairwise(kept)):
        raise UserError(f"SOLVER.STEPS must be above 0 and each above the one before, got {milestones}.")


def _check_rematch(cfg: CfgNode, needed: bool) -> None:
    rematch = cfg.MGD.REMATCH
    _check_choice("MGD.REMATCH.SOURCE", rematch.SOURCE, SOURCES)
    for key in ("NUM_IMAGES", "BATCH_SIZE", "EVERY"):
        if rematch[key] < 1:
            raise UserError(f"MGD.REMATCH.{key} must be at least 1, got {rematch[key]}.")
    schedule, last = rematch_schedule(cfg), cfg.SOLVER.MAX_ITER
    if not needed or schedule.start or any(step < last for step in schedule.at):
        return
    if not any(schedule.periods) or not any(map(schedule.due, range(1, last))):
        raise UserError(
            f"MGD.REMATCH.START is False and no rematch comes before SOLVER.MAX_ITER {last}, so nothing would ever be "
            "matched."
        )


def _check_choice(key: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{key} is {value!r}; there are: {', '.join(choice or repr('') for choice in choices)}.")


def check_scaling(cfg: CfgNode, processes: int) -> None:
    """Detectron2 would scale its own schedule to the number of processes, and not that of the rematches."""
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if cfg.MGD.ENABLED and reference not in (0, processes):
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference} and there are {processes} processes: set it to 0, "
            "and the schedule, MGD.REMATCH and MGD.SCHEDULE included, for this number."
        )


def check_supported(cfg: CfgNode, processes: int) -> None:
    """What Detectron2's trainer offers and this one does not."""
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise UserError("TEST.PRECISE_BN.ENABLED is not supported: it could not be resumed.")
    if cfg.TEST.AUG.ENABLED:
        raise UserError("TEST.AUG.ENABLED is not supported: evaluate the student with Detectron2's own train_net.py.")
    images, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.MGD.ACCUMULATE
    if images % processes == 0 and images // processes % parts:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {processes} processes share; the {images // processes} images of "
            f"each cannot be cut into MGD.ACCUMULATE {parts} equal parts."
        )
