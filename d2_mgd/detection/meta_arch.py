"""A student and its teacher as one Detectron2 model.

Shape shorthand: N images, S student and T teacher channels, (Hf, Wf) the student's map at a feature.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from d2_mgd.detection.config import META_ARCHITECTURE, student_config
from d2_mgd.detection.config_checks import LAST_NORMS, rematch_schedule, validate_config, weight_schedule
from d2_mgd.detection.distillers import distiller_options, log_recipe, make_distiller, make_heads
from d2_mgd.detection.features import FeaturePair, find_last_norm, pair_features
from d2_mgd.detection.heads import HeadDistiller, head_options
from d2_mgd.detection.maps import WatchedMaps, laid_over, valid_masks
from d2_mgd.detection.networks import build_network
from d2_mgd.detection.norms import FailedElsewhere, make_trainable, synchronises
from d2_mgd.detection.rematcher import Rematcher
from d2_mgd.detection.student_state import save_as_student
from d2_mgd.detection.teacher import FrozenTeacher, frozen_teacher
from d2_mgd.distill import MatchingGuidedDistiller, WeightSchedule
from d2_mgd.errors import UserError
from d2_mgd.training.processes import first_failure

__all__ = ["TeacherStudentDetector"]

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]  # as Detectron2's models take it
Maps = dict[str, Tensor]
Masks = dict[str, "Tensor | None"]


@META_ARCH_REGISTRY.register()
class TeacherStudentDetector(nn.Module):
    """Trains an unmodified Detectron2 model with the maps of another. In inference it is the student.

    One training step runs the student once, with its own losses, and the teacher once, as far as its deepest feature,
    and its head where predictions are distilled; where the schedule makes the distillation weigh nothing, not at all.
    The model rematches by itself, whatever training loop calls it: it counts iterations by Detectron2's event storage,
    measures the matching costs on the maps of its own steps, and solves at the iterations of its schedule.

    ``state_dict()`` is that of the student, with the distiller's keys beside it under the prefix ``distiller.``.

    Args:
        student: any Detectron2 meta-architecture with a backbone.
        teacher: a detector of any other architecture, which stays outside ``parameters()``, ``state_dict()`` and modes.
        distiller: compares the maps of ``features``, or its options, from which one is made; None without features.
        features: where to distil: FPN levels and backbone stages that both have.
        before_activation: take backbone stages before their last activation.
        input_format: channel order of the images that the student gets, as INPUT.FORMAT says it; by default the
            student's own ``input_format``, where it has one, else BGR.
        train_last_norm: what becomes of the last, frozen norm of each distilled backbone stage of the student:
            ``affine`` trains scale and shift, ``sync_bn`` the statistics too, ``none`` nothing.
        schedule: factor of the distillation losses by the iteration; by default always 1.
        heads: compares the predictions of both networks' dense heads; or its options ``dense`` and ``cross``.
        rematcher: when to rematch, and on which maps; by default before the first step with distillation.

    Raises:
        ValueError: a feature that one of them lacks, strides or widths that do not fit, channel orders that cannot be
            converted.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher,
        distiller: MatchingGuidedDistiller | Mapping[str, Any] | None,
        features: Sequence[str],
        before_activation: bool = True,
        input_format: str | None = None,
        train_last_norm: str = "affine",
        schedule: WeightSchedule | None = None,
        heads: HeadDistiller | Mapping[str, Any] | None = None,
        rematcher: Rematcher | None = None,
    ) -> None:
        super().__init__()
        input_format = input_format or getattr(student, "input_format", None) or "BGR"
        teacher.check_format(input_format)
        self.pairs = pair_features(student, teacher.model, features, before_activation)
        _warn_of_strides(self.pairs)
        _train_last_norms(student, self.pairs, train_last_norm)
        self.student = student
        self.teacher = teacher
        self.distiller = make_distiller(distiller, self.pairs, teacher)
        self.input_format = input_format
        self.schedule = schedule or WeightSchedule()
        self.heads = make_heads(heads, student, teacher.model)
        self.rematcher = rematcher or Rematcher()
        self.balanced = 0  # finished steps when the balance was updated
        self._student_features = {name: pair.student for name, pair in self.pairs.items()}
        also = None if self.heads is None else self.heads.student.watch
        self._watched = WatchedMaps(student, self._student_features, also=also)
        self._synchronises = self.distiller is not None and synchronises(self.distiller)
        self._same_pixels = teacher.same_pixels(student, input_format)
        teacher.watch({name: pair.teacher for name, pair in self.pairs.items()})
        if self.distiller is not None:
            self.distiller.to(self.device)
        save_as_student(self)

    @classmethod
    def from_config(cls, cfg: CfgNode, teacher_cfg: CfgNode | None = None) -> dict[str, Any]:
        """Arguments of the constructor. ``teacher_cfg`` is given where ``cfg`` has been checked already."""
        guide = teacher_cfg or validate_config(cfg).teacher
        if guide is None:
            raise UserError(f"MGD.ENABLED is False, and MODEL.META_ARCHITECTURE {META_ARCHITECTURE}: set it to True.")
        student, model = build_network(student_config(cfg)), build_network(guide)
        # before the weights, so that a wrong feature name is an error before a download
        pair_features(student, model, cfg.MGD.FEATURES, cfg.MGD.BEFORE_ACTIVATION)
        dense, cross = head_options(cfg)
        heads = None if dense is None and cross is None else HeadDistiller(student, model, dense, cross)
        teacher = frozen_teacher(model, guide, cfg)
        log_recipe(cfg)
        return {
            "student": student,
            "teacher": teacher,
            "distiller": distiller_options(cfg),
            "features": list(cfg.MGD.FEATURES),
            "before_activation": cfg.MGD.BEFORE_ACTIVATION,
            "input_format": cfg.INPUT.FORMAT,
            "train_last_norm": cfg.MGD.STUDENT.TRAIN_LAST_NORM,
            "schedule": weight_schedule(cfg),
            "heads": heads,
            "rematcher": Rematcher(rematch_schedule(cfg), cfg.MGD.REMATCH.SOURCE, cfg.MGD.REMATCH.EVERY),
        }

    @property
    def device(self) -> torch.device:
        """Of the student."""
        return next(self.student.parameters()).device

    @property
    def balances(self) -> bool:
        """Whether the weights of the features follow from their losses (MGD.BALANCE auto)."""
        return self.distiller is not None and self.distiller.balance.active

    def forward(self, batched_inputs: Batch) -> Any:
        """In inference the student's output; in training its losses and those of the distillation.

        These are ``loss_distill/<feature>`` and, where they are asked for, ``loss_dense_kd/<class or box>`` and
        ``loss_cross_head/<class or box>``.

        Args:
            batched_inputs: what the student's meta-architecture takes; of each image its ``image`` (3, h, w), 0 to 255,
                goes to the teacher too.
        """
        if not self.training:
            return self.student(batched_inputs)
        iteration = self.rematcher.iteration()
        if iteration >= self.rematcher.finished:  # not a further micro-batch of the same step
            self.update_balance()
            if iteration == self.schedule.stop:
                logger.info("The distillation has ended after %d iterations, as its schedule says", iteration)
        factor = self._factor(iteration)
        if factor == 0.0:
            losses = {**self.student(batched_inputs), **self._no_losses()}
        else:
            losses = self._distilled(batched_inputs, factor, iteration)
        self.rematcher.finished = iteration + 1
        return losses

    def _distilled(self, batched_inputs: Batch, factor: float, iteration: int) -> dict[str, Tensor]:
        """All losses of a step in which the distillation counts."""
        begin, due = time.perf_counter(), self.rematches_next
        task_losses, student_maps, batch = self._run_student(batched_inputs, self._synchronises or due)
        inputs = self._for_teacher(batched_inputs, batch)
        outputs: Maps = {}
        if self.heads is None:
            teacher_maps = self.teacher(**inputs)
        else:
            teacher_maps, outputs = self.teacher.with_outputs(**inputs)
        losses: dict[str, Tensor] = {}
        if self.distiller is not None:
            student_maps, teacher_maps, valid = self._aligned(batched_inputs, student_maps, teacher_maps)
            if due or self.rematcher.observes(iteration):
                self.distiller.observe(student_maps, teacher_maps, valid)
            if due:
                self.rematcher.rematch(self.distiller, iteration, begin)
            if self.distiller.matched:
                losses = self.distiller(student_maps, teacher_maps, valid, _boxes(batched_inputs), factor)
            else:  # the schedule begins later
                losses = self.distiller.no_losses(self.device)
        if self.heads is not None:
            with self.teacher.autocast():
                wanted = self.heads.predict(outputs)
            of_heads = self.heads.losses(wanted, _sizes(batched_inputs))
            losses.update({name: factor * loss for name, loss in of_heads.items()})
        return {**task_losses, **losses}

    def update_balance(self, reduced: bool = False) -> None:
        """Make the next step's factors from what the finished one has measured, once; by default the next step does it.

        Args:
            reduced: see :meth:`~d2_mgd.distill.MatchingGuidedDistiller.update_balance`, which is a collective without.
        """
        if self.distiller is not None and self.balanced < self.rematcher.finished:
            self.balanced = self.rematcher.finished
            self.distiller.update_balance(reduced=reduced)

    @property
    def rematches_next(self) -> bool:
        """Whether the next training step rematches, for which ranks wait for each other.

        Raises:
            UserError: a pass over images was due for the first matching, and no hook has made it.
        """
        if self.distiller is None or not self.distiller.needs_matching:
            return False
        iteration, matched = self.rematcher.iteration(), self.distiller.matched
        due = self.rematcher.due(iteration, self.schedule, matched)
        if due and self.rematcher.source == "pass":
            raise UserError(
                f"iteration {iteration} has no matching: MGD.REMATCH.SOURCE 'pass' needs the hooks of "
                "d2_mgd.detection.distillation_hooks(cfg, model) in the trainer; register them, or set "
                "MGD.REMATCH.SOURCE to 'online', which measures the costs on the maps of training steps."
            )
        return due

    @property
    def observes_next(self) -> bool:
        """Whether the next training step adds to the matching costs."""
        return self.rematcher.observes(self.rematcher.iteration()) or self.rematches_next

    @torch.no_grad()
    def extract_maps(self, batched_inputs: Batch) -> tuple[Maps, Maps, Masks]:
        """Maps of both networks for a batch: no head, no gradients, in whatever mode the student is.

        Returns:
            tuple: student maps, name -> (N, S, Hf, Wf); teacher maps, name -> (N, T, Hf, Wf); masks of real pixels,
            name -> (N, 1, Hf, Wf) boolean, or None where nothing is padded.
        """
        student_maps, batch = self._watched.run(batched_inputs)
        teacher_maps = self.teacher(**self._for_teacher(batched_inputs, batch))
        return self._aligned(batched_inputs, student_maps, teacher_maps)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, such as moving averages of the weights: without hooks, which the next training step registers."""
        self._watched.detach()
        return self.__dict__.copy()

    def extra_repr(self) -> str:
        return f"features={list(self.pairs)}, teacher={self.teacher!r}"

    def _factor(self, iteration: int) -> float:
        """Of the distillation losses in this step."""
        factor = self.schedule.factor(iteration)
        if has_event_storage():
            get_event_storage().put_scalar("distill_factor", factor, smoothing_hint=False)
        return factor

    def _run_student(self, batched_inputs: Batch, together: bool) -> tuple[Any, Maps, Tensor]:
        """The student's losses, maps and batch.

        Where ranks wait ``together`` for each other in the rest of the step, they first agree on a failure.
        """
        failure = ""
        try:
            found = self._watched.forward(batched_inputs)
        except FloatingPointError as error:
            if not together:
                raise
            failure = str(error) or type(error).__name__
        if together and first_failure(failure):
            raise FloatingPointError(failure) if failure else FailedElsewhere
        return found

    def _for_teacher(self, batched_inputs: Batch, batch: Tensor) -> dict[str, Any]:
        """What the teacher is called with, for images of which the student's backbone got ``batch``."""
        return {
            "images": [sample["image"] for sample in batched_inputs],
            "input_format": self.input_format,
            "min_size": tuple(batch.shape[-2:]),
            "normalised": batch.detach() if self._same_pixels else None,
        }

    def _aligned(self, batched_inputs: Batch, student_maps: Maps, teacher_maps: Maps) -> tuple[Maps, Maps, Masks]:
        """Both maps over the same pixels, the teacher's without padding of its own, and masks of real ones."""
        teacher_maps = laid_over(teacher_maps, student_maps, self.pairs)
        return student_maps, teacher_maps, valid_masks(_sizes(batched_inputs), student_maps, self._student_features)

    def _no_losses(self) -> dict[str, Tensor]:
        """Of a step without the teacher."""
        zero = torch.zeros((), device=self.device)
        of_features = {} if self.distiller is None else self.distiller.no_losses(self.device)
        return {**of_features, **{name: zero for name in ([] if self.heads is None else self.heads.names)}}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TeacherStudentDetector:
        # .to() and its like: the teacher goes where the student goes
        self.teacher.model._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _sizes(batched_inputs: Batch) -> list[tuple[int, int]]:
    """(h, w) of each image before padding."""
    return [(sample["image"].shape[-2], sample["image"].shape[-1]) for sample in batched_inputs]


def _boxes(batched_inputs: Batch) -> list[Tensor] | None:
    """(B, 4) ground-truth boxes of each image, where the data set has them."""
    if not all("instances" in sample and sample["instances"].has("gt_boxes") for sample in batched_inputs):
        return None
    return [sample["instances"].gt_boxes.tensor for sample in batched_inputs]


def _warn_of_strides(pairs: dict[str, FeaturePair]) -> None:
    for name, pair in pairs.items():
        own, guide = pair.student.stride, pair.teacher.stride
        if own != guide:
            logger.warning(
                "feature %s has stride %d in the student and %d in the teacher: the teacher's map is resized.",
                name, own, guide,
            )  # fmt: skip


def _train_last_norms(student: nn.Module, pairs: dict[str, FeaturePair], kind: str) -> None:
    if kind not in LAST_NORMS:
        raise UserError(f"unknown train_last_norm {kind!r}; there are: {', '.join(LAST_NORMS)}.")
    if kind == "none":
        return
    for name, pair in pairs.items():
        place = find_last_norm(student, pair.student)
        if place is not None and make_trainable(*place, kind):
            logger.info("The student's last norm of %s trains (%s).", name, kind)
