"""Being asked to leave: SIGTERM, as schedulers send it before they take a machine away, and Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["StopRequest", "ToldToLeave", "forwarded_signals", "leaving_when_told", "loader_process_signals"]

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

    Args:
        waiting: what is said on standard error when a signal comes.
    """

    def __init__(self, waiting: str = "") -> None:
        self.waiting = waiting
        self.received = 0  # number of the first signal; 0: none
        self._last = 0.0
        self._programs: list[subprocess.Popen[str]] = []

    def __enter__(self) -> forwarded_signals:
        self._handlers = {number: signal.signal(number, self._forward) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a program that is told too; ``options`` are those of ``subprocess.Popen``."""
        program = subprocess.Popen(command, text=True, **options)
        self._programs.append(program)
        if self.received:  # meanwhile
            program.send_signal(self.received)
        return program

    def leave_if_told(self) -> None:
        """Raise :class:`ToldToLeave` if a signal has come."""
        if self.received:
            raise ToldToLeave(self.received)

    def _forward(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.waiting and not self.received:
            _say(self.waiting)
        self.received = self.received or int(number)
        again = self._last and now - self._last > _SAME_PRESS
        self._last = self._last or now
        sent = signal.SIGKILL if again and number == signal.SIGINT else number
        for program in self._programs:
            program.send_signal(sent)  # nothing where it has ended
        for process in multiprocessing.active_children():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, sent)
        if again and number == signal.SIGINT:
            os._exit(128 + number)


class ToldToLeave(KeyboardInterrupt):
    """SIGTERM or Ctrl-C in a program that has nothing of its own to save.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def leaving_when_told() -> Iterator[None]:
    """Context in which SIGTERM and Ctrl-C raise :class:`ToldToLeave`."""
    handlers = {number: signal.signal(number, _raise) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _raise(number: int, frame: Any) -> None:
    raise ToldToLeave(number)


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
