"""Trainings of one tiny detector through tools/train_net.py, killed by SIGKILL or undisturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.detection.training_runs import ROOT, Workplace

KILL_AT = Path(__file__).with_name("kill_at.py")
TIME = "time"  # instead of a place: some seconds after the start of the training loop
STARTED = "Starting training from iteration"  # Detectron2's log
SCHEDULE = (
    *("SOLVER.MAX_ITER", 12, "SOLVER.STEPS", "(8,)", "SOLVER.CHECKPOINT_PERIOD", 3, "MGD.CHECKPOINT.KEEP", 2),
    *("MGD.REMATCH.PERIODS", "[2]", "TEST.EVAL_PERIOD", 0),
)
_TIMEOUT = 300.0  # seconds; a training takes some seconds on an idle machine


@dataclass(frozen=True)
class Kill:
    """When to kill a training.

    Args:
        place: of ``kill_at.PLACES``, or ``TIME``.
        count: at which visit of the place, from 1.
        seconds: after the start of the training loop, if the place is ``TIME``.
    """

    place: str
    count: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s after the start" if self.place == TIME else f"{self.place} {self.count}"


@dataclass
class Fall:
    """A kill that happened, and the files after it.

    Args:
        kill: when.
        begun: finished iterations when the killed process started; 0 for a new training.
        pointer: the file that ``last_checkpoint`` names; "" for none yet.
        leftovers: temporary files.
        survived: whether the training ended as the undisturbed one; None before its end.
    """

    kill: Kill
    begun: int
    pointer: str
    leftovers: list[str]
    survived: bool | None = None


@dataclass
class Run:
    """One process.

    Args:
        status: exit status; minus the signal's number if it was killed.
        begun: finished iterations when it started; None if it did not reach the training loop.
        seconds: of the whole process.
        loop: seconds from the start of the training loop to the end.
        text: its output.
    """

    status: int
    begun: int | None
    seconds: float
    loop: float
    text: str = field(repr=False)


class Soak:
    """Trainings of one tiny detector, disturbed or not.

    Args:
        folder: for data, teacher and outputs.
        overrides: KEY VALUE pairs after ``SCHEDULE``.
    """

    def __init__(self, folder: Path, *overrides: Any) -> None:
        self.folder = folder
        self.workplace = Workplace(folder / "workplace")
        self.overrides = (*SCHEDULE, *overrides)
        self.outputs = 0

    def output(self) -> Path:
        """Return a new folder for a training."""
        self.outputs += 1
        return self.folder / f"training_{self.outputs:03d}"

    def run(self, output: Path, *overrides: Any, kill: Kill | None = None, tally: Path | None = None) -> Run:
        """Start or resume a training in a new process; kill it at ``kill``, or count visits of places in ``tally``."""
        resume = ("--resume",) if output.exists() else ()
        arguments = self.workplace.arguments(output, *self.overrides, *overrides, flags=resume)
        watch = ["--tally", str(tally)] if tally else []
        if kill is not None and kill.place != TIME:
            mark = output.with_name(f"{output.name}_killed_{time.monotonic_ns()}")
            watch = ["--place", kill.place, "--count", str(kill.count), "--mark", str(mark)]
        script = [str(ROOT / "tools" / "train_net.py"), *arguments]
        if watch:
            script = [str(KILL_AT), *watch, *script]
        return _process([sys.executable, *script], kill.seconds if kill and kill.place == TIME else None)

    def killed(self, output: Path, kill: Kill, *overrides: Any) -> Fall | None:
        """Start or resume a training and kill it; return None if it ended before.

        Raises:
            AssertionError: it ended in another way.
        """
        run = self.run(output, *overrides, kill=kill)
        if run.status == 0:
            return None
        assert run.status == -signal.SIGKILL, f"{kill}: status {run.status}\n{run.text[-4000:]}"
        pointer = output / "last_checkpoint"
        return Fall(
            kill,
            run.begun or 0,
            pointer.read_text() if pointer.exists() else "",
            sorted(path.name for path in output.glob(".*.tmp")),
        )

    def ended(self, output: Path, *overrides: Any) -> dict[str, Any]:
        """Run a training to its end and return its last checkpoint.

        Raises:
            AssertionError: it failed.
        """
        run = self.run(output, *overrides)
        assert run.status == 0, f"status {run.status}\n{run.text[-6000:]}"
        return final(output)


def final(output: Path) -> dict[str, Any]:
    """Return the checkpoint of a finished training."""
    return torch.load(output / "model_final.pth", weights_only=True)


def differences(one: Any, other: Any, path: str = "checkpoint") -> Iterator[str]:
    """Yield where two checkpoints differ, in type, number or any bit of a tensor."""
    if type(one) is not type(other):
        yield path
    elif isinstance(one, torch.Tensor):
        if not (one.dtype == other.dtype and torch.equal(one, other)):
            yield path
    elif isinstance(one, dict):
        for key in {**one, **other}:
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield path
        for index, (left, right) in enumerate(zip(one, other)):
            yield from differences(left, right, f"{path}[{index}]")
    elif one != other:
        yield path


def _process(command: list[str], kill_after: float | None) -> Run:
    """Run a training; kill it ``kill_after`` seconds after the start of its loop."""
    begin = time.monotonic()
    started, begun, said = begin, None, []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
    )
    timers = [threading.Timer(_TIMEOUT, process.kill)]
    timers[0].start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if STARTED in line and begun is None:
                started, begun = time.monotonic(), int(line.rsplit(maxsplit=1)[1])
                if kill_after is not None:
                    timers.append(threading.Timer(kill_after, process.kill))
                    timers[-1].start()
        status = process.wait()
    finally:
        process.kill()
        for timer in timers:
            timer.cancel()
    end = time.monotonic()
    return Run(status, begun, end - begin, end - started, "".join(said))
