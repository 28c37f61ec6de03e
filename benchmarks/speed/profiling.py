"""Where the time of one distilled step goes, by torch.profiler.

Shares are of the whole step's time on the host, or on the GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.speed.pair import Pair
from benchmarks.tables import markdown

# part -> names in the profile whose time it is; the backward pass is split by the node of the distillation's loss
_FORWARD = {
    "teacher, forward": "part:teacher",
    "student, forward": "part:student",
    "distiller, forward": "part:distiller",
}
_BACKWARD = "autograd::engine::evaluate_function: "
_DISTILLER_NODES = ("_SumOfSquaresBackward",)


def profile_step(quick: bool = False) -> dict[str, Any]:
    """Shares of one step of the classification pair, on the GPU if there is one, and its most expensive operators."""
    on_gpu = torch.cuda.is_available()
    batch, size, rounds = (2, 64, 1) if quick else (64 if on_gpu else 16, 224, 5)
    pair = Pair(batch, size, "cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else None)
    modules: list[tuple[str, torch.nn.Module]] = [
        ("part:teacher", pair.teacher),
        ("part:student", pair.student.network),
    ]
    modules += [("part:distiller", feature) for feature in pair.distiller.features.values()]
    with _named(modules):
        for _ in range(2):
            _step(pair)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        with profile(activities=activities) as recorded:
            for _ in range(rounds):
                _step(pair)
    on_host = [average for average in recorded.key_averages() if average.device_type == DeviceType.CPU]
    averages = {average.key: average for average in on_host}  # the operators, with the time of their kernels
    seconds = _seconds_of(averages, on_gpu, rounds)
    shares = {part: seconds(name) for part, name in _FORWARD.items()}
    shares["student, forward"] -= shares["distiller, forward"]  # which compares maps while the student makes them
    backward = sum(seconds(name) for name in averages if name.startswith(_BACKWARD))
    shares["distiller, backward"] = sum(seconds(f"{_BACKWARD}{node}") for node in _DISTILLER_NODES)
    shares["student, backward"] = backward - shares["distiller, backward"]
    shares["optimiser"] = seconds("part:optimiser")
    # a GPU's backward pass is launched by another thread, outside of the step's range
    whole = seconds("part:step") + (backward if on_gpu else 0.0)
    shares["everything else"] = whole - sum(shares.values())
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


def _step(pair: Pair) -> None:
    with record_function("part:step"):
        pair.step.train()
        output = pair.step(pair.images, pair.targets)
        loss = torch.stack(list(output.losses.values())).sum() / pair.images.shape[0]
        pair.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with record_function("part:optimiser"):
            pair.optimizer.step()


def _seconds_of(averages: dict[str, Any], on_gpu: bool, rounds: int) -> Callable[[str], float]:
    def seconds(name: str) -> float:
        if name not in averages:
            return 0.0
        average = averages[name]
        return (average.device_time_total if on_gpu else average.cpu_time_total) / 1e6 / rounds

    return seconds


def _own(average: Any, on_gpu: bool) -> float:
    return average.self_device_time_total if on_gpu else average.self_cpu_time_total


@contextmanager
def _named(modules: Sequence[tuple[str, torch.nn.Module]]) -> Iterator[None]:
    """Each module's forward under its name in the profile."""
    ranges: dict[str, Any] = {}
    handles = []
    for name, module in modules:

        def enter(*_: Any, name: str = name) -> None:
            ranges[name] = record_function(name)
            ranges[name].__enter__()

        def leave(*_: Any, name: str = name) -> None:
            ranges.pop(name).__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
