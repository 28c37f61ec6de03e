"""Two processes under torchrun that lose one of them, are told to leave, or meet an image that one cannot read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import train_net
from training_runs import ROOT, in_process_trainer, run, write_coco

from d2_mgd.detection.loader import SampleError
from tests.ranks import in_processes
from tests.soak.trainings import KILL_AT, differences, final

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN_NET = str(ROOT / "tools" / "train_net.py")
# all that a step can be: parts, mixed precision, loading processes
ALL = ("SOLVER.IMS_PER_BATCH", 4, "MGD.ACCUMULATE", 2, "SOLVER.AMP.ENABLED", True, "DATALOADER.NUM_WORKERS", 1)


def trained(arguments: list[str]) -> int:
    train_net.main(arguments)
    return 0


def test_a_lost_process_is_restarted_and_all_continue_to_the_bit(workplace: Any, tmp_path: Path) -> None:
    assert in_processes(trained, workplace.arguments(tmp_path / "whole", *ALL, "TEST.EVAL_PERIOD", 0), 2) == [0, 0]
    mark = tmp_path / "killed"
    kill = ["--place", "step", "--count", "5", "--rank", "1", "--mark", str(mark)]
    arguments = workplace.arguments(tmp_path / "lost", *ALL, "TEST.EVAL_PERIOD", 0)
    killer = [str(KILL_AT), *kill, TRAIN_NET, *arguments]
    done = run([*TORCHRUN, "--max-restarts", "1", *killer])
    assert mark.exists() and "Starting training from iteration 3" in done.stdout
    assert [*differences(final(tmp_path / "whole"), final(tmp_path / "lost"))] == []


def counting_a_restart_on_rank_0(arguments: list[str]) -> int:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(os.environ["RANK"] == "0"))
    return trained(arguments)


def test_two_machines_of_which_one_counts_a_restart_both_continue(workplace: Any, tmp_path: Path) -> None:
    """Each machine's agent counts for itself, and one that came in another's place has counted none."""
    plain = ("MGD.ENABLED", "False")
    in_process_trainer(workplace, tmp_path, *plain).train()
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    arguments = workplace.arguments(tmp_path, "TEST.EVAL_PERIOD", 0, *plain)
    assert in_processes(counting_a_restart_on_rank_0, arguments, 2) == [0, 0]
    for log in ("log.txt", "log.txt.rank1"):
        assert "Starting training from iteration 3" in (tmp_path / log).read_text()


def test_torchrun_that_is_told_to_leave_leaves_a_checkpoint(workplace: Any, tmp_path: Path) -> None:
    long = ("SOLVER.MAX_ITER", 100_000, "TEST.EVAL_PERIOD", 0, "DATALOADER.NUM_WORKERS", 2)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*TORCHRUN, TRAIN_NET, *workplace.arguments(tmp_path, *long)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for(tmp_path / "matching" / "iter_0000002.npz", process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "SIGTERM: stopped after" in said and "; the same command with --resume continues." in said
    assert "DataLoader worker" not in said  # the loading processes lived until the step was over
    saved = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)
    assert (
        len(saved["training"]["processes"]) == 2
        and f"of 100000 iterations and saved model_{saved['iteration']:07d}" in said
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(2000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_an_image_that_one_process_cannot_read_ends_both(
    workplace: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, root = write_coco(tmp_path, "unreadable", 4, seed=0)
    broken = root / "001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    online = ("MGD.REMATCH.START", False)  # so that a training step meets it
    known = workplace.arguments(tmp_path / "out", "DATASETS.TRAIN", "('unreadable',)", *online)
    statuses = in_processes(trained, ["--register-coco", "unreadable", path, root, *known], 2)
    said = {line.partition(": error: ")[2] for line in capfd.readouterr().err.splitlines() if ": error: " in line}
    unread = [sentence for sentence in said if f"cannot read {broken}: " in sentence]
    others = [sentence for sentence in said if "another rank has ended; its error is the cause" in sentence]
    assert len(unread) + len(others) == len(said)
    assert sorted(statuses) == [2 - len(others), 2] and unread  # on a busy machine both ranks may read it
    # Detectron2 logs what ended each process
    for log in (tmp_path / "out" / "log.txt", tmp_path / "out" / "log.txt.rank1"):
        assert f"SampleError: cannot read {broken}: " in log.read_text()


def test_a_loading_process_that_is_killed_is_named(workplace: Any, tmp_path: Path) -> None:
    from detectron2.engine import HookBase

    class KillLoader(HookBase):
        def before_step(self) -> None:
            import multiprocessing

            if self.trainer.iter == 2:
                (child,) = multiprocessing.active_children()
                os.kill(child.pid, signal.SIGKILL)

    trainer = in_process_trainer(workplace, tmp_path, "DATALOADER.NUM_WORKERS", "1", "MGD.REMATCH.PERIODS", "[0]")
    trainer.register_hooks([KillLoader()])
    with pytest.raises(SampleError, match=r"a loading process is gone \(DataLoader worker .*lower DATALOADER.NUM_WORK"):
        trainer.train()
