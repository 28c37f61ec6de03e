"""RetinaNet R50 of the model zoo (BGR) teaches RetinaNet R18 (RGB, torchvision's weights) at the FPN levels."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from d2_mgd.detection import FrozenTeacher, TeacherStudentDetector
from d2_mgd.detection.rematcher import Rematcher
from d2_mgd.distill import RematchSchedule, WeightSchedule

plain = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
dataloader, optimizer, lr_multiplier, train = plain.dataloader, plain.optimizer, plain.lr_multiplier, plain.train

student = plain.model
student.backbone.bottom_up.stages.depth = 18
del student.backbone.bottom_up.stages.stride_in_1x1
student.backbone.top_block.in_channels = 512
student.pixel_mean = [123.675, 116.28, 103.53]
student.pixel_std = [58.395, 57.12, 57.375]
student.input_format = "RGB"
dataloader.train.mapper.image_format = "RGB"

features = ["p3", "p4", "p5", "p6", "p7"]
model = L(TeacherStudentDetector)(
    student=student,
    teacher=L(FrozenTeacher)(
        model=model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py").model,
        weights=model_zoo.get_checkpoint_url("COCO-Detection/retinanet_R_50_FPN_3x.yaml"),
        input_format="BGR",
        precision="auto",
    ),
    features=features,
    # as in Base-MGD-levels.yaml; the warm-up is the learning rate's at train.max_iter 90000, so change both together
    distiller=dict(reducer="amp", loss="pearson", metric="pearson", norm="none", balance="auto"),
    schedule=L(WeightSchedule)(decay="cosine", stop="${train.max_iter}", warmup=1000),
    rematcher=L(Rematcher)(
        schedule=L(RematchSchedule)(periods=[5000, 31000], milestones=[20000]),
        source="online",
        every=10,
    ),
    input_format="RGB",
)

train.init_checkpoint = "torchvision://resnet18"
train.output_dir = "./output/lazy_mgd_levels_retinanet_R_50_R_18"
