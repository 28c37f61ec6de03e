"""ResNet-50 teaches MobileNet-V1: the same two networks plain and in a distillation step. N images of 224 px."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.distillation import DistillationStep, Student, Teacher
from classification.features import pair_features
from classification.models import build
from d2_mgd.distill import MatchingGuidedDistiller
from d2_mgd.distill.margins import tap_margins
from d2_mgd.distill.teacher_forward import TeacherForward
from d2_mgd.training.steps import Precision


class Pair:
    """Both networks twice with the same weights: plain, and in a distillation step. All are in channels_last.

    The floor of a step is the plain student's forward, backward and optimiser step and the plain teacher's forward to
    its last stage without a graph. No hook of this project is on either.

    Args:
        batch: N.
        size: height and width of the images.
        device: of networks and images.
        dtype: of mixed precision, for the plain networks and the student; None is float32.
        runs: how the teacher of the distillation step runs.
        balance: of the features' losses.
    """

    def __init__(
        self,
        batch: int,
        size: int,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        runs: TeacherForward | None = None,
        balance: str = "fixed",
    ) -> None:
        torch.manual_seed(0)
        student, teacher = (
            build(name, 1000).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for name in ("mobilenet_v1", "resnet50")
        )
        self.images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        self.targets = torch.randint(0, 1000, (batch,), device=device)
        self.precision = Precision(torch.device(device).type, dtype or torch.float32)
        self.plain_student, self.plain_teacher = copy.deepcopy(student), _trunk(copy.deepcopy(teacher))
        self.plain_optimizer = _sgd(self.plain_student)
        pairs = pair_features("mobilenet_v1", "resnet50")
        taps = {name: pair.teacher for name, pair in pairs.items()}
        self.teacher = Teacher(teacher, taps, with_logits=False, precision=self.precision, runs=runs)
        self.student = Student(student, {name: pair.student for name, pair in pairs.items()}, precision=self.precision)
        with torch.no_grad():
            student_maps, (teacher_maps, _) = self.student.maps(self.images[:2]), self.teacher(self.images[:2])
        channels = {name: (student_maps[name].shape[1], teacher_maps[name].shape[1]) for name in pairs}
        margins = tap_margins(teacher, taps, {name: pair.norm for name, pair in pairs.items()})
        self.distiller = MatchingGuidedDistiller(channels, margins=margins, balance=balance).to(device)
        self.student.distiller = self.distiller
        self.distiller.observe(student_maps, teacher_maps)
        self.distiller.rematch()
        self.step = DistillationStep(self.student, self.teacher)
        self.optimizer = _sgd(self.student)

    def floor(self) -> None:
        """Run the teacher's forward and the student's step."""
        with torch.no_grad(), self.precision.autocast():
            self.plain_teacher(self.images)
        self.student_alone()

    def student_alone(self) -> None:
        """Run the plain student's step."""
        with self.precision.autocast():
            logits = self.plain_student(self.images)
        loss = F.cross_entropy(logits.float(), self.targets)
        self.plain_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.plain_optimizer.step()

    def distilled(self, observe: bool = False) -> None:
        """Run a distilled step; with ``observe`` its maps count in the next matching."""
        self.step.train()
        output = self.step(self.images, self.targets, observe)
        loss: Tensor = torch.stack(list(output.losses.values())).sum() / self.images.shape[0]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.distiller.update_balance()
        if observe:
            self.distiller.observe(output.student_maps, output.teacher_maps)

    def two_forwards(self) -> None:
        """Run both plain networks to their last stage, as a rematch pass needs it."""
        self.plain_student.eval()
        with torch.no_grad(), self.precision.autocast():
            self.plain_teacher(self.images)
            self.plain_student.get_submodule("model")(self.images)
        self.plain_student.train()

    def rematch_pass(self) -> None:
        """Run one batch of a rematch pass."""
        self.step.eval()
        with torch.no_grad():
            output = self.step(self.images)
        self.distiller.observe(output.student_maps, output.teacher_maps)


def _trunk(resnet: Any) -> nn.Module:
    """Return a ResNet up to its last stage, frozen."""
    trunk = nn.Sequential(*list(resnet.children())[:-2])
    return trunk.requires_grad_(False).eval()


def _sgd(network: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, 1e-4, momentum=0.9, weight_decay=4e-5)
