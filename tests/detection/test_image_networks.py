"""Teachers that are no detectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torchvision
from tiny_detectors import SIZES, batch, distilled_config, step, tiny

from d2_mgd.detection import FrozenTeacher, TeacherStudentDetector
from d2_mgd.detection.features import feature_names
from d2_mgd.detection.teacher import build_teacher
from d2_mgd.distill import MatchingGuidedDistiller
from d2_mgd.errors import UserError

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def taught_by(name: str, *overrides: Any) -> Any:
    teacher = ["MGD.TEACHER.CONFIG_FILE", name, "MGD.TEACHER.OPTS", [], "MGD.FEATURES", ["p4"]]
    return distilled_config("retinanet", "retinanet", *teacher, *overrides)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:mobilenet_v3_small"])
def test_a_classifier_teaches_fpn_levels_of_its_strides(name: str) -> None:
    model = TeacherStudentDetector(taught_by(name, "MGD.FEATURES", ["p3", "p5"]))
    assert feature_names(model.teacher.model)[:4] == ["p2", "p3", "p4", "p5"] and model.teacher.input_format == "RGB"
    losses = step(model, batch(*SIZES))
    assert float(losses["loss_distill/p3"].detach()) > 0 and float(losses["loss_distill/p5"].detach()) > 0
    assert not any("teacher" in key for key in model.state_dict())


def test_its_maps_are_those_of_the_library(tmp_path: Path) -> None:
    source = torchvision.models.resnet18().eval()
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    cfg = taught_by("torchvision:resnet18", "MGD.TEACHER.WEIGHTS", str(tmp_path / "resnet18.pth"))
    teacher = build_teacher(cfg)
    assert len(teacher.digest) == 64
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        maps = teacher.model.backbone(images)
        stem = source.maxpool(source.relu(source.bn1(source.conv1(images))))
        torch.testing.assert_close(maps["p3"], source.layer2(source.layer1(stem)))
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match=r"resnet18\.pth are not of torchvision:resnet18"):
        build_teacher(cfg)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_timm(name: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model = TeacherStudentDetector(taught_by(f"timm:{name}"))
    assert float(step(model, batch((64, 96), (64, 90)))["loss_distill/p4"].detach()) > 0


def test_a_plain_backbone_teaches_with_an_input_format() -> None:
    student, backbone = tiny(), tiny("retinanet", 32).backbone
    with pytest.raises(UserError, match=r"has no pixel_mean: give it as MGD\.TEACHER\.PIXEL_MEAN"):
        FrozenTeacher(backbone)
    teacher = FrozenTeacher(backbone, input_format="RGB", pixel_mean=MEAN, pixel_std=STD)
    distiller = MatchingGuidedDistiller({"p3": (8, 8)}, loss="mse")
    model = TeacherStudentDetector(student=student, teacher=teacher, distiller=distiller, features=["p3"])
    assert float(step(model)["loss_distill/p3"].detach()) > 0


def test_the_input_format_of_a_config() -> None:
    given = ["MGD.TEACHER.PIXEL_MEAN", MEAN, "MGD.TEACHER.PIXEL_STD", STD, "MGD.TEACHER.FORMAT", "RGB"]
    teacher = TeacherStudentDetector(distilled_config("retinanet", "retinanet", *given)).teacher
    assert teacher.model.pixel_mean.flatten().tolist() == pytest.approx(MEAN) and teacher.input_format == "RGB"


def test_an_unknown_classifier_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match=r"torchvision has no classifier 'resnet19'\. Nearest: resnet"):
        TeacherStudentDetector(taught_by("torchvision:resnet19"))
