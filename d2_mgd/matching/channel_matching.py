"""The value that a solver returns: which teacher channels guide which student channel.

Shape shorthand: S student channels, T teacher channels, G the size of the largest group.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from d2_mgd.errors import UserError

__all__ = ["PADDING", "ChannelMatching"]

PADDING = -1
"""Fills the end of a row of ``ChannelMatching.groups`` whose group is smaller than the largest."""


@dataclass(frozen=True, eq=False)
class ChannelMatching:
    """Groups of teacher channels, one group for each student channel (the paper's flow matrix).

    Immutable, and checked when it is made: a value of this type is always a valid matching.

    Args:
        groups: (S, G) integers. Row ``s`` holds the teacher channels that guide student channel ``s``, padded with -1
            at the end of the row. Every group has at least one member and names no channel twice. Where T >= S, a
            teacher channel belongs to at most one group; where T < S, groups have one member and may share it.
        num_teacher: T.
        total_cost: sum of the costs of all matched pairs, in the units of the cost that was solved.

    Raises:
        ValueError: the groups are not a matching (the message names the offending student channel), ``num_teacher`` is
            no whole number, or ``total_cost`` is NaN.
    """

    groups: np.ndarray
    num_teacher: int
    total_cost: float = 0.0

    def __post_init__(self) -> None:
        groups = _as_integer_array(self.groups)
        try:
            num_teacher = operator.index(self.num_teacher)
        except TypeError:
            raise UserError(f"num_teacher must be a whole number, got {self.num_teacher!r}.") from None
        if math.isnan(self.total_cost):
            raise UserError("the total cost of a matching cannot be NaN.")
        if groups.ndim != 2 or 0 in groups.shape:
            raise UserError(f"groups must have the shape (S, G) with S, G >= 1, got {groups.shape}.")
        _check_groups(groups, num_teacher)
        longest = int((groups != PADDING).sum(axis=1).max())
        kept = np.ascontiguousarray(groups[:, :longest])
        groups = np.frombuffer(kept.tobytes(), dtype=kept.dtype).reshape(kept.shape)  # bytes cannot be written to
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "num_teacher", num_teacher)
        object.__setattr__(self, "total_cost", float(self.total_cost))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and unpickled ones are made, and so checked, anew."""
        return type(self), (self.groups, self.num_teacher, self.total_cost)

    @property
    def num_student(self) -> int:
        """S."""
        return self.groups.shape[0]

    @property
    def group_sizes(self) -> np.ndarray:
        """(S,) number of teacher channels that guide each student channel."""
        return (self.groups != PADDING).sum(axis=1)

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """All matched pairs as two index arrays of equal length: student channels, teacher channels."""
        student, column = np.nonzero(self.groups != PADDING)
        return student, self.groups[student, column]

    def changed(self, other: ChannelMatching) -> float:
        """Share (0 to 1) of student channels whose group has other members than in ``other``.

        Raises:
            ValueError: the two matchings are between different numbers of channels.
        """
        if (self.num_student, self.num_teacher) != (other.num_student, other.num_teacher):
            raise UserError(
                f"cannot compare a matching of ({self.num_student}, {self.num_teacher}) channels with one of "
                f"({other.num_student}, {other.num_teacher})."
            )
        width = max(self.groups.shape[1], other.groups.shape[1])
        return float((_sorted_rows(self.groups, width) != _sorted_rows(other.groups, width)).any(axis=1).mean())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelMatching):
            return NotImplemented
        same_size = (self.num_student, self.num_teacher) == (other.num_student, other.num_teacher)
        return same_size and self.changed(other) == 0.0

    def __hash__(self) -> int:
        rows = _sorted_rows(self.groups, self.groups.shape[1])
        return hash((rows.tobytes(), self.num_teacher))

    def __repr__(self) -> str:
        sizes = self.group_sizes
        return (
            f"ChannelMatching(S={self.num_student}, T={self.num_teacher}, group sizes {sizes.min()} to {sizes.max()}, "
            f"total cost {self.total_cost:.6g})"
        )


def _as_integer_array(groups: Any) -> np.ndarray:
    if isinstance(groups, torch.Tensor):
        groups = groups.detach().cpu().numpy()
    array = np.array(groups)  # always a copy
    if array.dtype.kind not in "iu":
        raise UserError(f"groups must hold integers, got dtype {array.dtype}.")
    return array.astype(np.int64)


def _sorted_rows(groups: np.ndarray, width: int) -> np.ndarray:
    padded = np.full((groups.shape[0], width), PADDING, dtype=np.int64)
    padded[:, : groups.shape[1]] = groups
    return np.sort(padded, axis=1)


def _check_groups(groups: np.ndarray, num_teacher: int) -> None:
    num_student = groups.shape[0]
    member = groups != PADDING
    outside = (groups < PADDING) | (groups >= num_teacher)
    if outside.any():
        student = int(np.nonzero(outside.any(axis=1))[0][0])
        raise UserError(
            f"group of student channel {student} is {groups[student].tolist()}, "
            f"but teacher channels are 0 to {num_teacher - 1}."
        )
    if not member[:, 0].all():
        student = int(np.nonzero(~member[:, 0])[0][0])
        raise UserError(f"student channel {student} has no teacher channel: every group needs at least one.")
    if (member[:, 1:] & ~member[:, :-1]).any():
        student = int(np.nonzero((member[:, 1:] & ~member[:, :-1]).any(axis=1))[0][0])
        raise UserError(f"group of student channel {student} is padded in the middle; -1 belongs at the end of a row.")
    ordered = np.sort(groups, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING)
    if twice.any():
        student = int(np.nonzero(twice.any(axis=1))[0][0])
        raise UserError(
            f"group of student channel {student} names a teacher channel twice: {groups[student].tolist()}."
        )
    if num_teacher >= num_student:
        uses = np.bincount(groups[member], minlength=num_teacher)
        if (uses > 1).any():
            teacher = int(np.nonzero(uses > 1)[0][0])
            raise UserError(
                f"teacher channel {teacher} guides {int(uses[teacher])} student channels; at most one where T >= S."
            )
    elif groups.shape[1] > 1 and member[:, 1:].any():
        raise UserError(f"groups must have one member where T < S (T={num_teacher}, S={num_student}).")
