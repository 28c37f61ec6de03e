"""Timing in turns, ratios with their spread, peaks of memory, and the table of all rows."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.tables import markdown

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = CLOCKS["wall"]


@dataclass
class Row:
    """One line of the table.

    Args:
        name: what is measured.
        goal: upper bound of the value, or lower bound if ``at_least``; None without a goal.
        value: median of the ratio, or whatever the name says.
        low, high: quartiles.
        seconds: median seconds of each thing that was compared.
        note: conditions.
        at_least: whether larger is better.
    """

    name: str
    goal: float | None
    value: float
    low: float | None = None
    high: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    note: str = ""
    at_least: bool = False


def use_clock(name: str) -> None:
    """Set the default clock of :func:`in_turn`, a name of ``CLOCKS``.

    ``cpu`` is the processor time of this process, all threads together. It is nearly the same on a busy machine as on
    an idle one. It does not count other processes or a GPU.
    """
    global _clock
    _clock = CLOCKS[name]


def in_turn(
    things: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] | None = None,
    calls: int = 1,
) -> dict[str, list[float]]:
    """Return the seconds of one call of each thing in each round. Things take turns, so the machine's load meets all.

    Args:
        things: name -> what to time.
        rounds: number of timed rounds.
        warmup: number of rounds before them that are not timed.
        clock: returns seconds; that of :func:`use_clock` by default.
        calls: number of calls between two synchronisations with the GPU; a training does not synchronise in a step.
    """
    clock = clock or _clock
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for index in range(warmup + rounds):
        for name, thing in things.items():
            _finish()
            start = clock()
            for _ in range(calls):
                thing()
            _finish()
            if index >= warmup:
                seconds[name].append((clock() - start) / calls)
    return seconds


def ratio_row(
    name: str, goal: float | None, seconds: Mapping[str, list[float]], over: str, under: str, note: str
) -> Row:
    """Return the ratio of two of the things, computed in each round."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under])]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    medians = {thing: statistics.median(values) for thing, values in seconds.items()}
    return Row(name, goal, statistics.median(ratios), low, high, medians, note)


def peak_tensor_bytes(thing: Callable[[], Any]) -> int:
    """Return the largest number of bytes of CPU tensors that a call holds at a time, beyond those from before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            thing()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def as_table(result: Mapping[str, Any]) -> str:
    """Return a Markdown table of the rows, under a line on the machine."""
    about = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    load = ", ".join(f"{value:.1f}" for value in (about["load_average"][0], result["load_average_after"][0]))
    what = "processor time" if result.get("clock") == "cpu" else "wall-clock time"
    text = (
        f"{about['processor']}, {about['cores']} cores, {about['threads']} threads; GPU: {about['gpu'] or 'none'}; "
        f"{what}; load average before and after: {load}; {versions}.\n\n"
    )
    head = ("what", "value (quartiles)", "goal", "median times", "conditions")
    text += markdown(head, map(_cells, result["rows"]), numbers=False)
    if result["left_out"]:
        text += f"\nNot measured on this machine: {'; '.join(result['left_out'])}.\n"
    return text


def _cells(row: Mapping[str, Any]) -> list[str]:
    value = f"{row['value']:.3f}"
    if row["low"] is not None:
        value += f" ({row['low']:.3f} to {row['high']:.3f})"
    sign = ">=" if row["at_least"] else "<="
    goal = "" if row["goal"] is None else f"{sign} {row['goal']:g}"
    seconds = ", ".join(f"{name} {value:.3g} s" for name, value in row["seconds"].items())
    return [row["name"], value, goal, seconds, row["note"]]


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
