"""Shape shorthand: N images, S student and T teacher channels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny_detectors import SIZES, batch, built, distilled_config, matched, paired, step, tiny, tiny_fcos

from d2_mgd.detection import TeacherStudentDetector
from d2_mgd.detection.config import student_config, teacher_config
from d2_mgd.detection.norms import TrainableAffineNorm, TrainableSyncNorm, export_student_state
from d2_mgd.detection.teacher import FrozenTeacher
from d2_mgd.distill import FEATURE_LOSSES, REDUCERS, SPATIAL_WEIGHTS, MatchingGuidedDistiller, batch_norm_margin
from d2_mgd.errors import UserError

ARCHITECTURES = [
    ("retinanet", "retinanet", ["p3", "p7"], "mse"),
    ("faster_rcnn", "faster_rcnn", ["p2", "p6"], "pearson"),
    ("mask_rcnn", "mask_rcnn", ["res2", "res5"], "partial_l2"),
    ("cascade", "cascade", ["res4", "p4"], "partial_l2, mse"),
    ("retinanet", "cascade", ["res3", "p5"], "mse"),
    ("mask_rcnn", "retinanet", ["res2", "p3"], "channel_kl"),
    ("faster_rcnn_c4", "faster_rcnn", ["res2", "res4"], "partial_l2"),
]


@pytest.mark.parametrize(("student", "teacher", "features", "loss"), ARCHITECTURES)
def test_every_architecture_trains_and_infers(student: str, teacher: str, features: list[str], loss: str) -> None:
    model = matched(built(student, teacher, "MGD.FEATURES", features, "MGD.LOSS", loss))
    with torch.random.fork_rng(), EventStorage(0):
        alone = model.student(batch(*SIZES))
    losses = step(model)
    assert set(losses) == {*alone, *(f"loss_distill/{name}" for name in features)}
    assert all(math.isfinite(value.detach()) for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.distiller.parameters())
    model.eval()
    with torch.no_grad():
        assert len(model(batch((64, 64)))[0]["instances"].scores) >= 0


@pytest.mark.parametrize("roles", ["student", "teacher", "both"])
def test_fcos(roles: str) -> None:
    """Has no yaml config: student or teacher by keyword."""
    student = tiny("retinanet") if roles == "teacher" else tiny_fcos(32)
    teacher = tiny("cascade", 32) if roles == "student" else tiny_fcos(64)
    model = matched(paired(student, teacher, ["res3", "p4", "p5"]))
    losses = step(model)
    assert {"loss_distill/res3", "loss_distill/p4", "loss_distill/p5"} <= set(losses)
    sum(losses.values()).backward()
    model.eval()
    with torch.no_grad():
        assert len(model(batch((160, 200)))) == 1


def dilated_c5() -> torch.nn.Module:
    dilated = ["MODEL.RESNETS.RES5_DILATION", 2, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"]
    dilated += ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
    for node in ("RESNETS.OUT", "ROI_HEADS.IN", "RPN.IN"):
        dilated += [f"MODEL.{node}_FEATURES", ["res5"]]
    return tiny("faster_rcnn_c4", 16, *dilated)


@pytest.mark.parametrize("dilated", ["student", "teacher"])
def test_strides_that_differ_by_a_factor(dilated: str, caplog: pytest.LogCaptureFixture) -> None:
    """A dilated res5 has stride 16 in place of 32."""
    strides = {who: 16 if who == dilated else 32 for who in ("student", "teacher")}
    networks = {who: dilated_c5() if who == dilated else tiny() for who in strides}
    with caplog.at_level("WARNING", "d2_mgd"):
        model = paired(networks["student"], networks["teacher"], ["res5"])
        student_maps, teacher_maps, _ = model.extract_maps(batch((96, 64), (90, 60)))
    said = f"res5 has stride {strides['student']} in the student and {strides['teacher']} in the teacher"
    assert sum(said in record.getMessage() for record in caplog.records) == 1
    expected = (96 // strides["student"], 64 // strides["student"])
    assert student_maps["res5"].shape[2:] == teacher_maps["res5"].shape[2:] == expected
    assert float(step(model)["loss_distill/res5"].detach()) > 0


@pytest.mark.parametrize("loss", [name for name, _ in FEATURE_LOSSES])
@pytest.mark.parametrize("reducer", [name for name, _ in REDUCERS])
def test_every_loss_and_reducer_gives_the_student_gradients(loss: str, reducer: str) -> None:
    model = matched(built("retinanet", "retinanet", "MGD.FEATURES", ["res4"], "MGD.LOSS", loss, "MGD.REDUCER", reducer))
    step(model)["loss_distill/res4"].backward()
    convolution = model.student.backbone.bottom_up.res4[-1].conv3
    assert float(convolution.weight.grad.abs().sum()) > 0
    assert float(convolution.norm.weight.grad.abs().sum()) > 0
    assert model.student.head.cls_score.weight.grad is None


@pytest.mark.parametrize("align", ["conv1x1", "matching"])
@pytest.mark.parametrize("norm", ["gn", "bn", "sync_bn", "none"])
def test_every_alignment_and_norm(align: str, norm: str) -> None:
    model = built("retinanet", "retinanet", "MGD.FEATURES", ["res3"], "MGD.ALIGN", align, "MGD.NORM", norm)
    if align == "matching":
        matched(model)
    step(model)["loss_distill/res3"].backward()
    assert all(p.grad is not None for p in model.distiller.parameters())


@pytest.mark.parametrize("spatial", [name for name, _ in SPATIAL_WEIGHTS])
def test_every_spatial_weight(spatial: str) -> None:
    losses = {}
    for name in ("all", spatial):
        torch.manual_seed(0)
        losses[name] = float(step(matched(built("faster_rcnn", "retinanet", "MGD.SPATIAL", name)))["loss_distill/p3"])
    assert math.isfinite(losses[spatial])
    assert (losses[spatial] == losses["all"]) == (spatial == "all")


def test_tied_levels_share_a_matching() -> None:
    model = matched(built("retinanet", "retinanet", "MGD.TIE", [["p3", "p5"]]))
    matchings = {name: matching.groups.tolist() for name, matching in model.distiller.matchings.items()}
    assert matchings["p3"] == matchings["p5"]
    with pytest.raises(ValueError, match="tied features need the same widths"):
        built("retinanet", "retinanet", "MGD.FEATURES", ["res3", "p3"], "MGD.TIE", [["res3", "p3"]])


class TestTeacherStaysOutside:
    def test_not_trained_not_saved_not_counted(self) -> None:
        model = matched(built())
        assert not any("teacher" in name for name, _ in model.named_parameters())
        assert not any("teacher" in name for name in model.state_dict())
        assert not any("teacher" in name for name, _ in model.named_modules())
        own = {name for name in model.state_dict() if not name.startswith("distiller.")}
        assert own == set(model.student.state_dict())
        sum(step(model).values()).backward()
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.model.parameters())

    def test_stays_in_eval_mode(self) -> None:
        model = matched(built("retinanet", "retinanet", "MGD.TEACHER.OPTS", ["MODEL.RESNETS.NORM", "BN"]))
        before = {name: value.clone() for name, value in model.teacher.model.state_dict().items()}
        model.train()
        step(model)
        assert not any(module.training for module in model.teacher.model.modules())
        after = model.teacher.model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_goes_where_the_student_goes(self) -> None:
        model = built().to(torch.float64)
        assert next(model.teacher.model.parameters()).dtype == torch.float64
        assert model.teacher.model.pixel_mean.dtype == torch.float64
        assert model.device == next(model.student.parameters()).device

    def test_each_network_runs_once(self) -> None:
        model = matched(built())
        ran: list[str] = []
        model.student.backbone.register_forward_pre_hook(lambda module, args: ran.append("student"))
        model.teacher.model.backbone.register_forward_pre_hook(lambda module, args: ran.append("teacher"))
        model.student.head.register_forward_pre_hook(lambda module, args: ran.append("student's head"))
        model.teacher.model.head.register_forward_pre_hook(lambda module, args: ran.append("teacher's head"))
        step(model)
        assert ran == ["student", "student's head", "teacher"]
        ran.clear()
        model.extract_maps(batch())
        assert ran == ["student", "teacher"]

    def test_each_sees_the_pixels_its_own_way(self) -> None:
        """A BGR student and an RGB teacher with torchvision's normalisation."""
        opts = [
            "INPUT.FORMAT",
            "RGB",
            "MODEL.PIXEL_MEAN",
            [123.675, 116.28, 103.53],
            "MODEL.PIXEL_STD",
            [58.4, 57.1, 57.4],
        ]
        model = built("retinanet", "retinanet", "MGD.TEACHER.OPTS", opts)
        samples = batch((64, 64), (64, 64))
        student_maps, teacher_maps, _ = model.extract_maps(samples)
        rgb = [{"image": sample["image"].flip(0)} for sample in samples]
        with torch.no_grad():
            own = model.student.backbone(model.student.preprocess_image(samples).tensor)
            alone = model.teacher.model.backbone(model.teacher.model.preprocess_image(rgb).tensor)
        for name in ("p3", "p4", "p5"):
            assert torch.equal(student_maps[name], own[name])
            assert torch.equal(teacher_maps[name], alone[name])


class TestInference:
    def test_is_the_student(self) -> None:
        model = matched(built("mask_rcnn", "mask_rcnn")).eval()
        samples = batch(*SIZES)
        with torch.no_grad():
            ours, students = model(samples), model.student(samples)
        for one, other in zip(ours, students):
            assert torch.equal(one["instances"].scores, other["instances"].scores)
            assert torch.equal(one["instances"].pred_masks, other["instances"].pred_masks)

    def test_carries_no_hooks(self) -> None:
        model = matched(built())
        step(model)
        model.eval()
        with torch.no_grad():
            model(batch())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.student.modules())

    @pytest.mark.parametrize("kind", ["affine", "sync_bn", "none"])
    def test_exported_student_is_the_plain_one(self, kind: str) -> None:
        overrides = ["MGD.FEATURES", ["res3", "p4"], "MGD.STUDENT.TRAIN_LAST_NORM", kind]
        model = matched(built("retinanet", "retinanet", *overrides))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)
        for _ in range(2):
            sum(step(model).values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        plain = build_model(student_config(distilled_config("retinanet", "retinanet", *overrides)))
        plain.load_state_dict(export_student_state(model.student), strict=True)
        model.eval()
        plain.eval()
        samples = batch(*SIZES)
        with torch.no_grad():
            for one, other in zip(model(samples), plain(samples)):
                assert len(one["instances"]) and torch.equal(one["instances"].scores, other["instances"].scores)
                assert torch.equal(one["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor)


class TestLastNorms:
    @pytest.mark.parametrize(("kind", "expected"), [("affine", TrainableAffineNorm), ("sync_bn", TrainableSyncNorm)])
    def test_of_distilled_stages_alone(self, kind: str, expected: type) -> None:
        model = built("retinanet", "retinanet", "MGD.FEATURES", ["res3", "p4"], "MGD.STUDENT.TRAIN_LAST_NORM", kind)
        found = [name for name, module in model.student.named_modules() if isinstance(module, expected)]
        assert found == ["backbone.bottom_up.res3.3.conv3.norm"]
        assert all(p.requires_grad for p in model.student.get_submodule(found[0]).parameters())

    def test_none(self) -> None:
        model = built("retinanet", "retinanet", "MGD.FEATURES", ["res3"], "MGD.STUDENT.TRAIN_LAST_NORM", "none")
        assert isinstance(model.student.backbone.bottom_up.res3[-1].conv3.norm, FrozenBatchNorm2d)

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match="unknown train_last_norm 'all'; there are: affine, sync_bn, none"):
            paired(tiny(), tiny("retinanet", 32), ["p3"], train_last_norm="all")


def test_mixed_precision() -> None:
    """Images of 128 px: PyTorch's bfloat16 convolution of a 1 x 1 map has garbage in its gradient on some CPUs."""
    model = matched(built("retinanet", "retinanet", "MGD.FEATURES", ["res3", "p4"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, batch((128, 128), (120, 100)))
        maps, _, _ = model.extract_maps(batch())
    assert maps["p4"].dtype == torch.bfloat16
    assert all(losses[f"loss_distill/{name}"].dtype == torch.float32 for name in ("res3", "p4"))
    sum(losses.values()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


class TestErrors:
    def test_features_are_checked_before_weights_are_fetched(self) -> None:
        with pytest.raises(ValueError, match=r"the student has no feature 'p2'; it has: .*p7"):
            built("retinanet", "retinanet", "MGD.FEATURES", ["p2"], "MGD.TEACHER.WEIGHTS", "no/such.pth")

    def test_teacher_weights_absent(self) -> None:
        with pytest.raises(UserError, match="the teacher's weights cannot be loaded"):
            built("retinanet", "retinanet", "MGD.TEACHER.WEIGHTS", "no/such.pth")

    def test_strides_without_a_common_factor(self) -> None:
        student, teacher = tiny(), tiny("retinanet", 32)
        shapes = teacher.backbone.output_shape()
        shapes["p3"] = ShapeSpec(channels=8, stride=12)
        teacher.backbone.output_shape = lambda: shapes
        with pytest.raises(UserError, match="p3 has stride 8 in the student and 12 in the teacher: one must be"):
            paired(student, teacher, ["p3"])

    def test_no_feature_in_common(self) -> None:
        student, teacher = tiny(), tiny("retinanet", 32)
        del student.backbone.bottom_up
        student.backbone.output_shape = lambda: {"s8": ShapeSpec(channels=8, stride=8)}
        with pytest.raises(UserError, match=r"no feature in common: the student has s8, and the teacher res2, .* p7"):
            paired(student, teacher, ["s8"])

    def test_widths_of_a_foreign_distiller(self) -> None:
        distiller = MatchingGuidedDistiller({"p3": (4, 4)}, loss="mse")
        with pytest.raises(ValueError, match=r"the networks have the widths \(S, T\) .*8, 8.* made for .*4, 4"):
            TeacherStudentDetector(
                student=tiny(), teacher=FrozenTeacher(tiny("retinanet", 32)), distiller=distiller, features=["p3"]
            )

    def test_formats(self) -> None:
        with pytest.raises(ValueError, match=r"INPUT\.FORMAT is L for the student and BGR for the teacher"):
            built("retinanet", "retinanet", "INPUT.FORMAT", "L")

    def test_reducer_and_mode_that_do_not_go_together(self) -> None:
        with pytest.raises(ValueError, match="feature res3: reducer 'sm' goes with the mode 'one_to_one'"):
            built("retinanet", "retinanet", "MGD.FEATURES", ["res3"], "MGD.REDUCER", "sm", "MGD.MODE", "balanced")

    def test_alignment_that_needs_equal_widths(self) -> None:
        with pytest.raises(ValueError, match="feature res3: alignment 'none' needs equal widths"):
            built("retinanet", "retinanet", "MGD.FEATURES", ["res3"], "MGD.ALIGN", "none")


def test_named_as_the_meta_architecture_itself() -> None:
    """Then Detectron2's own ``build_model`` makes it."""
    overrides = [
        "MODEL.META_ARCHITECTURE",
        "TeacherStudentDetector",
        "MGD.STUDENT.META_ARCHITECTURE",
        "GeneralizedRCNN",
    ]
    model = build_model(distilled_config("faster_rcnn", "retinanet", *overrides))
    assert isinstance(model, TeacherStudentDetector)
    assert type(model.student).__name__ == "GeneralizedRCNN"


class TestMargins:
    OVERRIDES = ("MGD.FEATURES", ["res4"], "MGD.LOSS", "partial_l2")

    def test_are_those_of_the_loaded_teacher(self, tmp_path: Path) -> None:
        teacher = tiny("retinanet", 32)
        torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
        weights = str(tmp_path / "teacher.pth")
        cfg = distilled_config("retinanet", "retinanet", *self.OVERRIDES, "MGD.TEACHER.WEIGHTS", weights)
        model = TeacherStudentDetector(cfg)
        expected = batch_norm_margin(teacher.backbone.bottom_up.res4[-1].conv3.norm)
        assert any(torch.equal(value, expected) for value in model.distiller.buffers() if value.shape == expected.shape)

    def test_folded_statistics_are_refused(self, tmp_path: Path) -> None:
        cfg = distilled_config("retinanet", "retinanet", *self.OVERRIDES)
        torch.save({"model": build_model(teacher_config(cfg)).state_dict()}, tmp_path / "teacher.pth")
        cfg.MGD.TEACHER.WEIGHTS = str(tmp_path / "teacher.pth")
        with pytest.raises(ValueError, match=r"feature res4: the statistics .* are folded into its scale"):
            TeacherStudentDetector(cfg)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = built("mask_rcnn", "retinanet", "MGD.FEATURES", ["res3", "p4"], "MODEL.DEVICE", "cuda").to("cuda")
    assert model.teacher.device.type == "cuda"
    matched(model)
    losses = step(model)
    sum(losses.values()).backward()
    assert all(value.device.type == "cuda" for value in losses.values())
