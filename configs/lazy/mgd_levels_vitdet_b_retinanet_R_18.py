"""Mask R-CNN with ViTDet-B of Detectron2's projects/ViTDet teaches RetinaNet R18 at the FPN levels that both have."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2_mgd.detection import FrozenTeacher

from .mgd_levels_retinanet_R_50_R_18 import dataloader, lr_multiplier, model, optimizer, train

model.teacher = L(FrozenTeacher)(
    model=model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model,
    weights="detectron2://ViTDet/COCO/mask_rcnn_vitdet_b/f325346929/model_final_61ccd1.pkl",
    input_format="RGB",
    precision="auto",
)
model.features = ["p3", "p4", "p5", "p6"]
# ViTDet takes squares of 1024 px
dataloader.train.mapper.augmentations[0].max_size = 1024

train.output_dir = "./output/lazy_mgd_levels_vitdet_b_retinanet_R_18"
