"""Throughput and remaining time of a training."""

from __future__ import annotations

import time
from datetime import timedelta


class Throughput:
    """Counts images per second since its construction."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.images = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)


class Remaining:
    """Estimates the time to the end of a run from the mean time of a step, evaluations and rematches included.

    Args:
        done: finished steps at construction.
        total: steps of the whole run.
    """

    def __init__(self, done: int, total: int) -> None:
        self.start, self.done, self.total = time.perf_counter(), done, total

    def after(self, done: int) -> str:
        """Remaining time after ``done`` finished steps, as H:MM:SS."""
        seconds = (time.perf_counter() - self.start) / max(done - self.done, 1) * (self.total - done)
        return str(timedelta(seconds=round(seconds)))
