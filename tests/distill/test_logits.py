"""Logit losses by property, and against their papers' formulas written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2_mgd.distill import LOGIT_LOSSES, LogitLoss, standardize_logits
from d2_mgd.distill.registry import names

ALL = names(LOGIT_LOSSES)


def logits(images: int = 5, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(images, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(classes, (images,), generator=generator)


def softmax(row: Any, temperature: float) -> np.ndarray:
    weights = np.exp(np.asarray(row) / temperature)
    return weights / weights.sum()


def divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    return float((teacher * np.log(teacher / student)).sum())


def test_kd_image_by_image() -> None:
    student, teacher, _ = logits()
    tau = 4.0
    expected = tau**2 * np.mean([divergence(softmax(t, tau), softmax(s, tau)) for s, t in zip(student, teacher)])
    assert LogitLoss("kd", temperature=tau)(student, teacher).item() == pytest.approx(expected)


def test_dkd_image_by_image() -> None:
    student, teacher, targets = logits()
    tau, alpha, beta = 3.0, 0.5, 6.0
    total = 0.0
    for s, t, target in zip(student.numpy(), teacher.numpy(), targets.tolist()):
        p_s, p_t = softmax(s, tau), softmax(t, tau)
        binary_s, binary_t = (np.array([p[target], 1 - p[target]]) for p in (p_s, p_t))
        hat_s, hat_t = (np.delete(p, target) / (1 - p[target]) for p in (p_s, p_t))
        total += alpha * divergence(binary_t, binary_s) + beta * divergence(hat_t, hat_s)
    ours = LogitLoss("dkd", temperature=tau, alpha=alpha, beta=beta)(student, teacher, targets)
    assert ours.item() == pytest.approx(tau**2 * total / len(targets))


def test_dkd_with_the_teachers_own_weight_of_the_others_is_kd() -> None:
    student, teacher, targets = (x[:1] for x in logits())  # one image: its weight is a constant
    tau = 2.0
    others = 1 - F.softmax(teacher / tau, dim=1)[0, targets[0]].item()
    dkd = LogitLoss("dkd", temperature=tau, alpha=1.0, beta=others)(student, teacher, targets)
    torch.testing.assert_close(dkd, LogitLoss("kd", temperature=tau)(student, teacher))


def test_dkd_of_a_teacher_that_is_certain_is_finite() -> None:
    student, teacher, targets = logits()
    teacher[torch.arange(5), targets] = 1e4
    student.requires_grad_()
    loss = LogitLoss("dkd", temperature=1.0)(student, teacher, targets)
    loss.backward()
    assert torch.isfinite(loss) and student.grad is not None and torch.isfinite(student.grad).all()


def test_dist_is_one_minus_the_correlations_of_rows_and_columns() -> None:
    student, teacher, _ = logits()
    tau, beta, gamma = 4.0, 2.0, 3.0
    p_s, p_t = (np.stack([softmax(row, tau) for row in x.numpy()]) for x in (student, teacher))
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p_s, p_t)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p_s.T, p_t.T)])
    ours = LogitLoss("dist", temperature=tau, beta=beta, gamma=gamma)(student, teacher)
    assert ours.item() == pytest.approx(tau**2 * (beta * rows + gamma * columns), rel=1e-6)


def test_standardised_logits() -> None:
    student, _, _ = logits()
    z = standardize_logits(student)
    expected = (student.numpy() - student.numpy().mean(1, keepdims=True)) / student.numpy().std(1, keepdims=True)
    np.testing.assert_allclose(z.numpy(), expected, rtol=1e-6)
    assert not standardize_logits(torch.full((2, 4), 3.0)).any()
    flat = torch.full((2, 4), 3.0, requires_grad=True)
    standardize_logits(flat).square().sum().backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()


@pytest.mark.parametrize("name", ALL)
def test_standardised_losses_see_relations_only(name: str) -> None:
    student, teacher, targets = logits()
    loss = LogitLoss(name, standardize=True)
    plain = loss(student, teacher, targets)
    torch.testing.assert_close(loss(0.1 * student + 2, 30 * teacher - 5, targets), plain, rtol=1e-5, atol=1e-7)
    assert loss(7 * teacher + 1, teacher, targets).item() == pytest.approx(0.0, abs=1e-9)
    by_hand = LogitLoss(name)(standardize_logits(student), standardize_logits(teacher), targets)
    torch.testing.assert_close(plain, by_hand)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_zero_for_equal_logits_else_positive_and_differentiable(name: str, standardize: bool) -> None:
    student, teacher, targets = logits()
    loss = LogitLoss(name, standardize=standardize)
    assert loss(teacher + 2, teacher, targets).item() == pytest.approx(0.0, abs=1e-9)
    assert loss(student, teacher, targets).item() > 0
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, targets), (student.requires_grad_(),))
    teacher.requires_grad_()
    loss(student, teacher, targets).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", ALL)
def test_weight_order_of_classes_and_mixed_precision(name: str) -> None:
    student, teacher, targets = logits()
    plain = LogitLoss(name)(student, teacher, targets)
    torch.testing.assert_close(LogitLoss(name, weight=0.25)(student, teacher, targets), 0.25 * plain)
    order = torch.randperm(7)
    inverse = order.argsort()
    torch.testing.assert_close(LogitLoss(name)(student[:, order], teacher[:, order], inverse[targets]), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = LogitLoss(name)(student.bfloat16(), teacher.bfloat16(), targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain.float(), rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "kl"}, "unknown logit loss 'kl'; there are: dist, dkd, kd"),
        ({"name": "kd", "beta": 1.0}, "logit loss 'kd' has no option beta; it has: temperature"),
        ({"name": "dkd", "beta": -1.0}, "logit loss 'dkd': beta must be finite and not negative, got -1"),
        ({"name": "kd", "weight": math.nan}, "weight must be finite"),
        ({"name": "dist", "temperature": 0.0}, "the temperature must be positive, got 0"),
    ],
)
def test_bad_choices_are_refused_when_they_are_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogitLoss(**options)


def test_bad_logits() -> None:
    student, teacher, _ = logits()
    with pytest.raises(ValueError, match="same classes"):
        LogitLoss("dist")(student, teacher[:, :6])
    with pytest.raises(ValueError, match="'dkd' needs the target classes"):
        LogitLoss("dkd")(student, teacher)
