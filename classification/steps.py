"""Gradients of a batch of images, with gradient accumulation over micro-batches.

Shape shorthand: N images.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from classification.data import Batch
from classification.distillation import Forward
from classification.evaluation import Intake
from classification.metrics import errors
from d2_mgd.training.steps import Stepper


class Found(NamedTuple):
    """Results of a backward pass, besides gradients.

    Args:
        losses: name -> () loss, summed over the images.
        wrong: ``err1`` and ``err5`` -> number of images.
        outputs: of the micro-batches, with their maps; empty without ``keep_maps``.
    """

    losses: dict[str, Tensor]
    wrong: dict[str, Tensor]
    outputs: list[Forward]


def backward(
    stepper: Stepper,
    step: nn.Module,
    intake: Intake,
    batch: Batch,
    accumulate: int = 1,
    keep_maps: bool = False,
    factor: float = 1.0,
) -> Found:
    """Compute the gradients of a batch's mean loss, without changing the weights.

    Under DDP, gradients are means over ranks, and all ranks have equally many micro-batches.

    Args:
        stepper: of the student.
        step: the module that a batch goes through: the student (possibly wrapped) and the teacher.
        intake: moves a batch to the device.
        batch: N images of a loader.
        accumulate: number of micro-batches.
        keep_maps: keep the maps of both networks.
        factor: of the distillation losses.
    """
    wrong: dict[str, Tensor] = {}
    outputs = []

    def losses_of(part: Batch) -> dict[str, Tensor]:
        images, targets = intake(part)
        output: Forward = step(images, targets, keep_maps, factor)
        for name, count in errors(output.logits.detach(), targets).items():
            wrong[name] = wrong[name] + count if name in wrong else count
        if keep_maps:
            outputs.append(output)
        return output.losses

    losses = stepper.backward(parts_of(batch, accumulate), losses_of, len(batch.targets))
    return Found(losses, wrong, outputs)


def parts_of(batch: Batch, number: int) -> list[Batch]:
    """Split a batch into micro-batches whose sizes differ by at most one, each with at least two images for batch-norm.

    Args:
        batch: N images.
        number: of micro-batches; fewer if there are too few images.
    """
    number = min(number, max(1, len(batch.targets) // 2))
    if number == 1:
        return [batch]
    pairs = zip(batch.images.tensor_split(number), batch.targets.tensor_split(number))
    return [Batch(images, targets, batch.broken if not index else []) for index, (images, targets) in enumerate(pairs)]
