"""Cascade Mask R-CNN with Swin-B of Detectron2's projects/ViTDet teaches RetinaNet R18 at the levels that both have."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

from .mgd_levels_vitdet_b_retinanet_R_18 import dataloader, lr_multiplier, model, optimizer, train

# cascade_mask_rcnn_swin_b_in21k_50ep.py of that project, which is not part of an installed Detectron2
teacher = model_zoo.get_config("common/models/cascade_rcnn.py").model
teacher.backbone.update(in_features=["p0", "p1", "p2", "p3"], norm="LN", square_pad=1024)
teacher.backbone.bottom_up = L(SwinTransformer)(
    embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], drop_path_rate=0.4
)
teacher.proposal_generator.head.conv_dims = [-1, -1]
for head in teacher.roi_heads.box_heads:
    head.update(conv_dims=[256] * 4, fc_dims=[1024], conv_norm="LN")
teacher.roi_heads.mask_head.conv_norm = "LN"
teacher.pixel_mean, teacher.pixel_std = model.student.pixel_mean, model.student.pixel_std
teacher.input_format = "RGB"

model.teacher.model = teacher
model.teacher.weights = "detectron2://ViTDet/COCO/cascade_mask_rcnn_swin_b_in21k/f342979038/model_final_246a82.pkl"

train.output_dir = "./output/lazy_mgd_levels_swin_b_retinanet_R_18"
