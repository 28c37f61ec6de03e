"""Steps with non-finite losses or gradients: report them, write a file that repeats the step, then skip or stop."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from d2_mgd.errors import CommonError, reason
from d2_mgd.matching import ChannelCost
from d2_mgd.training.files import write_atomically
from d2_mgd.training.modules import module_numbers, set_module_numbers
from d2_mgd.training.processes import all_gather, gather, rank
from d2_mgd.training.randomness import random_state

logger = logging.getLogger(__name__)

_NAMED_IMAGES = 4  # in a message


class NonFiniteError(CommonError):
    """A loss or gradient is not finite. Every rank raises the same message."""


@dataclass
class StepReport:
    """One rank's part of a step with non-finite numbers.

    Args:
        losses: name -> value.
        gradients: names of the parameters whose gradients are not finite.
        images: file names of the batch.
        failure: the model's error message if it computed no losses.
    """

    losses: dict[str, float]
    gradients: list[str]
    images: list[str]
    failure: str = ""

    def problem(self) -> str:
        """The model's failure, or its non-finite losses; "" if there are only gradients, which all ranks share."""
        bad = [f"{name} is {loss}" for name, loss in self.losses.items() if not math.isfinite(loss)]
        return self.failure.rstrip(".") or " and ".join(bad)


class NonFinitePolicy:
    """Skips steps with non-finite losses or gradients, or stops the training; the same on every rank.

    The first such step of a run, and the one that stops it, are written to ``<folder>/<step>.pth``. The file is the
    checkpoint from before the step. Its ``nonfinite`` contains the report of every rank, and the batches of the ranks
    that caused it. Where no step may be skipped, nothing is copied before a step, so the file's running statistics and
    observed matching costs include the step.

    Args:
        module: the trained module, not wrapped.
        skip: the most steps in a row to skip; 0 stops at the first.
        folder: for the files.
        checkpoint: random state before the step -> the checkpoint before the step; a collective.
        costs: matching costs that the forward pass of a step may add to.
        advice: the end of the error message.
    """

    def __init__(
        self,
        module: nn.Module,
        skip: int,
        folder: str | os.PathLike[str],
        checkpoint: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        costs: Mapping[str, ChannelCost] | None = None,
        advice: str = "",
    ) -> None:
        self.memory = _StepMemory(module, costs or {}, copies=skip > 0)
        self.skip = skip
        self.folder = folder
        self.checkpoint = checkpoint
        self.advice = advice
        self.skipped = 0
        self.in_a_row = 0
        self._written = False

    def before_step(self, observing: bool = False) -> None:
        """Copy what the step changes; ``observing`` where its forward pass adds to the matching costs."""
        self.memory.keep(observing)

    def after_finite_step(self) -> None:
        self.in_a_row = 0

    def handle(self, step: str, where: str, report: StepReport, batch: Callable[[], Any]) -> None:
        """Skip a step or stop, after undoing what its forward pass changed (collective).

        Args:
            step: name of the file.
            where: the step in a message, such as ``iteration 3``.
            report: of this rank.
            batch: copies this rank's batch, as tensors and plain containers.

        Raises:
            NonFiniteError: more steps in a row than may be skipped.
        """
        reports: list[StepReport] = all_gather(report)
        self.memory.restore()
        stops = self.in_a_row >= self.skip
        sentence = _sentence(where, reports)
        if stops or not self._written:
            sentence += self._write(step, where, reports, batch)
        if stops:
            before = f" after {self.in_a_row} skipped steps in a row" if self.in_a_row else ""
            raise NonFiniteError(f"{sentence}; stopped{before}.{self.advice}")
        self.skipped += 1
        self.in_a_row += 1
        if rank() == 0:
            logger.warning("%s; the step is skipped, %d in a row of at most %d.", sentence, self.in_a_row, self.skip)

    def _write(self, step: str, where: str, reports: Sequence[StepReport], batch: Callable[[], Any]) -> str:
        """Write the file (collective); returns the end of a sentence about it."""
        causes = [bool(report.problem()) for report in reports]
        batches = gather(batch() if causes[rank()] or not any(causes) else None)
        data = self.checkpoint(self.memory.random)
        path = os.path.join(self.folder, f"{step}.pth")
        self._written = True
        if rank() == 0:
            processes = [{**vars(report), "batch": one} for report, one in zip(reports, batches)]
            try:
                os.makedirs(self.folder, exist_ok=True)
                content = {**data, "nonfinite": {"step": where, "processes": processes}}
                write_atomically(path, lambda file: torch.save(content, file))
            except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
                return f"; {path}, which would repeat the step, cannot be written: {reason(error)}"
        return f"; {path} repeats the step"

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.skipped, self.in_a_row = state.get("skipped", 0), state["in_a_row"]


class _StepMemory:
    """A copy, made before each step, of the state that a forward pass changes.

    Args:
        module: the trained module.
        costs: matching costs that a forward pass may add to.
        copies: whether to copy tensors too. The random state and plain numbers of modules are always kept.
    """

    def __init__(self, module: nn.Module, costs: Mapping[str, ChannelCost], copies: bool) -> None:
        self.module = module
        self.costs = costs if copies else {}
        self.random: dict[str, Any] = {}
        self._buffers = list(module.buffers()) if copies else []
        self._copies = [buffer.clone() for buffer in self._buffers]

    def keep(self, observing: bool) -> None:
        self.random = random_state()
        self._numbers = module_numbers(self.module)
        for copy, buffer in zip(self._copies, self._buffers):
            copy.copy_(buffer)
        self._packed = {name: cost.packed() for name, cost in self.costs.items()} if observing else {}

    def restore(self) -> None:
        """Undo the forward pass, except in the global RNG."""
        set_module_numbers(self.module, self._numbers)
        for copy, buffer in zip(self._copies, self._buffers):
            buffer.copy_(copy)
        for name, packed in self._packed.items():
            self.costs[name].load_packed(packed)


def _sentence(where: str, reports: Sequence[StepReport]) -> str:
    """The message without its end: which value is not finite, in which step, on which images."""
    for number, report in enumerate(reports):
        if report.problem():
            on_rank = f" on rank {number}" if len(reports) > 1 else ""
            return f"{report.problem()} at {where}{on_rank}, images {_listed(report.images)}"
    names = next(report.gradients for report in reports if report.gradients)
    others = f" (and of {len(names) - 1} others)" if len(names) > 1 else ""
    images = _listed([name for report in reports for name in report.images])
    return f"the gradient of {names[0]}{others} is not finite at {where}, images {images}"


def _listed(images: Sequence[str]) -> str:
    more = len(images) - _NAMED_IMAGES
    return ", ".join(images[:_NAMED_IMAGES]) + (f" and {more} more" if more > 0 else "")
