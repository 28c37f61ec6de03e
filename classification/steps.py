"""One step of the optimiser: a batch, whole or in parts, forward and backward, checked, and then applied.

Shape shorthand: N images.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from classification.data import Batch
from classification.distillation import Forward, Student
from classification.evaluation import Intake
from classification.metrics import errors

__all__ = ["FINE", "Gradients", "Stepper", "parts_of"]

FINE = 0

# Here a scaler no longer explains gradients that are not finite: what float16 cannot hold is 7e7 without it.
_SMALLEST_SCALE = 2.0**-10


class Gradients(NamedTuple):
    """What a backward pass leaves, besides gradients.

    Args:
        images: N, of this process.
        losses: name -> scalar loss, summed over the images.
        wrong: ``err1`` and ``err5`` -> number of images.
        offence: () int64, :data:`FINE` or what is not finite, see :meth:`Stepper.name_of`.
        outputs: of the parts, for their maps.
    """

    images: int
    losses: dict[str, Tensor]
    wrong: dict[str, Tensor]
    offence: Tensor
    outputs: list[Forward]


def parts_of(batch: Batch, number: int) -> list[Batch]:
    """A batch in parts whose sizes differ by one at most, with two images or more, which batch-norm needs.

    Args:
        batch: N images.
        number: how many parts; fewer if there are too few images.
    """
    number = min(number, max(1, len(batch.targets) // 2))
    if number == 1:
        return [batch]
    pairs = zip(batch.images.tensor_split(number), batch.targets.tensor_split(number))
    return [Batch(images, targets, batch.broken if not index else []) for index, (images, targets) in enumerate(pairs)]


class Stepper:
    """Turns batches into steps of the optimiser.

    Args:
        step: the module that a batch goes through: the student (possibly wrapped) and the teacher.
        student: the trainable part.
        optimizer: of the student.
        intake: brings a batch to the device.
        accumulate: number of parts that a batch goes through in.
        float16: scale the losses, for gradients in float16.
        restorable: whether :meth:`discard` can undo a backward pass, which costs a copy of the running statistics.
    """

    def __init__(
        self,
        step: nn.Module,
        student: Student,
        optimizer: torch.optim.Optimizer,
        intake: Intake,
        accumulate: int = 1,
        float16: bool = False,
        restorable: bool = False,
    ) -> None:
        self.step = step
        self.student = student
        self.optimizer = optimizer
        self.intake = intake
        self.accumulate = accumulate
        self.scaler = torch.amp.GradScaler(intake.device.type, enabled=float16)
        self.restorable = restorable
        self._buffers: list[Tensor] = []

    def backward(self, batch: Batch, keep_maps: bool = False, factor: float = 1.0) -> Gradients:
        """Gradients of a batch's mean loss; the weights stay as they are.

        Under DDP they are those of all processes, which have equally many parts; one exchange a batch.

        Args:
            batch: N images, as they come from a loader.
            keep_maps: keep the maps of both networks.
            factor: of the distillation losses.
        """
        if self.restorable:
            self._buffers = [buffer.clone() for buffer in self.student.buffers()]
        self.optimizer.zero_grad(set_to_none=True)
        count = len(batch.targets)
        parts = parts_of(batch, self.accumulate)
        losses: dict[str, Tensor] = {}
        wrong: dict[str, Tensor] = {}
        outputs = []
        for index, part in enumerate(parts):
            with self._silent(index + 1 < len(parts)):
                images, targets = self.intake(part)
                output: Forward = self.step(images, targets, keep_maps, factor)
                sums = {name: loss.sum() for name, loss in output.losses.items()}
                self.scaler.scale(torch.stack(list(sums.values())).sum() / count).backward()
            _add(losses, sums)
            _add(wrong, errors(output.logits.detach(), targets))
            if keep_maps:
                outputs.append(output)
        return Gradients(count, losses, wrong, self._offence(losses), outputs)

    def apply(self) -> None:
        """Step with the gradients that there are."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def discard(self) -> None:
        """Forget the gradients, and what the forward passes left in running statistics."""
        assert self.restorable
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.student.buffers(), self._buffers):
            buffer.copy_(before)

    def name_of(self, offence: int, losses: Iterable[str]) -> str:
        """What is not finite, for a message; the names of the losses in their order."""
        gradients = (f"the gradient of {name}" for name, _ in self._gradients())
        return [*losses, *gradients][offence - 1]

    def _gradients(self) -> list[tuple[str, Tensor]]:
        named = self.student.named_parameters()
        return [(name, parameter.grad) for name, parameter in named if parameter.grad is not None]

    @contextlib.contextmanager
    def _silent(self, silent: bool) -> Iterator[None]:
        """Under DDP, gradients are exchanged with the last part alone."""
        wrapped: Any = getattr(self.step, "student", None)
        if silent and isinstance(wrapped, nn.parallel.DistributedDataParallel):
            with wrapped.no_sync():
                yield
        else:
            yield

    def _offence(self, losses: dict[str, Tensor]) -> Tensor:
        """1 + number of the first loss, or gradient, that is not finite; found without waiting for the device."""
        norms = torch._foreach_norm([gradient for _, gradient in self._gradients()], math.inf)
        largest = torch.stack([norm.float() for norm in norms])
        bad_gradients = ~torch.isfinite(largest)
        if self.scaler.is_enabled():  # skips such a step, and halves its scale, while that is of use
            bad_gradients &= self.scaler.scale(torch.ones_like(largest)) <= _SMALLEST_SCALE
        bad = torch.cat([~torch.isfinite(torch.stack(list(losses.values()))), bad_gradients])
        return torch.where(bad.any(), bad.int().argmax() + 1, FINE)


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        value = value.detach()
        sums[name] = sums[name] + value if name in sums else value
