"""The meta-architectures that tests distil: the rows of the table in docs/detection.md."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tiny_detectors import NUM_CLASSES, narrow

_SEMANTIC = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 8, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "MODEL.SEM_SEG_HEAD.NORM", ""]
_KEYPOINTS = [
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8],
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3,
    "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1, 0.1],
]  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Args:
        name: what the table calls it.
        config: a shipped config, under configs/.
        tasks: Detectron2's names of what its evaluators measure.
        data: the set of ``labelled_images`` on which it is trained and evaluated.
        options: of a yaml config, KEY VALUE overrides for both networks.
        small: changes a python config: small networks, the architecture as student.
        needs: a module that its config imports, beyond Detectron2's own.
        evaluator_needs: a module that its evaluators import.
    """

    name: str
    config: str
    tasks: tuple[str, ...] = ("bbox",)
    data: str = "keypoints"
    options: list[Any] = field(default_factory=list)
    small: Callable[[Any], None] | None = None
    needs: str = ""
    evaluator_needs: str = ""


def _fcos(cfg: Any) -> None:
    cfg.model.student.num_classes = NUM_CLASSES


def _pointrend(cfg: Any) -> None:
    small = ["MODEL.RESNETS.DEPTH", 50, "MODEL.POINT_HEAD.NUM_CLASSES", NUM_CLASSES, "TEST.DETECTIONS_PER_IMAGE", 5]
    for network, width in ((cfg.model.student, 16), (cfg.model.teacher.model, 32)):
        network.cfg.overrides.extend([*narrow(width), "MODEL.ROI_MASK_HEAD.FC_DIM", 16, *small])


def _vitdet(cfg: Any) -> None:
    backbone = cfg.model.teacher.model.backbone
    backbone.net.update(img_size=64, embed_dim=32, depth=2, num_heads=2, window_block_indexes=[0])
    cfg.model.teacher.model.roi_heads.box_head.update(conv_dims=[8], fc_dims=[1024])
    _teacher_as_student(cfg)


def _swin(cfg: Any) -> None:
    cfg.model.teacher.model.backbone.bottom_up.update(embed_dim=16, depths=[1] * 4, num_heads=[1] * 4)
    for head in cfg.model.teacher.model.roi_heads.box_heads:
        head.update(conv_dims=[8], fc_dims=[1024])
    _teacher_as_student(cfg)


def _teacher_as_student(cfg: Any) -> None:
    teacher = cfg.model.teacher.model
    teacher.backbone.square_pad = 64
    teacher.proposal_generator.update(pre_nms_topk=(50, 50), post_nms_topk=(20, 20))
    teacher.roi_heads.update(num_classes=NUM_CLASSES, batch_size_per_image=8)
    teacher.roi_heads.mask_head.conv_dims = [8, 8]
    cfg.model.student = copy.deepcopy(teacher)
    cfg.dataloader.train.mapper.use_instance_mask = True


ARCHITECTURES = [
    Architecture("RetinaNet", "RetinaNet/mgd_levels_R_50_R_18_FPN_1x.yaml"),
    Architecture("FCOS", "lazy/mgd_levels_retinanet_R_50_fcos_R_18.py", small=_fcos),
    Architecture("Faster R-CNN", "FasterRCNN/mgd_levels_R_50_R_18_FPN_1x.yaml"),
    Architecture("Mask R-CNN", "MaskRCNN/mgd_levels_R_50_R_18_FPN_1x.yaml", ("bbox", "segm")),
    Architecture("Cascade R-CNN", "CascadeRCNN/mgd_levels_R_50_R_18_FPN_1x.yaml", ("bbox", "segm")),
    Architecture(
        "Keypoint R-CNN",
        "KeypointRCNN/mgd_levels_R_50_R_18_FPN_1x.yaml",
        ("bbox", "keypoints"),
        options=_KEYPOINTS,
    ),
    Architecture(
        "SemanticSegmentor",
        "SemanticSegmentor/mgd_levels_panoptic_R_50_R_18_1x.yaml",
        ("sem_seg",),
        data="stuffonly",
        options=_SEMANTIC,
    ),
    Architecture(
        "PanopticFPN",
        "PanopticFPN/mgd_levels_R_50_R_18_1x.yaml",
        ("bbox", "segm", "sem_seg", "panoptic_seg"),
        data="separated",
        options=_SEMANTIC,
        evaluator_needs="panopticapi",
    ),
    Architecture(
        "PointRend's mask head",
        "lazy/mgd_levels_pointrend_R_50_R_18.py",
        ("bbox", "segm"),
        small=_pointrend,
        needs="detectron2.projects.point_rend",
    ),
    Architecture("ViTDet", "lazy/mgd_levels_vitdet_b_retinanet_R_18.py", ("bbox", "segm"), small=_vitdet, needs="timm"),
    Architecture("Swin", "lazy/mgd_levels_swin_b_retinanet_R_18.py", ("bbox", "segm"), small=_swin, needs="timm"),
    Architecture(
        "one that your project registers",
        "RetinaNet/mgd_levels_R_50_R_18_FPN_1x.yaml",
        options=["MODEL.META_ARCHITECTURE", "OwnDetector"],  # of own_project.py
    ),
]


_MEASURED = {
    "bbox": "boxes",
    "segm": "masks",
    "keypoints": "keypoints",
    "sem_seg": "semantic segments",
    "panoptic_seg": "panoptic segments",
}


def table() -> str:
    """The table in docs/detection.md: ``test_meta_architectures.py`` shows each of its cells."""
    rows = [("meta-architecture", "trains", "evaluates", "teaches", "resumes"), ("---",) * 5]
    for one in ARCHITECTURES:
        name = f"[{one.name}](../configs/{one.config})"
        rows.append((name, "yes", ", ".join(_MEASURED[task] for task in one.tasks), "yes", "yes"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
