"""Detectors small enough for a test: real Detectron2 models, narrow through their configs alone."""

from __future__ import annotations

from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2_mgd.detection import TeacherStudentDetector
from d2_mgd.detection.config import add_mgd_config
from d2_mgd.detection.features import pair_features
from d2_mgd.detection.teacher import FrozenTeacher
from d2_mgd.distill import MatchingGuidedDistiller

CONFIGS = {
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "faster_rcnn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "faster_rcnn_c4": "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
    "mask_rcnn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "cascade": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
}
NUM_CLASSES = 3
SIZES = ((64, 64), (60, 50))  # of a batch that is padded


def narrow(width: int) -> list[Any]:
    """Overrides that make a bottleneck network of ``width``, 2, 4 and 8 times ``width`` channels."""
    return [
        "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", width,
        "MODEL.RESNETS.WIDTH_PER_GROUP", max(width // 4, 2),
        "MODEL.FPN.OUT_CHANNELS", 8,
        "MODEL.RETINANET.NUM_CONVS", 1,
        "MODEL.RETINANET.NUM_CLASSES", NUM_CLASSES,
        "MODEL.ROI_HEADS.NUM_CLASSES", NUM_CLASSES,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8,
        "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
        "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
        "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50,
        "MODEL.RPN.PRE_NMS_TOPK_TEST", 50,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20,
        "MODEL.RPN.POST_NMS_TOPK_TEST", 20,
        "MODEL.BACKBONE.FREEZE_AT", 1,
        "MODEL.WEIGHTS", "",
        "MODEL.DEVICE", "cpu",
    ]  # fmt: skip


def tiny_config(name: str = "retinanet", width: int = 16, *overrides: Any) -> CfgNode:
    """A config with the MGD node, of a narrow detector."""
    cfg = model_zoo.get_config(CONFIGS[name])
    add_mgd_config(cfg)
    cfg.merge_from_list([*narrow(width), *overrides])
    return cfg


def distilled_config(name: str = "retinanet", teacher: str = "retinanet", *overrides: Any) -> CfgNode:
    """A narrow student and a teacher twice as wide, untrained unless ``overrides`` say otherwise.

    Losses have their own scale in every step: no balance, no schedule.
    """
    own = [
        "MGD.ENABLED", True,
        "MGD.LOSS", "mse",
        "MGD.BALANCE", "fixed",
        "MGD.TEACHER.CONFIG_FILE", CONFIGS[teacher],
        "MGD.TEACHER.WEIGHTS", "untrained",
        "MGD.TEACHER.OPTS", narrow(32),
    ]  # fmt: skip
    return tiny_config(name, 16, *own, *overrides)


def tiny(name: str = "retinanet", width: int = 16, *overrides: Any) -> nn.Module:
    return lively(build_model(tiny_config(name, width, *overrides)))


def tiny_fcos(channels: int = 32) -> nn.Module:
    """FCOS, which Detectron2 has as a python config only."""
    model = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    model.num_classes = NUM_CLASSES
    del model.backbone.bottom_up.stages.stride_in_1x1
    model.backbone.bottom_up.stages.depth = 18
    model.backbone.top_block.in_channels = channels
    model.backbone.out_channels = channels
    model.head.conv_dims = [channels]
    for shape in model.head.input_shape:
        shape.channels = channels
    return lively(instantiate(model))


def lively(model: nn.Module) -> nn.Module:
    """With frozen statistics and scales as a trained network has them, not all alike."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if hasattr(module, "running_var") and module.weight is not None:
            shape = module.weight.shape
            with torch.no_grad():
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(shape, generator=generator) * 0.2)
                module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
                module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
    return model


def image(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def batch(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """Images of these (h, w) with an object and its mask each."""
    samples = []
    for seed, (height, width) in enumerate(sizes or ((64, 64), (64, 64))):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, width / 2, height / 2]]))
        instances.gt_classes = torch.tensor([seed % NUM_CLASSES])
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        mask[:, 4 : height // 2, 4 : width // 2] = True
        instances.gt_masks = BitMasks(mask)
        samples.append({"image": image(height, width, seed), "instances": instances, "height": height, "width": width})
    return samples


def built(name: str = "retinanet", teacher: str = "retinanet", *overrides: Any) -> TeacherStudentDetector:
    cfg = distilled_config(name, teacher, *overrides)
    model = META_ARCH_REGISTRY.get("TeacherStudentDetector")(cfg)
    lively(model.student)
    lively(model.teacher.model)
    return model


def paired(student: nn.Module, teacher: nn.Module, features: list[str], **options: Any) -> TeacherStudentDetector:
    """Without a config."""
    channels = {name: pair.channels for name, pair in pair_features(student, teacher, features).items()}
    norms = options.pop("train_last_norm", "affine")
    return TeacherStudentDetector(
        student=student,
        teacher=FrozenTeacher(teacher),
        distiller=MatchingGuidedDistiller(channels, **{"loss": "mse", **options}),
        features=features,
        train_last_norm=norms,
    )


def matched(model: TeacherStudentDetector, samples: list[dict[str, Any]] | None = None) -> TeacherStudentDetector:
    model.distiller.observe(*model.extract_maps(samples or batch(*SIZES)))
    model.distiller.rematch()
    return model


def step(model: TeacherStudentDetector, samples: list[dict[str, Any]] | None = None) -> dict[str, Tensor]:
    with EventStorage(0):  # where heads count their proposals
        return model(samples or batch(*SIZES))
