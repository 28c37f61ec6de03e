"""Predictions of dense heads: compared with the teacher's, at the student's own head and through the teacher's.

Shape shorthand: N images, R anchors of all levels.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from tiny_detectors import SIZES, batch, built, distilled_config, matched, narrow, step, tiny, tiny_fcos
from training_runs import in_process_trainer, same_tensors

from d2_mgd.detection import TeacherStudentDetector
from d2_mgd.detection.config import student_config
from d2_mgd.detection.config_checks import validate_config
from d2_mgd.detection.dense_head import DenseHead
from d2_mgd.detection.heads import CrossHeadKD, HeadDistiller, HeadKD
from d2_mgd.detection.norms import export_student_state
from d2_mgd.detection.teacher import FrozenTeacher

TWO_CONVS = ("MODEL.RETINANET.NUM_CONVS", 2)
DENSE = ("MGD.DENSE_KD.ENABLED", True)
CROSS = ("MGD.CROSS_HEAD.ENABLED", True, "MGD.CROSS_HEAD.CONVS", 1)
TEACHER = ("MGD.TEACHER.OPTS", [*narrow(32), *TWO_CONVS])
ALL = {"loss_dense_kd/class", "loss_dense_kd/box", "loss_cross_head/class", "loss_cross_head/box"}


def opinionated(model: nn.Module, seed: int = 0) -> nn.Module:
    """With predictions of a sane size that differ from place to place, as a trained head's do."""
    generator = torch.Generator().manual_seed(seed)
    pixels = model.preprocess_image(batch(*SIZES)).tensor
    with torch.no_grad():
        size = max(float(found.std()) for found in model.backbone(pixels).values())
        for name, parameter in model.head.named_parameters():
            if name.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2.0 / parameter[0].numel()) ** 0.5)
        for subnet in (model.head.cls_subnet, model.head.bbox_subnet):
            subnet[0].weight.div_(size)
    return model


def retinanets(*overrides: Any) -> TeacherStudentDetector:
    torch.manual_seed(0)
    model = built("retinanet", "retinanet", *TWO_CONVS, *TEACHER, *overrides)
    opinionated(model.student, 1)
    opinionated(model.teacher.model, 2)
    return model


def fcoses(dense: HeadKD | None = None, cross: CrossHeadKD | None = None) -> TeacherStudentDetector:
    student, teacher = opinionated(tiny_fcos(32), 1), opinionated(tiny_fcos(32), 2)
    return TeacherStudentDetector(
        student=student,
        teacher=FrozenTeacher(teacher),
        distiller=None,
        features=[],
        heads=HeadDistiller(student, teacher, dense, cross),
    )


def with_itself(model: nn.Module, dense: HeadKD | None, cross: CrossHeadKD | None) -> TeacherStudentDetector:
    opinionated(model)
    teacher = copy.deepcopy(model)
    heads = HeadDistiller(model, teacher, dense, cross)
    return TeacherStudentDetector(
        student=model, teacher=FrozenTeacher(teacher), distiller=None, features=[], heads=heads
    )


@pytest.mark.parametrize("convs", [0, 1, 2])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(convs: int) -> None:
    model = with_itself(tiny("retinanet", 16, *TWO_CONVS), HeadKD(), CrossHeadKD(convs=convs))
    losses = step(model)
    assert set(losses) >= ALL
    assert all(float(losses[name].detach()) == pytest.approx(0.0, abs=1e-4) for name in ALL)


@pytest.mark.parametrize("convs", [0, 1])
def test_fcos_that_is_its_teacher_has_nothing_to_learn(convs: int) -> None:
    losses = step(with_itself(tiny_fcos(32), HeadKD(), CrossHeadKD(convs=convs)))
    assert all(float(losses[name].detach()) == pytest.approx(0.0, abs=1e-4) for name in ALL)


def spoilt(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
    """Absurd scores where the second image of 30 x 20 in a batch of 64 x 64 is padding."""
    logits = logits.clone()
    stride = 64 // logits.shape[-1]
    logits[1, :, math.ceil(30 / stride) :] = 50.0
    logits[1, :, :, math.ceil(20 / stride) :] = 50.0
    return logits


def every_prediction(model: nn.Module, samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Logits (N, R, K) and boxes (N, R, 4), put together as Detectron2's own inference does."""
    images = model.preprocess_image(samples)
    features = [model.backbone(images.tensor)[name] for name in model.head_in_features]
    logits, deltas = model._transpose_dense_predictions(model.head(features)[:2], [model.num_classes, 4])
    anchors = Boxes.cat(model.anchor_generator(features)).tensor
    boxes = torch.stack([model.box2box_transform.apply_deltas(one, anchors) for one in torch.cat(deltas, dim=1)])
    return torch.cat(logits, dim=1), boxes


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_losses_are_those_of_the_formula(kind: str) -> None:
    """Location by location, without a line of the implementation."""
    dense = HeadKD(class_weight=0.5, box_weight=2.0, temperature=2.0)
    if kind == "fcos":
        model = fcoses(dense)
    else:
        model = retinanets("MGD.FEATURES", [], *DENSE, *(
            word for key, value in vars(dense).items() for word in (f"MGD.DENSE_KD.{key.upper()}", value)
        ))  # fmt: skip
    samples = batch((64, 96), (64, 96))
    losses = step(model, samples)
    with torch.no_grad():
        logits, boxes = every_prediction(model.student, samples)
        wanted, wanted_boxes = every_prediction(model.teacher.model, samples)
    positives = model.student.loss_normalizer
    own, target = (logits / 2).sigmoid().double(), (wanted / 2).sigmoid().double()
    entropy = -(target * own.log() + (1 - target) * (1 - own).log())
    expected = 4 * ((target - own).abs() * entropy).sum() / positives
    assert float(losses["loss_dense_kd/class"]) == pytest.approx(0.5 * float(expected), rel=1e-4)
    total = 0.0
    for one, other, scores in zip(boxes, wanted_boxes, wanted.sigmoid()):
        iou = pairwise_iou(Boxes(one), Boxes(other)).diagonal()
        hull = torch.cat([torch.minimum(one, other)[:, :2], torch.maximum(one, other)[:, 2:]], dim=1)
        areas = [Boxes(found).area() for found in (one, other, hull)]
        union = (areas[0] + areas[1]) / (1 + iou)
        generalised = iou - (areas[2] - union) / areas[2].clamp(min=1e-7)
        real = areas[1] >= 1e-3  # FCOS makes empty boxes of negative distances
        total += float(((1 - generalised) * scores.amax(dim=1))[real].double().sum())
    assert float(losses["loss_dense_kd/box"]) == pytest.approx(2.0 * total / positives, rel=1e-3)


class TestThroughTheTeachersHead:
    def test_gradients_reach_the_first_part_of_the_students_head_alone(self) -> None:
        model = retinanets("MGD.FEATURES", [], *CROSS)
        losses = step(model)
        (losses["loss_cross_head/class"] + losses["loss_cross_head/box"]).backward()
        head = model.student.head
        for subnet in (head.cls_subnet, head.bbox_subnet):
            assert float(subnet[0].weight.grad.abs().sum()) > 0
            assert subnet[2].weight.grad is None
        assert head.cls_score.weight.grad is None and head.bbox_pred.weight.grad is None
        assert float(model.student.backbone.fpn_output4.weight.grad.abs().sum()) > 0
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.model.parameters())

    def test_learning_from_it_draws_the_crossed_predictions_to_the_teachers(self) -> None:
        model = retinanets("MGD.FEATURES", [], *CROSS)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
        found = []
        for _ in range(6):
            losses = step(model)
            total = losses["loss_cross_head/class"] + losses["loss_cross_head/box"]
            found.append(float(total.detach()) * model.student.loss_normalizer)
            optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert found[-1] < 0.9 * found[0]

    def test_scale_and_offset_of_the_students_features_do_not_matter(self) -> None:
        model = with_itself(tiny("retinanet", 16, *TWO_CONVS), None, CrossHeadKD(convs=1))
        with torch.no_grad():
            for subnet in (model.student.head.cls_subnet, model.student.head.bbox_subnet):
                subnet[0].weight.mul_(torch.linspace(0.5, 4.0, 8).view(-1, 1, 1, 1))
                subnet[0].bias.add_(torch.linspace(-3.0, 3.0, 8))
        losses = step(model, batch((128, 128), (128, 128)))
        for part in ("class", "box"):
            assert float(losses[f"loss_cross_head/{part}"].detach()) == pytest.approx(0.0, abs=1e-3)

    def test_fcos(self) -> None:
        losses = step(fcoses(None, CrossHeadKD(0.4, 0.75, convs=1)))
        sum(losses.values()).backward()
        assert float(losses["loss_cross_head/class"]) > 0 and float(losses["loss_cross_head/box"]) > 0


def test_all_methods_together() -> None:
    model = matched(retinanets("MGD.FEATURES", ["res4", "p3"], "MGD.LOSS", "pearson", *DENSE, *CROSS))
    losses = step(model)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_distill/res4", "loss_distill/p3", *ALL}
    assert all(math.isfinite(value.detach()) and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.student.head.parameters())
    alone = step(matched(retinanets("MGD.FEATURES", ["res4", "p3"], "MGD.LOSS", "pearson")))
    for name, value in alone.items():  # one method leaves the others as they are
        assert float(losses[name].detach()) == pytest.approx(float(value.detach()), rel=1e-5)


def test_each_network_and_each_head_runs_once() -> None:
    model = matched(retinanets("MGD.FEATURES", ["p3"], *DENSE, *CROSS))
    ran: list[str] = []

    def note(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda module, args: ran.append(name))

    note(model.student.backbone, "student")
    note(model.student.head, "student's head")
    note(model.teacher.model.backbone, "teacher")
    note(model.teacher.model.head.cls_subnet[0], "teacher's first convolution")
    note(model.teacher.model.head.cls_score, "teacher's scores")
    step(model)
    levels = len(model.student.head_in_features)
    assert ran[:3] == ["student", "student's head", "teacher"]
    assert ran.count("teacher's first convolution") == levels
    assert ran.count("teacher's scores") == 2 * levels  # its own predictions, and those of the student's features
    ran.clear()
    model.extract_maps(batch())
    assert ran == ["student", "teacher"]


@pytest.mark.parametrize("method", [DENSE, CROSS])
def test_where_it_weighs_nothing_only_the_student_runs(method: tuple[Any, ...]) -> None:
    model = retinanets("MGD.FEATURES", [], "MGD.SCHEDULE.START", 5, *method)
    ran: list[str] = []
    model.teacher.model.backbone.register_forward_pre_hook(lambda module, args: ran.append("teacher"))
    with EventStorage(4):
        losses = model(batch(*SIZES))
    assert not ran and {float(losses[name]) for name in ALL & set(losses)} == {0.0}
    with EventStorage(5):
        again = model(batch(*SIZES))
    assert ran == ["teacher"] and set(again) == set(losses) and all(again[name] > 0 for name in ALL & set(again))


class TestPadding:
    def test_predictions_at_padding_do_not_count(self) -> None:
        model = retinanets("MGD.FEATURES", [], *DENSE)
        samples = batch((64, 64), (30, 20))
        clean = step(model, samples)
        positives = model.student.loss_normalizer  # a moving average
        spoil = model.teacher.model.head.cls_score.register_forward_hook(spoilt)
        again = step(model, samples)
        spoil.remove()
        for part in ("class", "box"):
            own, other = (float(losses[f"loss_dense_kd/{part}"]) for losses in (clean, again))
            assert own * positives == pytest.approx(other * model.student.loss_normalizer)

    def test_masks_are_in_the_order_of_the_anchors(self) -> None:
        from d2_mgd.detection.features import find_feature
        from d2_mgd.detection.heads import _of_anchors
        from d2_mgd.detection.maps import valid_masks

        model = tiny()
        head = DenseHead(model, None, "student")
        maps = {"p3": torch.zeros(2, 27, 8, 12)}
        mask = valid_masks([(64, 96), (33, 40)], maps, {"p3": find_feature(model, "p3")})["p3"]
        anchors = model.anchor_generator([maps["p3"]] * 5)[0]
        found = _of_anchors(mask, torch.zeros(2, len(anchors), 3))
        corners = anchors.get_centers()  # where the cell begins, with Detectron2's offset of 0
        assert found[0].all() and torch.equal(found[1], (corners[:, 1] < 33) & (corners[:, 0] < 40))
        assert head.anchors([maps["p3"]] * 5)[0].shape == (8 * 12 * 9, 4)

    def test_a_teacher_that_pads_more_sees_the_same_places(self) -> None:
        model = retinanets("MGD.FEATURES", ["p3"], *DENSE, *CROSS)
        matched(model)
        plain = step(model, batch((64, 64), (60, 50)))
        model.teacher.model.backbone._size_divisibility = 128
        more = step(model, batch((64, 64), (60, 50)))
        for name in ALL:
            assert math.isfinite(more[name].detach()) and float(more[name]) != float(plain[name])


def test_mixed_precision() -> None:
    model = retinanets("MGD.FEATURES", [], *DENSE, *CROSS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, batch((128, 128), (120, 100)))
    assert all(losses[name].dtype == torch.float32 and math.isfinite(losses[name].detach()) for name in ALL)
    plain = step(model, batch((128, 128), (120, 100)))
    for name in ALL:
        assert float(losses[name].detach()) == pytest.approx(float(plain[name].detach()), rel=0.2)
    sum(losses.values()).backward()


class TestErrors:
    @pytest.mark.parametrize(("student", "teacher", "who"), [
        ("faster_rcnn", "retinanet", "student"), ("retinanet", "cascade", "teacher"),
    ])  # fmt: skip
    @pytest.mark.parametrize("method", [DENSE, CROSS])
    def test_detectors_without_a_dense_head(self, student: str, teacher: str, who: str, method: Any) -> None:
        with pytest.raises(ValueError, match=f"the {who} is a GeneralizedRCNN without the dense head"):
            built(student, teacher, *method)

    @pytest.mark.parametrize(("overrides", "message"), [
        (["MODEL.RETINANET.NUM_CLASSES", 4], "the student has 4 classes and the teacher 3"),
        (["MODEL.RETINANET.IN_FEATURES", ["p3", "p4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64]]],
         r"levels of strides \[8, 16\], the teacher at \[8, 16, 32"),
        (["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]],
         "the anchors of level p3 differ, 3 at a location in the student and 9 in the teacher"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]], "the anchors of level p3 differ"),
        (["MGD.CROSS_HEAD.CONVS", 2], r"MGD\.CROSS_HEAD\.CONVS is 2, and the student's head has 1 convolutions"),
        (["MODEL.FPN.OUT_CHANNELS", 12],
         r"after 1 convolutions the student's head has \(for classes, boxes\) \[12, 12\] channels and the teacher's"),
    ])  # fmt: skip
    def test_predictions_that_cannot_be_compared(self, overrides: list[Any], message: str) -> None:
        """Before any weight is looked for."""
        missing = ("MGD.TEACHER.WEIGHTS", "no/such.pth")
        with pytest.raises(ValueError, match=message):
            built("retinanet", "retinanet", *missing, *CROSS, *overrides)

    def test_anchors_of_another_kind(self) -> None:
        with pytest.raises(ValueError, match="the anchors of level p3 differ, 1 at a location in the student and 9 in"):
            HeadDistiller(tiny_fcos(32), tiny("retinanet", 16), HeadKD())

    @pytest.mark.parametrize(("overrides", "message"), [
        (["DENSE_KD.CLASS_WEIGHT", -1.0], r"MGD\.DENSE_KD: the weights of classes and boxes must be 0 or more"),
        (["DENSE_KD.CLASS_WEIGHT", 0.0, "DENSE_KD.BOX_WEIGHT", 0.0], "and not both 0"),
        (["DENSE_KD.TEMPERATURE", 0.0], r"MGD\.DENSE_KD: the temperature must be positive"),
        (["CROSS_HEAD.CONVS", -1], r"MGD\.CROSS_HEAD: the number of convolutions must be 0 or more"),
        (["DENSE_KD.ENABLED", False, "CROSS_HEAD.ENABLED", False, "FEATURES", []],
         r"MGD\.FEATURES is empty, and neither MGD\.DENSE_KD nor MGD\.CROSS_HEAD is enabled"),
    ])  # fmt: skip
    def test_numbers_that_cannot_be(self, overrides: list[Any], message: str) -> None:
        keys = [f"MGD.{value}" if index % 2 == 0 else value for index, value in enumerate(overrides)]
        with pytest.raises(ValueError, match=message):
            validate_config(distilled_config("retinanet", "retinanet", *DENSE, *CROSS, *keys))


def test_off_by_default_and_a_weight_of_zero_leaves_a_loss_out() -> None:
    assert built().heads is None
    model = retinanets("MGD.FEATURES", [], *DENSE, "MGD.DENSE_KD.BOX_WEIGHT", 0.0)
    assert set(step(model)) == {"loss_cls", "loss_box_reg", "loss_dense_kd/class"}


def test_the_exported_student_is_the_plain_one() -> None:
    overrides = [*TWO_CONVS, *TEACHER, "MGD.FEATURES", ["p4"], *DENSE, *CROSS]
    model = matched(built("retinanet", "retinanet", *overrides))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        sum(step(model).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    plain = build_model(student_config(distilled_config("retinanet", "retinanet", *overrides)))
    plain.load_state_dict(export_student_state(model.student), strict=True)
    model.eval()
    plain.eval()
    with torch.no_grad():
        for one, other in zip(model(batch(*SIZES)), plain(batch(*SIZES))):
            assert torch.equal(one["instances"].scores, other["instances"].scores)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.student.modules())


def test_predictions_alone_train_and_resume(workplace: Any, tmp_path: Path) -> None:
    """Without any feature: no matching, no distiller."""
    given = ["MGD.FEATURES", "[]", "MGD.LOSS", "mse", *(str(word) for word in (*DENSE, *CROSS))]
    given += ["MGD.TEACHER.OPTS", "['MODEL.FPN.OUT_CHANNELS',8]", "MGD.TEACHER.WEIGHTS", "untrained"]
    trainer = in_process_trainer(workplace, tmp_path, *given)
    trainer.train()
    latest = trainer.storage.latest()
    assert all(latest[name][0] > 0 for name in ALL) and not (tmp_path / "matching").exists()
    whole = torch.load(tmp_path / "model_final.pth", weights_only=False)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    in_process_trainer(workplace, tmp_path, *given, resume=True).train()
    assert same_tensors(torch.load(tmp_path / "model_final.pth", weights_only=False)["model"], whole["model"])
    with pytest.raises(ValueError, match="one of the two distils features and the other does not"):
        in_process_trainer(workplace, tmp_path, *given, "MGD.FEATURES", "['p3']", resume=True)
