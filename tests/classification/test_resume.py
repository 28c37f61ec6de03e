"""Going on: a killed run ends as the undisturbed one does, bit for bit; and checkpoints that do not fit."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from classification import main_base
from tests.classification.conftest import SMALL, Run, assert_same_run, command
from tests.ranks import in_processes


def kill_after_checkpoint(words: list[str], checkpoint: Path) -> None:
    """Start a run, and kill it and its workers outright as soon as there is a checkpoint."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read() if process.stderr else ""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def method(data: Path, resnet18_file: Path) -> list[object]:
    """Everything that has a state: dropout, a random reducer, costs that grow with the steps, meters, momentum."""
    teacher = ["--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
    arguments = [
        "--arch",
        "mobilenet_v2",
        "--mgd-reducer",
        "rd",
        "--mgd-update-freq",
        1,
        "--mgd-update-source",
        "online",
    ]
    return [data, *SMALL, *arguments, "--mgd-with-kd", 1, "--epochs", 3, "--lr", 0.01, "--checkpoint-freq", 1, *teacher]


def test_a_killed_run_ends_as_the_undisturbed_one(mgd: Run, method: list[object], tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert mgd(*method, "--output-dir", undisturbed, small=False) == 0
    kill_after_checkpoint(
        command("main_mgd.py", *method, "--workers", 2, "--output-dir", killed), killed / "checkpoint.pth"
    )
    before = torch.load(killed / "checkpoint.pth", weights_only=True)["progress"]
    assert before["epoch"] < 3
    assert mgd(*method, "--resume", killed / "checkpoint.pth", small=False) == 0
    assert_same_run(undisturbed, killed)


def test_with_a_compiled_teacher_in_bfloat16_it_resumes_exactly(method: list[object], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*method, "--teacher-compile", 1, "--teacher-precision", "bfloat16", "--output-dir"]
    subprocess.run(command("main_mgd.py", *words, whole), check=True)  # not forked, because it compiles
    kill_after_checkpoint(command("main_mgd.py", *words, parts), parts / "checkpoint.pth")
    subprocess.run(command("main_mgd.py", *words, parts, "--resume"), check=True)
    assert "Compiled the teacher" in (parts / "log.txt").read_text()
    assert_same_run(whole, parts)


@pytest.mark.parametrize("step", [2])
def test_every_step_can_be_gone_on_from(
    mgd: Run, method: list[object], tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops right after the checkpoint of a step in the middle of the second epoch."""
    from classification.engine import Trainer

    class Stopped(Exception):
        pass

    save = Trainer.save

    def stop(self: Trainer) -> None:
        save(self)
        if (self.progress.epoch, self.progress.step) == (1, step):
            raise Stopped

    assert mgd(*method, "--output-dir", tmp_path / "undisturbed", small=False) == 0
    monkeypatch.setattr(Trainer, "save", stop)
    with pytest.raises(Stopped):
        mgd(*method, "--output-dir", tmp_path / "stopped", small=False)
    monkeypatch.undo()
    assert mgd(*method, "--output-dir", tmp_path / "stopped", "--resume", "auto", small=False) == 0
    assert_same_run(tmp_path / "undisturbed", tmp_path / "stopped")


def test_going_on_with_more_epochs(base: Run, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["--arch", "shufflenet_v2_x0_5", "--lr-drop-epochs", 1]
    assert base(data, *arguments, "--epochs", 2) == 0
    assert base(data, *arguments, "--output-dir", tmp_path / "parts") == 0
    assert base(data, *arguments, "--epochs", 2, "--resume", tmp_path / "parts" / "checkpoint.pth") == 0
    assert "options changed since the checkpoint: epochs 1 -> 2" in (tmp_path / "parts" / "log.txt").read_text()
    assert_same_run(tmp_path / "run", tmp_path / "parts")
    # and a finished run has nothing left to do
    assert base(data, *arguments, "--epochs", 2, "--resume", "auto", "--output-dir", tmp_path / "parts") == 0
    assert_same_run(tmp_path / "run", tmp_path / "parts")


def test_going_on_with_other_settings_of_the_optimiser(base: Run, data: Path, tmp_path: Path) -> None:
    arguments = ["--arch", "shufflenet_v2_x0_5", "--lr", 0.01]
    assert base(data, *arguments) == 0
    changed = ["--wd", 0.5, "--momentum", 0.1, "--nesterov", 1, "--epochs", 2]
    assert base(data, *arguments, *changed, "--resume", tmp_path / "run" / "checkpoint.pth") == 0
    optimizer = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["optimizer"]
    (group,) = optimizer["param_groups"]
    assert {key: group[key] for key in ("weight_decay", "momentum", "nesterov", "lr")} == {
        "weight_decay": 0.5,
        "momentum": 0.1,
        "nesterov": True,
        "lr": 0.01,
    }
    assert optimizer["state"][0]["momentum_buffer"].any()


def test_going_on_with_a_network_that_knows_the_version_of_its_weights(base: Run, data: Path, tmp_path: Path) -> None:
    """torchvision's MNASNet refuses weights without one."""
    assert base(data, "--arch", "mnasnet0_5") == 0
    assert base(data, "--arch", "mnasnet0_5", "--epochs", 2, "--resume", tmp_path / "run" / "checkpoint.pth") == 0


def test_resume_without_a_checkpoint_starts_anew(base: Run, data: Path, tmp_path: Path) -> None:
    assert base(data, "--arch", "mobilenet_v1", "--resume", "auto", "--output-dir", tmp_path / "run") == 0
    assert (tmp_path / "run" / "checkpoint.pth").exists()


def test_a_restart_by_torchrun_goes_on_by_itself(
    base: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert base(data, "--arch", "mobilenet_v1") == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert base(data, "--arch", "mobilenet_v1", "--epochs", 2) == 0
    assert len((tmp_path / "run" / "metrics.json").read_text().splitlines()) == 2


def _the_second_counts_a_restart(words: list[str]) -> int:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]
    return main_base.main(words)


def test_a_restart_that_one_machine_counts_is_one_for_all(base: Run, data: Path, tmp_path: Path) -> None:
    words = [data, *SMALL, "--arch", "mobilenet_v1", "--epochs", 2, "--output-dir", tmp_path / "run"]
    assert base(data, "--arch", "mobilenet_v1") == 0
    assert in_processes(_the_second_counts_a_restart, words, 2) == [0, 0]
    assert "Resumed" in (tmp_path / "run" / "log.txt").read_text()


def test_checkpoints_that_do_not_fit(
    base: Run, mgd: Run, data: Path, resnet18_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert base(data, "--arch", "mobilenet_v1") == 0
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    assert base(data, "--arch", "resnet18", "--resume", checkpoint) == 2
    assert "is of mobilenet_v1, but --arch is resnet18" in capsys.readouterr().err
    teacher = ["--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
    assert mgd(data, "--arch", "mobilenet_v1", *teacher, "--resume", checkpoint) == 2
    assert "fit these options: it was written without a feature distiller" in capsys.readouterr().err
    assert base(data, "--arch", "mobilenet_v1", "--resume", tmp_path / "run" / "student_last.pth") == 2
    assert "to start from its weights use --student-resume" in capsys.readouterr().err
    assert base(data, "--arch", "mobilenet_v1", "--resume", tmp_path / "none.pth") == 2
    assert "none.pth does not exist" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for split in ("train", "valid"):
        (other / split / "ant").rename(other / split / "aphid")
    assert base(other, "--arch", "mobilenet_v1", "--resume", checkpoint) == 2
    assert "has 3 classes that are not the data's 3" in capsys.readouterr().err
    checkpoint.write_bytes(checkpoint.read_bytes()[:100_000])
    assert base(data, "--arch", "mobilenet_v1", "--resume", checkpoint) == 2
    said = capsys.readouterr().err
    assert "checkpoint_epoch_0001.pth has 100000 bytes of the " in said
    assert "no earlier checkpoint is intact" in said


def test_going_on_with_another_distiller_is_refused(
    mgd: Run, data: Path, resnet18_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    teacher = ["--arch", "shufflenet_v2_x0_5", "--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
    assert mgd(data, *teacher, "--features", "stage2", "stage3") == 0
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    assert mgd(data, *teacher, "--features", "stage3", "--resume", checkpoint, "--epochs", 2) == 2
    assert "the checkpoint does not fit these options" in capsys.readouterr().err


def test_another_batch_goes_on_after_as_many_images(base: Run, data: Path, tmp_path: Path) -> None:
    """24 images: after two steps of eight, one of two processes is lost, and with it half of a step's images."""
    words = ["--arch", "shufflenet_v2_x0_5", "--lr", 0.01, "--checkpoint-freq", 2]
    assert base(data, *words) == 0
    half = tmp_path / "run" / "checkpoint_epoch_0000_step_000002.pth"
    assert base(data, *words, "--batch-size", 4, "--resume", half) == 0
    assert "0 epochs and 4 steps are done" in (tmp_path / "run" / "log.txt").read_text()
    stored = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert stored["student"]["conv1.1.num_batches_tracked"] == 2 + 2
    assert stored["progress"]["history"][-1]["epoch"] == 1
