"""The proof that an exported file answers as the PyTorch network does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from d2_mgd.errors import UserError
from d2_mgd.export.students import Student

_WARM_UP = 5  # runs of each before the first is timed


@dataclass(frozen=True)
class Check:
    """The network and the file side by side.

    Args:
        images: number of validation images.
        accuracy: measure -> that of the network and of the file.
        differences: description -> number.
        milliseconds: median of one image on one thread, of the network and of the file.
    """

    images: int
    accuracy: dict[str, tuple[float, float]]
    differences: dict[str, float]
    milliseconds: tuple[float, float]

    def largest_change(self) -> tuple[str, float]:
        """The measure that differs most, and by how many points."""
        changes = {name: _change(*pair) for name, pair in self.accuracy.items()}
        return max(changes.items(), key=lambda item: item[1])

    def rows(self) -> list[tuple[str, str, str]]:
        """Lines of a table: what, the network, the file."""
        pairs = {**self.accuracy, "median latency, one thread, ms": self.milliseconds}
        return [(name, f"{network:.2f}", f"{file:.2f}") for name, (network, file) in pairs.items()] + [
            (name, "", f"{value:.3g}") for name, value in self.differences.items()
        ]


def _change(network: float, file: float) -> float:
    if math.isnan(network) or math.isnan(file):  # the AP where nothing is detected
        return 0.0 if math.isnan(network) and math.isnan(file) else math.inf
    return abs(network - file)


def check(student: Student, run: Callable[[Tensor], Sequence[Tensor]], count: int | None = None) -> Check:
    """Run the network and the file on validation images, in turn.

    Args:
        student: has the network and the images.
        run: runs the file.
        count: of images; all by default.

    Raises:
        UserError: there is no validation image.
    """
    calls = {student.network: [], run: []}  # type: dict[Callable[[Tensor], Sequence[Tensor]], list[float]]
    comparison, images = student.comparison(), 0
    with torch.inference_mode(), _one_thread():
        for image, target in student.validation(count):
            answers = []
            for call, seconds in calls.items():
                for _ in range(_WARM_UP if images == 0 else 0):
                    call(image)
                begin = time.perf_counter()
                answers.append(call(image))
                seconds.append(time.perf_counter() - begin)
            comparison.add(target, *answers)
            images += 1
    if not images:
        raise UserError("there is no validation image to check the file on.")
    network, file = (1e3 * median(seconds) for seconds in calls.values())
    return Check(images, comparison.accuracy(), comparison.differences(), (network, file))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
