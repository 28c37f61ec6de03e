"""Losses of dense class logits and box distributions, by property and against their formulas."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from d2_mgd.distill import box_distribution_kd, dense_class_kd


def test_dense_classes_location_by_location() -> None:
    student, teacher = 2 * torch.randn(2, 3, 4, dtype=torch.float64), 2 * torch.randn(2, 3, 4, dtype=torch.float64)
    total, best = 0.0, 0.0
    for image in range(2):
        for location in range(3):
            scores = teacher[image, location].sigmoid().tolist()
            best += max(scores)
            for s, p_t in zip(student[image, location].sigmoid().tolist(), scores):
                total -= abs(p_t - s) * (p_t * math.log(s) + (1 - p_t) * math.log(1 - s))
    assert dense_class_kd(student, teacher).item() == pytest.approx(total / max(1.0, best))
    plain = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="sum")
    torch.testing.assert_close(dense_class_kd(student, teacher, gamma=0.0), plain / max(1.0, best))


def test_edges_location_by_location() -> None:
    student, teacher, weight = (
        torch.randn(2, 3, 4, 8).double(),
        torch.randn(2, 3, 4, 8).double(),
        torch.rand(2, 3) + 0.5,
    )
    expected = sum(
        weight[n, r]
        * F.kl_div((student[n, r, e] / 10).log_softmax(0), (teacher[n, r, e] / 10).softmax(0), reduction="sum")
        for n in range(2)
        for r in range(3)
        for e in range(4)
    )
    ours = box_distribution_kd(student, teacher, weight)
    torch.testing.assert_close(ours, 100 * expected / 4 / weight.sum().double(), rtol=1e-5, atol=0)


def test_equal_outputs_cost_nothing_and_no_gradient_reaches_the_teacher() -> None:
    logits = torch.randn(2, 5, 3)
    edges = torch.randn(2, 5, 4, 8)
    assert dense_class_kd(logits, logits).item() == 0.0
    assert box_distribution_kd(edges, edges, torch.ones(2, 5)).item() == pytest.approx(0.0, abs=1e-6)
    edge_loss = partial(box_distribution_kd, weight=torch.ones(2, 5))
    for loss, shape in ((dense_class_kd, (2, 5, 3)), (edge_loss, (2, 5, 4, 8))):
        student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
        value = loss(student, teacher)
        value.backward()
        assert value > 0 and student.grad is not None and student.grad.any() and teacher.grad is None


def test_padding_changes_nothing() -> None:
    student, teacher = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[:, 6:] = False
    padded = [torch.cat([x, torch.full((2, 3, 3), 9.0)], dim=1) for x in (student, -teacher)]
    torch.testing.assert_close(dense_class_kd(*padded, valid), dense_class_kd(student, -teacher))
    edges = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 4, 8)
    wide = [torch.cat([x, torch.randn(2, 3, 4, 8)], dim=1) for x in edges]
    torch.testing.assert_close(
        box_distribution_kd(*wide, valid), box_distribution_kd(*edges, torch.ones(2, 6)), rtol=1e-5, atol=1e-7
    )
    assert dense_class_kd(*padded, torch.zeros(2, 9, dtype=torch.bool)).item() == 0.0


def test_bad_outputs() -> None:
    with pytest.raises(ValueError, match="the same classes, levels and anchors"):
        dense_class_kd(torch.zeros(1, 5, 3), torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match=r"one value for each location \(1, 5\) is needed, got \(1, 4\)"):
        dense_class_kd(torch.zeros(1, 5, 3), torch.zeros(1, 5, 3), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="gamma must not be negative"):
        dense_class_kd(torch.zeros(1, 5, 3), torch.zeros(1, 5, 3), gamma=-1.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        box_distribution_kd(torch.zeros(1, 5, 4, 2), torch.zeros(1, 5, 4, 2), torch.ones(1, 5), temperature=0.0)
