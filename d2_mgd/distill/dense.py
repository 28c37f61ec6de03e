"""Distillation of a dense detector's own outputs: class logits and box distributions at every location.

Shape shorthand: N images, R locations (anchors) of all levels, K classes, B bins of a box edge's distribution.

Both losses take the teacher's outputs at the same locations. Where the student's come from (its own head; or the
teacher's head on the student's features, as CrossKD has it: Wang et al., "CrossKD", CVPR 2024) makes no difference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["box_distribution_kd", "dense_class_kd"]


def dense_class_kd(
    student_logits: Tensor, teacher_logits: Tensor, valid: Tensor | None = None, gamma: float = 1.0
) -> Tensor:
    """Quality focal loss of sigmoid scores towards the teacher's, over the sum of the teacher's best scores.

    ``|p_t - p_s|^gamma`` times the binary cross-entropy of student score ``p_s`` and teacher score ``p_t`` (Li et al.,
    "Generalized Focal Loss", NeurIPS 2020, equation 3, with the teacher's score as the quality; CrossKD's loss of
    classes, with gamma 1). Most locations are background in both, and cost next to nothing. The sum is divided by the
    teacher's expected number of objects' locations, the sum of each location's best score, at least 1.

    Args:
        student_logits: (N, R, K) before the sigmoid.
        teacher_logits: (N, R, K); no gradient flows into them.
        valid: (N, R) boolean, true at locations of real pixels; all by default.
        gamma: 0 is plain cross-entropy.

    Raises:
        ValueError: shapes that differ, or a negative gamma.
    """
    _check(student_logits, teacher_logits, valid, student_logits.shape[:2])
    if gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}.")
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = _in_float(student_logits), _in_float(teacher_logits.detach()).sigmoid()
        elements = F.binary_cross_entropy_with_logits(student, teacher, reduction="none")
        elements = elements * (teacher - student.sigmoid()).abs().pow(gamma)
        best = teacher.amax(dim=2)
        if valid is not None:
            elements = elements.masked_fill(~valid.unsqueeze(2), 0.0)
            best = best.masked_fill(~valid, 0.0)
        return elements.sum() / best.sum().clamp(min=1.0)


def box_distribution_kd(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor, temperature: float = 10.0
) -> Tensor:
    """Divergence of the distributions of box edges, times temperature squared, mean over edges by weight.

    Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022, equation 3; its temperature is 10.
    For heads that predict an edge as a distribution over bins (GFL); others have nothing to compare here.

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
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}.")
    with torch.autocast(student_logits.device.type, enabled=False):
        student = F.log_softmax(_in_float(student_logits) / temperature, dim=3)
        teacher = F.log_softmax(_in_float(teacher_logits.detach()) / temperature, dim=3)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=3).mean(dim=2)  # (N, R)
        weight = weight.to(divergence.dtype)
        return (divergence * weight).sum() / weight.sum().clamp(min=1.0) * temperature**2


def _in_float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check(student: Tensor, teacher: Tensor, per_location: Tensor | None, locations: torch.Size) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must give the same outputs at the same locations, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: do both have the same classes, levels and anchors?"
        )
    if per_location is not None and per_location.shape != locations:
        raise ValueError(f"one value for each location {tuple(locations)} is needed, got {tuple(per_location.shape)}.")
