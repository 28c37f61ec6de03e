"""Logs in services: a recorded one, and the real ones without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from recorded_service import RecordedService

from d2_mgd.errors import UserError
from d2_mgd.training import services
from d2_mgd.training.services import check_services, open_logs

CONFIG = {"MODEL": {"WEIGHTS": "", "SIZES": [1, 2]}, "SEED": 7}
IMAGE = np.zeros((4, 6, 3), np.uint8)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[RecordedService]:
    monkeypatch.setitem(services.SERVICES, "wandb", RecordedService)
    monkeypatch.setattr(RecordedService, "opened", [])
    return RecordedService


def test_a_resumed_training_continues_its_run(tmp_path: Path, recorded: type[RecordedService]) -> None:
    for resume in (False, True, False):
        (log,) = open_logs(["wandb", "wandb"], tmp_path, CONFIG, "iteration", resume)
        log.scalars({"loss": 1.0}, 3)
        log.image("matching/p3", IMAGE, 3)
        log.close(success=True)
    assert [one.run_id for one in recorded.opened] == [None, "first", None]
    assert recorded.opened[0].numbers == {"loss": {3: 1.0}} and recorded.opened[0].success
    assert recorded.opened[0].images == [("matching/p3", 3)]
    assert (tmp_path / "wandb_run.txt").read_text() == "first"


@pytest.mark.parametrize("method", ["start", "scalars"])
def test_a_failing_service_is_one_warning(
    tmp_path: Path, recorded: type[RecordedService], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(recorded, "fail_at", method)
    warnings: list[str] = []
    monkeypatch.setattr(services.logger, "warning", lambda text, *values: warnings.append(text % values))
    (log,) = open_logs(["wandb"], tmp_path, CONFIG, "iteration", resume=False)
    for step in range(3):
        log.scalars({"loss": 1.0}, step)
    log.close(success=True)
    assert warnings == ["--log wandb stops, and the training continues: no route to host"]
    assert recorded.opened[0].success is None


def test_what_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    check_services([])
    with pytest.raises(UserError, match="--log-student needs a service: add --log"):
        check_services([], log_student=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--log mlflow needs the package mlflow, .*: pip install mlflow\."):
        check_services(["mlflow"])


def test_wandb_without_a_key_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"--log wandb has no API key: .* WANDB_API_KEY, or set WANDB_MODE=offline"):
        check_services(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_services(["wandb"])


def _written(service: str, folder: Path) -> None:
    """Log a little, in this process."""
    (log,) = open_logs([service], folder, CONFIG, "iteration", resume=False)
    for step in range(3):
        log.scalars({"rematch/p3_cost": 0.5, "loss": 1.0 / (step + 1)}, step)
    log.image("matching/p3", IMAGE, 2)
    student = folder / "student.pth"
    student.write_bytes(b"weights")
    log.file(student)
    log.close(success=True)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    _written("wandb", tmp_path)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("run-*.wandb")
    wandb.teardown()  # its own process may write the file's end after the run has finished
    content = log.read_bytes()
    run_id = (tmp_path / "wandb_run.txt").read_text()
    assert run_id in log.name
    for text in (b"rematch/p3_cost", b"loss", b"student.pth", b"WEIGHTS"):
        assert text in content
    assert list(run.glob("files/media/images/matching/*.png"))


def test_mlflow_in_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlflow", "sqlalchemy"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    _written("mlflow", tmp_path)
    client, run_id = MlflowClient(), (tmp_path / "mlflow_run.txt").read_text()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["rematch/p3_cost"] == 0.5
    assert run.data.params["MODEL.SIZES"] == "[1, 2]" and run.data.params["SEED"] == "7"
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [0, 1, 2]
    stored = [client.list_artifacts(run_id, folder)[0].path for folder in ("student", "matching/p3")]
    assert stored == ["student/student.pth", "matching/p3/0000002.png"]
