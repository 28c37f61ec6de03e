"""Mask R-CNN R50 with the mask head of Detectron2's projects/PointRend teaches the same with R18 at the FPN levels."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.projects.point_rend import add_pointrend_config
from omegaconf import OmegaConf

from d2_mgd.detection import FrozenTeacher

from .mgd_levels_retinanet_R_50_R_18 import dataloader, lr_multiplier, model, optimizer, train


def pointrend(overrides):
    """The values of the project's Base-PointRend-RCNN-FPN.yaml with KEY VALUE overrides. It has no python config."""
    cfg = get_cfg()
    add_pointrend_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file("Base-RCNN-FPN.yaml"))
    cfg.MODEL.DEVICE = "cpu"  # the tool moves the model to train.device
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
    head = cfg.MODEL.ROI_MASK_HEAD
    head.NAME, head.POOLER_TYPE, head.POINT_HEAD_ON = "PointRendMaskHead", "", True
    cfg.merge_from_list(OmegaConf.to_container(overrides))
    return cfg


r18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STRIDE_IN_1X1", False]
mean, std = model.student.pixel_mean, model.student.pixel_std
model.student = L(build_model)(
    cfg=L(pointrend)(overrides=[*r18, "MODEL.PIXEL_MEAN", list(mean), "MODEL.PIXEL_STD", list(std)])
)
model.teacher = L(FrozenTeacher)(
    model=L(build_model)(cfg=L(pointrend)(overrides=[])),
    weights="detectron2://PointRend/InstanceSegmentation/pointrend_rcnn_R_50_FPN_3x_coco/164955410/model_final_edd263.pkl",
    input_format="BGR",
    precision="auto",
)
model.features = ["p2", "p3", "p4", "p5", "p6"]
dataloader.train.mapper.update(use_instance_mask=True, instance_mask_format="bitmask")
optimizer.lr = 0.02

train.output_dir = "./output/lazy_mgd_levels_pointrend_R_50_R_18"
