"""Ranks of a training, forked from the test's process, which saves their start."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest

from d2_mgd.training import launch


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_processes(script: Callable[[list[str]], Any], words: list[Any], world: int) -> list[int]:
    """A script's exit statuses in ``world`` ranks, which have the environment variables of torchrun."""
    context = multiprocessing.get_context("fork")
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(world):
        place = {**common, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(context.Process(target=_rank, args=(script, [str(word) for word in words], place)))
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    return [-1 if process.exitcode is None else process.exitcode for process in processes]


def fork_launched_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``start_ranks`` fork its ranks, without the signal handlers that the launcher has set in this process."""
    own = launch._rank

    def rank(*arguments: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        own(*arguments)

    monkeypatch.setattr(launch, "_rank", rank)
    monkeypatch.setattr(launch, "LaunchConfig", functools.partial(launch.LaunchConfig, start_method="fork"))


def _rank(script: Callable[[list[str]], Any], words: list[str], place: dict[str, object]) -> None:
    launch._PATIENCE = 0.0  # without a launcher, no rank is ended because another one has failed
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.exit(script(words))
