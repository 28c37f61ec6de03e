"""The matching cost: the published formula, invariances, precision, masks, and processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from d2_mgd.matching import ChannelCost


def reference(student: Tensor, teacher: Tensor, centred: bool = False) -> Tensor:
    """2 - 2 cos of each image's flattened maps, image by image, averaged; in float64."""
    total = torch.zeros(student.shape[1], teacher.shape[1], dtype=torch.float64)
    for s, t in zip(student.double().flatten(2), teacher.double().flatten(2)):
        if centred:
            s, t = s - s.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
        total += 2 - 2 * F.normalize(s, dim=1) @ F.normalize(t, dim=1).T
    return total / student.shape[0]


def maps(images: int = 5, student: int = 4, teacher: int = 7, size: tuple[int, int] = (6, 5)) -> tuple[Tensor, Tensor]:
    return torch.randn(images, student, *size), torch.randn(images, teacher, *size) + 0.3


@pytest.mark.parametrize("metric", ["cosine", "pearson"])
def test_published_formula(metric: str) -> None:
    student, teacher = maps()
    cost = ChannelCost(4, 7, metric)
    cost.update(student[:2], teacher[:2])
    cost.update(student[2:], teacher[2:])
    assert cost.num_images == 5
    assert cost.mean().dtype == torch.float64 and cost.mean().shape == (4, 7)
    torch.testing.assert_close(cost.mean(), reference(student, teacher, metric == "pearson"), atol=1e-6, rtol=0)


def test_positive_scale_changes_nothing_and_pearson_forgets_the_mean() -> None:
    student, teacher = maps()
    scaled = student * torch.rand(1, 4, 1, 1).add(0.1), teacher * 1000
    for metric, (s, t) in {"cosine": scaled, "pearson": (scaled[0] + 3, scaled[1] - 5)}.items():
        plain, moved = ChannelCost(4, 7, metric), ChannelCost(4, 7, metric)
        plain.update(student, teacher)
        moved.update(s, t)
        torch.testing.assert_close(plain.mean(), moved.mean(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("metric", ["cosine", "pearson"])
def test_padding_changes_nothing_whatever_it_holds(metric: str) -> None:
    student, teacher = maps(images=3)
    height, width = [6, 4, 5], [5, 5, 3]
    separate = ChannelCost(4, 7, metric)
    padded_student, padded_teacher = torch.full((3, 4, 6, 5), math.nan), torch.full((3, 7, 6, 5), math.inf)
    valid = torch.zeros(3, 1, 6, 5, dtype=torch.bool)
    for i, (h, w) in enumerate(zip(height, width)):
        separate.update(student[i : i + 1, :, :h, :w], teacher[i : i + 1, :, :h, :w])
        padded_student[i, :, :h, :w] = student[i, :, :h, :w]
        padded_teacher[i, :, :h, :w] = teacher[i, :, :h, :w]
        valid[i, :, :h, :w] = True
    batch = ChannelCost(4, 7, metric)
    batch.update(padded_student, padded_teacher, valid)
    assert batch.num_images == 3
    torch.testing.assert_close(batch.mean(), separate.mean(), atol=1e-6, rtol=0)


def test_an_image_without_real_pixels_is_no_image() -> None:
    student, teacher = maps(images=2)
    valid = torch.ones(2, 1, 6, 5, dtype=torch.bool)
    valid[1] = False
    cost = ChannelCost(4, 7)
    cost.update(student, teacher, valid)
    assert cost.num_images == 1
    torch.testing.assert_close(cost.mean(), reference(student[:1], teacher[:1]), atol=1e-6, rtol=0)


def test_dead_channels_are_far_from_everything() -> None:
    student, teacher = maps(images=1)
    student[:, 1] = 0.0
    teacher[:, 2] = 4.0  # constant: dead once it is centred
    cosine, pearson = ChannelCost(4, 7), ChannelCost(4, 7, "pearson")
    cosine.update(student, teacher)
    pearson.update(student, teacher)
    assert (cosine.mean()[1] == 2.0).all()
    assert (pearson.mean()[1] == 2.0).all() and (pearson.mean()[:, 2] == 2.0).all()
    assert (cosine.mean()[0, [0, 1, 3]] != 2.0).all()


def test_a_map_has_no_distance_to_itself() -> None:
    student, _ = maps()
    cost = ChannelCost(4, 4)
    cost.update(student, student)
    assert cost.mean().diagonal().abs().max() < 1e-6
    assert (cost.mean() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_also_under_autocast(dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in maps())
    cost = ChannelCost(4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost.update(student, teacher)
    torch.testing.assert_close(cost.mean(), reference(student, teacher), atol=1e-6, rtol=0)


def test_channels_last_maps() -> None:
    student, teacher = maps()
    cost = ChannelCost(4, 7)
    cost.update(student.to(memory_format=torch.channels_last), teacher)
    torch.testing.assert_close(cost.mean(), reference(student, teacher), atol=1e-6, rtol=0)


def test_nothing_is_lost_over_many_images() -> None:
    student, teacher = maps(images=50, student=2, teacher=2, size=(3, 3))
    cost = ChannelCost(2, 2)
    for _ in range(2000):
        cost.update(student, teacher)
    assert cost.num_images == 100_000
    torch.testing.assert_close(cost.mean(), reference(student, teacher), atol=1e-6, rtol=0)


def test_reset_and_state() -> None:
    student, teacher = maps()
    cost, other = ChannelCost(4, 7), ChannelCost(4, 7)
    cost.update(student[:3], teacher[:3])
    other.load_state_dict(cost.state_dict())
    cost.update(student[3:], teacher[3:])
    assert other.num_images == 3  # the state is a copy
    other.update(student[3:], teacher[3:])
    assert torch.equal(cost.mean(), other.mean())
    cost.reset()
    assert cost.num_images == 0
    with pytest.raises(ValueError, match="empty"):
        cost.mean()
    with pytest.raises(ValueError, match="channels"):
        ChannelCost(2, 7).load_state_dict(other.state_dict())


def test_no_gradient_is_kept() -> None:
    student, teacher = maps()
    cost = ChannelCost(4, 7)
    cost.update(student.requires_grad_(), teacher)
    assert not cost.mean().requires_grad


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 4, 6, 5), (2, 8, 6, 5), "expected 4 student and 7 teacher channels"),
        ((2, 4, 6, 5), (3, 7, 6, 5), "same images, height and width"),
        ((2, 4, 6, 5), (2, 7, 3, 3), "same images, height and width"),
        ((4, 6, 5), (7, 6, 5), r"\(N, C, H, W\)"),
    ],
)
def test_shapes_that_do_not_fit(student: tuple[int, ...], teacher: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelCost(4, 7).update(torch.zeros(student), torch.zeros(teacher))


def test_bad_masks_metrics_and_values() -> None:
    student, teacher = maps()
    with pytest.raises(ValueError, match="unknown matching metric 'l1'; there are: cosine, pearson"):
        ChannelCost(4, 7, "l1")
    with pytest.raises(ValueError, match="boolean mask"):
        ChannelCost(4, 7).update(student, teacher, torch.ones(5, 1, 6, 5))
    for bad in (math.nan, math.inf):
        cost = ChannelCost(4, 7)
        teacher[2, 3, 1, 1] = bad
        cost.update(student, teacher)
        with pytest.raises(
            ValueError, match="not finite at 4 of 28 entries, first at student channel 0, teacher channel 3"
        ):
            cost.mean()


@pytest.mark.gpu
def test_a_stored_sum_waits_for_the_maps_wherever_it_was_stored() -> None:
    student, teacher = (one.cuda() for one in maps())
    cost, stored = ChannelCost(4, 7), ChannelCost(4, 7)
    cost.update(student, teacher)
    state = cost.state_dict()
    stored.load_state_dict({**state, "similarity": state["similarity"].cpu()})
    for one in (cost, stored):
        one.update(student, teacher)
    assert stored.state_dict()["similarity"].device == student.device
    assert torch.equal(stored.mean(), cost.mean())


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    student, teacher = maps(images=7)
    cost = ChannelCost(4, 7)
    share = {0: slice(0, 5), 1: slice(5, 7), 2: slice(0, 0)}[rank]
    if rank < 2:
        cost.update(student[share], teacher[share])
    cost.all_reduce()
    cost.all_reduce()  # twice is once
    assert cost.num_images == 7
    torch.save(cost.mean(), f"{folder}/{rank}.pt")
    cost.update(student[:1], teacher[:1])  # from here on it speaks for this process again
    assert cost.num_images == {0: 6, 1: 3, 2: 1}[rank]
    dist.destroy_process_group()


def test_ranks_with_unequal_shares_and_with_none_equal_one_process(tmp_path: Path) -> None:
    mp.start_processes(_rank, (3, str(tmp_path)), nprocs=3, start_method="fork")
    torch.manual_seed(0)
    student, teacher = maps(images=7)
    for rank in range(3):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), reference(student, teacher), atol=1e-6, rtol=0)
