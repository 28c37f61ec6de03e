"""A student and its teacher as one Detectron2 model.

Shape shorthand: N images, S student and T teacher channels, (Hf, Wf) the student's map at a feature.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from d2_mgd.detection.config import UNTRAINED, student_config
from d2_mgd.detection.config_checks import (
    LAST_NORMS,
    MARGIN_LOSSES,
    feature_losses,
    feature_weights,
    validate_config,
    weight_schedule,
)
from d2_mgd.detection.features import (
    FeaturePair,
    WatchedMaps,
    crop_to,
    find_last_norm,
    pair_features,
    teacher_margin,
    valid_masks,
)
from d2_mgd.detection.heads import HeadDistiller, head_options
from d2_mgd.detection.networks import build_network
from d2_mgd.detection.norms import FailedElsewhere, make_trainable, synchronises
from d2_mgd.detection.teacher import FrozenTeacher
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

    Args:
        student: any Detectron2 meta-architecture with a backbone.
        teacher: a detector of any other architecture, which stays outside ``parameters()``, ``state_dict()`` and modes.
        distiller: compares the maps of ``features``, made for their widths; None where there are no features.
        features: where to distil: FPN levels and backbone stages that both have.
        before_activation: take backbone stages before their last activation.
        input_format: channel order of the images that the student gets, as INPUT.FORMAT says it.
        train_last_norm: what becomes of the last, frozen norm of each distilled backbone stage of the student:
            ``affine`` trains scale and shift, ``sync_bn`` the statistics too, ``none`` nothing.
        schedule: factor of the distillation losses by the iteration of Detectron2's event storage; None is always 1.
        heads: compares the predictions of both networks' dense heads; None does not.

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
        distiller: MatchingGuidedDistiller | None,
        features: Sequence[str],
        before_activation: bool = True,
        input_format: str = "BGR",
        train_last_norm: str = "affine",
        schedule: WeightSchedule | None = None,
        heads: HeadDistiller | None = None,
    ) -> None:
        super().__init__()
        teacher.check_format(input_format)
        self.pairs = pair_features(student, teacher.model, features, before_activation)
        _check_widths(self.pairs, distiller)
        _train_last_norms(student, self.pairs, train_last_norm)
        self.student = student
        self.teacher = teacher
        self.distiller = distiller
        self.input_format = input_format
        self.schedule = schedule
        self.heads = heads
        self.observe_next = False  # set it, and the next training step's maps count in the matching costs
        self._student_features = {name: pair.student for name, pair in self.pairs.items()}
        also = None if heads is None else heads.student.watch
        self._watched = WatchedMaps(student, self._student_features, also=also)
        self._synchronises = distiller is not None and synchronises(distiller)
        self._same_pixels = teacher.same_pixels(student, input_format)
        teacher.watch({name: pair.teacher for name, pair in self.pairs.items()})
        if self.distiller is not None:
            self.distiller.to(self.device)

    @classmethod
    def from_config(cls, cfg: CfgNode, teacher_cfg: CfgNode | None = None) -> dict[str, Any]:
        """Arguments of the constructor. ``teacher_cfg`` is given where ``cfg`` has been checked already."""
        guide = teacher_cfg or validate_config(cfg).teacher
        assert guide is not None
        student, model = build_network(student_config(cfg)), build_network(guide)
        # before the weights, which may take a download
        pairs = pair_features(student, model, cfg.MGD.FEATURES, cfg.MGD.BEFORE_ACTIVATION)
        dense, cross = head_options(cfg)
        heads = None if dense is None and cross is None else HeadDistiller(student, model, dense, cross)
        teacher = FrozenTeacher(model, input_format=guide.INPUT.FORMAT, weights=guide.MODEL.WEIGHTS, cfg=guide)
        return {
            "student": student,
            "teacher": teacher,
            "distiller": _build_distiller(cfg, pairs, teacher) if pairs else None,
            "features": list(cfg.MGD.FEATURES),
            "before_activation": cfg.MGD.BEFORE_ACTIVATION,
            "input_format": cfg.INPUT.FORMAT,
            "train_last_norm": cfg.MGD.STUDENT.TRAIN_LAST_NORM,
            "schedule": weight_schedule(cfg),
            "heads": heads,
        }

    @property
    def device(self) -> torch.device:
        """Of the student."""
        return next(self.student.parameters()).device

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
        factor = self._factor()
        if factor == 0.0:
            self.observe_next = False
            return {**self.student(batched_inputs), **self._no_losses()}
        task_losses, student_maps, batch = self._run_student(batched_inputs)
        inputs = self._for_teacher(batched_inputs, batch)
        outputs: Maps = {}
        if self.heads is None:
            teacher_maps = self.teacher(**inputs)
        else:
            teacher_maps, outputs = self.teacher.with_outputs(**inputs)
        losses = self._compare_features(batched_inputs, batch, student_maps, teacher_maps, factor)
        if self.heads is not None:
            of_heads = self.heads.losses(outputs, _sizes(batched_inputs))
            losses.update({name: factor * loss for name, loss in of_heads.items()})
        return {**task_losses, **losses}

    @torch.no_grad()
    def extract_maps(self, batched_inputs: Batch) -> tuple[Maps, Maps, Masks]:
        """Maps of both networks for a batch: no head, no gradients, in whatever mode the student is.

        Returns:
            tuple: student maps, name -> (N, S, Hf, Wf); teacher maps, name -> (N, T, Hf, Wf); masks of real pixels,
            name -> (N, 1, Hf, Wf) boolean, or None where nothing is padded.
        """
        student_maps, batch = self._watched.run(batched_inputs)
        teacher_maps = self.teacher(**self._for_teacher(batched_inputs, batch))
        return self._aligned(batched_inputs, batch, student_maps, teacher_maps)

    def extra_repr(self) -> str:
        return f"features={list(self.pairs)}, teacher={self.teacher!r}"

    def _factor(self) -> float:
        """Of the distillation losses in this step."""
        if self.schedule is None:
            return 1.0
        storage = get_event_storage()
        factor = self.schedule.factor(storage.iter)
        storage.put_scalar("distill_factor", factor, smoothing_hint=False)
        return factor

    def _run_student(self, batched_inputs: Batch) -> tuple[Any, Maps, Tensor]:
        """The student's losses, maps and batch. Ranks agree on a failure before they meet in the distiller's norms."""
        failure = ""
        try:
            found = self._watched.forward(batched_inputs)
        except FloatingPointError as error:
            if not self._synchronises:
                raise
            failure = str(error) or type(error).__name__
        if self._synchronises and first_failure(failure):
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

    def _aligned(
        self, batched_inputs: Batch, batch: Tensor, student_maps: Maps, teacher_maps: Maps
    ) -> tuple[Maps, Maps, Masks]:
        """Both maps over the same pixels, the teacher's without padding of its own, and masks of real ones."""
        sizes, (height, width) = _sizes(batched_inputs), batch.shape[-2:]
        if self.teacher.padded_size(sizes, (height, width)) != (height, width):
            teacher_maps = crop_to(teacher_maps, student_maps)
        return student_maps, teacher_maps, valid_masks(sizes, student_maps, self._student_features)

    def _compare_features(
        self, batched_inputs: Batch, batch: Tensor, student_maps: Maps, teacher_maps: Maps, factor: float
    ) -> dict[str, Tensor]:
        if self.distiller is None:
            return {}
        student_maps, teacher_maps, valid = self._aligned(batched_inputs, batch, student_maps, teacher_maps)
        if self.observe_next:
            self.observe_next = False
            self.distiller.observe(student_maps, teacher_maps, valid)
        if self.distiller.matched:
            return self.distiller(student_maps, teacher_maps, valid, _boxes(batched_inputs), factor)
        return self.distiller.no_losses(self.device)  # until the first rematch

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


def _check_widths(pairs: dict[str, FeaturePair], distiller: MatchingGuidedDistiller | None) -> None:
    found = {name: pair.channels for name, pair in pairs.items()}
    made_for = {} if distiller is None else distiller.channels
    if found != made_for:
        raise UserError(f"the networks have the widths (S, T) {found}, and the distiller was made for {made_for}.")


def _train_last_norms(student: nn.Module, pairs: dict[str, FeaturePair], kind: str) -> None:
    if kind not in LAST_NORMS:
        raise UserError(f"unknown train_last_norm {kind!r}; there are: {', '.join(LAST_NORMS)}.")
    if kind == "none":
        return
    for name, pair in pairs.items():
        place = find_last_norm(student, pair.student)
        if place is not None and make_trainable(*place, kind):
            logger.info("The student's last norm of %s trains (%s).", name, kind)


def _build_distiller(cfg: CfgNode, pairs: dict[str, FeaturePair], teacher: FrozenTeacher) -> MatchingGuidedDistiller:
    losses = feature_losses(cfg)
    known = teacher.weights_path != UNTRAINED
    margins = {
        name: teacher_margin(teacher.model, pairs[name].teacher, statistics_needed=known)
        for name, loss in losses.items()
        if loss in MARGIN_LOSSES
    }
    return MatchingGuidedDistiller(
        {name: pair.channels for name, pair in pairs.items()},
        reducer=cfg.MGD.REDUCER,
        loss=losses,
        metric=cfg.MGD.METRIC,
        mode=cfg.MGD.MODE or None,
        align=cfg.MGD.ALIGN,
        norm=cfg.MGD.NORM,
        weights=feature_weights(cfg) if cfg.MGD.BALANCE == "fixed" else None,
        balance=cfg.MGD.BALANCE,
        margins=margins,
        reduction=cfg.MGD.REDUCTION,
        spatial=cfg.MGD.SPATIAL,
        strides={name: pair.student.stride for name, pair in pairs.items()},
        tie=cfg.MGD.TIE,
    )
