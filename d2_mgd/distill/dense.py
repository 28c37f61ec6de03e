"""Distillation of what a dense detector predicts at every location: classes, boxes, distributions of box edges.

Shape shorthand: N images, R locations (anchors), K classes, B bins of a box edge's distribution, C channels.

All losses take the teacher's outputs at the same locations. Where the student's come from makes no difference: from
its own head, or from the teacher's head on the student's features (Wang et al., "CrossKD: Cross-Head Knowledge
Distillation for Object Detection", CVPR 2024), for which :func:`with_statistics_of` gives these the teacher's scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from d2_mgd.distill.losses import channel_statistics

__all__ = ["best_scores", "box_distribution_kd", "dense_box_kd", "dense_class_kd", "with_statistics_of"]


_SMALLEST_BOX = 1e-3  # square pixels; the loss's slope at smaller ones is steep beyond measure


def dense_class_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor | None = None,
    gamma: float = 1.0,
    temperature: float = 1.0,
    normalizer: float | None = None,
) -> Tensor:
    """Quality focal loss of sigmoid scores towards the teacher's.

    ``|p_t - p_s|^gamma`` times the binary cross-entropy of student score ``p_s`` and teacher score ``p_t``: the quality
    focal loss of Li et al. ("Generalized Focal Loss", NeurIPS 2020) with the teacher's score as the quality, which is
    CrossKD's loss of classes, with gamma 1. Most locations are background in both, and cost next to nothing. With a
    temperature the scores are those of logits divided by it, and the loss is multiplied by its square (Hinton et al.,
    2015); published without.

    Args:
        student_logits: (N, R, K) before the sigmoid.
        teacher_logits: (N, R, K); no gradient flows into them.
        valid: (N, R) boolean, true at locations of real pixels; all by default.
        gamma: 0 is plain cross-entropy.
        temperature: above 0.
        normalizer: what the sum is divided by; published is the number of positive anchors. By default the teacher's
            expected number of locations with an object, the sum of each location's best score, at least 1.

    Raises:
        ValueError: shapes that differ, a negative gamma, or a temperature that is not positive.
    """
    _check(student_logits, teacher_logits, valid, student_logits.shape[:2])
    if gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}.")
    _check_temperature(temperature)
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = _in_float(student_logits) / temperature, _in_float(teacher_logits.detach())
        target = (teacher / temperature).sigmoid()
        elements = F.binary_cross_entropy_with_logits(student, target, reduction="none")
        elements = elements * (target - student.sigmoid()).abs().pow(gamma)
        if valid is not None:
            elements = elements.masked_fill(~valid.unsqueeze(2), 0.0)
        best = best_scores(teacher, valid) if normalizer is None else None
        return elements.sum() * temperature**2 / _divisor(best, normalizer)


def best_scores(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """(N, R) best sigmoid score of each location of (N, R, K) logits; 0 where ``valid`` (N, R) is false."""
    best = _in_float(logits.detach()).amax(dim=2).sigmoid()
    return best if valid is None else best.masked_fill(~valid, 0.0)


def dense_box_kd(
    student_boxes: Tensor, teacher_boxes: Tensor, weight: Tensor, normalizer: float | None = None
) -> Tensor:
    """Generalised IoU loss of boxes towards the teacher's, summed by weight.

    CrossKD's loss of boxes for heads that predict one at each location (its published code for RetinaNet; Rezatofighi
    et al., "Generalized Intersection over Union", CVPR 2019), where the weight is the teacher's best score. A teacher's
    box without an area, as FCOS gives for background, is no target.

    Args:
        student_boxes: (N, R, 4) x1, y1, x2, y2 in pixels.
        teacher_boxes: (N, R, 4); no gradient flows into them.
        weight: (N, R) how much each location counts.
        normalizer: what the sum is divided by; by default all of the weight, at least 1.

    Raises:
        ValueError: shapes that differ.
    """
    _check(student_boxes, teacher_boxes, weight, student_boxes.shape[:2])
    with torch.autocast(student_boxes.device.type, enabled=False):
        teacher_boxes = _in_float(teacher_boxes.detach())
        elements = generalized_box_iou_loss(_in_float(student_boxes), teacher_boxes)  # (N, R)
        sides = teacher_boxes[..., 2:] - teacher_boxes[..., :2]
        weight = weight.to(elements.dtype).masked_fill(sides.prod(dim=2) < _SMALLEST_BOX, 0.0)
        return (elements * weight).sum() / _divisor(weight, normalizer)


def box_distribution_kd(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor, temperature: float = 10.0
) -> Tensor:
    """Divergence of the distributions of box edges, times temperature squared, mean over edges by weight.

    Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022; its temperature is 10. For heads
    that predict an edge as a distribution over bins (GFL); others have nothing to compare here.

    Args:
        student_logits: (N, R, 4, B) before the softmax over bins.
        teacher_logits: (N, R, 4, B); no gradient flows into them.
        weight: (N, R) how much each location counts: a mask of those near objects, or the teacher's best scores.
            The sum is divided by all of it, at least 1.
        temperature: above 0.

    Raises:
        ValueError: shapes that differ, or a temperature that is not positive.
    """
    _check(student_logits, teacher_logits, weight, student_logits.shape[:2])
    _check_temperature(temperature)
    with torch.autocast(student_logits.device.type, enabled=False):
        student = F.log_softmax(_in_float(student_logits) / temperature, dim=3)
        teacher = F.log_softmax(_in_float(teacher_logits.detach()) / temperature, dim=3)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=3).mean(dim=2)  # (N, R)
        weight = weight.to(divergence.dtype)
        return (divergence * weight).sum() / _divisor(weight, None) * temperature**2


def with_statistics_of(teacher: Tensor, student: Tensor, valid: Tensor | None = None) -> Tensor:
    """The student's map with each channel's mean and deviation, over images and real pixels, those of the teacher's.

    So that what follows in the teacher's head sees the scale that it was trained with (as CrossKD's published code
    does before the activation).

    Args:
        teacher: (N, C, H, W); no gradient flows into it.
        student: (N, C, H, W).
        valid: (N, 1, H, W) boolean, true at real pixels; all by default.

    Raises:
        ValueError: shapes that differ.
    """
    if teacher.shape != student.shape:
        raise ValueError(f"both maps must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}.")
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = _in_float(student), _in_float(teacher.detach())
        real = student, teacher
        if valid is not None:
            real = student.masked_fill(~valid, 0.0), teacher.masked_fill(~valid, 0.0)
        own_mean, own_deviation = channel_statistics(real[0], valid)
        mean, deviation = channel_statistics(real[1], valid)
        return (student - own_mean) * (deviation / own_deviation) + mean


def _in_float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _divisor(weight: Tensor | None, normalizer: float | None) -> Tensor | float:
    if normalizer is not None:
        return normalizer
    assert weight is not None
    return weight.sum().clamp(min=1.0)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}.")


def _check(student: Tensor, teacher: Tensor, per_location: Tensor | None, locations: torch.Size) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must give the same outputs at the same locations, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: do both have the same classes, levels and anchors?"
        )
    if per_location is not None and per_location.shape != locations:
        raise ValueError(f"one value for each location {tuple(locations)} is needed, got {tuple(per_location.shape)}.")
