"""Being told to leave: all is saved, the status says why, and the run that goes on ends as the undisturbed one."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from classification import main_mgd
from classification.engine import Trainer
from d2_mgd.distill import MatchingGuidedDistiller
from d2_mgd.training.steps import Stepper
from tests.classification.conftest import SMALL, Run, assert_same_run, command
from tests.ranks import in_processes

METHOD = ["--arch", "shufflenet_v2_x0_5", "--mgd-reducer", "amp", "--mgd-update-freq", 1]
METHOD += ["--epochs", 3, "--lr", 0.01, "--print-freq", 1]


@pytest.fixture(scope="module")
def words(data: Path, resnet18_file: Path) -> list[object]:
    return [data, *SMALL, *METHOD, "--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]


@pytest.fixture(scope="module")
def alone(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main_mgd.main([str(word) for word in [*words, "--output-dir", folder]]) == 0
    return folder


def at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, act: Callable[[], None]) -> None:
    """Do something in the middle of a run: just before the ``count``-th call of a method."""
    original, calls = getattr(owner, name), []

    def visited(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == count:
            act()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, visited)


# three steps an epoch; evaluations: the teacher's, the student's, then one an epoch; a pass is three batches
@pytest.mark.parametrize(
    ("number", "owner", "name", "count", "epochs", "steps"),
    [
        (signal.SIGTERM, Stepper, "backward", 2, 0, 2),
        (signal.SIGINT, Stepper, "backward", 6, 1, 3),
        (signal.SIGTERM, Trainer, "evaluate", 3, 0, 3),
        (signal.SIGINT, MatchingGuidedDistiller, "observe", 5, 0, 3),
    ],
    ids=["middle of an epoch", "last step", "evaluation", "pass for a matching"],
)
def test_told_to_leave_it_saves_and_goes_on_to_the_bit(
    mgd: Run,
    words: list[object],
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    owner: Any,
    name: str,
    count: int,
    epochs: int,
    steps: int,
) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    told = ["--output-dir", tmp_path / "told"]
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, count, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as left:
            mgd(*words, *told, small=False)
    assert left.value.code == 128 + number
    progress = torch.load(tmp_path / "told" / "checkpoint.pth", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (epochs, steps)
    assert f"{number.name}: stopped after {epochs} epochs and {steps} of 3 steps, all of it saved" in (
        tmp_path / "told" / "log.txt"
    ).read_text(encoding="utf-8")
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers

    assert mgd(*words, *told, "--resume", small=False) == 0
    assert_same_run(alone, tmp_path / "told")


@pytest.mark.parametrize(("name", "count"), [("evaluate", 2), ("_observe_pass", 1)])
def test_before_the_first_step_there_is_nothing_to_save(
    mgd: Run, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, name, count, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as left:
            mgd(*words, small=False)
    assert left.value.code == 143
    assert not (tmp_path / "run" / "checkpoint.pth").exists()
    assert "there is nothing to save" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


# ---- real processes


def start(words: list[str], stdout: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """A command line in a process group of its own, as a shell gives it one."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def read_until(process: subprocess.Popen[str], text: str) -> None:
    """Wait for a line of a process's log."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen))


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=200)
    return process.returncode, said


def test_ctrl_c_reaches_the_loading_processes_and_they_go_on_with_the_step(
    mgd: Run, words: list[object], tmp_path: Path
) -> None:
    """The terminal tells the whole group of processes; there are a thousand epochs to go."""
    run = [*words, "--epochs", 1000, "--workers", 2, "--checkpoint-freq", 1, "--output-dir", tmp_path / "run"]
    process = start(command("main_mgd.py", *run))
    read_until(process, "epoch 1, step 2 of 3")
    os.killpg(process.pid, signal.SIGINT)
    status, said = end_of(process)
    assert status == 130, said
    assert "all of it saved" in said
    assert "Traceback" not in said
    assert torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)["progress"]["epoch"] < 1000


def test_a_second_ctrl_c_leaves_at_once(words: list[object], tmp_path: Path) -> None:
    """A step of these sizes lasts longer than this test waits."""
    slow = ["--image-size", 256, "--batch-size", 24, "--mgd-update-images", 1, "--arch", "wide_resnet50_2"]
    process = start(command("main_mgd.py", *words, *slow, "--features", "stage2", "--output-dir", tmp_path / "run"))
    read_until(process, "stage2 S=")
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "Finishing this step")
    time.sleep(1.2)  # closer together, two are taken for one
    os.killpg(process.pid, signal.SIGINT)
    status, said = end_of(process)
    assert status == 130
    assert "Left at once" in said
    assert not (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.fixture(scope="module")
def two(words: list[object]) -> list[object]:
    """Two processes: mixed precision, a step in parts, statistics of each process's own.

    Images of 64 px: at 32 a part of two images leaves batch-norms two values a channel, and their gradients explode.
    """
    together = ["--accumulate", 2, "--mixed-precision", "bf16", "--mgd-update-source", "online", "--workers", 2]
    return [*words, *together, "--image-size", 64]


@pytest.fixture(scope="module")
def undisturbed(two: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert in_processes(main_mgd.main, [*two, "--output-dir", folder], 2) == [0, 0]
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)  # NaN would be unequal to itself
    return folder


def second_rank_gets_a_signal(words: list[str]) -> int:
    """In the second step of the second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            at_call(patch, Stepper, "backward", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return main_mgd.main(words)


def test_one_of_two_processes_is_told_and_both_leave_after_the_same_step(
    two: list[object], undisturbed: Path, tmp_path: Path
) -> None:
    """Then the run goes on, to the same bits. A test of detection sends the signal to torchrun."""
    folder = ["--output-dir", tmp_path / "run"]
    assert in_processes(second_rank_gets_a_signal, [*two, *folder], 2) == [143, 143]
    assert "SIGTERM: stopped after 1 epochs and 2 of 3 steps" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    stored = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert len(stored["processes"]) == 2
    assert in_processes(main_mgd.main, [*two, *folder, "--resume"], 2) == [0, 0]
    assert_same_run(undisturbed, tmp_path / "run")


def test_told_to_leave_when_nobody_reads_what_it_says_it_saves(words: list[object], tmp_path: Path) -> None:
    """As in ``main_mgd.py ... 2>&1 | tee log``, where Ctrl-C ends tee too."""
    endless = ["--epochs", 100_000, "--output-dir", tmp_path / "run"]
    process = start(command("main_mgd.py", *words, *endless), stdout=subprocess.PIPE)
    read_until(process, "epoch 1, step 2 of 3")
    assert process.stdout is not None and process.stderr is not None
    try:
        process.stdout.close()
        process.stderr.close()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=200) == 130
    finally:
        process.kill()
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "SIGINT: stopped after" in log and "all of it saved" in log
    assert (tmp_path / "run" / "checkpoint.pth").is_file()
