"""The `MGD` node of a config: what each key means, the configs of student and teacher, and what is checked first."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from d2_mgd import configs
from d2_mgd.detection.config_files import check_mgd_types, merge_file, merge_overrides
from d2_mgd.detection.heads import head_options
from d2_mgd.distill import (
    ALIGNMENTS,
    FEATURE_LOSSES,
    MATCHED_ALIGNMENTS,
    NORMS,
    REDUCERS,
    REDUCTIONS,
    SPATIAL_WEIGHTS,
    RematchSchedule,
    WeightSchedule,
)
from d2_mgd.matching import METRICS, MODES

__all__ = [
    "UNTRAINED",
    "add_mgd_config",
    "feature_losses",
    "feature_weights",
    "rematch_schedule",
    "student_config",
    "teacher_config",
    "validate_config",
    "validate_running",
    "weight_schedule",
]

META_ARCHITECTURE = "TeacherStudentDetector"
UNTRAINED = "untrained"  # MGD.TEACHER.WEIGHTS of a teacher that is meant to stay as it was initialised
LAST_NORMS = ("affine", "sync_bn", "none")
SOURCES = ("pass", "online")
PRECISIONS = ("", "float16", "bfloat16")
_MOST_REMATCHES = 10_000
MARGIN_LOSSES = ("partial_l2",)  # need a teacher's pre-activations with the margins of their batch-norm

_PROJECT_CONFIGS = configs.FOLDER


def add_mgd_config(cfg: CfgNode) -> None:
    """Add the `MGD` node to a Detectron2 config. Nothing else in the config changes."""
    cfg.MGD = CfgNode()
    # Distil. False trains the plain student of the same config.
    cfg.MGD.ENABLED = False

    cfg.MGD.TEACHER = CfgNode()
    # The teacher's own config: a yaml file (relative to the working directory or to this project's configs), or a name
    # of the model zoo, such as "COCO-Detection/retinanet_R_101_FPN_3x.yaml".
    cfg.MGD.TEACHER.CONFIG_FILE = ""
    # Its weights: a file or URL; "" is MODEL.WEIGHTS of its config; "zoo" is the model zoo's checkpoint of CONFIG_FILE;
    # "untrained" is a random network, a control that teaches nothing.
    cfg.MGD.TEACHER.WEIGHTS = ""
    # KEY VALUE pairs that override its config.
    cfg.MGD.TEACHER.OPTS = []
    # Evaluate the teacher on DATASETS.TEST before training.
    cfg.MGD.TEACHER.EVAL_FIRST = False

    cfg.MGD.STUDENT = CfgNode()
    # The student's meta-architecture, only where MODEL.META_ARCHITECTURE is "TeacherStudentDetector" itself.
    cfg.MGD.STUDENT.META_ARCHITECTURE = ""
    # The last norm of each distilled backbone stage of the student: "affine" trains its scale and shift and keeps its
    # statistics, "sync_bn" trains both, "none" leaves it frozen.
    cfg.MGD.STUDENT.TRAIN_LAST_NORM = "affine"

    # Where to distil: FPN levels "p2" ... "p7", backbone stages "res2" ... "res5"; none where only predictions are.
    cfg.MGD.FEATURES = ["p3", "p4", "p5"]
    # Factor of each feature's loss, or one for all.
    cfg.MGD.WEIGHTS = [1.0]
    # Take backbone stages before their last ReLU. FPN levels have none.
    cfg.MGD.BEFORE_ACTIVATION = True
    # How a group of teacher channels becomes one map: "amp", "max", "mean", "rd", "sm".
    cfg.MGD.REDUCER = "amp"
    # "partial_l2" (backbone stages before the activation only), "mse", "pearson", "channel_kl"; one name, or one for
    # each feature with commas between.
    cfg.MGD.LOSS = "mse"
    # "mean" over real elements, or "image_sum", the published sum over elements divided by images.
    cfg.MGD.REDUCTION = "mean"
    # Which pixels count how much in the loss: "all" alike, ground-truth "boxes" and background in balance, or by the
    # teacher's "attention".
    cfg.MGD.SPATIAL = "all"
    # Matching cost of two channels: "cosine" (published) or "pearson".
    cfg.MGD.METRIC = "cosine"
    # "balanced", "even", "one_to_one"; "" is what the reducer needs.
    cfg.MGD.MODE = ""
    # Lists of features that share one matching, as levels under one head may: [["p3", "p4", "p5"]].
    cfg.MGD.TIE = []
    # "matching" reduces the teacher to the width of the student; "matched_projection", a learned projection of the
    # student that starts as the matching; "conv1x1", one from a random start; "none" compares channel by channel.
    cfg.MGD.ALIGN = "matching"
    # Norm of the student's maps before they are compared: "gn" (published for detectors), "bn", "sync_bn", "none".
    cfg.MGD.NORM = "gn"

    cfg.MGD.REMATCH = CfgNode()
    # Where costs come from: "pass", over images of an own loader; or "online", the maps of training steps themselves.
    cfg.MGD.REMATCH.SOURCE = "pass"
    # Rematch before the first step.
    cfg.MGD.REMATCH.START = True
    # Then every so many iterations, with another period from each milestone on; 0 or no period at all is never.
    cfg.MGD.REMATCH.PERIODS = [5000, 31000]
    cfg.MGD.REMATCH.MILESTONES = [20000]
    # In place of periods, after these numbers of iterations; ...
    cfg.MGD.REMATCH.AT = []
    # ... and each a constant factor later than the one before, often at first and seldom later: [first, last, count].
    cfg.MGD.REMATCH.LOG_SPACED = []
    # Images of a pass, over all processes (published: 1000 batches of 16).
    cfg.MGD.REMATCH.NUM_IMAGES = 2000
    # Batch size of the pass, for each process.
    cfg.MGD.REMATCH.BATCH_SIZE = 8
    # Online: observe every so many steps.
    cfg.MGD.REMATCH.EVERY = 10

    # Compare the predictions of both networks' dense heads, of RetinaNet or FCOS with the same classes and anchors.
    cfg.MGD.DENSE_KD = CfgNode()
    cfg.MGD.DENSE_KD.ENABLED = False
    # Factors of the losses of class scores and of boxes, which are divided by what the student divides its own by.
    cfg.MGD.DENSE_KD.CLASS_WEIGHT = 1.0
    cfg.MGD.DENSE_KD.BOX_WEIGHT = 1.0
    # Of the class logits.
    cfg.MGD.DENSE_KD.TEMPERATURE = 1.0

    # The same for what the teacher's head makes of the student's features (CrossKD).
    cfg.MGD.CROSS_HEAD = CfgNode()
    cfg.MGD.CROSS_HEAD.ENABLED = False
    cfg.MGD.CROSS_HEAD.CLASS_WEIGHT = 1.0
    cfg.MGD.CROSS_HEAD.BOX_WEIGHT = 1.0
    cfg.MGD.CROSS_HEAD.TEMPERATURE = 1.0
    # After how many convolutions of the student's head; 0 is the pyramid's levels (published: 3 of RetinaNet's 4).
    cfg.MGD.CROSS_HEAD.CONVS = 3

    # The factor of all distillation losses as the training goes on. Where it is 0, the teacher does not run.
    cfg.MGD.SCHEDULE = CfgNode()
    # "constant", or falling from START to STOP along a line ("linear") or half a cosine ("cosine").
    cfg.MGD.SCHEDULE.DECAY = "constant"
    # The iteration that distillation begins with; the first matching is measured then.
    cfg.MGD.SCHEDULE.START = 0
    # The iteration that it ends before; 0 is SOLVER.MAX_ITER.
    cfg.MGD.SCHEDULE.STOP = 0
    # What "linear" and "cosine" fall to, as a share of the weight.
    cfg.MGD.SCHEDULE.END = 0.0
    # Iterations in which the weight first rises from 0.
    cfg.MGD.SCHEDULE.WARMUP = 0

    cfg.MGD.DATA = CfgNode()
    # Let the file names of a COCO-format data set, or links among its files, leave its image folder.
    cfg.MGD.DATA.ALLOW_OUTSIDE_ROOT = False

    # Cut each process's share of SOLVER.IMS_PER_BATCH into so many parts, run one after the other for one step of the
    # optimiser: the memory of a smaller batch. With a teacher or without, as all keys from here on.
    cfg.MGD.ACCUMULATE = 1
    # Of SOLVER.AMP.ENABLED: "float16", on GPUs alone and with a loss scaler, or "bfloat16"; "" is float16 on a GPU and
    # bfloat16 on a CPU. Losses and matching costs are float32.
    cfg.MGD.PRECISION = ""

    cfg.MGD.NONFINITE = CfgNode()
    # Steps in a row that may be left out because a loss or gradient is not finite; 0 stops at the first. What repeats
    # such a step goes to OUTPUT_DIR/nonfinite.
    cfg.MGD.NONFINITE.SKIP = 0

    cfg.MGD.CHECKPOINT = CfgNode()
    # How many checkpoints stay in OUTPUT_DIR; 0 keeps all.
    cfg.MGD.CHECKPOINT.KEEP = 0


def student_config(cfg: CfgNode) -> CfgNode:
    """The plain config of the student: no `MGD` node, its own meta-architecture. An unmodified Detectron2 loads it.

    Raises:
        ValueError: MODEL.META_ARCHITECTURE is the distilling one and MGD.STUDENT names no other.
    """
    plain = cfg.clone()
    plain.defrost()
    node = plain.pop("MGD", None)
    if plain.MODEL.META_ARCHITECTURE == META_ARCHITECTURE:
        own = node.STUDENT.META_ARCHITECTURE if node is not None else ""
        if own in ("", META_ARCHITECTURE):
            raise ValueError(
                f"MODEL.META_ARCHITECTURE is {META_ARCHITECTURE}, so MGD.STUDENT.META_ARCHITECTURE must name the "
                "student's own, such as RetinaNet."
            )
        plain.MODEL.META_ARCHITECTURE = own
    if cfg.is_frozen():
        plain.freeze()
    return plain


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's own, frozen config, on the student's device; MODEL.WEIGHTS says where its weights are.

    Raises:
        ValueError: no such config, one that cannot be read, overrides it does not know, no weights named.
    """
    name = cfg.MGD.TEACHER.CONFIG_FILE
    path, from_zoo = _config_file(name)
    teacher = get_cfg()
    add_mgd_config(teacher)  # a student of an earlier distillation may teach
    try:
        # Detectron2's own files hold python expressions and came with its code; a stranger's must not.
        merge_file(teacher, path, allow_unsafe=from_zoo)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"MGD.TEACHER.CONFIG_FILE {name} (or a base of it) asks for python, {error.problem}: that is not run, so "
            "write the values out, or name a config of the model zoo."
        ) from error
    except ValueError as error:
        raise ValueError(f"MGD.TEACHER.CONFIG_FILE {name} is not a config of a Detectron2 model: {error}.") from error
    try:
        merge_overrides(teacher, cfg.MGD.TEACHER.OPTS)
    except ValueError as error:
        raise ValueError(f"MGD.TEACHER.OPTS do not fit {name}: {error}.") from error
    teacher = student_config(teacher)
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.MODEL.WEIGHTS = _teacher_weights(cfg, teacher)
    teacher.freeze()
    return teacher


def _config_file(name: str) -> tuple[str, bool]:
    """Path of the teacher's config, and whether it is one of the model zoo's."""
    if not name:
        raise ValueError(
            "MGD.TEACHER.CONFIG_FILE is empty: give the teacher's config, a yaml file or a name of the model zoo such "
            "as COCO-Detection/retinanet_R_101_FPN_3x.yaml; or set MGD.ENABLED to False to train without a teacher."
        )
    if not name.endswith((".yaml", ".yml")):
        raise ValueError(
            f"MGD.TEACHER.CONFIG_FILE {name} is not a yaml file; Detectron2's python configs cannot be used."
        )
    try:
        for path in (Path(name), _PROJECT_CONFIGS / name):
            if path.is_file():
                return str(path), False
        return model_zoo.get_config_file(name), True
    except (OSError, RuntimeError) as error:  # a name may also be longer than a file system takes
        raise ValueError(
            f"MGD.TEACHER.CONFIG_FILE {name} is found neither from the working directory, nor in {_PROJECT_CONFIGS}, "
            "nor in Detectron2's model zoo."
        ) from error


def _teacher_weights(cfg: CfgNode, teacher: CfgNode) -> str:
    weights = cfg.MGD.TEACHER.WEIGHTS
    if weights == "zoo":
        try:
            return model_zoo.get_checkpoint_url(cfg.MGD.TEACHER.CONFIG_FILE)
        except RuntimeError as error:
            raise ValueError(
                f"the model zoo has no checkpoint of MGD.TEACHER.CONFIG_FILE {cfg.MGD.TEACHER.CONFIG_FILE}; give the "
                "file of its weights as MGD.TEACHER.WEIGHTS."
            ) from error
    weights = weights or teacher.MODEL.WEIGHTS
    if not weights:
        raise ValueError(
            "the teacher has no weights: give their file as MGD.TEACHER.WEIGHTS, or as MODEL.WEIGHTS in its config "
            f"({UNTRAINED!r} is a teacher that was never trained)."
        )
    return weights


def feature_weights(cfg: CfgNode) -> dict[str, float]:
    """Feature name -> factor of its loss.

    Raises:
        ValueError: another number of weights than features or one; a weight that is negative or not finite.
    """
    features, weights = list(cfg.MGD.FEATURES), list(cfg.MGD.WEIGHTS)
    if len(weights) == 1:
        weights *= len(features)
    if len(weights) != len(features):
        raise ValueError(
            f"MGD.WEIGHTS has {len(weights)} entries for the {len(features)} features {', '.join(features)}: give one "
            "for each, or one for all."
        )
    found = {}
    for name, weight in zip(features, weights):
        try:
            found[name] = float(weight)  # yaml reads 1e-9, without a point, as text
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"MGD.WEIGHTS: the weight {weight!r} of feature {name} is not a number.") from None
        if not (math.isfinite(found[name]) and found[name] >= 0):
            raise ValueError(
                f"MGD.WEIGHTS: the weight of feature {name} must be finite and not negative, got {weight}."
            )
    return found


def feature_losses(cfg: CfgNode) -> dict[str, str]:
    """Feature name -> name of its loss.

    Raises:
        ValueError: another number of losses than features or one; an unknown loss; one with margins where none are.
    """
    features = list(cfg.MGD.FEATURES)
    losses = [loss.strip() for loss in str(cfg.MGD.LOSS).split(",")]
    for loss in losses:
        _check_choice("MGD.LOSS", loss, [name for name, _ in FEATURE_LOSSES])
    if len(losses) == 1:
        losses *= len(features)
    if len(losses) != len(features):
        raise ValueError(
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
        ValueError: numbers that do not fit together.
    """
    rematch = cfg.MGD.REMATCH
    try:
        if not rematch.AT and not rematch.LOG_SPACED:
            return RematchSchedule(rematch.PERIODS, rematch.MILESTONES, rematch.START)
        if rematch.LOG_SPACED and len(rematch.LOG_SPACED) != 3:
            raise ValueError(f"LOG_SPACED is [first, last, count], got {list(rematch.LOG_SPACED)}.")
        if rematch.LOG_SPACED and rematch.LOG_SPACED[2] > _MOST_REMATCHES:
            raise ValueError(f"LOG_SPACED asks for {rematch.LOG_SPACED[2]} rematches; {_MOST_REMATCHES} are the most.")
        spaced = RematchSchedule.log_spaced(*rematch.LOG_SPACED).at if rematch.LOG_SPACED else []
        return RematchSchedule(start=rematch.START, at=[*rematch.AT, *spaced])
    except ValueError as error:
        raise ValueError(f"MGD.REMATCH: {error}") from error


def weight_schedule(cfg: CfgNode) -> WeightSchedule | None:
    """The factor of the distillation losses by finished iterations, as MGD.SCHEDULE says it; None where it is always 1.

    Raises:
        ValueError: numbers that do not fit together, or a distillation that would never begin.
    """
    node, last = cfg.MGD.SCHEDULE, cfg.SOLVER.MAX_ITER
    if last <= node.START:
        raise ValueError(f"MGD.SCHEDULE.START is {node.START}, and SOLVER.MAX_ITER {last}: nothing would be distilled.")
    try:
        schedule = WeightSchedule(node.DECAY, node.START, node.STOP or last, node.WARMUP, node.END)
    except ValueError as error:
        raise ValueError(f"MGD.SCHEDULE: {error}") from error
    always = node.DECAY == "constant" and not node.START and not node.WARMUP and not 0 < node.STOP < last
    return None if always else schedule


def _check_margin(feature: str, loss: str, before_activation: bool) -> None:
    if re.fullmatch(r"p\d", feature):
        raise ValueError(
            f"MGD.LOSS {loss} needs margins, which feature {feature} cannot have: an FPN level ends in a convolution, "
            "not in a batch-norm before an activation; use mse or pearson there."
        )
    if not before_activation:
        raise ValueError(
            f"MGD.LOSS {loss} compares feature {feature} before its activation: set MGD.BEFORE_ACTIVATION to True, or "
            "use mse or pearson."
        )


def validate_config(cfg: CfgNode) -> None:
    """Check all that the config alone tells: names, numbers, and that the teacher's config can be read.

    What needs the two networks (whether a feature exists in both, strides, margins, weights that fit) is checked when
    :class:`~d2_mgd.detection.TeacherStudentDetector` is built, before the first step too. Where MGD.ENABLED is False
    only what every training needs is checked.

    Raises:
        ValueError: one sentence that names the key, the value, and what would be right.
    """
    mgd = cfg.MGD
    defaults = CfgNode()
    add_mgd_config(defaults)
    check_mgd_types(mgd, defaults.MGD)
    validate_running(cfg)
    for key in ("IMS_PER_BATCH", "MAX_ITER"):
        if cfg.SOLVER[key] < 1:
            raise ValueError(f"SOLVER.{key} must be at least 1, got {cfg.SOLVER[key]}.")
    _check_milestones(cfg)
    if mgd.CHECKPOINT.KEEP < 0:
        raise ValueError(f"MGD.CHECKPOINT.KEEP must be at least 0, which keeps all, got {mgd.CHECKPOINT.KEEP}.")
    if mgd.NONFINITE.SKIP < 0:
        raise ValueError(f"MGD.NONFINITE.SKIP must be at least 0, which leaves out none, got {mgd.NONFINITE.SKIP}.")
    if mgd.ACCUMULATE < 1:
        raise ValueError(f"MGD.ACCUMULATE must be at least 1, which cuts no batch, got {mgd.ACCUMULATE}.")
    _check_choice("MGD.PRECISION", mgd.PRECISION, PRECISIONS)
    if not mgd.ENABLED:
        return
    student_config(cfg)
    features = list(mgd.FEATURES)
    if not features and head_options(cfg) == (None, None):
        raise ValueError(
            "MGD.FEATURES is empty, and neither MGD.DENSE_KD nor MGD.CROSS_HEAD is enabled: name at least one feature, "
            "such as p3 or res4."
        )
    if len(set(features)) != len(features):
        raise ValueError(f"MGD.FEATURES names a feature twice: {', '.join(features)}.")
    feature_weights(cfg)
    feature_losses(cfg)
    _check_choice("MGD.REDUCER", mgd.REDUCER, [name for name, _ in REDUCERS])
    _check_choice("MGD.REDUCTION", mgd.REDUCTION, REDUCTIONS)
    _check_choice("MGD.SPATIAL", mgd.SPATIAL, [name for name, _ in SPATIAL_WEIGHTS])
    _check_choice("MGD.METRIC", mgd.METRIC, METRICS)
    _check_choice("MGD.MODE", mgd.MODE, ["", *MODES])
    _check_choice("MGD.ALIGN", mgd.ALIGN, ALIGNMENTS)
    _check_choice("MGD.NORM", mgd.NORM, NORMS)
    _check_choice("MGD.STUDENT.TRAIN_LAST_NORM", mgd.STUDENT.TRAIN_LAST_NORM, LAST_NORMS)
    _check_rematch(cfg, needed=mgd.ALIGN in MATCHED_ALIGNMENTS and bool(features))
    head_options(cfg)
    weight_schedule(cfg)
    teacher_config(cfg)


def validate_running(cfg: CfgNode) -> None:
    """Check what evaluations need as well as trainings: the device, and the processes that load images.

    Raises:
        ValueError: one sentence that names the key, the value, and what would be right.
    """
    if cfg.DATALOADER.NUM_WORKERS < 0:
        raise ValueError(
            f"DATALOADER.NUM_WORKERS must be at least 0, which starts none, got {cfg.DATALOADER.NUM_WORKERS}."
        )
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, which is no device: give cpu, cuda or cuda:N."
        ) from None


def _check_milestones(cfg: CfgNode) -> None:
    """Detectron2 leaves out milestones above MAX_ITER, with a warning, and no others."""
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return
    milestones, last = cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER
    if not all(isinstance(step, (int, float)) for step in milestones):
        raise ValueError(f"SOLVER.STEPS must be numbers of iterations, got {milestones}.")
    if last in milestones:
        raise ValueError(
            f"SOLVER.STEPS has {last}, which is SOLVER.MAX_ITER, so no step would follow that drop of the learning "
            "rate: leave it out of SOLVER.STEPS, or raise SOLVER.MAX_ITER."
        )
    kept = [0, *(step for step in milestones if step < last)]
    if any(step <= before for before, step in itertools.pairwise(kept)):
        raise ValueError(f"SOLVER.STEPS must be above 0 and each above the one before, got {milestones}.")


def _check_rematch(cfg: CfgNode, needed: bool) -> None:
    rematch = cfg.MGD.REMATCH
    _check_choice("MGD.REMATCH.SOURCE", rematch.SOURCE, SOURCES)
    for key in ("NUM_IMAGES", "BATCH_SIZE", "EVERY"):
        if rematch[key] < 1:
            raise ValueError(f"MGD.REMATCH.{key} must be at least 1, got {rematch[key]}.")
    schedule, last = rematch_schedule(cfg), cfg.SOLVER.MAX_ITER
    if not needed or schedule.start or any(step < last for step in schedule.at):
        return
    if not any(schedule.periods) or not any(map(schedule.due, range(1, last))):
        raise ValueError(
            f"MGD.REMATCH.START is False and no rematch comes before SOLVER.MAX_ITER {last}, so nothing would ever be "
            "matched."
        )


def _check_choice(key: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key} is {value!r}; there are: {', '.join(choice or repr('') for choice in choices)}.")
