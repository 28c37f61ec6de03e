"""Reducers against plain definitions, one student channel at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2_mgd.distill import REDUCERS
from d2_mgd.distill.registry import names

TEACHER = torch.randn(3, 7, 4, 5)
MARGIN = -torch.rand(7)
GROUPS = torch.tensor([[4, 0, 6], [1, 3, -1], [5, 2, -1]])


def members(row: Tensor) -> Tensor:
    return row[row >= 0]


def by_definition(name: str) -> tuple[Tensor, Tensor]:
    maps, margins = [], []
    for row in GROUPS:
        group, margin = TEACHER[:, members(row)], MARGIN[members(row)]
        if name == "amp":
            strongest = group.abs().argmax(dim=1, keepdim=True)
            maps.append(group.gather(1, strongest)[:, 0])
            margins.append(margin.mean())
        elif name in ("max", "sp"):
            maps.append(group.amax(dim=1))
            margins.append(margin.max())
        else:
            maps.append(group.mean(dim=1))
            margins.append(margin.mean())
    return torch.stack(maps, dim=1), torch.stack(margins)


@pytest.mark.parametrize("name", ["amp", "max", "sp", "mean"])
def test_definition_with_groups_of_unequal_size(name: str) -> None:
    guided, margin = REDUCERS.get(name)(TEACHER, GROUPS, MARGIN, None)
    expected, expected_margin = by_definition(name)
    torch.testing.assert_close(guided, expected)
    torch.testing.assert_close(margin, expected_margin)
    assert REDUCERS.get(name)(TEACHER, GROUPS, None, None)[1] is None


def test_absolute_max_keeps_the_sign_where_max_does_not_see_it() -> None:
    teacher = torch.tensor([-3.0, 2.0]).view(1, 2, 1, 1)
    groups = torch.tensor([[0, 1]])
    assert REDUCERS.get("amp")(teacher, groups, None, None)[0].item() == -3.0
    assert REDUCERS.get("max")(teacher, groups, None, None)[0].item() == 2.0


@pytest.mark.parametrize("name", ["amp", "max", "sp", "mean", "rd", "sm"])
def test_groups_of_one_make_the_identity(name: str) -> None:
    order = torch.randperm(7)
    guided, margin = REDUCERS.get(name)(TEACHER, order[:, None], MARGIN, None)
    assert torch.equal(guided, TEACHER[:, order])
    assert torch.equal(margin, MARGIN[order])


@pytest.mark.parametrize("name", ["amp", "max", "mean"])
def test_order_in_a_group_and_images_of_a_batch_do_not_matter(name: str) -> None:
    reducer = REDUCERS.get(name)
    shuffled = torch.tensor([[6, 4, 0], [3, 1, -1], [2, 5, -1]])
    torch.testing.assert_close(reducer(TEACHER, GROUPS, MARGIN, None), reducer(TEACHER, shuffled, MARGIN, None))
    alone = torch.cat([reducer(image[None], GROUPS, None, None)[0] for image in TEACHER])
    torch.testing.assert_close(reducer(TEACHER, GROUPS, None, None)[0], alone)


def test_random_drop_takes_members_only_all_of_them_and_again_with_the_same_generator() -> None:
    teacher = torch.arange(7.0).view(1, 7, 1, 1).expand(8, 7, 20, 20)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        guided, margin = REDUCERS.get("rd")(teacher, GROUPS, MARGIN, generator)
        assert margin is not None
        return guided, margin

    guided, margin = draw(0)
    for channel, row in enumerate(GROUPS):
        group = members(row)
        values, counts = guided[:, channel].unique(return_counts=True)
        assert values.tolist() == sorted(group.tolist())
        share = counts / counts.sum()
        assert (share - 1 / len(group)).abs().max() < 0.05  # 3200 draws
        assert margin[channel] in MARGIN[group]
    again, margin_again = draw(0)
    assert torch.equal(guided, again) and torch.equal(margin, margin_again)
    assert not torch.equal(guided, draw(1)[0])


def test_sparse_matching_needs_groups_of_one() -> None:
    with pytest.raises(ValueError, match="groups of one teacher channel, got up to 3"):
        REDUCERS.get("sm")(TEACHER, GROUPS, None, None)


@pytest.mark.parametrize("name", ["amp", "max", "mean", "rd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_picked_keeps_its_dtype_and_what_is_computed_is_float32_at_least(name: str, dtype: torch.dtype) -> None:
    guided, _ = REDUCERS.get(name)(TEACHER.to(dtype), GROUPS, MARGIN, None)
    assert guided.dtype == (torch.promote_types(dtype, torch.float32) if name == "mean" else dtype)


def test_the_table_is_complete() -> None:
    assert set(names(REDUCERS)) >= {"amp", "max", "mean", "rd", "sm", "sp"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_mean_of_short_floats_is_exact(dtype: torch.dtype) -> None:
    teacher = (100 * torch.randn(2, 12, 5, 5)).to(dtype)
    groups = torch.tensor([[0, 3, 4, 7, 9], [1, 2, 5, 6, -1], [8, 10, 11, -1, -1]])
    guided, _ = REDUCERS.get("mean")(teacher, groups, None, None)
    expected = torch.stack([teacher[:, [i for i in group if i >= 0]].double().mean(dim=1) for group in groups], dim=1)
    torch.testing.assert_close(guided.double(), expected, rtol=1e-6, atol=1e-5)
