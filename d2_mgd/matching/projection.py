"""Projections of the student's channels to the teacher's: one that starts as a matching, and how far both agree.

Shape shorthand: S student channels, T teacher channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from d2_mgd.errors import UserError
from d2_mgd.matching.channel_matching import ChannelMatching
from d2_mgd.matching.solver import solve_matching

__all__ = ["ProjectionAgreement", "matched_weight", "projection_agreement"]


def matched_weight(matching: ChannelMatching) -> torch.Tensor:
    """(T, S) float32 projection that gives each teacher channel the mean of its student channels.

    Where T >= S that is one student channel, with weight 1. A teacher channel that the matching leaves out (modes
    ``even`` and ``one_to_one``) has zeros.
    """
    student, teacher = matching.pairs
    weight = np.zeros((matching.num_teacher, matching.num_student), dtype=np.float32)
    weight[teacher, student] = 1.0
    return torch.from_numpy(weight / np.maximum(weight.sum(axis=1, keepdims=True), 1.0))


@dataclass(frozen=True)
class ProjectionAgreement:
    """Where a projection has its weight.

    Args:
        share: of the squared weights of the matched teacher channels, how much lies on matched pairs, 0 to 1.
        chance: the same for a random matching.
        best: the same for the matching that the projection itself would choose, of the same kind.
    """

    share: float
    chance: float
    best: float

    @property
    def agreement(self) -> float:
        """0 for a random matching, 1 for the projection's own; 0 where it prefers none."""
        return (self.share - self.chance) / (self.best - self.chance) if self.best > self.chance else 0.0


def projection_agreement(weight: Any, matching: ChannelMatching) -> ProjectionAgreement:
    """Compare a projection of the student's channels to the teacher's, such as a learned 1 x 1 convolution.

    Every teacher channel counts alike: its squared weights are scaled to the sum 1, and one whose weights are all zero
    prefers none. Where student channels have different scales, multiply the columns by their deviations first; then a
    square is what a channel contributes.

    Args:
        weight: (T, S) or (T, S, 1, 1) array or tensor.
        matching: between the same channels.

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """
    array = weight.detach().cpu().double().numpy() if isinstance(weight, torch.Tensor) else np.asarray(weight, float)
    wanted = (matching.num_teacher, matching.num_student)
    if array.shape not in (wanted, (*wanted, 1, 1)):
        raise UserError(f"the projection must be (T, S) = {wanted} for this matching, got {array.shape}.")
    if not np.isfinite(array).all():
        raise UserError("the projection holds numbers that are not finite.")
    squares = array.reshape(wanted) ** 2
    total = squares.sum(axis=1, keepdims=True)
    uniform = np.full_like(squares, 1.0 / matching.num_student)
    shares = np.divide(squares, total, out=uniform, where=total > 0).T  # (S, T), columns of sum 1
    own = solve_matching(1.0 - shares, _mode(matching))
    student, teacher = matching.pairs
    chance = len(student) / (matching.num_student * len(np.unique(teacher)))
    return ProjectionAgreement(_on_pairs(shares, matching), chance, _on_pairs(shares, own))


def _on_pairs(shares: np.ndarray, matching: ChannelMatching) -> float:
    student, teacher = matching.pairs
    return float(shares[student, teacher].sum() / len(np.unique(teacher)))


def _mode(matching: ChannelMatching) -> str:
    """The solver's mode that gives matchings with as many pairs."""
    pairs, students, teachers = len(matching.pairs[0]), matching.num_student, matching.num_teacher
    if pairs == students <= teachers:
        return "one_to_one"
    return "balanced" if teachers < students or pairs == teachers else "even"
