"""A method between two networks: its losses, rematches, and measurements of learned projections.

Shape shorthand: N images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.data import StudyError
from benchmarks.accuracy.engine import Engine, Outcome
from benchmarks.accuracy.networks import Staged
from benchmarks.accuracy.steps import Maps
from benchmarks.accuracy.study import Method, new_distiller
from d2_mgd.distill import MatchingGuidedDistiller, batch_norm_margin
from d2_mgd.distill.teacher_forward import TeacherForward
from d2_mgd.matching import projection_agreement

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # an epoch of images and labels


class Distillation:
    """A method between two networks."""

    def __init__(self, method: Method, student: Staged, teacher: Staged, engine: Engine) -> None:
        self.method, self.student, self.engine = method, student, engine
        self.teacher = teacher.requires_grad_(False).eval()
        self.runs = TeacherForward(method.teacher_precision)
        self.logits = method.logit_loss()
        self.schedule = method.weight_schedule()
        self.rematches = method.rematch_schedule()
        self.distiller = None
        if method.compares_features:
            try:
                margins = _margins(method, teacher)
                if engine.compiled is not None and method.balance != "fixed":
                    raise ValueError("the balance auto is not supported under --compile: use --graphs.")
                self.distiller = new_distiller(method, student.widths, teacher.widths, margins).to(engine.device)
            except ValueError as error:
                raise StudyError(str(error)) from error

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(()) if self.distiller is None else self.distiller.parameters()

    def loss(self, images: Tensor, labels: Tensor, factor: Tensor) -> tuple[Tensor, Maps, Maps]:
        """Return the loss of a batch, and both networks' maps without gradients.

        Args:
            images, labels: (N, 3, P, P) and (N,).
            factor: () of all distillation losses.
        """
        if self.distiller is not None:
            self.distiller.update_balance()  # of the step before this one
        student_maps, logits, teacher_maps, teacher_logits = self._forward(images)
        total = self.method.task_weight * F.cross_entropy(logits.float(), labels)
        if self.distiller is not None:
            losses = self.distiller(student_maps, teacher_maps, factor=factor)
            total = total + torch.stack([*losses.values()]).sum()
        if self.logits is not None:
            total = total + factor * self.logits(logits, teacher_logits, labels)
        return total, {name: found.detach() for name, found in student_maps.items()}, teacher_maps

    def _forward(self, images: Tensor) -> tuple[Maps, Tensor, Maps, Tensor]:
        with self.engine.autocast():
            student_maps, logits = self.student.maps_and_logits(images)
            with torch.no_grad(), self.runs.autocast(images.device):
                teacher_maps, teacher_logits = self.teacher.maps_and_logits(images)
        if self.distiller is not None:
            student_maps, teacher_maps = (
                {name: maps[name] for name in self.distiller.channels} for maps in (student_maps, teacher_maps)
            )
        return student_maps, logits, teacher_maps, teacher_logits

    def observe_online(self, epoch: int, left: int, images: int, student: Maps, teacher: Maps) -> None:
        """Observe the maps of a step, if it is one of the last before a rematch.

        Args:
            epoch: finished epochs after this one.
            left: remaining steps of the epoch, including this one.
            images: number of images of a step.
            student, teacher: their maps.
        """
        if not self._matches or self.method.rematch_source != "online" or not self.rematches.due(epoch):
            return
        if left <= math.ceil(self.method.rematch_images / images):
            assert self.distiller is not None
            self.distiller.observe(student, teacher)

    @property
    def _matches(self) -> bool:
        return self.distiller is not None and self.distiller.needs_matching

    def measure_and_rematch(self, epoch: int, batches: Batches, outcome: Outcome) -> bool:
        """Rematch after ``epoch`` epochs if it is due, and add a record per feature. Returns whether it was due.

        ``cost`` is the mean of the matched pairs, ``chance`` that of all pairs, so of a random matching; ``changed``
        the share of student channels whose group changed, ``kept`` the mean that the old matching would have now.
        """
        if not self._matches or not self.rematches.due(epoch):
            return False
        assert self.distiller is not None
        if epoch == 0 or self.method.rematch_source == "pass":
            self._pass(batches, self.distiller.observe)
        old = self.distiller.matchings
        for name, report in self.distiller.rematch().items():
            before = old[name]
            outcome.rematches.append(
                {
                    "epoch": epoch,
                    "feature": name,
                    "cost": round(report.mean_cost, 6),
                    "chance": round(float(report.cost.mean()), 6),
                    "changed": round(report.changed, 6),
                    "kept": None if before is None else round(float(report.cost[before.pairs].mean()), 6),
                }
            )
        return True

    def measure_projections(self, batches: Batches) -> list[dict[str, Any]]:
        """Compare each learned projection with the matching of the same two networks' channels.

        ``share`` is the share of the projection's contributions on matched pairs, ``chance`` that for a random
        matching, ``best`` that for the matching with the largest share.
        """
        if self.distiller is None or not self.distiller.projections:
            return []
        widths = self.distiller.channels
        matched = MatchingGuidedDistiller(widths, metric=self.method.metric, mode=self.method.mode)
        power = {name: torch.zeros(student, device=self.engine.device) for name, (student, _) in widths.items()}

        def observe(student: Maps, teacher: Maps) -> None:
            matched.observe(student, teacher)
            for name, found in student.items():
                power[name] += found.float().var(dim=(0, 2, 3))

        self._pass(batches, observe)
        reports = matched.rematch()
        found = []
        for name, weight in self.distiller.projections.items():
            agreement = projection_agreement(weight * power[name].sqrt(), reports[name].matching)
            found.append({"feature": name, **{k: round(v, 6) for k, v in dataclasses.asdict(agreement).items()}})
        return found

    @torch.no_grad()
    def _pass(self, batches: Batches, observe: Callable[[Maps, Maps], None]) -> None:
        """Observe training batches. The student uses the statistics of each batch, which also fit initial weights."""
        seen = 0
        with _kept_statistics(self.student):
            while seen < self.method.rematch_images:
                for images, _ in batches():
                    student_maps, _, teacher_maps, _ = self._forward(images)
                    observe(student_maps, teacher_maps)
                    seen += len(images)
                    if seen >= self.method.rematch_images:
                        break


def _margins(method: Method, teacher: Staged) -> dict[str, Tensor] | None:
    if method.loss != "partial_l2":
        return None
    names = [name for name in teacher.widths if method.features is None or name in method.features]
    return {name: batch_norm_margin(teacher.last_norm(name)) for name in names}


@contextmanager
def _kept_statistics(network: nn.Module) -> Iterator[None]:
    """Context with training mode, in which batch-norms do not change their running statistics."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.train()
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
