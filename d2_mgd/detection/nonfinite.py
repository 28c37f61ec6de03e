"""Losses and gradients that are not finite: named, written down so that the step can be repeated, and then the end.

Or, where it is allowed, the step is left out and the training goes on with the next batch.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Instances
from torch import Tensor, nn

from d2_mgd.detection.state import module_numbers, set_module_numbers
from d2_mgd.errors import UserError, reason
from d2_mgd.training import write_atomically
from d2_mgd.training.randomness import random_state

__all__ = ["NonFiniteError", "NonFinitePolicy", "StepMemory", "StepReport"]

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]


class NonFiniteError(UserError, FloatingPointError):
    """A loss or gradient is not finite; the message is one sentence that names it."""


@dataclass
class StepReport:
    """What came of a step in one process.

    Args:
        losses: name -> number.
        gradients: names of the weights whose gradients are not finite.
        failure: what Detectron2 said where there are no losses.
        images: file names of the batch.
    """

    losses: dict[str, float]
    gradients: list[str]
    failure: str = ""
    images: list[str] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        return not self.failure and not self.gradients and all(map(math.isfinite, self.losses.values()))

    def offence(self) -> str:
        """What is not finite, as the begin of a sentence; "" for nothing, or for gradients alone."""
        bad = [f"{name} is {loss}" for name, loss in self.losses.items() if not math.isfinite(loss)]
        return self.failure.rstrip(".") or " and ".join(bad)


class StepMemory:
    """What a forward pass changes beside random state that it draws: kept before each, to take it back.

    Args:
        detector: the model under training, not wrapped.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.detector = detector
        self.buffers: list[Tensor] = []
        for module in detector.modules():
            if not isinstance(module, FrozenBatchNorm2d):
                self.buffers += [buffer for buffer in module.buffers(recurse=False)]
        self.copies = [buffer.clone() for buffer in self.buffers]
        self.random: dict[str, Any] = {}

    def keep(self) -> None:
        """Before a step."""
        self.random = random_state()
        self.numbers = module_numbers(self.detector)
        for copy, buffer in zip(self.copies, self.buffers):
            copy.copy_(buffer)
        self.costs = _observed(self.detector)

    def restore(self) -> None:
        """Buffers, numbers and collected costs as they were; the random state goes on."""
        for copy, buffer in zip(self.copies, self.buffers):
            buffer.copy_(copy)
        set_module_numbers(self.detector, self.numbers)
        if self.costs is not None:
            distiller: Any = self.detector.distiller
            distiller.load_cost_state_dict(self.costs)


def _observed(detector: Any) -> dict[str, Any] | None:
    """The costs collected so far, where the coming step adds to them."""
    if not getattr(detector, "observe_next", False):
        return None
    states = detector.distiller.cost_state_dict()
    return {
        name: {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
        for name, state in states.items()
    }


class NonFinitePolicy:
    """What becomes of a step that is not finite, in all processes the same.

    The first one of a run, and the one that ends it, are written to ``<folder>/iter_0001000.pth``: a checkpoint as it
    would have been before that step, which ``--resume`` continues with that step, and beside it under ``nonfinite`` the
    losses of every process, the file names of its images, and the images and annotations of those that were at fault.

    Args:
        detector: the model under training, not wrapped.
        skip: how many steps in a row may be left out; 0 stops at the first.
        folder: for the files.
        checkpoint: random state before the step -> the checkpoint before the step; a collective.
    """

    def __init__(
        self, detector: nn.Module, skip: int, folder: str, checkpoint: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> None:
        self.memory = StepMemory(detector)
        self.skip = skip
        self.folder = folder
        self.checkpoint = checkpoint
        self.in_a_row = 0
        self._written = False

    def remember(self) -> None:
        """Before every step."""
        self.memory.keep()

    def passed(self) -> None:
        """After a step that was finite."""
        self.in_a_row = 0

    def handle(self, iteration: int, report: StepReport, batch: Batch) -> None:
        """After a step that was not, in any process; the model is then as before it. A collective.

        Args:
            iteration: of the step.
            report: of this process.
            batch: of this process.

        Raises:
            NonFiniteError: too many in a row.
        """
        report.images = [str(sample.get("file_name", f"number {index}")) for index, sample in enumerate(batch)]
        reports: list[StepReport] = comm.all_gather(report)
        self.memory.restore()
        stops = self.in_a_row >= self.skip
        sentence = _sentence(iteration, reports)
        if stops or not self._written:
            sentence += self._write(iteration, reports, batch)
        if stops:
            before = f" after {self.in_a_row} in a row were left out" if self.in_a_row else ""
            raise NonFiniteError(f"{sentence}; stopped{before}.")
        self.in_a_row += 1
        logger.warning("%s; the step is left out, %d in a row of at most %d.", sentence, self.in_a_row, self.skip)

    def _write(self, iteration: int, reports: Sequence[StepReport], batch: Batch) -> str:
        """The file, and the end of a sentence on it."""
        own = reports[comm.get_rank()]
        at_fault = bool(own.offence()) or not any(report.offence() for report in reports)
        batches = comm.gather(_plain(batch) if at_fault else None)
        data = self.checkpoint(self.memory.random)
        path = os.path.join(self.folder, f"iter_{iteration:07d}.pth")
        self._written = True
        if not comm.is_main_process():
            return f"; {path} holds what repeats it"
        data["nonfinite"] = {
            "iteration": iteration,
            "processes": [{**vars(report), "batch": one} for report, one in zip(reports, batches)],
        }
        try:
            os.makedirs(self.folder, exist_ok=True)
            write_atomically(path, lambda file: torch.save(data, file))
        except (OSError, RuntimeError) as error:
            return f"; what repeats it cannot be written to {path}: {reason(error)}"
        return f"; {path} holds what repeats it"

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]


def _sentence(iteration: int, reports: Sequence[StepReport]) -> str:
    """What was not finite, when, and on which images."""
    for rank, report in enumerate(reports):
        if report.offence():
            where = f" of process {rank}" if len(reports) > 1 else ""
            return f"{report.offence()} at iteration {iteration}{where}, images {', '.join(report.images)}"
    first = next(report for report in reports if report.gradients)
    others = f" (and those of {len(first.gradients) - 1} others)" if len(first.gradients) > 1 else ""
    images = ", ".join(name for report in reports for name in report.images)
    return f"the gradient of {first.gradients[0]}{others} is not finite at iteration {iteration}, images {images}"


def _plain(value: Any) -> Any:
    """A batch as tensors and plain containers, which need no trust to be read."""
    if isinstance(value, Instances):
        return {"image_size": tuple(value.image_size), **_plain(value.get_fields())}
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, (Tensor, str, int, float, type(None))):
        return value
    for name in ("tensor", "polygons"):  # of Detectron2's structures
        if hasattr(value, name):
            return _plain(getattr(value, name))
    return str(value)
