"""What a detector's training logs in a service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import train_net as command_line
from recorded_service import RecordedService
from training_runs import Workplace

from d2_mgd.training import services


def test_numbers_config_matchings_and_student(workplace: Workplace, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(services.SERVICES, "mlflow", RecordedService)
    monkeypatch.setattr(RecordedService, "opened", [])
    monkeypatch.setattr(command_line, "check_services", lambda *_: None)
    flags = ("--log", "mlflow", "--log-student")
    overrides = ("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 0, "TEST.EVAL_PERIOD", 3)
    command_line.main(workplace.arguments(tmp_path / "run", *overrides, flags=flags))
    (run,) = RecordedService.opened
    assert run.success and run.files == ["model_final.pth", "student.yaml"] and run.step_name == "iteration"
    assert run.config["MGD"]["FEATURES"] == ["res4", "p4"]
    assert set(run.numbers) >= {"total_loss", "loss_distill/res4", "lr", "rematch/p4_cost", "bbox/AP"}
    assert max(run.numbers["total_loss"]) == 2
    # before the first step, and after two iterations
    assert run.images == [(f"matching/{name}", step) for step in (0, 1) for name in ("res4", "p4")]


def test_a_log_that_cannot_be_opened_is_refused(workplace: Workplace, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        command_line.main(workplace.arguments(tmp_path / "run", flags=("--log-student",)))
    assert left.value.code == 2
    assert "train_net.py: error: --log-student needs a service: add --log" in capsys.readouterr().err
