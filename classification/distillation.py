"""The forward pass of a step: the teacher's maps, the student's maps and logits, and the losses.

Shape shorthand: N images, K classes.

The teacher and the trainable part are two modules, so that DDP wraps the trainable part only. DataParallel wraps both
together, :class:`DistillationStep`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.data_parallel import summable
from d2_mgd.distill import FeatureTaps, LogitLoss, MatchingGuidedDistiller, Tap
from d2_mgd.distill.teacher_forward import TeacherForward
from d2_mgd.training.steps import Precision

Maps = dict[str, Tensor]

_LOGITS = "logits of the head"  # beside the maps of features, whose names contain no space


class Forward(NamedTuple):
    """Outputs of a step's forward pass.

    Args:
        logits: (N, K) of the student.
        losses: name -> (1,) loss times N, so that the shares of several GPUs add up.
        student_maps, teacher_maps: without gradients; empty without ``keep_maps``.
    """

    logits: Tensor
    losses: dict[str, Tensor]
    student_maps: Maps
    teacher_maps: Maps


class Classifier(nn.Module):
    """A network for evaluation, with the precision and the input images of training.

    Args:
        network: the student, or the teacher.
        precision: of the forward pass.
        renormalize: converts the student's images to the network's normalisation.
    """

    def __init__(self, network: nn.Module, precision: Precision, renormalize: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.precision = precision
        self.renormalize = renormalize or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, K) float32 logits."""
        with self.precision.autocast():
            logits: Tensor = self.network(self.renormalize(images))
        return logits.float()


class Teacher(nn.Module):
    """The frozen teacher and its taps; always in evaluation mode.

    Args:
        network: the teacher.
        taps: feature name -> tap; empty to distil logits only.
        with_logits: also run the head.
        precision: of the student's forward pass; float32 by default.
        renormalize: converts the student's images to the teacher's normalisation.
        runs: precision and memory format of the forward pass; by default those of the student.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: Mapping[str, Tap],
        with_logits: bool,
        precision: Precision | None = None,
        renormalize: nn.Module | None = None,
        runs: TeacherForward | None = None,
    ) -> None:
        super().__init__()
        self.precision = precision or Precision()
        self.runs = runs or TeacherForward()
        self.network = self.runs.prepare(network.requires_grad_(False))
        self.taps = FeatureTaps(network, taps) if taps else None
        self.with_logits = with_logits
        self.renormalize = renormalize or nn.Identity()

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, with_logits: bool | None = None) -> tuple[Maps, Tensor | None]:
        """Maps by name, and (N, K) logits or None; without logits the forward pass ends at the deepest tap.

        Args:
            images: normalised for the student.
            with_logits: overrides the constructor's.
        """
        with_logits = self.with_logits if with_logits is None else with_logits
        with self.precision.autocast():
            found = self.runs(self._maps_and_logits if with_logits else self._maps, self.renormalize(images))
        return found, found.pop(_LOGITS, None)

    def _maps(self, images: Tensor) -> Maps:
        assert self.taps is not None
        return self.taps.run_in(self.network, images)

    def _maps_and_logits(self, images: Tensor) -> Maps:
        logits = self.network(images)
        return {**({} if self.taps is None else self.taps.collect()), _LOGITS: logits}


class Student(nn.Module):
    """The trainable part: the student network, and the distiller's norms or projections.

    Args:
        network: the student; taps are hooks, its modules and state dict stay as they are.
        taps: feature name -> tap; empty without a distiller.
        distiller: compares the maps; None without features.
        logit_loss: compares the logits if the teacher returns them; by default KD at temperature 1.5.
        precision: of the forward pass; float32 by default.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: Mapping[str, Tap] | None = None,
        distiller: MatchingGuidedDistiller | None = None,
        logit_loss: LogitLoss | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.distiller = distiller
        self.taps = FeatureTaps(network, taps) if taps else None
        self.logit_loss = logit_loss or LogitLoss("kd", temperature=1.5)
        self.precision = precision or Precision()

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        teacher_maps: Maps,
        teacher_logits: Tensor | None,
        keep_maps: bool = False,
        factor: float = 1.0,
    ) -> Forward:
        """Logits and losses of a batch.

        Args:
            images, targets: (N, 3, H, W) and (N,).
            teacher_maps, teacher_logits: the teacher's, not used if ``factor`` is 0. Each map is removed from
                ``teacher_maps`` when it has been compared, which frees its memory.
            keep_maps: also return the maps of both networks.
            factor: of the distillation losses.
        """
        found: dict[str, Tensor] = {}
        kept: Maps = {}
        of_teacher = dict(teacher_maps) if keep_maps else {}

        def compare(name: str, student_map: Tensor) -> None:
            """Compare one feature as soon as the student has computed it, so that both maps can be freed."""
            if keep_maps:
                kept[name] = student_map.detach()
            if self.distiller is not None and factor:
                loss = self.distiller.compare(name, student_map, teacher_maps.pop(name), factor=factor)
                found[f"loss_distill/{name}"] = loss

        with self.precision.autocast(), nullcontext() if self.taps is None else self.taps.each(compare):
            logits = self.network(images)
        losses = {"loss_class": F.cross_entropy(logits.float(), targets), **found}
        if self.distiller is not None and not factor:
            losses.update(self.distiller.no_losses(logits.device))
        if teacher_logits is not None:
            losses["loss_kd"] = factor * self.logit_loss(logits, teacher_logits, targets)
        return Forward(logits, summable(losses, images.shape[0]), kept, of_teacher)

    @torch.no_grad()
    def maps(self, images: Tensor) -> Maps:
        """The tapped maps; the forward pass ends at the deepest tap."""
        assert self.taps is not None
        with self.precision.autocast():
            return self.taps.run_in(self.network, images)


class DistillationStep(nn.Module):
    """Teacher and student as one module.

    Args:
        student: the trainable part, possibly wrapped in DDP.
        teacher: None to train without a teacher.
    """

    def __init__(self, student: nn.Module, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher

    def forward(
        self, images: Tensor, targets: Tensor | None = None, keep_maps: bool = False, factor: float = 1.0
    ) -> Forward:
        """Logits and losses of a batch; without ``targets``, only the maps of both networks.

        Args:
            images, targets: (N, 3, H, W) and (N,).
            keep_maps: also return the maps of both networks.
            factor: of the distillation losses; if it is 0, the teacher does not run.
        """
        if targets is None:
            assert self.teacher is not None
            wrapped = isinstance(self.student, nn.parallel.DistributedDataParallel)
            student = self.student.module if wrapped else self.student
            assert isinstance(student, Student)
            teacher_maps, _ = self.teacher(images, with_logits=False)
            return Forward(images.new_empty(0), {}, student.maps(images), teacher_maps)
        if self.teacher is None:
            return self.student(images, targets, {}, None, keep_maps)
        if factor == 0.0:
            output = self.student(images, targets, {}, None, False, factor)
            if self.teacher.with_logits:
                output.losses["loss_kd"] = torch.zeros_like(output.losses["loss_class"])
            return output
        teacher_maps, teacher_logits = self.teacher(images)
        return self.student(images, targets, teacher_maps, teacher_logits, keep_maps, factor)
