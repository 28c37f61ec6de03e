"""What a run of tools/train_net.py sees in an image: the maps of its two networks, and its detections.

Shape shorthand: S student channels, T teacher channels, (H, W) a map.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_folder import Maps, Run, read_image, reading

from d2_mgd.errors import UserError, located
from d2_mgd.visualize import Detections


@dataclass(frozen=True)
class TestSet:
    """A data set that detectors were evaluated on.

    Args:
        name: in DATASETS.TEST.
        json_file: annotations in COCO's format.
        image_root: the folder of its images.
        content: of the json.
    """

    name: str
    json_file: Path
    image_root: Path
    content: Mapping[str, Any]

    @property
    def categories(self) -> list[int]:
        """Ids, in the order of Detectron2's labels."""
        return sorted(category["id"] for category in self.content["categories"])

    @property
    def classes(self) -> list[str]:
        """Names, by label."""
        names = {category["id"]: category["name"] for category in self.content["categories"]}
        return [names[number] for number in self.categories]


def read_test_set(run: Run) -> TestSet:
    """The first data set of a run's DATASETS.TEST, where ``datasets.json`` says that it lies.

    Raises:
        UserError: it is not said, or the json is not there any more.
    """
    names = list(run.settings["DATASETS.TEST"])
    if not names:
        raise UserError(f"{run.folder} was trained without a data set to test on (DATASETS.TEST is empty).")
    path = run.folder / "datasets.json"
    with reading(f"the test set {names[0]!r} of {run.folder} cannot be read"):
        if not path.is_file():
            raise UserError(
                f"{run.folder} has no datasets.json, so it is not known where the images of {names[0]} are."
            )
        places = json.loads(path.read_text(encoding="utf-8"))
        if names[0] not in places:
            raise UserError(f"{path} does not say where the images of {names[0]} are: it is not in COCO's format.")
        place = places[names[0]]
        json_file = Path(place["json_file"])
        return TestSet(names[0], json_file, Path(place["image_root"]), _read_json(json_file))


@functools.cache
def _read_json(path: Path) -> Any:
    """Of a data set; several runs share one."""
    return json.loads(path.read_text(encoding="utf-8"))


def first_image(run: Run) -> Path:
    """Of its test set. Errors as in :func:`read_test_set`."""
    found = read_test_set(run)
    return found.image_root / found.content["images"][0]["file_name"]


def stored_detections(run: Run, name: str) -> list[dict[str, Any]]:
    """COCO's result records of a run's last evaluation on a data set.

    Raises:
        UserError: there are none.
    """
    path = run.folder / "inference" / name / "coco_instances_results.json"
    with reading(f"{path} cannot be read"):
        if not path.is_file():
            raise UserError(f"{run.folder} has not been evaluated on {name} yet: there is no {path}.")
        return list(json.loads(path.read_text(encoding="utf-8")))


def detections_of(
    records: Sequence[Mapping[str, Any]], images: Sequence[int], categories: Sequence[int]
) -> list[Detections]:
    """COCO's records, annotations or results, by image.

    Args:
        records: with ``image_id``, ``category_id``, ``bbox``, and results with ``score``.
        images: ids.
        categories: ids, by label.
    """
    label = {number: index for index, number in enumerate(categories)}
    found = []
    for image in images:
        mine = [record for record in records if record["image_id"] == image]
        boxes = np.array([record["bbox"] for record in mine], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([label[record["category_id"]] for record in mine], dtype=int)
        scores = np.array([record["score"] for record in mine]) if mine and "score" in mine[0] else None
        found.append(Detections(boxes, labels, scores))
    return found


@torch.no_grad()
def feature_maps(run: Run, image: Path) -> Maps:
    """Both networks' maps on an image that is resized as in an evaluation; the student is of the last checkpoint.

    Raises:
        UserError: a network or its weights cannot be loaded, or the image cannot be read.
    """
    pixels = read_image(image)
    try:
        from detectron2.config import get_cfg
        from detectron2.data import transforms

        from d2_mgd.detection import Trainer, add_mgd_config
        from d2_mgd.detection.checkpoint import TrainingCheckpointer
        from d2_mgd.detection.config import UNTRAINED
        from d2_mgd.detection.config_files import merge_file
        from d2_mgd.detection.weights import load_weights
        from d2_mgd.training.weights_files import read_tensors
    except ImportError as error:
        raise UserError(f"{error}.") from error
    with located("the two detectors cannot be built: "):
        cfg = get_cfg()
        add_mgd_config(cfg)
        merge_file(cfg, str(run.folder / "config.yaml"))
        cfg.MODEL.DEVICE = "cpu"
        checkpointer = TrainingCheckpointer(torch.nn.Module(), str(run.folder), save_to_disk=False)
        if not checkpointer.has_checkpoint():
            raise UserError(f"{run.folder} holds no checkpoint.")
        weights = checkpointer.newest_whole()
        model: Any = Trainer.build_model(cfg).eval()
        load_weights(model.student, weights)
        taught = read_tensors(weights)["distillation"]["teacher"]
        if taught["weights"] == UNTRAINED:
            raise UserError("the teacher was untrained, and such a one is not kept.")
        if taught["digest"] != model.teacher.digest:
            raise UserError(
                f"the teacher's file {model.teacher.weights_path} has changed since the training: its SHA-256 differs."
            )
        resize = transforms.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        pixels = resize.get_transform(pixels).apply_image(pixels)
        ordered = pixels[:, :, ::-1] if cfg.INPUT.FORMAT == "BGR" else pixels
        batch = [{"image": torch.from_numpy(ordered.transpose(2, 0, 1).astype("float32"))}]
        student, teacher, valid = model.extract_maps(batch)
    return Maps(pixels, _cropped(student, valid), _cropped(teacher, valid), Path(weights))


def _cropped(maps: Mapping[str, torch.Tensor], valid: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Without the cells of padding, which lie at the bottom and to the right."""
    found = {}
    for name, one in maps.items():
        mask = valid[name]
        if mask is not None and mask.shape[-2:] == one.shape[-2:]:
            rows, columns = (int(mask[0, 0].any(dim=1 - axis).sum()) for axis in (0, 1))
            one = one[..., :rows, :columns]
        found[name] = one
    return found
