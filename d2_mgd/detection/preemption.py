"""Being asked to leave: SIGTERM, as schedulers send it before they take a machine away, and Ctrl-C.

The step in progress is finished, a checkpoint written, and the process leaves with a status that says why.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import detectron2.utils.comm as comm
import torch
import torch.distributed as dist
from detectron2.engine import HookBase

__all__ = ["PreemptionHook", "forwarded_signals"]

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun hands a Ctrl-C on to processes that the terminal has told already: two within this time are one.
_SAME_PRESS = 1.0  # seconds


class PreemptionHook(HookBase):
    """Stops a training at the end of a step, in all processes the same, with status 143 (SIGTERM) or 130 (Ctrl-C).

    It comes before the hooks that rematch, save and evaluate: those would take time that there is not. A rematch that
    is due by then is done by the training that continues, at its begin. A second Ctrl-C leaves at once.

    Args:
        save: saves a checkpoint under a name; a collective.
    """

    def __init__(self, save: Callable[[str], None]) -> None:
        self.save = save
        self._received = 0
        self._when = 0.0
        self._pid = os.getpid()
        self._handlers: dict[signal.Signals, Any] = {}

    def before_train(self) -> None:
        if threading.current_thread() is threading.main_thread():  # others cannot be told
            self._handlers = {number: signal.signal(number, self._remember) for number in _SIGNALS}

    def after_train(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        received = _largest(self._received)
        if not received or finished >= self.trainer.max_iter:  # all is done but what follows the last step
            return
        name = f"model_{self.trainer.iter:07d}"
        self.save(name)
        logger.warning(
            "%s: stopped after %d of %d iterations and saved %s.pth; the same command with --resume continues.",
            signal.Signals(received).name,
            finished,
            self.trainer.max_iter,
            name,
        )
        raise SystemExit(128 + received)

    def _remember(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        again = self._received and now - self._when > _SAME_PRESS
        if os.getpid() != self._pid:
            # A loading process, forked with this handler: the training still needs it for the step in progress.
            if again and number == signal.SIGTERM:
                os._exit(128 + number)
        elif again and number == signal.SIGINT:
            os.write(2, b"Left at once; --resume continues from the last checkpoint.\n")
            os._exit(128 + number)
        else:
            os.write(2, b"Finishing this step, then saving; Ctrl-C (again) leaves at once.\n")
        if not self._received:
            self._received, self._when = int(number), now


def _largest(number: int) -> int:
    """The largest of all processes' numbers. A collective on the CPU, which does not wait for a GPU."""
    if comm.get_world_size() == 1:
        return number
    shared = torch.tensor(number)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
    return int(shared)


class forwarded_signals:
    """Context of a process that waits for processes that it started: SIGTERM and Ctrl-C go on to them.

    They save and leave, and what waits for them ends with their status. A second Ctrl-C leaves at once.
    """

    def __enter__(self) -> None:
        self._last = 0.0
        self._handlers = {number: signal.signal(number, self._forward) for number in _SIGNALS}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        again = self._last and now - self._last > _SAME_PRESS
        self._last = self._last or now
        for process in multiprocessing.active_children():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL if again and number == signal.SIGINT else number)
        if again and number == signal.SIGINT:
            os._exit(128 + number)
