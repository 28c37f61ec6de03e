"""Handling of Ctrl-C, and of a scheduler's SIGTERM: stop after the current step, or forward them to processes."""

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

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The terminal sends a Ctrl-C to all processes, and torchrun forwards it: two within this time count as one.
_SAME_PRESS = 1.0  # seconds

_active: list[StopRequest] = []


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C was received. In a training every rank raises it, even if another rank has received the signal.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Context in which SIGTERM and Ctrl-C are recorded, for :func:`received_signal`; a second Ctrl-C exits at once.

    Args:
        confirm: whether to confirm the signal on standard error; one rank is enough.
    """

    def __init__(self, confirm: bool = True) -> None:
        self.confirm = confirm
        self.received = 0  # number of the first signal; 0: none
        self._when = 0.0
        self._pid = os.getpid()
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in this thread only
            self._handlers = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        _active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _active.remove(self)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _remember(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        again = self.received and now - self._when > _SAME_PRESS
        if os.getpid() != self._pid:
            # This is a dataloader worker, forked with this handler: the current step still needs its batches.
            if again and number == signal.SIGTERM:
                os._exit(128 + number)
        elif again and number == signal.SIGINT:
            _say("Left at once; --resume continues from the last checkpoint.")
            os._exit(128 + number)
        elif self.confirm:
            _say("Finishing this step, then saving; Ctrl-C (again) leaves at once.")
        if not self.received:
            self.received, self._when = int(number), now


def received_signal() -> int:
    """Number of the signal that this process received in a :class:`StopRequest`; 0 for none."""
    return max((request.received for request in _active), default=0)


def _say(sentence: str) -> None:
    """Write to standard error from a signal handler; its reader may have ended."""
    with suppress(OSError):
        os.write(2, f"{sentence}\n".encode())


class forwarded_signals:
    """Context that forwards SIGTERM and Ctrl-C to the child processes of this one.

    They save and exit, and this process exits with their status. A second Ctrl-C exits at once.

    Args:
        waiting: message on standard error when a signal arrives.
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
        """Start a program that receives the signals too; ``options`` are those of ``subprocess.Popen``."""
        program = subprocess.Popen(command, text=True, **options)
        self._programs.append(program)
        if self.received:  # while it started
            program.send_signal(self.received)
        return program

    def raise_received(self) -> None:
        """Raise :class:`Interrupted` if a signal has arrived."""
        if self.received:
            raise Interrupted(self.received)

    def _forward(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.waiting and not self.received:
            _say(self.waiting)
        self.received = self.received or int(number)
        again = self._last and now - self._last > _SAME_PRESS
        self._last = self._last or now
        sent = signal.SIGKILL if again and number == signal.SIGINT else number
        for program in self._programs:
            program.send_signal(sent)  # no effect if it has ended
        for process in multiprocessing.active_children():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, sent)
        if again and number == signal.SIGINT:
            os._exit(128 + number)


@contextmanager
def raised_signals() -> Iterator[None]:
    """Context in which SIGTERM and Ctrl-C raise :class:`Interrupted`."""
    handlers = {number: signal.signal(number, _raise) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _raise(number: int, frame: Any) -> None:
    raise Interrupted(number)


def loader_process_signals(worker: int) -> None:
    """``worker_init_fn`` of a DataLoader: workers ignore signals to the process group until the current step ends.

    The training ends its workers itself, by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # otherwise the sender of a signal is unknown
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(parent.pid,), daemon=True).start()


def _exit_on_sigterm_from(sender: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)
