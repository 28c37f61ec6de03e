"""Being asked to leave: SIGTERM, as schedulers send it before they take a machine away, and Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

__all__ = ["StopRequest", "forwarded_signals", "loader_process_signals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun hands a Ctrl-C on to processes that the terminal has told already: two within this time are one.
_SAME_PRESS = 1.0  # seconds


class StopRequest:
    """Context in which SIGTERM and Ctrl-C are remembered, for the training to leave when it can; a second Ctrl-C
    leaves at once.

    Args:
        speak: whether this process says on standard error that it was heard; one of several is enough.
    """

    def __init__(self, speak: bool = True) -> None:
        self.speak = speak
        self.received = 0  # number of the first signal; 0: none
        self._when = 0.0
        self._pid = os.getpid()
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others cannot be told
            self._handlers = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _remember(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        again = self.received and now - self._when > _SAME_PRESS
        if os.getpid() != self._pid:
            # A loading process, forked with this handler: the training still needs it for the step in progress.
            if again and number == signal.SIGTERM:
                os._exit(128 + number)
        elif again and number == signal.SIGINT:
            _say("Left at once; --resume continues from the last checkpoint.")
            os._exit(128 + number)
        elif self.speak:
            _say("Finishing this step, then saving; Ctrl-C (again) leaves at once.")
        if not self.received:
            self.received, self._when = int(number), now


def _say(sentence: str) -> None:
    """To standard error, from a handler; Ctrl-C may have ended who reads it."""
    with suppress(OSError):
        os.write(2, f"{sentence}\n".encode())


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


def loader_process_signals(worker: int) -> None:
    """``worker_init_fn`` of a DataLoader: what tells a whole group of processes to leave must not take away the images
    that the step in progress waits for. The training ends its loading processes itself, by a SIGTERM of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # elsewhere there is no telling who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told_by, args=(parent.pid,), daemon=True).start()


def _leave_when_told_by(sender: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)
