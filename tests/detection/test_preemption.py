"""Trainings that are told to leave, or killed, and continue as if they had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.engine import HookBase
from training_runs import ROOT, in_process_trainer, same_tensors

from d2_mgd.detection.preemption import PreemptionHook


class Sender(HookBase):
    """Sends this process a signal before a step."""

    def __init__(self, number: signal.Signals, iteration: int) -> None:
        self.number = number
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), self.number)


def end_of(output: Path) -> dict[str, Any]:
    return torch.load(output / "model_final.pth", weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(workplace: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("undisturbed")
    in_process_trainer(workplace, output).train()
    return end_of(output)


# a rematch is due after steps 2 and 4, a checkpoint after 3
@pytest.mark.parametrize(("number", "iteration"), [(signal.SIGTERM, 1), (signal.SIGINT, 4)])
def test_told_to_leave_it_saves_and_continues_to_the_bit(
    workplace: Any,
    tmp_path: Path,
    undisturbed: dict[str, Any],
    number: signal.Signals,
    iteration: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    trainer = in_process_trainer(workplace, tmp_path)
    trainer.register_hooks([Sender(number, iteration)])
    with caplog.at_level("WARNING", "d2_mgd"), pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 128 + number
    assert f"{number.name}: stopped after {iteration + 1} of 6 iterations and saved model_000000" in caplog.text
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers

    resumed = in_process_trainer(workplace, tmp_path, resume=True)
    assert resumed.start_iter == iteration + 1
    resumed.train()
    assert same_tensors(end_of(tmp_path)["model"], undisturbed["model"])
    assert same_tensors(end_of(tmp_path)["distillation"]["distiller"], undisturbed["distillation"]["distiller"])


def stop_in_a_pass(trainer: Any, of: str, after: int) -> None:
    """Send SIGTERM in the middle of a pass over images: a rematch's, after so many iterations, or an evaluation's."""
    # a pass runs no head, and an evaluation no teacher
    network = trainer.detector.teacher.model.backbone if of == "rematch" else trainer.student.head
    images = []

    def send(module: Any, arguments: Any) -> None:
        if not trainer.student.training and trainer.iter + 1 == after and trainer.start_iter < after:
            images.append(1)
            if len(images) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    network.register_forward_pre_hook(send)


@pytest.mark.parametrize("of", ["rematch", "evaluation"])
def test_told_to_leave_in_a_pass_it_breaks_it_off(
    workplace: Any, tmp_path: Path, undisturbed: dict[str, Any], of: str, caplog: pytest.LogCaptureFixture
) -> None:
    often = ("TEST.EVAL_PERIOD", "2")
    trainer = in_process_trainer(workplace, tmp_path, *often)
    stop_in_a_pass(trainer, of, after=2)
    with caplog.at_level("WARNING", "d2_mgd"), pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143
    assert "SIGTERM: stopped after 2 of 6 iterations and saved model_0000001.pth" in caplog.text
    assert (tmp_path / "matching" / "iter_0000002.npz").exists() == (of == "evaluation")
    resumed = in_process_trainer(workplace, tmp_path, *often, resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert (tmp_path / "matching" / "iter_0000002.npz").exists()
    assert same_tensors(end_of(tmp_path)["model"], undisturbed["model"])
    assert same_tensors(end_of(tmp_path)["distillation"]["distiller"], undisturbed["distillation"]["distiller"])


def test_told_to_leave_before_the_first_step_there_is_nothing_to_save(
    workplace: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = in_process_trainer(workplace, tmp_path)
    stop_in_a_pass(trainer, "rematch", after=1)  # the first matching
    with caplog.at_level("WARNING", "d2_mgd"), pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143 and "SIGTERM: stopped before a step" in caplog.text
    assert not (tmp_path / "last_checkpoint").exists()


def test_a_second_ctrl_c_leaves_at_once() -> None:
    child = os.fork()
    if child == 0:
        hook = PreemptionHook(lambda name: None, lambda: 0)
        hook.before_train()
        for pause in (0.0, 1.2):
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 130


def test_one_ctrl_c_that_arrives_twice_is_one() -> None:
    hook = PreemptionHook(lambda name: None, lambda: 0)
    hook.before_train()
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        hook.after_train()
    assert hook.stop.received == signal.SIGINT and threading.current_thread() is threading.main_thread()


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(2000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_several_processes_leave_after_the_same_step(workplace: Any, tmp_path: Path) -> None:
    long = ("SOLVER.MAX_ITER", 100_000, "TEST.EVAL_PERIOD", 0)
    process = start(workplace.arguments(tmp_path, *long, flags=("--num-gpus", "2")))
    try:
        wait_for(tmp_path / "matching" / "iter_0000000.npz", process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, said[-4000:]
    assert "SIGTERM: stopped after" in said and "Traceback" not in said
    saved = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)
    assert len(saved["training"]["processes"]) == 2


def test_told_to_leave_when_nobody_reads_what_it_says_it_saves(workplace: Any, tmp_path: Path) -> None:
    """As in ``train_net.py ... 2>&1 | tee log``."""
    process = start(workplace.arguments(tmp_path, "SOLVER.MAX_ITER", 100_000, "TEST.EVAL_PERIOD", 0))
    try:
        wait_for(tmp_path / "model_0000002.pth", process)
        assert process.stdout is not None
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
    finally:
        process.kill()
    log = (tmp_path / "log.txt").read_text()
    assert "SIGTERM: stopped after" in log
    assert f"saved {(tmp_path / 'last_checkpoint').read_text()}" in log
