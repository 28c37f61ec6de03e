"""Losses of dense class logits, boxes and box distributions, by property and against their formulas."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from d2_mgd.distill import box_distribution_kd, dense_box_kd, dense_class_kd, with_statistics_of
from d2_mgd.distill.dense import best_scores


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


def test_temperature_and_normalizer_of_dense_classes() -> None:
    student, teacher = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double()
    softened = dense_class_kd(student / 3, teacher / 3, normalizer=1.0)
    torch.testing.assert_close(dense_class_kd(student, teacher, temperature=3.0, normalizer=4.0), 9 * softened / 4)
    # the default divides by the teacher's own scores, not by softened ones
    divisor = best_scores(teacher).sum().clamp(min=1)
    torch.testing.assert_close(dense_class_kd(student, teacher, temperature=3.0), 9 * softened / divisor)
    # levels of a pyramid add up where they share a divisor
    parts = [dense_class_kd(student[:, p], teacher[:, p], normalizer=7.0) for p in (slice(2), slice(2, 5))]
    torch.testing.assert_close(sum(parts), dense_class_kd(student, teacher, normalizer=7.0))


def boxes(*shape: int) -> torch.Tensor:
    corner = 20 * torch.rand(*shape, 2)
    return torch.cat([corner, corner + 1 + 20 * torch.rand(*shape, 2)], dim=-1).double()


def test_boxes_location_by_location() -> None:
    student, teacher, weight = boxes(2, 6), boxes(2, 6), torch.rand(2, 6).double() + 0.5
    total = 0.0
    for n in range(2):
        for r in range(6):
            (a1, b1, a2, b2), (c1, d1, c2, d2) = student[n, r].tolist(), teacher[n, r].tolist()
            inter = max(0.0, min(a2, c2) - max(a1, c1)) * max(0.0, min(b2, d2) - max(b1, d1))
            union = (a2 - a1) * (b2 - b1) + (c2 - c1) * (d2 - d1) - inter
            hull = (max(a2, c2) - min(a1, c1)) * (max(b2, d2) - min(b1, d1))
            total += float(weight[n, r]) * (1 - inter / union + (hull - union) / hull)
    assert dense_box_kd(student, teacher, weight).item() == pytest.approx(total / float(weight.sum()))
    assert dense_box_kd(student, teacher, weight, 3.0).item() == pytest.approx(total / 3)


def test_boxes_without_an_area_are_no_targets() -> None:
    student, teacher = boxes(1, 4).requires_grad_(), boxes(1, 4)
    teacher[0, 1, 2] = teacher[0, 1, 0]
    rest = torch.tensor([[True, False, True, True]])
    found = dense_box_kd(student, teacher, torch.ones(1, 4), 1.0)
    torch.testing.assert_close(found, dense_box_kd(student, teacher, rest.double(), 1.0))
    found.backward()
    assert student.grad is not None and not student.grad[0, 1].any() and student.grad[0, 0].any()


def test_a_map_takes_the_statistics_of_another() -> None:
    teacher, student = 3 * torch.randn(4, 5, 7, 6).double() - 2, 0.1 * torch.randn(4, 5, 7, 6).double() + 9
    found = with_statistics_of(teacher, student)
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(found, (0, 2, 3)), statistic(teacher, (0, 2, 3)), rtol=1e-4, atol=1e-5)
    factors, offsets = torch.rand(1, 5, 1, 1) + 0.5, torch.randn(1, 5, 1, 1)
    torch.testing.assert_close(with_statistics_of(teacher, student * factors + offsets), found, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(with_statistics_of(teacher, teacher), teacher, rtol=1e-9, atol=1e-9)
    # padding counts for nothing
    valid = torch.ones(4, 1, 7, 9, dtype=torch.bool)
    valid[..., 6:] = False
    wide = [F.pad(maps, (0, 3), value=1e3) for maps in (teacher, student)]
    torch.testing.assert_close(with_statistics_of(*wide, valid)[..., :6], found)


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
    box_loss = partial(dense_box_kd, weight=torch.ones(2, 5))
    assert box_loss(boxes(2, 5), boxes(2, 5)).item() > 0
    same = boxes(2, 5)
    assert box_loss(same, same).item() == pytest.approx(0.0, abs=1e-6)
    for loss, shape in ((dense_class_kd, (2, 5, 3)), (edge_loss, (2, 5, 4, 8))):
        student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
        value = loss(student, teacher)
        value.backward()
        assert value > 0 and student.grad is not None and student.grad.any() and teacher.grad is None
    student, teacher = boxes(2, 5).requires_grad_(), boxes(2, 5).requires_grad_()
    box_loss(student, teacher).backward()
    assert student.grad is not None and student.grad.any() and teacher.grad is None


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
