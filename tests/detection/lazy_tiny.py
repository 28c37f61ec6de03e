"""A python config of the tiny pair, for tests; ``train.*`` and ``dataloader.*`` as Detectron2's tools expect them."""

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from training_runs import TINY_MODEL

from d2_mgd.detection import FrozenTeacher, TeacherStudentDetector
from d2_mgd.detection.rematcher import Rematcher
from d2_mgd.distill import RematchSchedule


def retinanet(res2: int, channels: int) -> object:
    plain = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
    network = plain.model
    network.backbone.bottom_up.stem.out_channels = 4
    network.backbone.bottom_up.freeze_at = 1
    network.backbone.bottom_up.stages = L(tiny_stages)(res2=res2)
    network.backbone.out_channels = channels
    network.backbone.top_block.in_channels = 8 * res2
    network.head.input_shape = [ShapeSpec(channels=channels)] * 5
    network.head.conv_dims = [channels]
    network.head.num_anchors = 3
    network.anchor_generator.sizes = TINY_MODEL["ANCHOR_GENERATOR"]["SIZES"]
    network.num_classes = 3
    network.smooth_l1_beta = 0.1  # the yaml configs' default
    network.test_score_thresh = 0.0
    network.test_topk_candidates = 20
    network.pixel_mean, network.pixel_std = TINY_MODEL["PIXEL_MEAN"], TINY_MODEL["PIXEL_STD"]
    return plain


def tiny_stages(res2: int) -> list:
    """Stages as the yaml configs' widths make them."""
    stages, into = [], 4
    for index, blocks in enumerate((3, 4, 6, 3)):
        width, out = 2 * 2**index, res2 * 2**index
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
                in_channels=into,
                out_channels=out,
                bottleneck_channels=width,
                norm="FrozenBN",
                stride_in_1x1=True,
            )
        )
        into = out
    return stages


own = retinanet(8, 8)
dataloader, optimizer, lr_multiplier, train = own.dataloader, own.optimizer, own.lr_multiplier, own.train

model = L(TeacherStudentDetector)(
    student=own.model,
    teacher=L(FrozenTeacher)(model=retinanet(16, 12).model, input_format="RGB"),
    features=["res4", "p4"],
    distiller=dict(loss=dict(res4="mse", p4="mse"), reducer="amp", norm="gn", weights=dict(res4=1.0, p4=1.0)),
    rematcher=L(Rematcher)(schedule=L(RematchSchedule)(periods=[2]), source="online", every=1),
)

resize = L(T.ResizeShortestEdge)(short_edge_length=64, max_size=96)
dataloader.train.dataset.names, dataloader.test.dataset.names = "tiny_train", "tiny_valid"
dataloader.train.mapper.augmentations, dataloader.test.mapper.augmentations = [resize], [resize]
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = dataloader.test.num_workers = 0
optimizer.lr = 0.001
train.update(max_iter=3, eval_period=0, device="cpu", init_checkpoint="")
train.checkpointer.period = 2
