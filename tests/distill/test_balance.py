"""The balance of task and distillation, by its properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2_mgd.distill import BALANCES, MatchingGuidedDistiller
from d2_mgd.distill.registry import names

CHANNELS = {"a": (6, 12), "b": (4, 8)}
RULES = names(BALANCES)


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
    return {"a": scale * a, "b": scale * a[:, :8, 1:-1, 1:-1]}


class Training:
    """A student, its distiller, and the same images in each run."""

    def __init__(self, rule: str, rate: float = 0.05, **options: Any) -> None:
        self.student = Student()
        self.distiller = MatchingGuidedDistiller(CHANNELS, balance=rule, **{"loss": "mse", "norm": "none", **options})
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


def trained(
    rule: str, steps: int = 6, rate: float = 0.05, options: dict[str, Any] | None = None, **scales: Any
) -> Training:
    training = Training(rule, rate, **(options or {}))
    for seed in range(steps):
        training.step(images(seed), **scales)
    return training


def test_the_gradient_at_the_map_is_a_share_of_the_tasks() -> None:
    training = trained("norm", steps=4, rate=0.0, options={"weights": {"b": 0.5}})
    for _ in range(3):
        batch = images(0)
        maps, task = training.student(batch)
        losses = training.distiller(maps, teacher(batch))
        own, of_task = (
            torch.autograd.grad(loss, maps["b"], retain_graph=True)[0] for loss in (losses["loss_distill/b"], task)
        )
        assert float(own.norm() / of_task.norm()) == pytest.approx(0.5 * 0.3, rel=0.2)  # a mean over other batches
    report = training.distiller.balance_report()
    assert report["ratio/b"] > 0.0 and list(report) == ["ratio/a", "ratio/b", "balance/a", "balance/b"]


@pytest.mark.parametrize("rule", RULES)
def test_a_constant_factor_of_the_loss_or_of_the_teacher_changes_nothing(rule: str) -> None:
    plain = trained(rule).weights()
    # from the second step on: the first one measures, and its loss of a thousandth is scaled alike by the outside
    for scales in ({"of_teacher": 8.0}, {"of_all": 2.0**16}):
        torch.testing.assert_close(trained(rule, **scales).weights(), plain, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(trained("fixed", of_teacher=8.0).weights(), plain, rtol=1e-2)
