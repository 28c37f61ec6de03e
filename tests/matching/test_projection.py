"""Agreement of a projection with a matching, by its properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2_mgd.matching import ChannelMatching, projection_agreement, solve_matching

KINDS = [(4, 12, "balanced"), (4, 10, "balanced"), (4, 10, "even"), (4, 10, "one_to_one"), (6, 6, "balanced"),
         (9, 4, "balanced")]  # fmt: skip


def random_matching(students: int, teachers: int, mode: str, seed: int = 0) -> ChannelMatching:
    return solve_matching(np.random.default_rng(seed).random((students, teachers)), mode)


def on_pairs(matching: ChannelMatching) -> np.ndarray:
    """(T, S) with weight on matched pairs alone, of different sizes and signs."""
    weight = np.zeros((matching.num_teacher, matching.num_student))
    student, teacher = matching.pairs
    weight[teacher, student] = np.random.default_rng(1).normal(size=len(student)) + 3.0 * (-1.0) ** teacher
    return weight


@pytest.mark.parametrize(("students", "teachers", "mode"), KINDS)
def test_a_projection_onto_the_matched_pairs_agrees_entirely(students: int, teachers: int, mode: str) -> None:
    matching = random_matching(students, teachers, mode)
    found = projection_agreement(on_pairs(matching), matching)
    assert found.share == pytest.approx(1.0) and found.best == pytest.approx(1.0)
    assert found.agreement == pytest.approx(1.0) and found.chance < 1.0
    away = (on_pairs(matching) == 0).astype(float)  # everywhere else
    assert projection_agreement(away, matching).share == 0.0
    assert projection_agreement(away, matching).agreement < 0.0


@pytest.mark.parametrize(("students", "teachers", "mode"), KINDS)
def test_chance_is_what_random_matchings_have(students: int, teachers: int, mode: str) -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(teachers, students))
    found = [projection_agreement(weight, random_matching(students, teachers, mode, seed)) for seed in range(400)]
    assert np.mean([one.share for one in found]) == pytest.approx(found[0].chance, rel=0.05)
    assert max(one.share for one in found) <= found[0].best + 1e-12
    assert np.mean([one.agreement for one in found]) == pytest.approx(0.0, abs=0.05)


def test_a_projection_without_preference() -> None:
    matching = random_matching(4, 12, "balanced")
    found = projection_agreement(np.full((12, 4), -0.3), matching)
    assert found.share == pytest.approx(0.25) == found.chance and found.agreement == 0.0


def test_scale_sign_and_order_do_not_matter() -> None:
    generator = np.random.default_rng(2)
    weight, matching = generator.normal(size=(10, 4)), random_matching(4, 10, "balanced")
    found = projection_agreement(weight, matching)
    scaled = weight * generator.uniform(0.1, 9.0, (10, 1)) * generator.choice([-1, 1], (10, 4))
    assert projection_agreement(scaled, matching).share == pytest.approx(found.share)
    order, back = generator.permutation(10), np.empty(10, dtype=int)
    back[order] = np.arange(10)
    moved = ChannelMatching(np.where(matching.groups < 0, -1, back[matching.groups]), 10)
    assert projection_agreement(weight[order], moved).share == pytest.approx(found.share)


def test_a_convolution_and_dead_rows() -> None:
    matching = random_matching(4, 10, "balanced")
    convolution = torch.nn.Conv2d(4, 10, 1, bias=False)
    found = projection_agreement(convolution.weight, matching)
    assert found == projection_agreement(convolution.weight[:, :, 0, 0].detach().numpy(), matching)
    dead = on_pairs(matching)
    dead[3] = 0.0  # prefers none: a quarter of its share lies on its pair
    assert projection_agreement(dead, matching).share == pytest.approx((9 + 0.25) / 10)


def test_bad_projections() -> None:
    matching = random_matching(4, 10, "balanced")
    with pytest.raises(ValueError, match=r"must be \(T, S\) = \(10, 4\) for this matching, got \(4, 10\)"):
        projection_agreement(np.ones((4, 10)), matching)
    with pytest.raises(ValueError, match="not finite"):
        projection_agreement(np.full((10, 4), np.nan), matching)
