"""COCO-format data sets named on the command line, and what is checked in every COCO-format set before training.

An error names the data set, the first offence and how many there are. What Detectron2 handles by itself, crowds, boxes
that leave their image by rounding, boxes without area, is no error.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager
from torch import nn

from d2_mgd.data.coco import ERROR, WARNING, CocoError, Inspection
from d2_mgd.data.formats import LabelFiles
from d2_mgd.data.inspection import OUTSIDE, inspect_set
from d2_mgd.errors import UserError
from d2_mgd.training import write_atomically
from d2_mgd.training.processes import failing_together, local_rank

__all__ = [
    "Inspection",
    "check_classes",
    "check_coco",
    "check_datasets",
    "check_datasets_once",
    "name_keypoints",
    "register_coco",
    "register_label_files",
    "registered",
    "wanted_of",
]

logger = logging.getLogger(__name__)

_ALLOW = "; MGD.DATA.ALLOW_OUTSIDE_ROOT True allows it"


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """Make a COCO-format data set known to Detectron2 under ``name``; the same one twice is fine.

    Args:
        name: what DATASETS.TRAIN and DATASETS.TEST call it.
        json_file: annotations in COCO's instance format.
        image_root: the folder that the json's file names are relative to.

    Raises:
        UserError: another data set has that name, or it is none.
    """
    if not name.strip():
        raise UserError(f"a data set needs a name, not {name!r}.")
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name)
        if (known.get("json_file"), known.get("image_root")) != (json_file, image_root):
            raise UserError(f"there is already a data set {name!r}; register yours under another name.")
        return
    register_coco_instances(name, {}, json_file, image_root)


def register_label_files(sets: Iterable[LabelFiles], cfg: CfgNode) -> None:
    """Write sets of other formats as COCO-format json to ``OUTPUT_DIR/datasets``, and register those. A collective.

    Args:
        sets: those in DATASETS.TRAIN or DATASETS.TEST are read, by the first process of each machine.
        cfg: the config.

    Raises:
        UserError: an error in a set's label files; one sentence.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "datasets")
    used = {one.name: one for one in sets if one.name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    paths = {name: os.path.join(folder, f"{name.replace(os.sep, '_')}.json") for name in used}
    with failing_together():
        if local_rank() == 0:
            for name, one in used.items():
                _write_json(one, paths[name])
    for name, one in used.items():
        register_coco(name, paths[name], one.image_root)


def _write_json(files: LabelFiles, path: str) -> None:
    labelled = files.read()
    for finding in labelled.findings:
        if finding.severity == ERROR:
            raise UserError(f"data set {files.name!r}: {finding}.")
        logger.log(
            logging.WARNING if finding.severity == WARNING else logging.INFO, "data set %r: %s.", files.name, finding
        )
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps(labelled.content).encode()))
    logger.info("data set %r: %s as COCO-format json is in %s", files.name, files.source, path)


def check_datasets(cfg: CfgNode, train: bool = True) -> None:
    """Check the data sets of a config: DATASETS.TEST, and DATASETS.TRAIN where ``train``.

    Files are listed, not read: 100,000 images take seconds. Sets in other formats than COCO's are only looked up.

    Args:
        cfg: a config with the `MGD` node.
        train: whether there will be a training.

    Raises:
        UserError: see :func:`check_coco`; or a set is not registered, or there is none to train on.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN names no data set.")
    for name in dict.fromkeys([*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]):
        known = registered(name)
        if known.get("evaluator_type") == "coco":
            wanted = wanted_of(cfg, name, train=train)
            check_coco(name, known.json_file, known.image_root, wanted, allow_outside=cfg.MGD.DATA.ALLOW_OUTSIDE_ROOT)


def check_datasets_once(cfg: CfgNode, train: bool = True) -> None:
    """:func:`check_datasets` in the first process of each machine; what one of them finds, all raise. A collective."""
    with failing_together():
        if local_rank() == 0:
            check_datasets(cfg, train)


def name_keypoints(cfg: CfgNode) -> None:
    """Where MODEL.KEYPOINT_ON, take the keypoints' names of checked COCO-format sets from their json.

    Names that differ in left and right are mirror images of each other.

    Raises:
        UserError: no category of a set lists keypoints.
    """
    if not cfg.MODEL.KEYPOINT_ON:
        return
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        known = registered(name)
        if known.get("evaluator_type") != "coco" or known.get("keypoint_names") is not None:
            continue
        with PathManager.open(known.json_file) as file:
            points = next((one["keypoints"] for one in json.load(file)["categories"] if one.get("keypoints")), None)
        if points is None:
            raise UserError(f"data set {name!r} has no keypoints for MODEL.KEYPOINT_ON: its categories list none.")
        mirrored = [(point, point.replace("left", "right")) for point in points if "left" in point]
        known.set(keypoint_names=points, keypoint_flip_map=[pair for pair in mirrored if pair[1] in points])


def registered(name: str) -> Metadata:
    """What Detectron2 knows of a data set.

    Raises:
        UserError: there is none of that name.
    """
    if name not in DatasetCatalog.list():
        raise UserError(
            f"there is no data set {name!r}; name yours by --register-coco {name} JSON IMAGES, --register-voc {name} "
            "FOLDER SPLIT, or --register-yolo NAME DATA_YAML, which makes NAME_train, NAME_val and NAME_test."
        )
    return MetadataCatalog.get(name)


def wanted_of(cfg: CfgNode, name: str, train: bool = True) -> Inspection:
    """What a config wants of one of its data sets."""
    trained_on, evaluated_on = train and name in cfg.DATASETS.TRAIN, name in cfg.DATASETS.TEST
    return Inspection(
        train=trained_on,
        evaluate=evaluated_on,
        masks=trained_on and cfg.MODEL.MASK_ON,
        sizes=image_sizes(cfg, train=trained_on, evaluate=evaluated_on),
    )


def image_sizes(cfg: CfgNode, train: bool = True, evaluate: bool = True) -> list[tuple[int, int]]:
    """(shortest, longest) sides that images are resized to, in training, and in evaluation and rematching."""
    sizes = []
    if train:
        shortest = cfg.INPUT.MIN_SIZE_TRAIN
        shortest = (shortest,) if isinstance(shortest, int) else shortest
        sizes += [(side, cfg.INPUT.MAX_SIZE_TRAIN) for side in shortest]
    if evaluate or (train and cfg.MGD.ENABLED):
        sizes.append((cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST))
    return sizes


def check_coco(
    name: str, json_file: str, image_root: str, wanted: Inspection | None = None, *, allow_outside: bool = False
) -> None:
    """Check a COCO-format data set, so that no training stops in its middle because of it.

    Args:
        name: for the messages.
        json_file, image_root: as in :func:`register_coco`.
        wanted: what it is used for; by default training on boxes.
        allow_outside: whether its file names may leave ``image_root``.

    Raises:
        UserError: the json or the image folder cannot be read; or the first of the errors that
            :func:`~d2_mgd.data.inspection.inspect_set` finds. What is only odd is logged.
    """
    try:
        findings, _ = inspect_set(
            PathManager.get_local_path(json_file),
            PathManager.get_local_path(image_root),
            wanted or Inspection(),
            allow_outside,
        )
    except CocoError as error:
        raise UserError(f"data set {name!r}: {error}.") from error
    for finding in findings:
        if finding.severity == ERROR:
            advice = _ALLOW if finding.kind == OUTSIDE else ""
            raise UserError(f"data set {name!r}: {finding}{advice}.")
    for finding in findings:
        if finding.severity == WARNING:
            logger.warning("data set %r: %s.", name, finding)


def check_classes(names: Iterable[str], model: nn.Module, way_out: str = "") -> None:
    """Check that data sets agree on their classes, and ``model`` with them on their number.

    Args:
        names: registered data sets.
        model: a plain Detectron2 detector; one without classes, such as a proposal network, fits all.
        way_out: what the message advises; by default the override that would be right.

    Raises:
        UserError: they do not.
    """
    first: tuple[str, list[str]] | None = None
    for name in dict.fromkeys(names):
        classes = _classes(name)
        if classes is None:
            continue
        first = first or (name, classes)
        if classes != first[1]:
            other = next((f"{a!r} and {b!r}" for a, b in zip(first[1], classes) if a != b), None)
            raise UserError(
                f"the data sets {first[0]!r} and {name!r} differ in their classes: {len(first[1])} and {len(classes)} "
                f"of them{f', {other} first' if other else ''}; both must list the same ones in the same order."
            )
    wanted = _number_of_classes(model)
    if first is not None and wanted is not None and wanted != len(first[1]):
        raise UserError(
            f"the {type(model).__name__} has {wanted} classes but the data set {first[0]!r} has {len(first[1])} "
            f"({_short_list(first[1])}): {way_out or f'set {_classes_key(model)} {len(first[1])}'}."
        )


def _classes(name: str) -> list[str] | None:
    """The class names of a data set, read from its json where Detectron2 has not done so yet."""
    if MetadataCatalog.get(name).get("thing_classes") is None:
        DatasetCatalog.get(name)
    return MetadataCatalog.get(name).get("thing_classes")


def _number_of_classes(model: nn.Module) -> int | None:
    head = getattr(model, "roi_heads", model)
    number = getattr(head, "num_classes", None)
    return number if isinstance(number, int) else None


def _classes_key(model: nn.Module) -> str:
    """The config key that holds a model's number of classes."""
    return "MODEL.ROI_HEADS.NUM_CLASSES" if hasattr(model, "roi_heads") else "MODEL.RETINANET.NUM_CLASSES"


def _short_list(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
