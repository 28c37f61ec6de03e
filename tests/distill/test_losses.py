"""Feature losses by property, and against their papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2_mgd.distill import FEATURE_LOSSES, kd_loss, published_weights, reduce_loss
from d2_mgd.distill.registry import lookup, names

SHAPE = (3, 5, 6, 4)
ALL = names(FEATURE_LOSSES)


def maps() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64), -torch.rand(5).double()


def mean_loss(
    name: str, student: Tensor, guided: Tensor, margin: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    return reduce_loss(FEATURE_LOSSES.get(name)(student, guided, margin, valid), valid)


def test_partial_l2_element_by_element() -> None:
    student, guided, margin = maps()
    elements = FEATURE_LOSSES.get("partial_l2")(student, guided, margin, None)
    for n in range(SHAPE[0]):
        for c in range(SHAPE[1]):
            for s, t, loss in zip(student[n, c].flatten(), guided[n, c].flatten(), elements[n, c].flatten()):
                target = max(t.item(), margin[c].item())
                skipped = s.item() <= target and target <= 0
                assert loss.item() == pytest.approx(0.0 if skipped else (s.item() - target) ** 2)


def test_published_sum_and_factors() -> None:
    student, guided, margin = (x.float() for x in maps())
    target = torch.max(guided, margin.view(1, -1, 1, 1))
    published = F.mse_loss(student, target, reduction="none") * ((student > target) | (target > 0)).float()
    elements = FEATURE_LOSSES.get("partial_l2")(student, guided, margin, None)
    weights = published_weights("classification", ["a", "b", "c", "d"])
    for index, name in enumerate("abcd"):
        expected = published.sum() / SHAPE[0] / 1e4 / 2 ** (4 - 1 - index)
        ours = weights[name] * reduce_loss(elements, reduction="image_sum")
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    table = published_weights("detection", ["res2", "res3", "res4", "res5", "p5"])
    assert table == {"res2": 1 / 5e7, "res3": 1 / 5e7, "res4": 1 / 5e6, "res5": 1 / 5e6, "p5": 1 / 5e5}
    with pytest.raises(ValueError, match="no published weight for p6"):
        published_weights("detection", ["p6"])
    with pytest.raises(ValueError, match="'classification' and 'detection'"):
        published_weights("segmentation", ["p3"])


@pytest.mark.parametrize("name", ALL)
def test_zero_for_equal_maps_else_positive_and_differentiable(name: str) -> None:
    student, guided, margin = maps()
    assert mean_loss(name, guided, guided).item() == pytest.approx(0.0, abs=1e-12)
    assert mean_loss(name, student, guided, margin).item() > 0
    small = student[:, :2, :2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: mean_loss(name, s, guided[:, :2, :2, :2], margin[:2]), (small,))


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing_whatever_it_holds(name: str) -> None:
    student, guided, margin = maps()
    valid = torch.zeros(3, 1, 9, 7, dtype=torch.bool)
    valid[:, :, :6, :4] = True
    padded_student = torch.full((3, 5, 9, 7), 1e3, dtype=torch.float64)
    padded_guided = torch.full((3, 5, 9, 7), -1e3, dtype=torch.float64)
    padded_student[:, :, :6, :4], padded_guided[:, :, :6, :4] = student, guided
    padded_student.requires_grad_()
    loss = mean_loss(name, padded_student, padded_guided, margin, valid)
    torch.testing.assert_close(loss, mean_loss(name, student, guided, margin))
    loss.backward()
    assert padded_student.grad is not None and not padded_student.grad.masked_select(~valid).any()


@pytest.mark.parametrize("name", ["mse", "partial_l2", "pearson"])
def test_mean_does_not_depend_on_the_number_of_pixels_or_images(name: str) -> None:
    student, guided, margin = maps()
    torch.testing.assert_close(
        mean_loss(name, student.repeat(2, 1, 2, 3), guided.repeat(2, 1, 2, 3), margin),
        mean_loss(name, student, guided, margin),
    )


def test_pearson_is_one_minus_the_correlation() -> None:
    student, guided, _ = maps()
    rows = [x.transpose(0, 1).flatten(1) for x in (student, guided)]
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows)])
    torch.testing.assert_close(mean_loss("pearson", student, guided), 1 - correlation.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        mean_loss("pearson", 7 * student + 2, 0.1 * guided - 4),
        mean_loss("pearson", student, guided),
        atol=1e-4,
        rtol=0,
    )


def test_channel_kl_is_the_mean_divergence_of_a_channel() -> None:
    student, guided, _ = maps()
    tau = 4.0
    expected = (
        tau**2
        * F.kl_div((student / tau).flatten(2).log_softmax(2), (guided / tau).flatten(2).softmax(2), reduction="none")
        .sum(2)
        .mean()
    )
    torch.testing.assert_close(mean_loss("channel_kl", student, guided), expected)
    shifted = guided + torch.randn(3, 5, 1, 1)
    torch.testing.assert_close(mean_loss("channel_kl", student, shifted), expected)


def test_spatial_weights_multiply_any_loss() -> None:
    student, guided, _ = maps()
    weight = torch.zeros(3, 1, 6, 4)
    weight[1, :, 2, 3] = 2.0
    elements = FEATURE_LOSSES.get("mse")(student, guided, None, None)
    weighted = reduce_loss(elements, spatial_weight=weight)
    torch.testing.assert_close(weighted, 2 * elements[1, :, 2, 3].sum() / elements.numel())


def test_an_image_without_real_pixels_costs_nothing() -> None:
    student, guided, _ = maps()
    valid = torch.zeros(3, 1, 6, 4, dtype=torch.bool)
    for name in ALL:
        assert mean_loss(name, student, guided, None, valid).item() == 0.0


def test_unknown_names_list_those_that_exist() -> None:
    with pytest.raises(ValueError, match="unknown loss 'l3'; there are: channel_kl, mse, partial_l2, pearson"):
        lookup(FEATURE_LOSSES, "loss", "l3")


def test_kd_as_published() -> None:
    student, teacher = torch.randn(6, 10), torch.randn(6, 10)
    expected = F.kl_div((student / 1.5).log_softmax(1), (teacher / 1.5).softmax(1), reduction="batchmean") * 1.5**2
    torch.testing.assert_close(kd_loss(student, teacher), expected)
    assert kd_loss(student, student + 3).item() == pytest.approx(0.0, abs=1e-6)
    teacher.requires_grad_()
    kd_loss(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None and student.grad is not None
    with pytest.raises(ValueError, match="same classes"):
        kd_loss(student, torch.randn(6, 11))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="positive"):
            kd_loss(student, teacher, temperature)
