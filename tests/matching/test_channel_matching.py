"""A ChannelMatching is valid or it is not made; and nobody changes it afterwards."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from d2_mgd.matching import ChannelMatching


def test_pairs_sizes_and_shape() -> None:
    matching = ChannelMatching([[3, 0], [1, -1], [2, -1]], num_teacher=4, total_cost=1.5)
    assert (matching.num_student, matching.num_teacher, matching.total_cost) == (3, 4, 1.5)
    assert matching.groups.dtype == np.int64
    assert matching.group_sizes.tolist() == [2, 1, 1]
    assert [list(map(int, pair)) for pair in zip(*matching.pairs)] == [[0, 3], [0, 0], [1, 1], [2, 2]]


def test_groups_may_be_a_tensor_and_needless_padding_goes() -> None:
    matching = ChannelMatching(torch.tensor([[1, -1, -1], [0, -1, -1]]), num_teacher=2)
    assert matching.groups.tolist() == [[1], [0]]


def test_it_cannot_be_changed() -> None:
    source = np.array([[0], [1]])
    matching = ChannelMatching(source, num_teacher=2)
    source[0, 0] = 1
    assert matching.groups.tolist() == [[0], [1]]
    with pytest.raises(ValueError, match="read-only"):
        matching.groups[0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        matching.total_cost = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_nor_can_its_copies(copied: Callable[[ChannelMatching], ChannelMatching]) -> None:
    matching = ChannelMatching([[0, 2], [1, -1]], num_teacher=3, total_cost=1.5)
    other = copied(matching)
    assert other == matching and other.total_cost == 1.5
    with pytest.raises(ValueError, match="read-only"):
        other.groups[0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        other.groups.setflags(write=True)


@pytest.mark.parametrize(("num_teacher", "total_cost"), [(2.7, 0.0), ("2", 0.0), (2, math.nan)])
def test_numbers_that_are_none(num_teacher: Any, total_cost: float) -> None:
    with pytest.raises(ValueError, match=r"whole number|cannot be NaN"):
        ChannelMatching([[0], [1]], num_teacher, total_cost)


def test_changed_counts_student_channels_whose_members_differ() -> None:
    first = ChannelMatching([[0, 1], [2, 3], [4, -1], [5, -1]], num_teacher=6)
    same_members = ChannelMatching([[1, 0], [3, 2], [4, -1], [5, -1]], num_teacher=6)
    half = ChannelMatching([[0, 1], [2, 3], [5, -1], [4, -1]], num_teacher=6)
    assert first.changed(same_members) == 0.0 and first == same_members and hash(first) == hash(same_members)
    assert first.changed(half) == half.changed(first) == 0.5 and first != half
    with pytest.raises(ValueError, match="cannot compare"):
        first.changed(ChannelMatching([[0]], num_teacher=1))


@pytest.mark.parametrize(
    ("groups", "num_teacher", "message"),
    [
        ([[0], [2]], 2, "student channel 1 is \\[2\\]"),
        ([[0], [-2]], 2, "student channel 1"),
        ([[-1, -1], [0, 1]], 2, "student channel 0 has no teacher channel"),
        ([[-1, 1], [0, -1]], 2, "student channel 0 has no teacher channel"),
        ([[0, -1, 1], [2, -1, -1]], 3, "padded in the middle"),
        ([[0, 0], [1, -1]], 4, "twice"),
        ([[0], [0]], 2, "teacher channel 0 guides 2"),
        ([[0, 1], [0, -1], [1, -1]], 2, "one member where T < S"),
        ([0, 1], 2, "shape"),
        (np.zeros((0, 1), dtype=int), 2, "shape"),
        ([[0.5]], 2, "integers"),
    ],
)
def test_invalid_groups_cannot_be_made(groups: object, num_teacher: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelMatching(groups, num_teacher)  # type: ignore[arg-type]


def test_sharing_is_allowed_where_the_teacher_is_narrower() -> None:
    assert ChannelMatching([[0], [0], [1]], num_teacher=2).group_sizes.tolist() == [1, 1, 1]
