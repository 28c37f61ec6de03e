"""The schedules of a run: learning rate, distillation weight and rematches."""

from __future__ import annotations

import argparse
import math
from bisect import bisect_right
from collections.abc import Sequence

from classification.options import rematch_schedule, weight_schedule
from d2_mgd.distill import MatchingGuidedDistiller, RematchSchedule, WeightSchedule
from d2_mgd.distill.rematching import rematch_due

_WARMUP_FACTOR = 0.1  # published


def learning_rate_factor(epoch: int, drops: Sequence[int], ratio: float, warmup_epochs: int = 0) -> float:
    """Factor of the learning rate in an epoch, counted from 0: drops, and a linear warm-up."""
    factor = ratio ** bisect_right(sorted(drops), epoch)
    if epoch < warmup_epochs:
        share = epoch / warmup_epochs
        factor *= _WARMUP_FACTOR * (1.0 - share) + share
    return factor


class Schedules:
    """The schedules of a run.

    Args:
        options: as parsed.
        distiller: None if no features are distilled.
        steps: of an epoch.
        images: of a step, on all ranks.
    """

    def __init__(
        self, options: argparse.Namespace, distiller: MatchingGuidedDistiller | None, steps: int, images: int
    ) -> None:
        self.options = options
        self.steps = steps
        self.images = images
        matched = distiller is not None and distiller.needs_matching
        self.rematch = rematch_schedule(options) if matched else RematchSchedule(start=False)
        self.weight = WeightSchedule() if options.method == "base" else weight_schedule(options)

    def learning_rate(self, epoch: int) -> float:
        """The learning rate in an epoch, counted from 0."""
        options = self.options
        warmup = options.warmup_epochs if options.warmup else 0
        factor: float = learning_rate_factor(epoch, options.lr_drop_epochs, options.lr_drop_ratio, warmup)
        return options.lr * factor

    def distill_factor(self, finished_steps: int) -> float:
        """Factor of the distillation losses in the next step."""
        return self.weight.factor(finished_steps / self.steps)

    def starts_matched(self, epoch: int) -> bool:
        """Whether a training that starts with epoch ``epoch`` needs a matching before its first step."""
        return self.rematch.start and self.weight.active(epoch)

    def rematch_due(self, epoch: int) -> bool:
        """Whether to rematch after ``epoch`` epochs; never after the last, because no step would use the matching."""
        return epoch < self.options.epochs and rematch_due(self.rematch, self.weight, epoch)

    def observing(self, finished_steps: int) -> bool:
        """Whether the next rematch uses the maps of the next step: one of the last steps with enough images for it."""
        if not self.rematch.start or self.options.mgd_update_source == "pass":
            return False
        later = range(finished_steps // self.steps + 1, self.options.epochs)
        due = next((epoch for epoch in later if self.rematch_due(epoch)), None)
        if due is None:
            return False
        left = due * self.steps - finished_steps
        return left <= math.ceil(self.options.mgd_update_images / self.images)
