from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.engine import HookBase
from training_runs import in_process_trainer, same_tensors

from d2_mgd.detection.hooks import MatchingHook
from d2_mgd.detection.loader import TrainLoader
from d2_mgd.distill import load_reports
from d2_mgd.training.randomness import random_state


def hook_of(trainer: Any) -> MatchingHook:
    return next(hook for hook in trainer._hooks if isinstance(hook, MatchingHook))


class Recorder(HookBase):
    """Remembers what a step was given and what came of it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.observed: list[int] = []

    def after_step(self) -> None:
        self.losses.append(self.trainer.storage.latest()["total_loss"][0])
        self.observed.append(self.trainer.detector.distiller.costs["res4"].num_images)


def test_a_rematch_leaves_everything_else_as_it_was(workplace: Any, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path)
    trainer.detector.train()
    stubborn = trainer.student.backbone.bottom_up.res4[0].eval()  # a module that is not in the mode of its parent
    modes = [module.training for module in trainer.detector.modules()]
    student = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    state = random_state()
    hook = hook_of(trainer)

    hook._observe_pass(0)

    after = random_state()
    assert after["python"] == state["python"] and torch.equal(after["torch"], state["torch"])
    assert torch.equal(after["numpy"][1], state["numpy"][1]) and after["numpy"][2:] == state["numpy"][2:]
    assert [module.training for module in trainer.detector.modules()] == modes and not stubborn.training
    assert same_tensors(trainer.student.state_dict(), student)
    assert trainer.detector.distiller.costs["res4"].num_images == 5


def test_rematching_does_not_change_which_batches_train(workplace: Any, tmp_path: Path) -> None:
    taken: dict[str, list[str]] = {}
    for periods in ("[1]", "[0]"):
        trainer = in_process_trainer(
            workplace, tmp_path / periods, "MGD.REMATCH.PERIODS", periods, "MGD.REDUCER", "amp"
        )
        loader = trainer.data_loader
        assert isinstance(loader, TrainLoader)
        names = taken[periods] = []
        mapper = loader.mapper
        loader.mapper = lambda record, mapper=mapper, names=names: (names.append(record["file_name"]), mapper(record))[
            1
        ]
        trainer.train()
    assert taken["[1]"] == taken["[0]"]


def test_what_a_rematch_found_is_kept_told_and_written(
    workplace: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = in_process_trainer(workplace, tmp_path)
    with caplog.at_level(logging.INFO, "d2_mgd"):
        trainer.train()
    files = sorted(path.name for path in (tmp_path / "matching").iterdir())
    assert files == ["iter_0000000.npz", "iter_0000002.npz", "iter_0000004.npz"]  # not after the last step
    reports = load_reports(tmp_path / "matching" / files[-1])
    matching = trainer.detector.distiller.matchings["res4"]
    assert (reports["res4"].matching.groups == matching.groups).all()
    assert reports["res4"].num_images == 5
    latest = trainer.storage.latest()
    for name in ("res4", "p4"):
        assert latest[f"rematch/{name}_cost"][0] == pytest.approx(reports[name].mean_cost)
        assert latest[f"rematch/{name}_changed"][0] == pytest.approx(reports[name].changed)
    assert latest["rematch/seconds"][0] > 0
    assert "Rematch after 4 iterations: res4 S=32 T=64 images=5 mean cost" in caplog.text


def test_online_costs_come_from_every_kth_step(workplace: Any, tmp_path: Path) -> None:
    online = ("MGD.REMATCH.SOURCE", "online", "MGD.REMATCH.EVERY", "2", "MGD.REMATCH.PERIODS", "[5]")
    trainer = in_process_trainer(workplace, tmp_path, *online)
    recorder = Recorder()
    trainer.register_hooks([recorder])
    trainer.train()
    assert recorder.observed == [0, 0, 2, 2, 4, 0]  # batches of two; rematches at 0 and 5
    assert load_reports(tmp_path / "matching" / "iter_0000000.npz")["p4"].num_images == 2
    assert load_reports(tmp_path / "matching" / "iter_0000005.npz")["p4"].num_images == 6


def test_nothing_is_rematched_where_nothing_is_matched(workplace: Any, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path, "MGD.ALIGN", "conv1x1", "MGD.LOSS", "mse")
    trainer.train()
    assert not (tmp_path / "matching").exists()
    assert math.isfinite(trainer.storage.latest()["loss_distill/p4"][0])


def test_nothing_is_distilled_before_the_first_matching(workplace: Any, tmp_path: Path) -> None:
    late = ("MGD.REMATCH.PERIODS", "[4]", "MGD.REMATCH.START", "False")
    trainer = in_process_trainer(workplace, tmp_path, *late)
    trainer.train()
    assert [path.name for path in (tmp_path / "matching").iterdir()] == ["iter_0000004.npz"]
    losses = [value for value, _ in trainer.storage.history("loss_distill/p4").values()]
    assert losses[:4] == [0.0] * 4 and min(losses[4:]) > 0


def test_a_longer_training_catches_up_on_the_rematch_at_the_end_of_a_shorter(workplace: Any, tmp_path: Path) -> None:
    in_process_trainer(workplace, tmp_path, "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "[3]").train()
    assert not (tmp_path / "matching" / "iter_0000004.npz").exists()
    trainer = in_process_trainer(workplace, tmp_path, resume=True)
    trainer.train()
    assert (tmp_path / "matching" / "iter_0000004.npz").exists()
