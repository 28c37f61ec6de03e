"""Rematch a student in training: measure the matching cost in a pass over images, solve, or keep the old matching.

All of it but :func:`rematch_due` is a collective under ``torch.distributed``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from d2_mgd.distill.distiller import MatchingGuidedDistiller
from d2_mgd.distill.reports import RematchReport
from d2_mgd.distill.schedule import RematchSchedule, WeightSchedule
from d2_mgd.errors import CommonError, UserError
from d2_mgd.matching import SolverError
from d2_mgd.training.modules import preserved_modes
from d2_mgd.training.processes import average_buffers, rank, sum_over_ranks, together
from d2_mgd.training.randomness import preserved_randomness

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")


def rematch_due(schedule: RematchSchedule, weight: WeightSchedule, steps: int) -> bool:
    """Whether to rematch after ``steps`` finished steps: at the start of the distillation, then by schedule."""
    first = steps == weight.start and schedule.start
    return weight.active(steps) and (first or schedule.due(steps))


@torch.no_grad()
def observe_pass(
    distiller: MatchingGuidedDistiller,
    student: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    maps_of: Callable[[Batch], Sequence[Any]],
) -> None:
    """Measure the matching costs over the images of a pass, with the student in evaluation mode.

    Batch-norm's running statistics are first averaged over ranks, so that all ranks measure the same student. Modes and
    the global RNG are restored. After an error, such as :class:`~d2_mgd.training.Interrupted`, the costs are empty.

    Args:
        distiller: collects the costs.
        student: the network in training, not wrapped.
        batches: starts the pass over this rank's share of the images.
        maps_of: batch -> the arguments of :meth:`MatchingGuidedDistiller.observe`.
    """
    _forget(distiller)
    with preserved_randomness(), preserved_modes(student):
        average_buffers(student)
        student.eval()
        try:
            for batch in batches():
                distiller.observe(*maps_of(batch))
        except BaseException:
            _forget(distiller)
            raise


def rematch(distiller: MatchingGuidedDistiller, when: str) -> dict[str, RematchReport]:
    """Solve the observed costs and use the new matchings.

    If a cost is empty or not finite, or a solver fails, the old matchings stay, with a warning.

    Args:
        distiller: has observed images.
        when: for the log, such as ``5 epochs``.

    Returns:
        Feature name -> report; empty if the old matchings stay.

    Raises:
        CommonError: there are no old matchings.
    """
    matched = distiller.matched
    try:
        reports = distiller.rematch()
    except (UserError, SolverError) as error:  # another RuntimeError means that a rank is lost
        if not matched:
            raise CommonError(f"the first matching cannot be found: {error}") from error
        _forget(distiller)
        if rank() == 0:
            logger.warning("Rematch after %s: %s The old matching stays.", when, error)
        return {}
    for name, report in reports.items():
        logger.info(
            "%s after %s: %s S=%d T=%d images=%d mean cost %.4f (%.4f by chance), %ssolved in %.2f s",
            "Rematch" if matched else "First matching", when, name, report.matching.num_student,
            report.matching.num_teacher, report.num_images, report.mean_cost, report.cost.mean(),
            f"{report.changed:.1%} of channels changed, " if matched else "", report.seconds,
        )  # fmt: skip
        if report.cost.max() == report.cost.min() and report.cost.size > 1 and rank() == 0:
            logger.warning(
                "%s after %s: all channels cost the same, so the matching means nothing. Maps of one pixel, whose "
                "Pearson correlation is not defined, or constant maps do that: leave this feature out.",
                name, when,
            )  # fmt: skip
    return reports


def gather_costs(distiller: MatchingGuidedDistiller) -> None:
    """Move the running costs of all ranks to rank 0, which saves them. The sum over ranks stays the same."""
    if not together():
        return
    for cost in distiller.costs.values():
        packed = sum_over_ranks(cost.packed().cpu())  # on the CPU also where a rank has not seen an image
        cost.load_packed(packed if rank() == 0 else torch.zeros_like(packed))


def _forget(distiller: MatchingGuidedDistiller) -> None:
    for cost in distiller.costs.values():
        cost.reset()
