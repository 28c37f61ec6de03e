"""Memory of a classification step over its floor's: tensors, and the process's resident memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.machine import ROOT
from benchmarks.speed.measure import Row, peak_tensor_bytes
from benchmarks.speed.pair import Pair

# glibc: blocks of 1 MiB and more are mapped and unmapped one by one; else the bound grows to 32 MiB with the first free
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
_SETTLED = 6  # steps after which the allocator's heap no longer grows
_RESET_PEAK = Path("/proc/self/clear_refs")  # Linux only


def rows(quick: bool) -> Iterator[Row]:
    """Yield the peak of the tensors of a step, and that of the process over a few steps, both over the floor's.

    The process is measured twice: with the default allocator, which keeps freed blocks, and with one that returns each
    large block when it is freed.
    """
    batch, size = (2, 64) if quick else (16, 224)
    pair = Pair(batch, size)
    for step in (pair.floor, pair.distilled):  # so that the optimiser has its state
        step()
    tensors = {what: peak_tensor_bytes(getattr(pair, what)) for what in ("floor", "distilled")}
    yield _row("memory of a step, tensors / floor, CPU", 1.0, tensors, batch, size)
    if not _RESET_PEAK.exists():
        return
    for how, goal, returned in (("resident", None, False), ("resident, freed blocks returned", 1.10, True)):
        peaks = {what: in_a_process(what, batch, size, returned) for what in ("floor", "distilled")}
        yield _row(f"memory of a step, {how} / floor, CPU", goal, peaks, batch, size)


def _row(name: str, goal: float | None, peaks: Mapping[str, int], batch: int, size: int) -> Row:
    megabytes = ", ".join(f"{what} {peak / 2**20:.0f} MiB" for what, peak in peaks.items())
    note = f"peak above what both networks take before the step ({megabytes}); batch {batch}, {size} px"
    return Row(name, goal, peaks["distilled"] / peaks["floor"], note=note)


def in_a_process(what: str, batch: int, size: int, returned: bool) -> int:
    """Return the peak of the bytes that a few calls of a method of :class:`Pair` add to a new process."""
    code = f"from benchmarks.speed.memory import _peak; print(_peak({what!r}, {batch}, {size}))"
    environment = {**os.environ, **(_RETURNED if returned else {})}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return int(done.stdout.split()[-1])


def _peak(what: str, batch: int, size: int) -> int:
    pair = Pair(2, 64)
    pair.images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    pair.targets = torch.randint(0, 1000, (batch,))
    _RESET_PEAK.write_text("5", encoding="ascii")  # getrusage's peak will not do: a process inherits its parent's
    before = _status("VmRSS")
    for _ in range(_SETTLED):
        getattr(pair, what)()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
