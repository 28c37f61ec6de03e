"""SIGKILL at chosen and random moments: what was promised is there, and the end is that of the undisturbed run.

``CLASSIFICATION_KILLS=20`` kills as often at random; the suite does so a few times.
"""

import io
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import classification.records as records
import d2_mgd.distill.distiller as distiller
from classification import main_mgd
from tests.classification.conftest import SMALL, assert_same_run
from tests.ranks import in_processes

KILLS = int(os.environ.get("CLASSIFICATION_KILLS", 4))
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def words(data: Path, resnet18_file: Path) -> list[object]:
    """Everything that has a state: dropout, a random reducer, costs that grow with the steps, momentum, sums."""
    teacher = ["--teacher-arch", "resnet18", "--teacher-resume", resnet18_file]
    method = ["--arch", "mobilenet_v2", "--mgd-reducer", "rd", "--mgd-update-freq", 1, "--mgd-update-source", "online"]
    return [data, *SMALL, *method, "--mgd-with-kd", 1, "--epochs", 3, "--lr", 0.01, "--checkpoint-freq", 2, *teacher]


@pytest.fixture(scope="module")
def undisturbed(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main_mgd.main([str(word) for word in [*words, "--output-dir", folder]]) == 0
    return folder


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, count: int, target: str = "") -> None:
    """Die before the ``count``-th call of a function, of those whose second argument ends in ``target``."""
    original, calls = getattr(owner, name), []

    def visited(*arguments: Any, **options: Any) -> Any:
        if not target or str(arguments[1]).endswith(target):
            calls.append(name)
        if len(calls) == count:
            die()
        return original(*arguments, **options)

    setattr(owner, name, visited)


def inside_a_write(count: int) -> None:
    """Die with half of a checkpoint's bytes on the disk."""
    original, calls = torch.save, []

    def save(content: Any, file: Any) -> None:
        calls.append("save")
        if len(calls) == count:
            whole = io.BytesIO()
            original(content, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()
        original(content, file)

    torch.save = save


# an epoch of three steps writes a checkpoint, the student twice or once, and a checkpoint; each run begins where the
# one before it left its last checkpoint, listed and pointed to or not
MOMENTS: dict[str, Callable[[], None]] = {
    "solving the first matching": lambda: before(distiller, "solve_matching", 2),
    "inside the first checkpoint": lambda: inside_a_write(1),
    "before the first checkpoint has its name": lambda: before(os, "replace", 1, "step_000002.pth"),
    "before it is on the list": lambda: before(os, "replace", 1, "checkpoints.json"),
    "before the pointer moves to it": lambda: before(os, "replace", 1, "checkpoint.pth"),
    "middle of an epoch": lambda: before(torch.optim.SGD, "step", 3),
    "inside the student's file": lambda: inside_a_write(1),
    "solving a later matching": lambda: before(distiller, "solve_matching", 2),
    "writing a matching": lambda: before(records, "save_reports", 1),
    "before an old checkpoint goes": lambda: before(os, "remove", 1),
    "inside a later checkpoint": lambda: inside_a_write(1),
}


def run_and_die(words: list[str], moment: Callable[[], None]) -> int | None:
    """Exit status of a run that meets its moment; a fork of this process, which saves the start."""

    def run() -> None:
        moment()
        os._exit(main_mgd.main(words))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(200)
    return process.exitcode


def test_killed_at_every_place_one_run_ends_as_the_undisturbed_one(
    words: list[object], undisturbed: Path, tmp_path: Path
) -> None:
    going_on = [str(word) for word in [*words, "--output-dir", tmp_path / "run", "--resume"]]
    for name, moment in MOMENTS.items():
        assert run_and_die(going_on, moment) == KILLED, name
    assert run_and_die(going_on, lambda: None) == 0
    assert_same_run(undisturbed, tmp_path / "run")
    assert not [file.name for file in (tmp_path / "run").iterdir() if file.name.endswith(".tmp")]


def test_killed_at_random_moments_it_ends_as_the_undisturbed_one(
    words: list[object], undisturbed: Path, tmp_path: Path
) -> None:
    going_on = [str(word) for word in [*words, "--output-dir", tmp_path / "run", "--resume"]]
    seconds = random.Random(KILLS)
    killed = 0
    while killed < KILLS:
        timer = threading.Timer(seconds.uniform(0.05, 1.5), die)
        status = run_and_die(going_on, timer.start)
        assert status in (KILLED, 0)
        if status == 0:  # it was done before its time: the next begins anew
            assert_same_run(undisturbed, tmp_path / "run")
            going_on = [word for word in going_on if word != "--resume"]
            going_on = [*going_on, "--overwrite"]
        else:
            killed += 1
            going_on = [word for word in going_on if word != "--overwrite"]
            going_on = [*going_on, *([] if "--resume" in going_on else ["--resume"])]
    assert run_and_die(going_on, lambda: None) == 0
    assert_same_run(undisturbed, tmp_path / "run")


def second_rank_dies(words: list[str]) -> int:
    if os.environ["RANK"] == "1":
        before(torch.optim.SGD, "step", 4)
    return main_mgd.main(words)


def test_one_of_two_processes_is_killed_and_both_go_on(words: list[object], tmp_path: Path) -> None:
    """In the middle of the second epoch; a test of detection has torchrun itself start the ranks again."""
    words = [*words, "--epochs", 2, "--output-dir"]
    assert in_processes(second_rank_dies, [*words, tmp_path / "run"], 2) == [1, KILLED]
    assert in_processes(main_mgd.main, [*words, tmp_path / "run", "--resume"], 2) == [0, 0]
    assert in_processes(main_mgd.main, [*words, tmp_path / "undisturbed"], 2) == [0, 0]
    assert_same_run(tmp_path / "undisturbed", tmp_path / "run")
