"""The projection that starts as the matching, by its properties."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from d2_mgd.distill import MatchingGuidedDistiller
from d2_mgd.matching import matched_weight, projection_agreement

Maps = dict[str, Tensor]


def maps(students: int, teachers: int, seed: int = 0) -> tuple[Maps, Maps]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, students, 6, 5), (4, teachers, 6, 5))
    student, teacher = (torch.randn(shape, generator=generator) for shape in shapes)
    return {"x": student}, {"x": teacher}


def projected(students: int, teachers: int, norm: str = "bn", matched: bool = True) -> MatchingGuidedDistiller:
    distiller = MatchingGuidedDistiller(
        {"x": (students, teachers)}, align="matched_projection", loss="mse", norm=norm, reducer="sm"
    )
    if matched:
        distiller.observe(*maps(students, teachers))
        distiller.rematch()
    return distiller


def step(distiller: MatchingGuidedDistiller, optimizer: torch.optim.Optimizer, seed: int) -> float:
    loss = distiller(*maps(4, 10, seed))["loss_distill/x"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(("students", "teachers"), [(4, 10), (6, 6), (9, 4)])
def test_the_start_gives_each_teacher_channel_the_mean_of_its_student_channels(students: int, teachers: int) -> None:
    distiller = projected(students, teachers, norm="none")
    matching = distiller.matchings["x"]
    assert matching is not None
    assert torch.equal(distiller.projections["x"], matched_weight(matching))
    torch.testing.assert_close(distiller.projections["x"].sum(dim=1), torch.ones(teachers))
    student, teacher = maps(students, teachers)
    guiding = [torch.from_numpy(matching.pairs[0][matching.pairs[1] == channel]) for channel in range(teachers)]
    expected = torch.stack([student["x"][:, channels].mean(dim=1) for channels in guiding], dim=1)
    loss = distiller(student, teacher)["loss_distill/x"]
    torch.testing.assert_close(loss, (expected - teacher["x"]).square().mean())


def test_a_teacher_of_repeated_student_channels_is_recovered_with_zero_loss() -> None:
    student = {"x": torch.randn(4, 8, 6, 6)}
    teacher = {"x": student["x"].repeat(1, 3, 1, 1)[:, torch.randperm(24)]}
    distiller = MatchingGuidedDistiller({"x": (8, 24)}, align="matched_projection", loss="mse", norm="none")
    distiller.observe(student, teacher)
    assert distiller.rematch()["x"].agreement is None
    assert distiller(student, teacher)["loss_distill/x"].item() == 0.0


def test_an_optimiser_made_before_the_first_matching_trains_the_projection() -> None:
    distiller = projected(4, 10, matched=False)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert not distiller.matched and distiller.needs_matching
    sum(distiller.no_losses(torch.device("cpu")).values()).backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    distiller.observe(*maps(4, 10))
    start = matched_weight(distiller.rematch()["x"].matching)
    assert distiller.matched and torch.equal(distiller.projections["x"], start)
    losses = [step(distiller, optimizer, seed=0) for _ in range(20)]
    assert losses[-1] < losses[0] and not torch.equal(distiller.projections["x"], start)


def test_later_rematches_leave_the_weight_and_report_how_far_it_agrees() -> None:
    distiller = projected(4, 10)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.5)
    for seed in range(5):
        step(distiller, optimizer, seed)
    trained = distiller.projections["x"].clone()
    distiller.observe(*maps(4, 10, seed=9))
    report = distiller.rematch()["x"]
    assert torch.equal(distiller.projections["x"], trained)
    assert distiller.matchings["x"] == report.matching
    assert report.agreement == projection_agreement(trained, report.matching).agreement


def test_save_and_restore_change_nothing() -> None:
    distiller = projected(4, 10)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.5)
    step(distiller, optimizer, seed=1)
    restored = projected(4, 10, matched=False)
    restored.load_state_dict(distiller.state_dict())
    copies = [restored, copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))]
    for other in copies:
        assert other.matched and other.matchings == distiller.matchings
        assert torch.equal(other(*maps(4, 10, 2))["loss_distill/x"], distiller(*maps(4, 10, 2))["loss_distill/x"])
        other.observe(*maps(4, 10, 3))
        other.rematch()  # not the first one: the weight stays
        assert torch.equal(other.projections["x"], distiller.projections["x"])
    empty = projected(4, 10, matched=False)
    empty.load_state_dict(projected(4, 10, matched=False).state_dict())
    assert not empty.matched


def test_margins_are_those_of_the_teachers_channels() -> None:
    margin = torch.linspace(-2.0, -0.5, 10)
    distiller = MatchingGuidedDistiller(
        {"x": (4, 10)}, align="matched_projection", loss="partial_l2", norm="none", margins={"x": margin}
    )
    student, teacher = maps(4, 10)
    distiller.observe(student, teacher)
    weight = matched_weight(distiller.rematch()["x"].matching)
    own = torch.einsum("ts,nshw->nthw", weight, student["x"])
    guided = torch.maximum(teacher["x"], margin.view(1, -1, 1, 1))
    expected = ((own - guided).square() * ((own > guided) | (guided > 0))).mean()
    torch.testing.assert_close(distiller(student, teacher)["loss_distill/x"], expected)
