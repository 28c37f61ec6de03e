"""Distillation of what dense heads predict: between both networks' own heads, and through the teacher's (CrossKD).

For RetinaNet and FCOS. Nothing runs twice: the student's predictions are those of its own training step, by hooks.

Shape shorthand: N images, K classes, (Hl, Wl) the map of a level, Rl its anchors, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from d2_mgd.detection.dense_head import DenseHead, HeadOutput, by_anchor, cropped, in_float32
from d2_mgd.detection.features import find_feature
from d2_mgd.detection.maps import valid_masks
from d2_mgd.distill.dense import best_scores, dense_box_kd, dense_class_kd, with_statistics_of
from d2_mgd.errors import UserError

__all__ = ["CrossHeadKD", "HeadDistiller", "HeadKD", "head_options"]


@dataclass(frozen=True)
class HeadKD:
    """How predictions are distilled.

    Args:
        class_weight: factor of :func:`~d2_mgd.distill.dense_class_kd`, which is divided by what the student divides
            its own losses by, its moving average of positive anchors.
        box_weight: factor of :func:`~d2_mgd.distill.dense_box_kd`, divided by the same.
        temperature: of the class logits.

    Raises:
        ValueError: weights that are negative or not finite, or both 0; a temperature that is not positive.
    """

    class_weight: float = 1.0
    box_weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.class_weight, self.box_weight)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise UserError(f"the weights of classes and boxes must be 0 or more, and not both 0, got {weights}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"the temperature must be positive, got {self.temperature}.")


@dataclass(frozen=True)
class CrossHeadKD(HeadKD):
    """The same through the teacher's head.

    The student's features behind ``convs`` convolutions of its head go, before the activation and with the teacher's
    mean and deviation of each channel, into the rest of the teacher's head, and what comes out learns from the
    teacher's predictions. So the student's own predictions have one target, the ground truth (Wang et al., "CrossKD",
    CVPR 2024; its published code takes 3 of 4 convolutions for RetinaNet; for FCOS 2, with the weights 0.4 and 0.75).

    Args:
        convs: 0 gives the pyramid's levels to the teacher's whole head.
    """

    convs: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.convs < 0:
            raise UserError(f"the number of convolutions must be 0 or more, got {self.convs}.")


def head_options(cfg: CfgNode) -> tuple[HeadKD | None, CrossHeadKD | None]:
    """What MGD.DENSE_KD and MGD.CROSS_HEAD say; None where they are off.

    Raises:
        ValueError: a number that cannot be.
    """
    made: list[HeadKD | None] = []
    for key, kind in (("DENSE_KD", HeadKD), ("CROSS_HEAD", CrossHeadKD)):
        node = cfg.MGD[key]
        try:
            options = {name.lower(): value for name, value in node.items() if name != "ENABLED"}
            made.append(kind(**options) if node.ENABLED else None)
        except UserError as error:
            raise UserError(f"MGD.{key}: {error}") from error
    dense, cross = made
    assert cross is None or isinstance(cross, CrossHeadKD)
    return dense, cross


class HeadDistiller:
    """Compares the predictions of a student's dense head with its teacher's. It has no parameters.

    Args:
        student: a RetinaNet or an FCOS.
        teacher: another, with the same classes, levels and anchors.
        dense: compare the student's own predictions.
        cross: compare what the teacher's head makes of the student's features.

    Attributes:
        names: of the losses.

    Raises:
        ValueError: one of them has no dense head, or they do not predict the same things.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, dense: HeadKD | None = None, cross: CrossHeadKD | None = None
    ) -> None:
        self.dense, self.cross = dense, cross
        convs = None if cross is None else cross.convs
        self.student = DenseHead(student, convs, "student")
        self.teacher = DenseHead(teacher, convs, "teacher")
        _check_same_predictions(self.student, self.teacher)
        if cross is not None and self.student.inner_widths != self.teacher.inner_widths:
            raise UserError(
                f"MGD.CROSS_HEAD: after {cross.convs} convolutions the student's head has (for classes, boxes) "
                f"{self.student.inner_widths} channels and the teacher's {self.teacher.inner_widths}, which takes no "
                "features of another width."
            )
        self.names = [
            f"{name}/{part}"
            for name, options in (("loss_dense_kd", dense), ("loss_cross_head", cross))
            if options is not None
            for part, weight in (("class", options.class_weight), ("box", options.box_weight))
            if weight > 0
        ]
        self._features = {name: find_feature(student, name) for name in self.student.levels}

    def __repr__(self) -> str:
        return f"HeadDistiller(dense={self.dense}, cross={self.cross})"

    @torch.no_grad()
    def predict(self, teacher_maps: Mapping[str, Tensor]) -> HeadOutput:
        """The teacher's predictions, in float32, from the maps (N, C, H, W) of all its levels by name."""
        return in_float32(self.teacher.predict([teacher_maps[name] for name in self.teacher.levels]))

    def losses(self, wanted: HeadOutput, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Of the batch that the student has just seen.

        Args:
            wanted: the teacher's predictions for the same images.
            sizes: (h, w) of the images before padding.

        Returns:
            dict: each of :attr:`names` -> scalar.
        """
        own = self.student.take()
        wanted = cropped(wanted, own)
        masks = valid_masks(sizes, dict(zip(self.student.levels, own.logits)), self._features)
        valid = [masks[name] for name in self.student.levels]
        losses: dict[str, Tensor] = {}
        if self.dense is not None:
            losses.update(self._compare("loss_dense_kd", self.dense, self.student, own, wanted, valid))
        if self.cross is not None:
            inner = [_with_statistics_of(*pairs) for pairs in zip(wanted.inner, own.inner, valid)]
            crossed = self.teacher.finish(inner)
            losses.update(self._compare("loss_cross_head", self.cross, self.teacher, crossed, wanted, valid))
        return losses

    def _compare(
        self,
        name: str,
        options: HeadKD,
        head: DenseHead,
        found: HeadOutput,
        wanted: HeadOutput,
        valid: Sequence[Tensor | None],
    ) -> dict[str, Tensor]:
        """The losses of one method between what ``head`` gave and what the teacher did, summed over levels."""
        normalizer = float(self.student.model.loss_normalizer)
        losses: dict[str, list[Tensor]] = {"class": [], "box": []}
        for level, anchors in enumerate(self.student.anchors(found.logits)):
            logits, target = (
                by_anchor(output.logits[level], self.student.model.num_classes) for output in (found, wanted)
            )
            real = _of_anchors(valid[level], logits)
            if options.class_weight > 0:
                losses["class"].append(
                    dense_class_kd(logits, target, real, temperature=options.temperature, normalizer=normalizer)
                )
            if options.box_weight > 0:
                boxes = head.boxes(by_anchor(found.deltas[level], 4), anchors)
                with torch.no_grad():
                    target_boxes = self.teacher.boxes(by_anchor(wanted.deltas[level], 4), anchors)
                losses["box"].append(dense_box_kd(boxes, target_boxes, best_scores(target, real), normalizer))
        weights = {"class": options.class_weight, "box": options.box_weight}
        return {f"{name}/{part}": weights[part] * torch.stack(terms).sum() for part, terms in losses.items() if terms}


def _with_statistics_of(
    teacher: tuple[Tensor, Tensor], student: tuple[Tensor, Tensor], valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    classes, boxes = (with_statistics_of(guide, own, valid) for guide, own in zip(teacher, student))
    return classes, boxes


def _check_same_predictions(student: DenseHead, teacher: DenseHead) -> None:
    classes = [head.model.num_classes for head in (student, teacher)]
    if classes[0] != classes[1]:
        raise UserError(
            f"the student has {classes[0]} classes and the teacher {classes[1]}: predictions can be distilled "
            "only between detectors of the same classes, features between any."
        )
    if student.strides != teacher.strides:
        raise UserError(
            f"the student predicts at levels of strides {student.strides}, the teacher at {teacher.strides}: "
            "predictions can be distilled at the same levels alone."
        )
    cells = torch.zeros(1, 1, 2, 2)
    pairs = [head.anchors([cells.to(head.model.pixel_mean.device)] * len(head.levels)) for head in (student, teacher)]
    for name, own, guide in zip(student.levels, *pairs):
        if own.shape != guide.shape or not torch.allclose(own.cpu(), guide.cpu()):
            raise UserError(
                f"the anchors of level {name} differ, {len(own) // 4} at a location in the student and "
                f"{len(guide) // 4} in the teacher: predictions can be distilled between the same anchors alone."
            )


def _of_anchors(mask: Tensor | None, predictions: Tensor) -> Tensor | None:
    """(N, 1, Hl, Wl) -> (N, Rl) for predictions (N, Rl, ...)."""
    if mask is None:
        return None
    locations = mask.flatten(1)
    return locations.repeat_interleave(predictions.shape[1] // locations.shape[1], dim=1)
