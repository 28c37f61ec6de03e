"""The keys of the `MGD` node, and the plain configs of student and teacher.

:mod:`~d2_mgd.detection.config_checks` reads and checks the values.
"""

from __future__ import annotations

import os
from pathlib import Path

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from d2_mgd import configs
from d2_mgd.detection.config_files import add_missing_keys, merge_file, merge_overrides
from d2_mgd.detection.image_network import image_network_config, is_image_network
from d2_mgd.detection.lazy_network import lazy_network_config
from d2_mgd.errors import UserError

META_ARCHITECTURE = "TeacherStudentDetector"
UNTRAINED = "untrained"  # MGD.TEACHER.WEIGHTS of a teacher that is meant to stay as it was initialised

_PROJECT_CONFIGS = configs.FOLDER


def add_mgd_config(cfg: CfgNode) -> None:
    """Add the `MGD` node to a Detectron2 config. Nothing else in the config changes."""
    cfg.MGD = CfgNode()
    # Distil. False trains the plain student of the same config.
    cfg.MGD.ENABLED = False

    cfg.MGD.TEACHER = CfgNode()
    # The teacher's own config: a yaml or python file (relative to the working directory or to this project's configs);
    # a name of the model zoo, such as "COCO-Detection/retinanet_R_101_FPN_3x.yaml"; or a classifier, "torchvision:NAME"
    # or "timm:NAME", whose maps of stride 4 to 32 are p2 to p5.
    cfg.MGD.TEACHER.CONFIG_FILE = ""
    # Its weights: a file or URL; "" is MODEL.WEIGHTS of its config; "zoo" is the model zoo's checkpoint of CONFIG_FILE;
    # "untrained" is a random network, a control that teaches nothing.
    cfg.MGD.TEACHER.WEIGHTS = ""
    # The input format of a teacher that has none: three means and deviations of pixels from 0 to 255, in the order of
    # FORMAT ("RGB", "BGR"). Empty is what its model and config contain.
    cfg.MGD.TEACHER.PIXEL_MEAN = []
    cfg.MGD.TEACHER.PIXEL_STD = []
    cfg.MGD.TEACHER.FORMAT = ""
    # Execute CONFIG_FILE if it is a python config (LazyConfig) that does not come with Detectron2. It is a program,
    # which may do anything: for files whose author you know.
    cfg.MGD.TEACHER.TRUST_PYTHON = False
    # KEY VALUE pairs that override its config; "path.key=value" for a python config.
    cfg.MGD.TEACHER.OPTS = []
    # Precision of its forward: "student" (that of the student), "float32", "bfloat16", "float16", or "auto": bfloat16
    # where the device has instructions for it, else "student".
    cfg.MGD.TEACHER.PRECISION = "student"
    # Compile its forward with torch.compile, which takes a minute for each size of a padded batch: for images of few
    # sizes.
    cfg.MGD.TEACHER.COMPILE = False
    # Evaluate the teacher on DATASETS.TEST before training, once for each data set and file of weights. A teacher that
    # is hardly better than chance, or not better than its student, is a warning.
    cfg.MGD.TEACHER.EVALUATE = True

    cfg.MGD.STUDENT = CfgNode()
    # The student's meta-architecture, only where MODEL.META_ARCHITECTURE is "TeacherStudentDetector" itself.
    cfg.MGD.STUDENT.META_ARCHITECTURE = ""
    # The last norm of each distilled backbone stage of the student: "affine" trains its scale and shift and keeps its
    # statistics, "sync_bn" trains both, "none" leaves it frozen.
    cfg.MGD.STUDENT.TRAIN_LAST_NORM = "affine"

    # Where to distil: FPN levels "p2" ... "p7", backbone stages "res2" ... "res5"; none where only predictions are.
    cfg.MGD.FEATURES = ["p3", "p4", "p5"]
    # A fixed factor of each feature's loss, or one for all; with the balance "fixed", [] is 1.
    cfg.MGD.WEIGHTS = []
    # Take backbone stages before their last ReLU. FPN levels have none.
    cfg.MGD.BEFORE_ACTIVATION = True
    # How a group of teacher channels becomes one map: "amp", "max", "mean", "rd", "sm".
    cfg.MGD.REDUCER = "amp"
    # "partial_l2" (backbone stages before the activation only), "mse", "pearson", "channel_kl"; one name, or one for
    # each feature with commas between.
    cfg.MGD.LOSS = "pearson"
    # "mean" over real elements, or "image_sum", the published sum over elements divided by images.
    cfg.MGD.REDUCTION = "mean"
    # "auto": the features' losses sum to 24 at the start, each in proportion to the square root of the teacher's
    # channels. A student that is trained already has less weight, by its distance to the teacher. At the first
    # evaluation (TEST.EVAL_PERIOD) in which the student is better than its teacher, the distillation stops.
    # "fixed": MGD.WEIGHTS weigh the losses. "" is "fixed" with MGD.WEIGHTS or without MGD.FEATURES, else "auto".
    cfg.MGD.BALANCE = ""
    # Which pixels count how much in the loss: "all" alike, ground-truth "boxes" and background in balance, or by the
    # teacher's "attention".
    cfg.MGD.SPATIAL = "all"
    # Matching cost of two channels: "cosine" (published) or "pearson"; "" is "pearson" with that loss, else "cosine".
    cfg.MGD.METRIC = ""
    # "balanced", "even", "one_to_one"; "" is what the reducer needs.
    cfg.MGD.MODE = ""
    # Lists of features that share one matching, as levels under one head may: [["p3", "p4", "p5"]].
    cfg.MGD.TIE = []
    # "matching" reduces the teacher to the width of the student; "matched_projection", a learned projection of the
    # student that starts as the matching; "conv1x1", one from a random start; "none" compares channel by channel.
    cfg.MGD.ALIGN = "matching"
    # Norm of the student's maps before they are compared: "gn" (published for detectors), "bn", "sync_bn", "none"; ""
    # is "none" with the loss "pearson", which standardises channels itself, else "gn".
    cfg.MGD.NORM = ""

    cfg.MGD.REMATCH = CfgNode()
    # Which maps the costs are measured on: "online", those of training steps, in any training loop; or "pass", those of
    # a separate pass over images, which needs our Trainer or distillation_hooks(cfg, model) in another.
    cfg.MGD.REMATCH.SOURCE = "online"
    # Rematch before the first step with distillation.
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
    # Online rematches observe one step of EVERY.
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
    # "constant", or falling from START to STOP along a line ("linear") or half a cosine ("cosine"); "" is "cosine" with
    # the balance "auto", else "constant".
    cfg.MGD.SCHEDULE.DECAY = ""
    # The iteration that distillation begins with; the first matching is measured then.
    cfg.MGD.SCHEDULE.START = 0
    # The iteration that it ends before; 0 is SOLVER.MAX_ITER.
    cfg.MGD.SCHEDULE.STOP = 0
    # What "linear" and "cosine" fall to, as a share of the weight.
    cfg.MGD.SCHEDULE.END = 0.0
    # Iterations in which the weight first rises from 0. -1 is SOLVER.WARMUP_ITERS, but at most a fifth of the
    # distillation, with the balance "auto" and without SOLVER.CLIP_GRADIENTS; else 0.
    cfg.MGD.SCHEDULE.WARMUP = -1

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
    # Most steps in a row to skip because a loss or gradient is not finite; 0 stops at the first. A file that repeats
    # such a step is in OUTPUT_DIR/nonfinite.
    cfg.MGD.NONFINITE.SKIP = 0

    cfg.MGD.CHECKPOINT = CfgNode()
    # How many checkpoints stay in OUTPUT_DIR; 0 keeps all.
    cfg.MGD.CHECKPOINT.KEEP = 0

    cfg.MGD.EARLY_STOP = CfgNode()
    # End the training after so many evaluations, of TEST.EVAL_PERIOD, without a better one; 0 never does.
    cfg.MGD.EARLY_STOP.PATIENCE = 0
    # The metric of the best student, model_best.pth, such as "bbox/AP50"; the higher the better. "" is the first
    # of panoptic PQ, the AP of keypoints, masks and boxes, and semantic mIoU that the evaluation has.
    cfg.MGD.EARLY_STOP.METRIC = ""


def student_config(cfg: CfgNode) -> CfgNode:
    """The plain config of the student: no `MGD` node, its own meta-architecture. An unmodified Detectron2 loads it.

    Raises:
        UserError: MODEL.META_ARCHITECTURE is the distilling one and MGD.STUDENT names no other.
    """
    plain = cfg.clone()
    plain.defrost()
    node = plain.pop("MGD", None)
    if plain.MODEL.META_ARCHITECTURE == META_ARCHITECTURE:
        own = node.STUDENT.META_ARCHITECTURE if node is not None else ""
        if own in ("", META_ARCHITECTURE):
            raise UserError(
                f"MODEL.META_ARCHITECTURE is {META_ARCHITECTURE}, so MGD.STUDENT.META_ARCHITECTURE must name the "
                "student's own, such as RetinaNet."
            )
        plain.MODEL.META_ARCHITECTURE = own
    if cfg.is_frozen():
        plain.freeze()
    return plain


def baseline_config(cfg: CfgNode) -> CfgNode:
    """The training of the same student alone, in OUTPUT_DIR/baseline: what a distilled one is compared with."""
    plain = student_config(cfg)
    plain.defrost()
    add_mgd_config(plain)
    for key in configs.WITHOUT_TEACHER:
        plain.MGD[key] = cfg.MGD[key]
    plain.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "baseline")
    plain.freeze()
    return plain


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The teacher's own, frozen config, on the student's device; MODEL.WEIGHTS says where its weights are.

    Raises:
        UserError: no such config, one that cannot be read, overrides it does not know, no weights named.
    """
    name = cfg.MGD.TEACHER.CONFIG_FILE
    if is_image_network(name):
        teacher = image_network_config(name)
    elif name.endswith(".py"):
        path, from_zoo = _config_file(name)
        return _finished(cfg, lazy_network_config(path, cfg.MGD.TEACHER.OPTS, from_zoo or cfg.MGD.TEACHER.TRUST_PYTHON))
    else:
        teacher = get_cfg()
        add_mgd_config(teacher)  # a student of an earlier distillation may teach
        add_missing_keys(teacher, cfg)  # those of the student's project, with its values where the file has none
        path, from_zoo = _config_file(name)
        # Detectron2's own files hold python expressions and came with its code; others are not trusted.
        what = f"MGD.TEACHER.CONFIG_FILE {name} is not a config of a Detectron2 model"
        merge_file(teacher, path, allow_unsafe=from_zoo, what=what)
    merge_overrides(teacher, cfg.MGD.TEACHER.OPTS, what=f"MGD.TEACHER.OPTS do not fit {name}")
    return _finished(cfg, student_config(teacher))


def _finished(cfg: CfgNode, teacher: CfgNode) -> CfgNode:
    """The teacher's config with what the student's says of device, format and weights, frozen."""
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.INPUT.FORMAT = cfg.MGD.TEACHER.FORMAT or teacher.INPUT.FORMAT
    teacher.MODEL.WEIGHTS = _teacher_weights(cfg, teacher)
    teacher.freeze()
    return teacher


def _config_file(name: str) -> tuple[str, bool]:
    """Path of the teacher's config, and whether it is one of the model zoo's."""
    if not name:
        raise UserError(
            "MGD.TEACHER.CONFIG_FILE is empty: give the teacher's config, a yaml file or a name of the model zoo such "
            "as COCO-Detection/retinanet_R_101_FPN_3x.yaml; or set MGD.ENABLED to False to train without a teacher."
        )
    if not name.endswith((".yaml", ".yml", ".py")):
        raise UserError(f"MGD.TEACHER.CONFIG_FILE {name} is neither a yaml file nor a python config.")
    try:
        for path in (Path(name), _PROJECT_CONFIGS / name):
            if path.is_file():
                return str(path), False
        return model_zoo.get_config_file(name), True
    except (OSError, RuntimeError) as error:  # a name may also be longer than a file system takes
        raise UserError(
            f"MGD.TEACHER.CONFIG_FILE {name} is found neither from the working directory, nor in {_PROJECT_CONFIGS}, "
            "nor in Detectron2's model zoo."
        ) from error


def _teacher_weights(cfg: CfgNode, teacher: CfgNode) -> str:
    weights = cfg.MGD.TEACHER.WEIGHTS
    if weights == "zoo":
        try:
            return model_zoo.get_checkpoint_url(cfg.MGD.TEACHER.CONFIG_FILE)
        except RuntimeError as error:
            raise UserError(
                f"the model zoo has no checkpoint of MGD.TEACHER.CONFIG_FILE {cfg.MGD.TEACHER.CONFIG_FILE}; give the "
                "file of its weights as MGD.TEACHER.WEIGHTS."
            ) from error
    weights = weights or teacher.MODEL.WEIGHTS
    if not weights:
        raise UserError(
            "the teacher has no weights: give their file as MGD.TEACHER.WEIGHTS, or as MODEL.WEIGHTS in its config "
            f"({UNTRAINED!r} is a teacher that was never trained)."
        )
    return weights
