"""Meta-architectures beyond detectors of boxes, and the evaluators that data sets ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.structures import Keypoints
from tiny_detectors import SIZES, batch, built, narrow, step, tiny_config

from d2_mgd.detection.evaluation import evaluator_of
from d2_mgd.errors import UserError

SEMANTIC = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 8, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4, "MODEL.SEM_SEG_HEAD.NORM", ""]
STUDENTS = {
    "semantic": ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", *SEMANTIC],
    "panoptic": ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", True, *SEMANTIC],
    "keypoint": [
        "MODEL.KEYPOINT_ON", True,
        "MODEL.MASK_ON", False,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8],
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3,
    ],
}  # fmt: skip
ANSWERS = {"semantic": "sem_seg", "panoptic": "panoptic_seg", "keypoint": "instances"}


def labelled() -> list[dict[str, Any]]:
    samples = batch(*SIZES)
    for sample in samples:
        height, width = sample["image"].shape[1:]
        sample["sem_seg"] = torch.randint(0, 4, (height, width))
        points = torch.tensor([[[6.0, 6.0, 2.0], [8.0, 12.0, 2.0], [14.0, 9.0, 1.0]]])
        sample["instances"].gt_keypoints = Keypoints(points)
    return samples


@pytest.mark.parametrize("kind", STUDENTS)
def test_it_trains_infers_and_teaches(kind: str) -> None:
    options = STUDENTS[kind]
    model = built("mask_rcnn", "retinanet", *options, "MGD.FEATURES", ["res4", "p4"])
    losses = step(model, labelled())
    sum(losses.values()).backward()
    assert float(losses["loss_distill/p4"].detach()) > 0 and any("distill" not in name for name in losses)
    model.eval()
    if kind == "keypoint":
        torch.nn.init.zeros_(
            model.student.roi_heads.keypoint_head.score_lowres.weight
        )  # untrained, its scores overflow
    with torch.no_grad():
        assert ANSWERS[kind] in model(batch())[0]
    teaches = built("retinanet", "mask_rcnn", "MGD.FEATURES", ["p4"], "MGD.TEACHER.OPTS", [*narrow(32), *options])
    assert type(teaches.teacher.model) is type(model.student)
    assert float(step(teaches)["loss_distill/p4"].detach()) > 0


@pytest.mark.parametrize(
    ("kind", "metadata", "expected"),
    [
        ("coco", {}, [COCOEvaluator]),
        (None, {}, [COCOEvaluator]),
        ("sem_seg", {"stuff_classes": ["sky"], "ignore_label": 255}, [SemSegEvaluator]),
    ],
)
def test_evaluators_are_those_of_the_type(kind: str | None, metadata: Any, expected: Any, tmp_path: Path) -> None:
    name = f"evaluated_{kind}"
    DatasetCatalog.register(name, list)
    if kind:
        MetadataCatalog.get(name).set(evaluator_type=kind)
    MetadataCatalog.get(name).set(thing_classes=["fish"], json_file=str(tmp_path / "none.json"), **metadata)
    (tmp_path / "none.json").write_text('{"images": [], "annotations": [], "categories": []}')
    found = evaluator_of(tiny_config(), name, str(tmp_path))
    found = found._evaluators if isinstance(found, DatasetEvaluators) else [found]
    assert [type(one) for one in found] == expected


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        (
            "coco_panoptic_seg",
            [],
            r"no ground truth for its evaluators .*lack panoptic_json, panoptic_root",
        ),
        ("coco", ["MODEL.KEYPOINT_ON", True], r"\(coco, keypoints\): its metadata lack keypoint_names"),
        ("depth", [], "has evaluator_type 'depth'; there are: coco, sem_seg"),
    ],
)
def test_a_data_set_without_ground_truth_is_named(
    kind: str, overrides: list[Any], message: str, tmp_path: Path
) -> None:
    name = f"without_{kind}"
    MetadataCatalog.get(name).set(evaluator_type=kind)
    with pytest.raises(UserError, match=message):
        evaluator_of(tiny_config("retinanet", 16, *overrides), name, str(tmp_path))
