"""The balance of task and distillation, by its properties."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from d2_mgd.distill import FEATURE_LOSSES, FeatureTaps, MatchingGuidedDistiller
from d2_mgd.distill.balance import Balance

CHANNELS = {"a": (6, 12), "b": (4, 3)}


class Student(nn.Module):
    """Two maps in a row and a task on the last one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        a = self.a(images)
        b = self.b(a.relu())
        return {"a": a, "b": b}, b.relu().square().mean()


def images(seed: int, number: int = 8) -> Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def teacher(batch: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
    """Maps that follow from the images."""
    a = torch.cat([batch, batch.square(), -batch, batch.sin()], dim=1)[..., 1:-1, 1:-1]
    return {"a": scale * a, "b": scale * a[:, :3, 1:-1, 1:-1]}


class Training:
    """A student, its distiller, and the same images in each run."""

    def __init__(self, balance: str = "auto", rate: float = 0.05, **options: Any) -> None:
        self.student = Student()
        self.distiller = MatchingGuidedDistiller(
            CHANNELS, balance=balance, **{"loss": "mse", "norm": "none", **options}
        )
        self.distiller.observe(self.student(images(99))[0], teacher(images(99)))
        self.distiller.rematch()
        parameters = [*self.student.parameters(), *self.distiller.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=rate)

    def step(self, *batches: Tensor, of_loss: float = 1.0, of_teacher: float = 1.0, of_all: float = 1.0) -> None:
        self.optimizer.zero_grad()
        for batch in batches:
            maps, task = self.student(batch)
            losses = self.distiller(maps, teacher(batch, of_teacher))
            (of_all * (task + of_loss * sum(losses.values())) / len(batches)).backward()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(of_all)
        self.optimizer.step()
        self.distiller.update_balance()

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.student.parameters()])


def trained(balance: str = "auto", steps: int = 6, rate: float = 0.05, **scales: Any) -> Training:
    training = Training(balance, rate)
    for seed in range(steps):
        training.step(images(seed), **scales)
    return training


def gradients_at(training: Training, feature: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Of the distillation loss and of the task, for the images that are measured."""
    maps, task = training.student(batch)
    loss = training.distiller(maps, teacher(batch))[f"loss_distill/{feature}"]
    own, of_task = (torch.autograd.grad(of, maps[feature], retain_graph=True)[0][::4] for of in (loss, task))
    return own, of_task


@pytest.mark.parametrize("widths", [[64], [64, 256], [64, 128, 256], [96] * 5])
def test_losses_sum_to_24_at_the_start_for_any_number_of_features(widths: list[int]) -> None:
    initial = Balance(True, {str(i): 1.0 for i in range(len(widths))}, widths).initial_losses
    assert float(initial.sum()) == pytest.approx(24.0)
    torch.testing.assert_close(initial / initial[0], (torch.tensor(widths) / widths[0]).sqrt())


def test_losses_begin_in_proportion_to_the_root_of_the_teachers_channels_before_their_weights() -> None:
    training = Training(rate=0.0, weights={"b": 0.5})
    for _ in range(3):
        training.step(images(0))
    losses = training.distiller(training.student(images(0))[0], teacher(images(0)))
    assert {name: float(loss.detach()) for name, loss in losses.items()} == pytest.approx({
        "loss_distill/a": 16.0, "loss_distill/b": 0.5 * 8.0  # 12 and 3 channels
    })  # fmt: skip


def test_factors_stay_as_they_began_after_a_resume_too() -> None:
    """Also those of a checkpoint that another rule made."""
    training = trained(steps=3)
    other = {name: 2.0 * value if name == "balance.factors" else value
             for name, value in training.distiller.state_dict().items()}  # fmt: skip
    training.distiller.load_state_dict(other)
    training.step(images(1))
    torch.testing.assert_close(training.distiller.balance.factors, other["balance.factors"], rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["mse", "pearson"])
def test_a_student_that_copies_its_teacher_has_a_bounded_factor(loss: str) -> None:
    distiller = MatchingGuidedDistiller({"a": (4, 4)}, align="none", norm="none", loss=loss, balance="auto")
    maps = torch.randn(8, 4, 6, 6)
    for _ in range(2):
        distiller({"a": maps.clone().requires_grad_()}, {"a": maps})
        distiller.update_balance()
    of_zeros = 1.0 if loss == "mse" else 0.5
    assert float(distiller.balance.factors[0]) == pytest.approx(24.0 / (0.05 * of_zeros), rel=0.05)


def test_the_report_has_ratios_and_factors() -> None:
    assert list(trained(rate=0.0, steps=2).distiller.balance.report()) == ["balance/a", "balance/b"]
    training = Training(rate=0.0)
    for _ in range(3):
        training.step(images(0))
    own, of_task = gradients_at(training, "b", images(0))
    report = training.distiller.balance.report()
    assert list(report) == ["ratio/a", "ratio/b", "balance/a", "balance/b"]
    assert report["ratio/b"] == pytest.approx(float(own.norm() / of_task.norm()), rel=1e-4)


def test_the_ratio_is_measured_without_a_balance_too() -> None:
    training = Training("fixed", rate=0.0, weights={"b": 3.0})
    for _ in range(2):
        training.step(images(0))
    own, of_task = gradients_at(training, "b", images(0))
    report = training.distiller.balance.report()
    assert list(report) == ["ratio/a", "ratio/b"]
    assert report["ratio/b"] == pytest.approx(float(own.norm() / of_task.norm()), rel=1e-4)
    assert not any("balance" in name for name in training.distiller.state_dict())


def test_a_constant_factor_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mse = FEATURE_LOSSES.get("mse")
    monkeypatch.setitem(FEATURE_LOSSES._obj_map, "hundredfold_mse", lambda *maps: 100.0 * mse(*maps))
    plain = trained().weights()
    other = Training(loss="hundredfold_mse")
    for seed in range(6):
        other.step(images(seed))
    torch.testing.assert_close(other.weights(), plain, rtol=1e-4, atol=1e-6)
    for scales in ({"of_teacher": 8.0}, {"of_all": 2.0**16}):
        torch.testing.assert_close(trained(**scales).weights(), plain, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(trained("fixed", of_teacher=8.0).weights(), plain, rtol=1e-2)


def test_a_batch_in_parts_gives_the_same_factors() -> None:
    whole, parts = Training(rate=0.0), Training(rate=0.0)
    for seed in range(3):
        whole.step(images(seed))
        parts.step(*images(seed).chunk(2))
    torch.testing.assert_close(parts.distiller.balance.factors, whole.distiller.balance.factors)


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_steps_without_a_loss_or_with_one_that_is_not_finite_measure_nothing(scale: float) -> None:
    plain, training = trained(steps=3, rate=0.0), Training(rate=0.0)
    for seed in range(3):
        training.step(images(seed))
        before = training.distiller.balance.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        training.distiller.update_balance()  # nothing was measured
        maps, task = training.student(images(seed))
        (task + sum(training.distiller(maps, teacher(images(seed), scale)).values())).backward()
        training.distiller.update_balance()
        after = training.distiller.balance.state_dict()
        torch.testing.assert_close(after["factors"], before["factors"], rtol=0, atol=0)
        torch.testing.assert_close(after["steps"], before["steps"], rtol=0, atol=0)
    torch.testing.assert_close(training.distiller.balance.factors, plain.distiller.balance.factors)


def test_the_factor_of_a_schedule_is_not_balanced_away() -> None:
    training, again = Training(rate=0.0), Training(rate=0.0)
    for factor in (0.5, torch.tensor(0.25)):
        maps, task = training.student(images(2))
        losses = training.distiller(maps, teacher(images(2)), factor=factor)
        (sum(losses.values()) + task).backward()
        training.distiller.update_balance()
        again.step(images(2))
    torch.testing.assert_close(training.distiller.balance.factors, again.distiller.balance.factors)


def test_a_copy_that_taps_made_is_measured_at_its_original() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 6, 3)

        def forward(self, batch: Tensor) -> Tensor:
            return nn.functional.relu_(self.a(batch)).square().mean()

    network = InPlace()
    distiller = MatchingGuidedDistiller({"a": (6, 12)}, loss="mse", norm="none")
    taps = FeatureTaps(network, {"a": "a"})
    guides = {"a": teacher(images(0))["a"]}
    distiller.observe({"a": network.a(images(0))}, guides)
    distiller.rematch()
    for _ in range(2):  # the first forward finds out that the map changes
        task = network(images(0))
        (task + distiller(taps.collect(), guides)["loss_distill/a"]).backward()
        distiller.update_balance()
    maps = network.a(images(0))
    own = torch.autograd.grad(distiller({"a": maps}, guides)["loss_distill/a"], maps)[0][::4]
    of_task = torch.autograd.grad(maps.relu().square().mean(), maps)[0][::4]
    assert distiller.balance.report()["ratio/a"] == pytest.approx(float(own.norm() / of_task.norm()), rel=1e-4)


@pytest.mark.parametrize("before", [1, 2])
def test_a_resumed_training_continues_to_the_bit(before: int) -> None:
    """Random numbers of the reducer included."""
    straight, first, resumed = (Training(reducer="rd") for _ in range(3))
    torch.manual_seed(0)
    for seed in range(4):
        straight.step(images(seed))
    torch.manual_seed(0)
    for seed in range(before):
        first.step(images(seed))
    resumed.student.load_state_dict(first.student.state_dict())
    resumed.distiller.load_state_dict(first.distiller.state_dict())
    for seed in range(before, 4):
        resumed.step(images(seed))
    assert torch.equal(resumed.weights(), straight.weights())
    torch.testing.assert_close(resumed.distiller.state_dict(), straight.distiller.state_dict(), rtol=0, atol=0)


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    training = Training(rate=0.0)
    for seed in range(3):
        training.step(images(seed).chunk(world)[rank])
    torch.save(training.distiller.balance.factors, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    alone = Training(rate=0.0)
    for seed in range(3):
        alone.step(images(seed))
    torch.testing.assert_close(first, alone.distiller.balance.factors)


def test_an_unknown_balance_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown balance 'best'; there are: fixed, auto"):
        MatchingGuidedDistiller(CHANNELS, balance="best")


def test_a_step_leaves_no_map_behind() -> None:
    """Nor the graph behind it."""
    trained("auto", steps=3)
    shapes = {(8, channels, *size) for (channels, _), size in zip(CHANNELS.values(), ((6, 6), (4, 4)))}
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is Tensor and tuple(found.shape) in shapes]


def test_a_fixed_weight_that_drowns_the_task_is_one_warning() -> None:
    training = Training("fixed", rate=0.0, weights={"a": 1e-3, "b": 50.0})
    for _ in range(110):
        training.step(images(0, number=2))
    (warning,) = training.distiller.balance.warnings()
    ratio = training.distiller.balance.report()["ratio/b"]
    assert f"feature b: at the student's map, the gradient of the distillation is {ratio:.3g} times" in warning
    assert f"Try the fixed weight {15.0 / ratio:.2g} in place of 50" in warning
    assert not training.distiller.balance.warnings()
