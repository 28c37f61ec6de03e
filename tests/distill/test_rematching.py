"""Rematching in a training: the pass over images, and bad costs or failing solvers, on ranks that are not alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import d2_mgd.distill.distiller as distiller_module
from d2_mgd.distill import MatchingGuidedDistiller, RematchSchedule, WeightSchedule
from d2_mgd.distill.rematching import gather_costs, observe_pass, rematch, rematch_due
from d2_mgd.errors import CommonError
from d2_mgd.matching import SolverError
from d2_mgd.training import Interrupted


def all_maps() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, 5, 5, generator=generator), torch.randn(7, 9, 5, 5, generator=generator)


def observed(share: slice = slice(None)) -> MatchingGuidedDistiller:
    distiller = MatchingGuidedDistiller({"a": (4, 9)})
    student, teacher = all_maps()
    distiller.observe({"a": student[share]}, {"a": teacher[share]})
    return distiller


def failing(error: Exception) -> Any:
    def fail(*arguments: Any) -> Any:
        raise error

    return fail


def test_a_rematch_is_due_at_the_start_of_the_distillation_and_by_schedule() -> None:
    weight = WeightSchedule(start=3, stop=9)
    due = [steps for steps in range(12) if rematch_due(RematchSchedule([4]), weight, steps)]
    assert due == [3, 4, 8]
    assert [steps for steps in range(9) if rematch_due(RematchSchedule([4], start=False), weight, steps)] == [4, 8]


def test_a_pass_changes_nothing_but_the_costs() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval(), nn.Dropout())
    distiller = observed()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state, modes = torch.get_rng_state(), [module.training for module in student.modules()]
    _, teacher = all_maps()

    def batches() -> Iterator[Tensor]:
        for _ in range(2):
            yield torch.randn(7, 3, 5, 5)

    observe_pass(distiller, student, batches, lambda images: ({"a": student(images)}, {"a": teacher}))
    assert distiller.costs["a"].num_images == 14
    assert torch.equal(torch.get_rng_state(), state) and [module.training for module in student.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_an_interrupted_pass_leaves_empty_costs() -> None:
    distiller, (student, teacher) = observed(), all_maps()

    def batches() -> Iterator[Tensor]:
        yield student
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        observe_pass(distiller, nn.Identity(), batches, lambda maps: ({"a": maps}, {"a": teacher}))
    assert distiller.costs["a"].num_images == 0


def test_a_matching_of_single_pixels_by_correlation_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    distiller = MatchingGuidedDistiller({"p6": (4, 9), "p7": (4, 9)}, metric="pearson")
    student, teacher = all_maps()
    distiller.observe({"p6": student, "p7": student[..., :1, :1]}, {"p6": teacher, "p7": teacher[..., :1, :1]})
    with caplog.at_level(logging.WARNING, "d2_mgd"):
        rematch(distiller, "0 epochs")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["p7 after 0 epochs"]


def test_a_lost_rank_is_not_taken_for_a_failed_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = observed()
    rematch(distiller, "0 steps")
    monkeypatch.setattr(distiller.costs["a"], "all_reduce", failing(RuntimeError("Connection reset by peer")))
    with pytest.raises(RuntimeError, match="Connection reset by peer"):
        rematch(distiller, "1 step")


def test_a_failed_solver_is_a_warning_where_there_is_a_matching(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    distiller, fresh = observed(), observed()
    before = rematch(distiller, "0 steps")["a"].matching
    monkeypatch.setattr(distiller_module, "solve_matching", failing(SolverError("the solver ended with 3.")))
    with pytest.raises(CommonError, match=r"^the first matching cannot be found: the solver ended with 3\.$"):
        rematch(fresh, "0 steps")
    distiller.observe(*({"a": maps} for maps in all_maps()))
    with caplog.at_level(logging.WARNING, "d2_mgd"):
        assert rematch(distiller, "5 steps") == {}
    assert "Rematch after 5 steps: the solver ended with 3. The old matching stays." in caplog.text
    now = distiller.matchings["a"]
    assert now is not None and (now.groups == before.groups).all() and distiller.costs["a"].num_images == 0


def _ranks(rank: int, folder: str, case: str) -> None:
    """A rematch where ranks have other numbers of images, maps that are not finite, or no solver."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    shares = [slice(0, 0), slice(0, 6), slice(6, 7)]
    if case == "only one":
        shares = [slice(0, 0), slice(0, 0), slice(0, 7)]
    distiller = MatchingGuidedDistiller({"a": (4, 9)})
    student, teacher = all_maps()
    if case == "second":
        distiller.observe({"a": student}, {"a": teacher})
        rematch(distiller, "0 steps")
    if case in ("first", "second") and rank == 2:
        student[6, 1] = torch.nan
    if case == "solver" and rank == 0:
        distiller_module.solve_matching = failing(SolverError("the solver found no flow."))
    if case != "empty":
        distiller.observe({"a": student[shares[rank]]}, {"a": teacher[shares[rank]]})
    gathered = -1
    if case == "gathered":
        gather_costs(distiller)
        gathered = distiller.costs["a"].num_images
    message = ""
    try:
        rematch(distiller, "1 step")
    except CommonError as error:
        message = str(error)
    matching = distiller.matchings["a"]
    found = {"message": message, "groups": None if matching is None else torch.from_numpy(matching.groups.copy())}
    left = distiller.costs["a"].num_images
    torch.save({**found, "left": left, "gathered": gathered}, Path(folder) / f"{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unequal", ""),
        ("only one", ""),
        ("gathered", ""),
        ("first", "the first matching cannot be found: feature a: the matching cost is not finite"),
        ("second", ""),
        ("empty", "the first matching cannot be found: feature a: the matching cost is empty"),
        ("solver", "the first matching cannot be found: the solver found no flow."),
    ],
)
def test_three_unlike_ranks_find_one_matching_or_fail_alike(tmp_path: Path, case: str, message: str) -> None:
    torch.multiprocessing.start_processes(_ranks, (str(tmp_path), case), nprocs=3, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(3)]
    assert len({one["message"] for one in found}) == 1
    assert found[0]["message"].startswith(message)
    if message:
        assert all(one["groups"] is None for one in found)
        return
    alone = rematch(observed(), "0 steps")["a"].matching
    assert all(torch.equal(one["groups"], torch.tensor(alone.groups)) for one in found)
    assert [one["left"] for one in found] == [0, 0, 0]  # the next collection is a new one, after a bad cost too
    assert [one["gathered"] for one in found] == ([7, 0, 0] if case == "gathered" else [-1, -1, -1])
