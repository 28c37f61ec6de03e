"""How a rank's process ends."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from d2_mgd.errors import UserError
from d2_mgd.training.launch import rank_status

FINALIZED = 99


def exit_status(work: Callable[[], object], mark: Path) -> int:
    """That of a fork which runs one rank; ``FINALIZED`` if its interpreter would be finalized."""
    child = os.fork()
    if child == 0:
        atexit._clear()
        atexit.register(mark.touch)
        with contextlib.suppress(BaseException):
            rank_status(work)
        atexit._run_exitfuncs()
        os._exit(FINALIZED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fails(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "status"),
    [
        (lambda: "metrics", 0),
        (fails(UserError("no such file.")), 2),
        (fails(SystemExit(143)), 143),
        (fails(KeyboardInterrupt()), 130),
        (fails(ZeroDivisionError()), 1),
    ],
    ids=["success", "user error", "signal", "Ctrl-C", "bug"],
)
def test_a_rank_runs_its_exit_functions_and_leaves_the_interpreter_as_it_is(
    work: Callable[[], object], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    assert exit_status(work, tmp_path / "mark") == status
    assert (tmp_path / "mark").exists()


def test_a_program_of_one_process_ends_as_any_other(tmp_path: Path) -> None:
    assert exit_status(lambda: None, tmp_path / "mark") == FINALIZED
