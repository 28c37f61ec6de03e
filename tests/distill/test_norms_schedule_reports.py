"""Student-side norms are blind to padding; when to rematch; what a rematch leaves on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from d2_mgd.distill import RematchReport, RematchSchedule, load_reports, save_reports
from d2_mgd.distill.norms import build_norm
from d2_mgd.matching import ChannelMatching


@pytest.mark.parametrize("name", ["bn", "sync_bn", "gn"])
def test_norms_without_a_mask_are_pytorch_s(name: str) -> None:
    norm, maps = build_norm(name, 12), torch.randn(4, 12, 5, 3)
    plain = nn.GroupNorm(4, 12) if name == "gn" else nn.BatchNorm2d(12)
    for _ in range(2):
        torch.testing.assert_close(norm(maps, None), plain(maps))
    for module in (norm, plain):
        module.eval()
    torch.testing.assert_close(norm(maps, None), plain(maps))


@pytest.mark.parametrize("name", ["bn", "sync_bn", "gn"])
def test_padding_changes_neither_the_output_nor_the_running_statistics(name: str) -> None:
    masked, plain = build_norm(name, 6), build_norm(name, 6)
    maps = torch.randn(3, 6, 5, 4)
    padded = torch.full((3, 6, 8, 9), 77.0)
    padded[:, :, :5, :4] = maps
    valid = torch.zeros(3, 1, 8, 9, dtype=torch.bool)
    valid[:, :, :5, :4] = True
    torch.testing.assert_close(masked(padded, valid)[:, :, :5, :4], plain(maps, None), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(masked.buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs)


def test_masked_batch_norm_has_the_gradient_of_the_plain_one() -> None:
    masked, plain = build_norm("bn", 3).double(), nn.BatchNorm2d(3).double()
    maps = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    masked(ours, torch.ones(2, 1, 4, 4, dtype=torch.bool)).square().sum().backward()
    plain(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-9)


def test_one_value_a_channel_is_no_error() -> None:
    norm = build_norm("bn", 3)
    norm.bias.data = torch.tensor([1.0, 2.0, 3.0])
    assert norm(torch.randn(1, 3, 1, 1), None).flatten().tolist() == [1.0, 2.0, 3.0]


def test_group_norm_of_any_width_and_unknown_norms() -> None:
    for channels in (1, 24, 116, 256):
        build_norm("gn", channels)(torch.randn(2, channels, 3, 3), None)
    with pytest.raises(ValueError, match="unknown norm 'ln'; there are: bn, sync_bn, gn, none"):
        build_norm("ln", 8)


def test_published_detection_schedule() -> None:
    schedule = RematchSchedule([5000, 31000], [20000])
    assert [step for step in range(0, 90001) if schedule.due(step)] == [0, 5000, 10000, 15000, 31000, 62000]


def test_schedules_without_a_start_or_without_periods() -> None:
    assert [s for s in range(7) if RematchSchedule([2], start=False).due(s)] == [2, 4, 6]
    assert [s for s in range(7) if RematchSchedule().due(s)] == [0]
    assert [s for s in range(9) if RematchSchedule([2, 0], [5]).due(s)] == [0, 2, 4]


@pytest.mark.parametrize(
    ("periods", "milestones"), [([5], [3]), ([5, 6], []), ([-1], []), ([1, 2, 3], [5, 4]), ([1, 2], [0])]
)
def test_schedules_that_do_not_fit(periods: list[int], milestones: list[int]) -> None:
    with pytest.raises(ValueError, match="rematch"):
        RematchSchedule(periods, milestones)


def test_reports_survive_the_disk(tmp_path: Path) -> None:
    cost = np.random.default_rng(0).random((2, 4))
    matching = ChannelMatching([[0, 3], [1, 2]], 4, float(cost[[0, 0, 1, 1], [0, 3, 1, 2]].sum()))
    report = RematchReport("res4", matching, cost, changed=0.5, seconds=0.25, num_images=12)
    save_reports(tmp_path / "matching" / "iter_1.npz", {"res4": report})
    loaded = load_reports(tmp_path / "matching" / "iter_1.npz")["res4"]
    assert loaded.matching == matching and np.array_equal(loaded.cost, cost)
    assert loaded.matching.total_cost == pytest.approx(matching.total_cost)
    assert (loaded.changed, loaded.seconds, loaded.num_images) == (0.5, 0.25, 12)
    assert loaded.mean_cost == pytest.approx(matching.total_cost / 4)
    assert [path.name for path in (tmp_path / "matching").iterdir()] == ["iter_1.npz"]
    np.savez(tmp_path / "other.npz", a=cost)
    with pytest.raises(ValueError, match="no matching reports"):
        load_reports(tmp_path / "other.npz")
