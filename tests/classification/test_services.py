"""What a classification run logs in a service, and when it says it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recorded_service import RecordedService

from classification import main_mgd, run
from d2_mgd.training import services
from d2_mgd.training.clocks import Remaining

SMALL = ["--image-size", 32, "--batch-size", 8, "--workers", 0, "--device", "cpu", "--print-freq", 1, "--epochs", 2]


@pytest.mark.parametrize("fail_at", ["", "start"])
def test_numbers_options_matchings_and_student(
    data: Path, tmp_path: Path, resnet18_file: Path, monkeypatch: Any, capfd: Any, fail_at: str
) -> None:
    monkeypatch.setitem(services.SERVICES, "mlflow", RecordedService)
    monkeypatch.setattr(RecordedService, "opened", [])
    monkeypatch.setattr(RecordedService, "fail_at", fail_at)
    warnings: list[str] = []
    monkeypatch.setattr(services.logger, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(run, "check_services", lambda *_: None)
    words = [data, *SMALL, "--arch", "resnet18", "--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
    words += [
        "--output-dir",
        tmp_path / "run",
        "--mgd-reducer",
        "amp",
        "--mgd-update-freq",
        1,
        "--log",
        "mlflow",
        "--log-student",
    ]
    assert main_mgd.main([str(word) for word in words]) == 0
    shown = "".join(capfd.readouterr())
    assert "images/s; 0:00:0" in shown and " left" in shown
    (logged,) = RecordedService.opened
    if fail_at:
        assert warnings == ["--log mlflow stops, and the training continues: no route to host"]
        return
    assert logged.success and logged.files == ["student_last.pth"] and logged.step_name == "step"
    assert logged.config["arch"] == "resnet18"
    assert list(logged.numbers["epoch/err1"]) == [3, 6] and list(logged.numbers["step/lr"]) == [1, 2, 3, 4, 5, 6]
    assert set(logged.images) == {(f"matching/stage{stage}", step) for step in (0, 3) for stage in range(1, 5)}


def test_the_time_that_is_left(monkeypatch: Any) -> None:
    now = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr("d2_mgd.training.clocks.time.perf_counter", lambda: next(now))
    remaining = Remaining(done=5, total=1000)
    assert remaining.after(10) == "0:33:00"  # 2 s a step
    assert remaining.after(1000) == "0:00:00"
