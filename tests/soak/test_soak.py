"""Trainings that are killed at bad moments end as the undisturbed one; the long form is `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from tests.soak.trainings import Kill, Soak, differences

SHORT = ("SOLVER.MAX_ITER", 6, "SOLVER.STEPS", "(4,)", "SOLVER.CHECKPOINT_PERIOD", 2, "MGD.REMATCH.NUM_IMAGES", 3)


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Soak:
    return Soak(tmp_path_factory.mktemp("soak"), *SHORT)


def test_killed_again_and_again_it_ends_as_undisturbed(soak: Soak) -> None:
    wanted = soak.ended(soak.output())
    output = soak.output()

    inside_write = soak.killed(output, Kill("write", 2))
    assert inside_write is not None and inside_write.pointer == "model_0000001.pth"
    (half,) = inside_write.leftovers
    assert half.startswith(".model_0000003.pth.") and 0 < (output / half).stat().st_size < len_of(output, 1)

    inside_rematch = soak.killed(output, Kill("report", 1), "DATALOADER.NUM_WORKERS", 1)
    assert inside_rematch is not None and inside_rematch.begun == 2

    before_pointer = soak.killed(output, Kill("pointer", 1))
    assert before_pointer is not None and before_pointer.begun == 2 and before_pointer.pointer == "model_0000001.pth"
    assert (output / "model_0000003.pth").exists()

    assert [*differences(wanted, soak.ended(output))] == []
    assert not list(output.glob(".*.tmp"))  # nothing that was cut short is left


def len_of(output: Path, iteration: int) -> int:
    return (output / f"model_{iteration:07d}.pth").stat().st_size


def test_a_difference_is_seen_wherever_it_is() -> None:
    def made(bit: float) -> dict:
        return {"model": {"w": torch.zeros(2)}, "training": {"processes": [{"numbers": {"n": bit}}]}}

    changed = made(0.0)
    changed["model"]["w"][1] = 1e-45  # the smallest number there is
    assert [*differences(made(0.0), made(0.0))] == []
    assert [*differences(made(0.0), changed)] == ["checkpoint.model.w"]
    assert [*differences(made(0.0), made(1.0))] == ["checkpoint.training.processes[0].numbers.n"]
    assert [*differences({"a": 1}, {"b": 1})] == ["checkpoint.a", "checkpoint.b"]
