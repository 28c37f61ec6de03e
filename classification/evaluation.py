"""Moving batches to the device, and evaluating a network on a split with any number of ranks.

Shape shorthand: N images.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from classification.data import IMAGENET, Batch, Statistics, normalize
from classification.metrics import errors
from d2_mgd.errors import UserError
from d2_mgd.training import Interrupted, received_signal
from d2_mgd.training.processes import largest
from d2_mgd.training.sums import Sums

logger = logging.getLogger(__name__)


class Intake:
    """Moves batches to the device, normalised and channels last; reports images that cannot be read.

    Args:
        device: of the network.
        skip_broken: skip images that cannot be read, instead of raising an error.
        statistics: mean and standard deviation of the network's images.
    """

    def __init__(self, device: torch.device, skip_broken: bool, statistics: Statistics = IMAGENET) -> None:
        self.device = device
        self.skip_broken = skip_broken
        self.normalize = normalize(statistics).to(device)
        self.broken: set[str] = set()

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) float32 images, channels last, and (N,) targets; N may be zero.

        Raises:
            UserError: an image cannot be read, and ``skip_broken`` is False.
        """
        for path in batch.broken:
            self._note(path)
        images = self.normalize(batch.images.to(self.device, non_blocking=True))
        return images, batch.targets.to(self.device, non_blocking=True)

    def _note(self, path: str) -> None:
        if not self.skip_broken:
            raise UserError(
                f"the image {path} cannot be read: remove it (tools/check_imagefolder.py lists all such images), or "
                "skip such images with --skip-broken-images."
            )
        if path not in self.broken:
            self.broken.add(path)
            logger.warning("skipped %s, which cannot be read (%d so far)", path, len(self.broken))


def until_signal(batches: Any, intake: Intake, what: str, is_main: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the images and targets of a pass; ranks may have unequal shares (collective at the end).

    Raises:
        Interrupted: a rank received a signal; on every rank, after its last batch.
        UserError: see :class:`Intake`.
    """
    for batch in progress_bar(batches, what, is_main):
        if received_signal():
            break
        images, targets = intake(batch)
        if images.shape[0]:
            yield images, targets
    (received,) = largest([received_signal()])
    if received:
        raise Interrupted(received)


@dataclass(frozen=True)
class Evaluation:
    """Results of a network on a split.

    Args:
        err1, err5: top-1 and top-5 error in percent; with K < 5 classes, err5 is the top-K error.
        loss: mean cross-entropy.
        images: number of images.
    """

    err1: float
    err5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Any, intake: Intake, is_main: bool) -> Evaluation:
    """Evaluate a network on the images of all ranks, each counted once (collective at the end).

    Args:
        model: images of ``intake`` -> (N, K) float32 logits.
        batches: this rank's share.
        intake: moves a batch to the device.
        is_main: whether this rank shows a progress bar.

    Raises:
        UserError: no image can be read.
        Interrupted: a rank received a signal.
    """
    model.eval()
    sums = Sums(intake.device)
    for images, targets in until_signal(batches, intake, "evaluation", is_main):
        logits = model(images)
        losses = nn.functional.cross_entropy(logits, targets, reduction="sum")
        sums.add(images.shape[0], {"loss": losses, **errors(logits, targets)})
    count, totals = sums.totals(("loss", "err1", "err5"))
    if count == 0:
        raise UserError("no image of the evaluation split can be read; tools/check_imagefolder.py lists such images.")
    return Evaluation(100.0 * totals["err1"] / count, 100.0 * totals["err5"] / count, totals["loss"] / count, count)


def progress_bar(batches: Any, what: str, is_main: bool, done: int = 0) -> Any:
    """A progress bar over batches, shown by the main rank if standard error is a terminal."""
    shown = is_main and sys.stderr.isatty()
    return tqdm(batches, what, total=done + len(batches), initial=done, leave=False, disable=not shown)
