"""Processes of a study: killed, started again, ended with their parent, without leaks."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.data import Choice
from benchmarks.accuracy.engine import Engine, Outcome
from benchmarks.accuracy.networks import Staged
from benchmarks.accuracy.results import Results
from benchmarks.accuracy.runner import _Place, _work
from benchmarks.accuracy.study import Recipe, Run
from tests.benchmarks.accuracy.conftest import run, written

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def killed_processes(count: int) -> Iterator[None]:
    """The first ``count`` processes that this one starts meanwhile are killed as soon as they are there."""
    over = threading.Event()

    def kill() -> None:
        seen: set[int | None] = set()
        while not over.wait(0.02):
            for process in multiprocessing.active_children():
                if process.pid not in seen and len(seen) < count:
                    seen.add(process.pid)
                    process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_killed_process_loses_its_own_run_only(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tmp_path, seeds=[0, 1])
    with killed_processes(100):
        assert run(study, tmp_path, data, "--methods", "student", "--jobs", "2") == 1
    said = capsys.readouterr().err
    for seed in (0, 1):
        assert f"failed: student, seed {seed}: its process was killed (out of memory?)." in said
    with killed_processes(1):  # the other run is not affected
        assert run(study, tmp_path, data, "--methods", "student", "--jobs", "2") == 1
    assert len(Results(tmp_path / "results" / "tiny.jsonl").by_digest) == 1


def test_processes_end_with_the_one_that_started_them(tmp_path: Path, data: Path) -> None:
    recipe = {"epochs": 100000, "batch": 16, "lr": 0.001, "drops": []}
    study, log = written(tmp_path, seeds=[0], recipe=recipe), tmp_path / "log"
    places = ["--data", data, "--weights", tmp_path / "weights", "--results", tmp_path]
    line = [sys.executable, "-m", "benchmarks.accuracy", "run", study, *places, "--device", "cpu", "--jobs", "2"]
    with open(log, "w") as file, subprocess.Popen(list(map(str, line)), cwd=ROOT, stderr=file) as process:
        try:
            wait_for(lambda: len(children(process.pid)) >= 2)
            time.sleep(0.5)
            started = children(process.pid)
        finally:
            process.kill()
    wait_for(lambda: not any(map(alive, started)))


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    return [int(child) for found in Path(f"/proc/{pid}/task").glob("*/children") for child in found.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_finished_run_leaves_its_memory_to_others(tmp_path: Path, data: Path) -> None:
    def networks() -> int:
        return sum(issubclass(type(found), Staged) for found in gc.get_objects())

    place = _Place(data, tmp_path, Engine(CPU))
    found = Run("student", "resnet8", Choice(pixels=8), Recipe(epochs=1, batch=16, drops=()), 0)
    gc.collect()
    before = networks()
    gc.disable()
    try:
        assert isinstance(_work(found, place), Outcome)
        assert networks() == before
    finally:
        gc.enable()
