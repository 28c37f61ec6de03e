"""When a detector in training observes its own maps and rematches: by the iteration alone, so equally on every rank."""

from __future__ import annotations

import time
from collections.abc import Mapping

from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from d2_mgd.distill import MatchingGuidedDistiller, RematchReport, RematchSchedule, WeightSchedule
from d2_mgd.distill.rematching import rematch, rematch_due
from d2_mgd.errors import UserError

SOURCES = ("pass", "online")


class Rematcher(nn.Module):
    """Counts iterations, decides when to observe and to rematch, and rematches. It has no parameters.

    Its two numbers are plain attributes of a module, which :func:`~d2_mgd.training.modules.module_numbers` keeps.

    Args:
        schedule: when to rematch; by default before the first step with distillation.
        source: ``online``: costs are measured on the maps of training steps. ``pass``: on a separate pass over images,
            by the hook of :func:`~d2_mgd.detection.distillation_hooks`.
        every: online, observe every so many steps.

    Attributes:
        finished: number of finished training steps.
        checked: rematches that are due before this number of finished steps are done.
    """

    def __init__(self, schedule: RematchSchedule | None = None, source: str = "online", every: int = 10) -> None:
        super().__init__()
        if source not in SOURCES:
            raise UserError(f"unknown source of matching costs {source!r}; there are: {', '.join(SOURCES)}.")
        if every < 1:
            raise UserError(f"the maps of every so many steps are observed: 1 or more, got {every}.")
        self.schedule = schedule or RematchSchedule()
        self.source = source
        self.every = int(every)
        self.finished = 0
        self.checked = 0
        self._reports: Mapping[str, RematchReport] = {}

    def iteration(self) -> int:
        """Number of finished steps: that of Detectron2's event storage, or without one an own count."""
        return get_event_storage().iter if has_event_storage() else self.finished

    def due(self, iteration: int, weight: WeightSchedule, matched: bool) -> bool:
        """Whether the step of ``iteration`` comes after a scheduled rematch that was not done.

        Args:
            iteration: number of finished steps.
            weight: when the distillation counts.
            matched: whether there are matchings. The rematch at the start is left out if there are.
        """
        if not weight.active(iteration) or (matched and self.source == "pass"):
            return False
        steps = range(max(self.checked, weight.start), iteration + 1)
        return any(rematch_due(self.schedule, weight, step) for step in steps if not (matched and step == weight.start))

    def observes(self, iteration: int) -> bool:
        """Whether the maps of this step count in the matching costs."""
        return self.source == "online" and iteration % self.every == 0

    def rematch(self, distiller: MatchingGuidedDistiller, iteration: int, begin: float) -> None:
        """Solve the observed costs, use the new matchings, and write them to the event storage (collective).

        Args:
            distiller: has observed images.
            iteration: number of finished steps.
            begin: of the measurement, by ``time.perf_counter()``.

        Raises:
            CommonError: there is no first matching, see :func:`~d2_mgd.distill.rematching.rematch`.
        """
        reports = rematch(distiller, f"{iteration} iterations")
        self.checked = iteration + 1
        self._reports = reports
        if not (reports and has_event_storage()):
            return
        storage = get_event_storage()
        storage.put_scalar("rematch/seconds", time.perf_counter() - begin, smoothing_hint=False)
        for name, report in reports.items():
            storage.put_scalar(f"rematch/{name}_cost", report.mean_cost, smoothing_hint=False)
            storage.put_scalar(f"rematch/{name}_changed", report.changed, smoothing_hint=False)

    def take_reports(self) -> Mapping[str, RematchReport]:
        """Feature name -> report of the newest rematch, once; empty where there was none since the last call."""
        reports, self._reports = self._reports, {}
        return reports
