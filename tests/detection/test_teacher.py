from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from tiny_detectors import CONFIGS, distilled_config, image, narrow, tiny, tiny_fcos
from torch import nn
from training_runs import same_tensors

from d2_mgd.detection import TeacherStudentDetector
from d2_mgd.detection.features import find_feature
from d2_mgd.detection.teacher import FrozenTeacher, build_teacher, load_teacher_weights
from d2_mgd.errors import UserError

TORCHVISION = ["MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "MODEL.PIXEL_STD", [58.395, 57.12, 57.375]]
ALL = ["res2", "res5", "p3", "p7"]


def teacher_of(model: nn.Module, names: list[str], input_format: str = "BGR") -> FrozenTeacher:
    teacher = FrozenTeacher(model, input_format=input_format)
    teacher.watch({name: find_feature(model, name) for name in names})
    return teacher


def _untrained(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    torch.save(TeacherStudentDetector(distilled_config()).teacher.model.state_dict(), folder / f"{rank}.pth")
    dist.destroy_process_group()


def test_an_untrained_teacher_is_the_same_in_all_processes(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_untrained, (tmp_path,), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    torch.manual_seed(0)  # of the first, and of a process alone
    alone = TeacherStudentDetector(distilled_config()).teacher.model.state_dict()
    assert same_tensors(one, two) and same_tensors(one, alone)


class TestPixels:
    @pytest.mark.parametrize("given", ["RGB", "BGR"])
    def test_its_own_channel_order_mean_and_deviation(self, given: str) -> None:
        """The maps are exactly those of the teacher alone on images in its own format."""
        model = tiny("retinanet", 32, *TORCHVISION, "INPUT.FORMAT", "RGB")
        teacher = teacher_of(model, ["p3", "p5", "p7"], "RGB")
        images = [image(64, 96, 0), image(50, 70, 1)]
        maps = teacher([picture if given == "RGB" else picture.flip(0) for picture in images], input_format=given)
        with torch.no_grad():
            alone = model.backbone(model.preprocess_image([{"image": picture} for picture in images]).tensor)
        for name, found in maps.items():
            assert torch.equal(found, alone[name]), name

    def test_same_pixels_are_used_as_they_are(self) -> None:
        model, student = tiny("retinanet", 32), tiny("faster_rcnn", 16)
        teacher = teacher_of(model, ["p3"])
        assert teacher.same_pixels(student, "BGR")
        seen: list[torch.Tensor] = []
        model.backbone.bottom_up.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        images = [image(64, 64)]
        normalised = student.preprocess_image([{"image": images[0]}]).tensor
        teacher(images, normalised=normalised)
        assert torch.equal(seen[0], normalised)

    def test_same_pixels_of_another_size_are_not(self) -> None:
        model, student = tiny("retinanet", 32), tiny("faster_rcnn_c4", 16)
        teacher = teacher_of(model, ["p3"])
        images = [image(50, 70)]
        normalised = student.preprocess_image([{"image": images[0]}]).tensor
        assert normalised.shape[-2:] == (50, 70)
        maps = teacher(images, normalised=normalised, min_size=(50, 70))
        with torch.no_grad():
            alone = model.backbone(model.preprocess_image([{"image": images[0]}]).tensor)
        assert torch.equal(maps["p3"], alone["p3"])

    def test_different_pixels(self) -> None:
        teacher = teacher_of(tiny("retinanet", 32), ["p3"])
        assert not teacher.same_pixels(tiny("retinanet", 16, *TORCHVISION), "BGR")
        assert not teacher.same_pixels(tiny(), "RGB")
        assert not teacher.same_pixels(nn.Linear(1, 1), "BGR")

    def test_formats_that_cannot_be_converted(self) -> None:
        teacher = teacher_of(tiny("retinanet", 32), ["p3"])
        with pytest.raises(ValueError, match=r"INPUT\.FORMAT is YUV-BT\.601 for the student and BGR for the teacher"):
            teacher.check_format("YUV-BT.601")


class TestPadding:
    def test_to_a_multiple_of_its_divisor(self) -> None:
        teacher = teacher_of(tiny("retinanet", 32), ["p3"])
        assert teacher.padded_size([(50, 70), (60, 40)]) == (64, 96)

    def test_to_the_students_size_at_least(self) -> None:
        teacher = teacher_of(tiny("retinanet", 32), ["p3"])
        assert teacher.padded_size([(50, 70)], (65, 70)) == (96, 96)
        assert teacher([image(50, 70)], min_size=(128, 128))["p3"].shape[-2:] == (16, 16)

    def test_to_squares_where_it_wants_them(self) -> None:
        model = tiny("retinanet", 32)
        model.backbone._square_pad = 128
        teacher = teacher_of(model, ["p3"])
        assert teacher.padded_size([(50, 70)]) == (128, 128)
        with pytest.raises(
            ValueError, match=r"the teacher takes images of 128 x 128 pixels and the batch has 50 x 200"
        ):
            teacher.padded_size([(50, 200)])


class TestFrozen:
    def test_eval_and_no_gradients(self) -> None:
        model = tiny("retinanet", 32).train()
        teacher = teacher_of(model, ALL)
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        maps = teacher([image(64, 64)])
        assert not any(found.requires_grad or found.is_inference() for found in maps.values())

    def test_it_is_no_module(self) -> None:
        holder = nn.Module()
        holder.teacher = teacher_of(tiny("retinanet", 32), ["p3"])
        assert not list(holder.modules())[1:] and not holder.state_dict()

    @pytest.mark.parametrize(
        ("names", "silent"),
        [
            (["res3"], ["backbone.bottom_up.res4", "backbone.fpn_lateral3", "head"]),
            (["p5"], ["backbone.fpn_output4", "backbone.fpn_output3", "backbone.top_block", "head"]),
            (["p3", "res5"], ["backbone.top_block", "head"]),
            (["p7"], ["head"]),
        ],
    )
    def test_runs_no_deeper_than_its_deepest_feature(self, names: list[str], silent: list[str]) -> None:
        model = tiny("retinanet", 32)
        teacher = teacher_of(model, names)
        ran: set[str] = set()
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, args, path=path: ran.add(path))
        teacher([image(64, 64)])
        assert "backbone.bottom_up.stem" in ran
        assert not ran & set(silent)
        assert "" not in ran

    def test_pre_activation_tap_stops_inside_the_stage(self) -> None:
        model = tiny("retinanet", 32)
        teacher = teacher_of(model, ["res2"])
        ran: list[int] = []
        model.backbone.bottom_up.res3.register_forward_pre_hook(lambda module, args: ran.append(1))
        teacher([image(64, 64)])
        assert not ran

    def test_model_runs_plainly_when_it_is_evaluated(self) -> None:
        model = tiny("retinanet", 32)
        teacher = teacher_of(model, ["res2"])
        teacher([image(64, 64)])
        with torch.no_grad():
            model([{"image": image(64, 64)}])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.pth"
    torch.save({"model": tiny("retinanet", 32).state_dict(), "iteration": 7}, path)
    return path


class TestWeights:
    def test_loaded_and_recorded(self, weights: Path) -> None:
        cfg = distilled_config("retinanet", "retinanet", "MGD.TEACHER.WEIGHTS", str(weights))
        teacher = build_teacher(cfg)
        expected = torch.load(weights, weights_only=True)["model"]
        assert all(torch.equal(value, expected[name]) for name, value in teacher.model.state_dict().items())
        assert teacher.weights_path == str(weights)
        assert teacher.digest == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert teacher.cfg.MODEL.META_ARCHITECTURE == "RetinaNet"

    def test_absent(self) -> None:
        cfg = distilled_config("retinanet", "retinanet", "MGD.TEACHER.WEIGHTS", "no/such/teacher.pth")
        with pytest.raises(UserError, match=r"the teacher's weights cannot be loaded: .*no/such/teacher\.pth"):
            build_teacher(cfg)

    def test_unreachable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
        with pytest.raises(UserError, match=r"the teacher's weights cannot be loaded: .*127\.0\.0\.1"):
            load_teacher_weights(tiny("retinanet", 32), "http://127.0.0.1:9/teacher.pth")

    def test_of_another_architecture(self, weights: Path) -> None:
        with pytest.raises(
            ValueError, match=r"do not fit its config: \d+ of the model are missing there, .*\d+ there are"
        ):
            load_teacher_weights(tiny("faster_rcnn", 32), str(weights))

    def test_of_another_width(self, weights: Path) -> None:
        with pytest.raises(ValueError, match=r"do not fit its config: backbone\S+ is \(\d+, .*MGD\.TEACHER\.OPTS"):
            load_teacher_weights(tiny("retinanet", 64), str(weights))

    def test_of_other_classes(self, weights: Path) -> None:
        model = tiny("retinanet", 32, "MODEL.RETINANET.NUM_CLASSES", 5)
        with pytest.raises(ValueError, match=r"head\.cls_score\.\w+ is \(27,.*\) there and \(45,.*\) in the model"):
            load_teacher_weights(model, str(weights))

    def test_a_backbone_alone_is_no_trained_detector(self, tmp_path: Path) -> None:
        """ImageNet weights, as MODEL.WEIGHTS of the zoo's configs names them: the head would be random."""
        model = tiny("retinanet", 32)
        state = {name: value for name, value in model.state_dict().items() if "bottom_up" in name}
        torch.save({"model": state}, tmp_path / "backbone.pth")
        with pytest.raises(ValueError, match=r"of the model are missing there, backbone\.fpn|are missing there, head"):
            load_teacher_weights(model, str(tmp_path / "backbone.pth"))

    def test_constants_may_be_there_or_not(self, tmp_path: Path) -> None:
        model = tiny("retinanet", 32)
        state = {
            **model.state_dict(),
            "pixel_mean": torch.zeros(3, 1, 1),
            "anchor_generator.cell_anchors.0": torch.zeros(9, 4),
            "backbone.bottom_up.stem.conv1.norm.num_batches_tracked": torch.tensor(3),
        }
        torch.save({"model": state}, tmp_path / "old.pth")
        load_teacher_weights(model, str(tmp_path / "old.pth"))

    def test_untrained_by_name_only_and_with_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            teacher = build_teacher(distilled_config())
        assert "The teacher is untrained" in caplog.text
        assert (teacher.weights_path, teacher.digest) == ("untrained", "")

    def test_as_the_caller_set_them(self) -> None:
        teacher = FrozenTeacher(tiny_fcos(), input_format="BGR")
        assert (teacher.weights_path, teacher.digest, teacher.cfg) == ("", "", None)

    def test_model_without_normalisation(self) -> None:
        model = tiny("retinanet", 32)
        del model.pixel_std
        with pytest.raises(ValueError, match="RetinaNet has no pixel_std"):
            FrozenTeacher(model)


def test_a_student_says_the_channel_order_of_its_images() -> None:
    student = tiny("retinanet", 16, "INPUT.FORMAT", "RGB")
    assert student.input_format == "RGB"
    teacher = FrozenTeacher(tiny("retinanet", 32), input_format="BGR")
    options = {"student": student, "teacher": teacher, "distiller": {"loss": "mse"}, "features": ["p3"]}
    assert TeacherStudentDetector(**options).input_format == "RGB"
    assert TeacherStudentDetector(**options, input_format="BGR").input_format == "BGR"


def test_model_zoo_name_and_overrides() -> None:
    teacher = build_teacher(distilled_config("retinanet", "cascade"))
    assert type(teacher.model.roi_heads).__name__ == "CascadeROIHeads"
    assert CONFIGS["cascade"].startswith("Misc/") and narrow(32)
    assert teacher.input_format == "BGR"
