"""RetinaNet R50 of the model zoo teaches FCOS R18 at the FPN levels."""

from detectron2 import model_zoo

from .mgd_levels_retinanet_R_50_R_18 import dataloader, lr_multiplier, model, optimizer, train

fcos = model_zoo.get_config("common/models/fcos.py").model
fcos.backbone.bottom_up = model.student.backbone.bottom_up
fcos.pixel_mean, fcos.pixel_std = model.student.pixel_mean, model.student.pixel_std
model.student = fcos

train.output_dir = "./output/lazy_mgd_levels_retinanet_R_50_fcos_R_18"
