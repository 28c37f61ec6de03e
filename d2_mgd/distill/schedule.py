"""The schedules of rematches and of the distillation weight."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from d2_mgd.errors import UserError

__all__ = ["DECAYS", "RematchSchedule", "WeightSchedule"]

DECAYS = ("constant", "linear", "cosine")


class RematchSchedule:
    """Rematch at the start, then with periods that change at given steps.

    The published detector: ``RematchSchedule([5000, 31000], [20000])``, every 5,000 iterations until 20,000, then at
    multiples of 31,000. Classification counts epochs: ``RematchSchedule([1])``.

    Args:
        periods: one period more than milestones; rematch at its multiples. 0 is never in that span. Empty is never.
        milestones: ascending numbers of steps; from each on the next period is in force.
        start: whether to rematch before the first step.
        at: numbers of steps at which to rematch besides.

    Raises:
        ValueError: numbers that do not fit together.
    """

    def __init__(
        self, periods: Sequence[int] = (), milestones: Sequence[int] = (), start: bool = True, at: Sequence[int] = ()
    ) -> None:
        self.periods = [int(period) for period in periods]
        self.milestones = [int(milestone) for milestone in milestones]
        self.start = bool(start)
        self.at = sorted({int(step) for step in at})
        if self.periods and len(self.periods) != len(self.milestones) + 1:
            raise UserError(
                f"a rematch schedule needs one period more than milestones, got periods {self.periods} and "
                f"milestones {self.milestones}."
            )
        if any(period < 0 for period in self.periods):
            raise UserError(f"rematch periods must not be negative, got {self.periods}.")
        if self.milestones != sorted(set(self.milestones)) or any(step <= 0 for step in self.milestones):
            raise UserError(f"rematch milestones must be positive and ascending, got {self.milestones}.")
        if any(step <= 0 for step in self.at):
            raise UserError(f"rematch steps must be positive, got {self.at}; 'start' is the one before the first.")

    @classmethod
    def log_spaced(cls, first: int, last: int, count: int, start: bool = True) -> RematchSchedule:
        """``count`` rematches from step ``first`` to step ``last``, each a constant factor later than the one before.

        Often while the student changes fast, seldom later. Steps that round to the same number are one rematch.

        Raises:
            ValueError: not 0 < first <= last, or a count below 1.
        """
        if not 0 < first <= last or count < 1:
            raise UserError(
                f"log-spaced rematches need 0 < first <= last and a count of 1 or more, got first {first}, last {last} "
                f"and count {count}."
            )
        ratio = (last / first) ** (1.0 / max(1, count - 1))
        steps = [round(first * ratio**index) for index in range(count - 1)]
        return cls(start=start, at=[*steps, last])

    def due(self, steps: int) -> bool:
        """Whether to rematch after ``steps`` finished steps (0: before the first)."""
        if steps == 0:
            return self.start
        if steps in self.at:
            return True
        if not self.periods:
            return False
        period = self.periods[bisect_right(self.milestones, steps)]
        return period > 0 and steps % period == 0


class WeightSchedule:
    """Factor of the distillation losses as a training goes on.

    0 before ``start`` and from ``stop`` on (stopping early helps students that are far smaller than their teacher: Cho
    and Hariharan, "On the Efficacy of Knowledge Distillation", ICCV 2019). In between 1, or falling from 1 to ``end``
    along a line or half a cosine (Loshchilov and Hutter, "SGDR", ICLR 2017). ``warmup`` multiplies it by a line from 0
    to 1 over as many steps after ``start``, as DKD is published (Zhao et al., CVPR 2022).

    Steps are whatever the training counts: iterations or epochs. The factor follows from their number and from
    ``share``, which a checkpoint has to contain. It is 1 until :meth:`compare` changes it, as trainers do under the
    balance ``auto``.

    Args:
        decay: ``constant``, ``linear`` or ``cosine``.
        start: number of finished steps from which on the distillation counts.
        stop: number of finished steps from which on it does not; None is never, which ``constant`` alone can do.
        warmup: steps of the warm-up; 0 is none.
        end: what ``linear`` and ``cosine`` fall to at ``stop``, 0 to 1.

    Raises:
        ValueError: an unknown decay, a decay without a stop, or numbers out of order.
    """

    def __init__(
        self, decay: str = "constant", start: int = 0, stop: int | None = None, warmup: int = 0, end: float = 0.0
    ) -> None:
        if decay not in DECAYS:
            raise UserError(f"unknown decay {decay!r} of the distillation weight; there are: {', '.join(DECAYS)}.")
        if stop is None and decay != "constant":
            raise UserError(f"a {decay} decay of the distillation weight needs a step at which it stops.")
        if start < 0 or warmup < 0 or (stop is not None and stop <= start):
            raise UserError(
                f"a weight schedule needs 0 <= start < stop and a warm-up of 0 or more, got start {start}, stop {stop} "
                f"and warm-up {warmup}."
            )
        if not 0.0 <= end <= 1.0:
            raise UserError(f"the distillation weight falls to a share of 0 to 1 of itself, got {end}.")
        self.decay = decay
        self.start = int(start)
        self.stop = None if stop is None else int(stop)
        self.warmup = int(warmup)
        self.end = float(end)
        self.share = 1.0  # of the weight; 0 ends the distillation before ``stop``

    def compare(self, teacher: float, student: float, chance: float = 0.0, trained: bool = False) -> None:
        """Set the share of the weight from the metrics of both networks; docs/weight.md has the figures behind it.

        A student that is better than its teacher has 0 from then on. One that is ``trained`` already has
        (teacher - student) / (teacher - chance) from the first step on, limited to 0 to 1.

        Args:
            teacher: its metric, the higher the better.
            student: the same of the student.
            chance: the same of guessing.
            trained: whether this is the comparison before the first step, of a student with given weights.
        """
        if student > teacher:
            self.share = 0.0
        elif trained and teacher > chance:
            self.share = min(1.0, (teacher - student) / (teacher - chance))

    def active(self, steps: float) -> bool:
        """Whether ``steps`` finished steps lie between ``start`` and ``stop``, and ``share`` is above 0."""
        return self.share > 0.0 and steps >= self.start and (self.stop is None or steps < self.stop)

    def factor(self, steps: float) -> float:
        """The factor, 0 to 1, after ``steps`` finished steps."""
        if not self.active(steps):
            return 0.0
        factor = self.share if self.warmup == 0 else self.share * min(1.0, (steps - self.start) / self.warmup)
        if self.stop is None or self.decay == "constant":
            return factor
        done = (steps - self.start) / (self.stop - self.start)
        left = 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return factor * (self.end + (1.0 - self.end) * left)
