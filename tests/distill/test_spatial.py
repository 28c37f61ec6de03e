"""Spatial weights by property and against FGD's formulas; ties; how the distiller uses both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from d2_mgd.distill import SPATIAL_WEIGHTS, MatchingGuidedDistiller, reduce_loss
from d2_mgd.distill.registry import names
from d2_mgd.matching import ChannelCost, solve_matching

BOXES = [
    torch.tensor([[8.0, 0.0, 24.0, 16.0], [9.0, 1.0, 15.0, 7.0]]),
    torch.zeros(0, 4),
    torch.tensor([[0.0, 0.0, 48.0, 40.0]]),
]
TEACHER = torch.randn(3, 4, 5, 6)  # a map of stride 8 of 48 x 40 pixels


def weight(name: str, teacher: Tensor = TEACHER, boxes: Any = BOXES, valid: Tensor | None = None) -> Tensor:
    found = SPATIAL_WEIGHTS.get(name)(teacher, boxes, 8, valid)
    assert found is not None
    return found


def test_boxes_pixel_by_pixel() -> None:
    ours = weight("boxes")
    for image, boxes in enumerate(BOXES):
        expected = torch.zeros(5, 6)
        for row in range(5):
            for column in range(6):
                sizes = []
                for x1, y1, x2, y2 in boxes.tolist():
                    left, top, right, bottom = x1 // 8, y1 // 8, math.ceil(x2 / 8), math.ceil(y2 / 8)
                    if left <= column < right and top <= row < bottom:
                        sizes.append((right - left) * (bottom - top))
                if sizes:
                    expected[row, column] = 1 / min(sizes)
        outside = expected == 0
        expected[outside] = 0.5 / max(1, int(outside.sum()))
        torch.testing.assert_close(ours[image, 0], expected * 30 / expected.sum())


def test_an_image_without_boxes_and_one_that_is_all_box_count_all_pixels_alike() -> None:
    torch.testing.assert_close(weight("boxes")[1:], torch.ones(2, 1, 5, 6))


def test_large_and_small_boxes_have_the_same_share() -> None:
    boxes = [torch.tensor([[0.0, 0.0, 32.0, 32.0], [40.0, 32.0, 48.0, 40.0]])]
    found = weight("boxes", TEACHER[:1], boxes)[0, 0]
    torch.testing.assert_close(found[:4, :4].sum(), found[4, 5])
    background = found.sum() - 2 * found[4, 5]
    torch.testing.assert_close(background, 0.5 * found[4, 5])


def test_boxes_at_the_border_and_smaller_than_a_pixel_cover_one() -> None:
    boxes = [torch.tensor([[47.9, 39.9, 60.0, 70.0], [3.0, 3.0, 3.0, 3.0]])]
    found = weight("boxes", TEACHER[:1], boxes)[0, 0]
    torch.testing.assert_close(found[4, 5], found[0, 0])
    assert found[4, 5] == found.max() and (found == found.max()).sum() == 2


def test_attention_is_the_softmax_of_the_mean_magnitude() -> None:
    magnitude = TEACHER.abs().mean(1) / 0.5
    expected = 30 * magnitude.flatten(1).softmax(1).view(3, 1, 5, 6)
    torch.testing.assert_close(weight("attention"), expected)
    torch.testing.assert_close(weight("attention", torch.ones(3, 4, 5, 6)), torch.ones(3, 1, 5, 6))


@pytest.mark.parametrize("name", ["boxes", "attention"])
def test_one_on_average_and_blind_to_padding(name: str) -> None:
    plain = weight(name)
    torch.testing.assert_close(plain.mean(dim=(1, 2, 3)), torch.ones(3))
    assert (plain >= 0).all()
    padded = torch.full((3, 4, 7, 9), 50.0)
    padded[:, :, :5, :6] = TEACHER
    valid = torch.zeros(3, 1, 7, 9, dtype=torch.bool)
    valid[:, :, :5, :6] = True
    found = weight(name, padded, valid=valid)
    torch.testing.assert_close(found[:, :, :5, :6], plain)
    assert not found.masked_select(~valid).any()
    valid[1] = False  # an image without a real pixel
    assert torch.isfinite(weight(name, padded, valid=valid)[[0, 2]]).all()


def test_bad_boxes() -> None:
    with pytest.raises(ValueError, match="needs the ground-truth boxes"):
        weight("boxes", boxes=None)
    with pytest.raises(ValueError, match=r"one tensor \(B, 4\) for each of the 3 images, got \(1, 4\)"):
        weight("boxes", boxes=[torch.zeros(1, 4)])
    with pytest.raises(ValueError, match="needs the stride"):
        SPATIAL_WEIGHTS.get("boxes")(TEACHER, BOXES, None, None)
    assert names(SPATIAL_WEIGHTS) == ["all", "attention", "boxes"]


# ---- in the distiller


def maps(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"p3": (10, 12), "p4": (5, 6), "c5": (5, 6)}
    student = {name: torch.randn(3, 4, *size, generator=generator) for name, size in sizes.items()}
    teacher = {name: torch.randn(3, 8, *size, generator=generator) for name, size in sizes.items()}
    return student, teacher


CHANNELS = {"p3": (4, 8), "p4": (4, 8), "c5": (4, 8)}
STRIDES = {"p3": 4, "p4": 8, "c5": 8}


def ready(**options: Any) -> MatchingGuidedDistiller:
    distiller = MatchingGuidedDistiller(CHANNELS, **{"loss": "mse", "norm": "none", **options})
    distiller.observe(*maps())
    distiller.rematch()
    return distiller


@pytest.mark.parametrize("loss", ["mse", "partial_l2", "pearson", "channel_kl"])
@pytest.mark.parametrize("name", ["boxes", "attention"])
def test_the_distiller_multiplies_any_loss(name: str, loss: str) -> None:
    student, teacher = maps()
    distiller = ready(spatial=name, strides=STRIDES, loss=loss)
    feature = distiller.features["p4"]
    guided, _ = feature.reducer(teacher["p4"], feature.groups, None, None)
    elements = feature.loss(student["p4"], guided, None, None)
    expected = reduce_loss(elements, spatial_weight=weight(name, teacher["p4"]))
    torch.testing.assert_close(distiller(student, teacher, boxes=BOXES)["loss_distill/p4"], expected)


def test_all_pixels_is_the_default_and_needs_no_boxes() -> None:
    student, teacher = maps()
    default, named = ready(), ready(spatial="all")
    assert default(student, teacher) == named(student, teacher, boxes=BOXES)


def test_weights_need_what_they_are_made_of() -> None:
    with pytest.raises(ValueError, match="unknown spatial weight 'box'; there are: all, attention, boxes"):
        MatchingGuidedDistiller(CHANNELS, spatial="box")
    with pytest.raises(ValueError, match="feature c5: the spatial weight 'boxes' needs the stride"):
        MatchingGuidedDistiller(CHANNELS, spatial="boxes", strides={"p3": 4, "p4": 8})
    with pytest.raises(ValueError, match="a stride was given for p9"):
        MatchingGuidedDistiller(CHANNELS, strides={"p9": 4})
    with pytest.raises(ValueError, match="needs the ground-truth boxes"):
        ready(spatial="boxes", strides=STRIDES)(*maps())


# ---- ties


def test_tied_features_share_the_optimum_of_their_summed_costs() -> None:
    student, teacher = maps()
    distiller = MatchingGuidedDistiller(CHANNELS, loss="mse", tie=[["p4", "p3"]])
    distiller.observe(student, teacher)
    reports = distiller.rematch()
    assert list(reports) == ["p3", "p4", "c5"]
    costs = {}
    for name in CHANNELS:
        cost = ChannelCost(4, 8)
        cost.update(student[name], teacher[name])
        costs[name] = cost.mean()
    shared = solve_matching(costs["p3"] + costs["p4"])
    assert reports["p3"].matching == reports["p4"].matching == distiller.matchings["p3"] == shared
    assert reports["c5"].matching == solve_matching(costs["c5"]) != shared
    total = sum(reports[name].matching.total_cost for name in ("p3", "p4"))
    assert total == pytest.approx(shared.total_cost)
    for name, report in reports.items():  # each reports its own cost
        assert report.mean_cost == pytest.approx(float(costs[name][report.matching.pairs].mean()))


def test_a_permutation_that_all_levels_share_is_found_where_one_level_cannot_tell() -> None:
    order = torch.randperm(6)
    student = {"p3": torch.randn(2, 6, 8, 8), "p4": torch.randn(2, 6, 4, 4)}
    teacher = {name: found[:, order] for name, found in student.items()}
    teacher["p4"] = torch.zeros(2, 6, 4, 4)  # dead: every matching of it costs the same
    distiller = MatchingGuidedDistiller({"p3": (6, 6), "p4": (6, 6)}, loss="mse", tie=[["p3", "p4"]])
    distiller.observe(student, teacher)
    groups = distiller.rematch()["p4"].matching.groups[:, 0]
    assert order[torch.from_numpy(groups.copy())].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie": [["p3", "p9"]]}, "feature p9 is tied, but the features are: p3, p4, c5"),
        ({"tie": [["p3", "p4"], ["p4", "c5"]]}, "feature p4 is tied twice"),
        ({"tie": ["p3"]}, "ties are lists of features"),
        ({"tie": [["p3", "p4"]], "align": "conv1x1"}, "not with the alignment 'conv1x1'"),
    ],
)
def test_bad_ties(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatchingGuidedDistiller(CHANNELS, **options)
    with pytest.raises(ValueError, match=r"same widths \(student, teacher\), got a \(2, 4\), b \(2, 6\)"):
        MatchingGuidedDistiller({"a": (2, 4), "b": (2, 6)}, tie=[["a", "b"]])
