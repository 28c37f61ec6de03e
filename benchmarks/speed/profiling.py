"""Measure the parts of a distilled step with torch.profiler.

Shares are of the whole step's time on the GPU, or on the CPU without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.speed.pair import Pair
from benchmarks.tables import markdown

_BACKWARD = "autograd::engine::evaluate_function: "
_PARTS = {  # row -> its name in the profile
    "teacher, forward": "part:teacher",
    "student, forward": "part:student",
    "distiller, forward": "part:distiller",
    "distiller, backward": f"{_BACKWARD}_DifferentiatedLossBackward",
    "optimiser": "Optimizer.step#SGD.step",
}


def profile_step(quick: bool = False) -> dict[str, Any]:
    """Return the parts of a step of the classification pair, on the GPU if there is one, and the slowest operators."""
    on_gpu = torch.cuda.is_available()
    batch, size, rounds = (2, 64, 1) if quick else (64 if on_gpu else 16, 224, 5)
    pair = Pair(batch, size, "cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else None)
    _name(pair)
    for _ in range(2):
        pair.distilled()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as recorded:
        for _ in range(rounds):
            with record_function("part:step"):
                pair.distilled()
    on_host = [average for average in recorded.key_averages() if average.device_type == DeviceType.CPU]
    averages = {average.key: average for average in on_host}  # the operators, with the time of their kernels
    seconds = _seconds_of(averages, on_gpu, rounds)
    shares = {part: seconds(name) for part, name in _PARTS.items()}
    shares["student, forward"] -= shares["distiller, forward"]  # each map is compared during the student's forward
    whole = seconds("part:step")
    if on_gpu:  # another thread runs autograd there, outside the step's range
        whole += sum(seconds(name) for name in averages if name.startswith(_BACKWARD))
    shares["student, backward, and the rest"] = whole - sum(shares.values())
    inner = [average for key, average in averages.items() if key.startswith("aten::")]
    inner.sort(key=lambda average: _own(average, on_gpu), reverse=True)
    return {
        "device": "GPU" if on_gpu else "CPU",
        "conditions": f"ResNet-50 to MobileNet-V1, batch {batch}, {size} px, amp + partial_l2, "
        + ("bfloat16" if on_gpu else "float32"),
        "seconds": whole,
        "parts": {part: {"seconds": value, "share": value / whole} for part, value in shares.items()},
        "operators": [
            {"name": average.key, "share": _own(average, on_gpu) / 1e6 / rounds / whole} for average in inner[:8]
        ],
    }


def as_markdown(found: dict[str, Any]) -> str:
    """Return a table of the parts, and a line of the operators."""
    rows = [[part, f"{1e3 * v['seconds']:.1f}", f"{v['share']:.1%}"] for part, v in found["parts"].items()]
    operators = ", ".join(f"`{entry['name']}` {entry['share']:.1%}" for entry in found["operators"])
    return (
        f"One distilled step on the {found['device']}: {1e3 * found['seconds']:.0f} ms under the profiler "
        f"({found['conditions']}).\n\n{markdown(('part', 'ms', 'share'), rows)}\n"
        f"Operators by their own time: {operators}.\n"
    )


def _name(pair: Pair) -> None:
    """Record the modules' forward passes under their names."""
    modules = [("part:teacher", pair.teacher), ("part:student", pair.student.network)]
    modules += [("part:distiller", feature) for feature in pair.distiller.features.values()]
    for name, module in modules:
        module.forward = record_function(name)(module.forward)


def _seconds_of(averages: dict[str, Any], on_gpu: bool, rounds: int) -> Callable[[str], float]:
    def seconds(name: str) -> float:
        if name not in averages:
            return 0.0
        average = averages[name]
        return (average.device_time_total if on_gpu else average.cpu_time_total) / 1e6 / rounds

    return seconds


def _own(average: Any, on_gpu: bool) -> float:
    return average.self_device_time_total if on_gpu else average.self_cpu_time_total
