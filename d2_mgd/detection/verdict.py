"""Verdicts of a training: on its teacher, on its best student, and when to stop because nothing improves any more."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from detectron2.engine import hooks
from detectron2.evaluation.testing import flatten_results_dict

from d2_mgd.detection.teacher_evaluation import Metrics
from d2_mgd.distill import WeightSchedule
from d2_mgd.errors import CommonError
from d2_mgd.training.processes import from_main
from d2_mgd.training.verdict import verdict

logger = logging.getLogger(__name__)

BEST = "model_best"  # its file, without .pth
_LAST = "model_final"  # Detectron2's name of the checkpoint after the last iteration
_MAIN = ("panoptic_seg/PQ", "keypoints/AP", "segm/AP", "bbox/AP", "sem_seg/mIoU", "sem_seg/IoU")
STOPPED = "stopped_early"  # the scalar of a training that ended before SOLVER.MAX_ITER
_STATE = ("_val_metric", "best_metric", "best_iter", "worse", "_counted")
# percent; AP and PQ of random predictions are lower. mIoU of random pixels is higher where classes are few: there a bad
# teacher is found by comparing it with its student alone.
_CHANCE = 1.0


def main_metric(names: Iterable[str], wanted: str = "") -> str | None:
    """The metric that a training is judged by: of the task that includes the others, on the first data set.

    Args:
        names: of what was measured.
        wanted: MGD.EARLY_STOP.METRIC.

    Raises:
        CommonError: ``wanted`` was not measured.
    """
    names = list(names)
    if wanted and wanted not in names:
        raise CommonError(
            f"MGD.EARLY_STOP.METRIC {wanted} is none of the metrics of the evaluation. Available: {', '.join(names)}."
        )
    return wanted or next((name for end in _MAIN for name in names if f"/{name}".endswith(f"/{end}")), None)


class TeacherVerdict:
    """Compares a teacher with chance and with its student, and logs each warning once.

    Args:
        teacher: its metrics; None if it was not evaluated.
        wanted: MGD.EARLY_STOP.METRIC.
    """

    def __init__(self, teacher: Metrics | None, wanted: str) -> None:
        self.metrics = teacher or {}
        self.metric = main_metric(self.metrics) if wanted not in self.metrics else wanted
        self.warning = ""
        self.before: float | None = None  # of a trained student, before the first step
        self._value = 0.0
        self._best: float | None = None
        if self.metric is not None:
            blind = all(map(math.isnan, self.metrics.values()))  # COCO's metrics of a detector without any prediction
            self._value = 0.0 if blind else self.metrics[self.metric]
            logger.info("teacher: %s %.2f", self.metric, self._value)
            self._judge()

    def measured(self, student: Metrics, before: bool = False) -> None:
        """Take an evaluation of the student into account, perhaps that before the first step."""
        value = student.get(self.metric or "")
        if value is not None and value == value:  # not NaN
            value = float(value)  # of numpy: a checkpoint contains what follows from it
            self._best = value if self._best is None else max(self._best, value)
            self.before = value if before else self.before
            self._judge()

    def weigh(self, schedule: WeightSchedule, finished: int, last: int) -> None:
        """Set the share of the weight under the balance ``auto``, after ``finished`` of ``last`` iterations."""
        if self._best is None:
            return
        was_active = schedule.active(finished) and 0 < finished < last
        schedule.compare(self._value, self._best, trained=finished == 0)
        if was_active and schedule.share == 0.0:
            logger.info(
                "The student (%s %.2f) is better than its teacher (%.2f): the distillation stops (MGD.BALANCE auto)",
                self.metric, self._best, self._value,
            )  # fmt: skip

    def log_share(self, share: float) -> None:
        """Log what the balance ``auto`` does with the weight from the first step of this start on."""
        if self.metric is None:
            logger.info(
                "The teacher was not evaluated before the first step: MGD.BALANCE auto neither lowers the weight for a "
                "trained student nor stops the distillation"
            )
        elif share < 1.0:
            why = "the student is as good as its teacher" if share == 0.0 else "the student is trained already"
            logger.info("The distillation has %.2f of its weight: %s (MGD.BALANCE auto)", share, why)

    def summarise(self, best: Metrics) -> None:
        """Log the verdict on the teacher, and warn of a student that was better before the training."""
        if self.warning:
            logger.warning(self.warning)
        value = best.get(self.metric or "")
        if value is not None and self.before is not None and value < self.before:
            logger.warning(
                "The student was better before this training: %s %.2f, now %.2f at best",
                self.metric,
                self.before,
                value,
            )

    def _judge(self) -> None:
        assert self.metric is not None
        before = self.warning
        self.warning = verdict(self.metric, self._value, self._best, _CHANCE)
        if self.warning and not before:
            logger.warning(self.warning)


class StoppedEarly(BaseException):
    """Ends the loop of a trainer. Detectron2's logs each ``Exception`` as an error."""


class EvaluationHook(hooks.EvalHook):
    """Detectron2's hook. A training that was stopped between a checkpoint and its evaluation continues with the latter.

    Otherwise a resumed training would count other evaluations than one that was not stopped.

    Args:
        period: TEST.EVAL_PERIOD.
        evaluate: returns the same nested dict of metrics on every rank.
    """

    def __init__(self, period: int, evaluate: Callable[[], dict[str, Any]]) -> None:
        super().__init__(period, self._measure)
        self.evaluate = evaluate
        self.evaluated = 0  # finished iterations
        self.metrics: Metrics = {}  # of the newest evaluation since the start

    def before_train(self) -> None:
        start = self.trainer.start_iter
        due = self._period > 0 and start % self._period == 0
        if due and self.evaluated < start < self.trainer.max_iter:
            self.trainer.iter = self.trainer.storage.iter = start - 1
            self._do_eval()
            self.trainer.iter = self.trainer.storage.iter = start

    def _do_eval(self) -> None:
        finished = min(self.trainer.iter + 1, self.trainer.max_iter)
        if finished != self.evaluated:
            super()._do_eval()
            self.evaluated = finished

    def _measure(self) -> dict[str, Any]:
        results = self.evaluate()
        self.metrics = flatten_results_dict(results)
        return results

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated": self.evaluated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluated = state["evaluated"]


class BestStudentHook(hooks.BestCheckpointer):
    """Detectron2's hook, which writes ``model_best.pth``, with early stopping and a state; on every rank.

    Args:
        evaluation: the hook before this one.
        save_best: writes the student to the file of a name; a collective.
        save_last: saves the checkpoint of a name; a collective.
        patience: evaluations without a better one after which the training ends; 0 for no end.
        wanted: MGD.EARLY_STOP.METRIC.
    """

    def __init__(
        self,
        evaluation: EvaluationHook,
        save_best: Callable[..., None],
        save_last: Callable[[str], None],
        patience: int,
        wanted: str,
    ) -> None:
        super().__init__(evaluation._period, SimpleNamespace(save=save_best), "", file_prefix=BEST)
        self.evaluation = evaluation
        self.save_last = save_last
        self.patience = patience
        self.wanted = wanted
        self.worse = 0  # evaluations since the best one
        self._warned = False
        self._counted = 0  # finished iterations at the newest of them

    @property
    def best(self) -> Metrics:
        """The metric of the best evaluation, also of those before the training was resumed; empty before the first."""
        return {} if self.best_metric is None else {self._val_metric: self.best_metric}

    @property
    def metric(self) -> str | None:
        """The metric that the newest evaluation was judged by."""
        return main_metric(self.evaluation.metrics, self.wanted) if self.evaluation.metrics else None

    def before_train(self) -> None:
        self._best_checking()  # an evaluation that was made up for
        start = self.trainer.start_iter
        if self._out_of_patience(start):
            if not from_main(os.path.isfile(os.path.join(self.trainer.cfg.OUTPUT_DIR, f"{_LAST}.pth"))):
                self.trainer.iter = start - 1  # the last finished one
                self.save_last(_LAST)
                self.trainer.iter = start
            raise StoppedEarly

    def after_step(self) -> None:
        super().after_step()
        if self._out_of_patience(self.trainer.iter + 1):
            self.save_last(_LAST)
            raise StoppedEarly

    def _best_checking(self) -> None:
        metric = self.metric
        if metric is None and self.patience > 0 and self.evaluation.metrics and not self._warned:
            self._warned = True
            logger.warning(
                "MGD.EARLY_STOP.PATIENCE does not end this training: the evaluation has none of %s. Set "
                "MGD.EARLY_STOP.METRIC to one of: %s",
                ", ".join(_MAIN), ", ".join(self.evaluation.metrics),
            )  # fmt: skip
        if metric is None or self.evaluation.evaluated == self._counted:
            return
        self._counted, self._val_metric, best = self.evaluation.evaluated, metric, self.best_iter
        super()._best_checking()
        self.worse = 0 if self.best_iter != best else self.worse + 1

    def _out_of_patience(self, finished: int) -> bool:
        """Whether the training ends now, of which the iterations become the last ones."""
        if not 0 < self.patience <= self.worse or finished >= self.trainer.max_iter:
            return False
        logger.info(
            "Stopping after %d of %d iterations: %s has not improved in %d evaluations",
            finished, self.trainer.max_iter, self._val_metric, self.worse,
        )  # fmt: skip
        self.trainer.max_iter = finished
        self.trainer.storage.put_scalar(STOPPED, finished, smoothing_hint=False)
        return True

    def summarise(self) -> None:
        """Log the best evaluation and its file, and the last one."""
        if self.best_metric is None:
            if os.path.isfile(os.path.join(self.trainer.cfg.OUTPUT_DIR, f"{BEST}.pth")):
                logger.warning(
                    "%s.pth is of an earlier training: this one has no evaluation with a finite metric", BEST
                )
            return
        finished = min(self.best_iter + 1, self.trainer.max_iter)
        last = self.evaluation.metrics.get(self._val_metric)
        logger.info(
            "best student: %s %.2f after %d iterations, %s.pth%s",
            self._val_metric, self.best_metric, finished, BEST,
            "" if last is None else f"; last: {last:.2f}, {_LAST}.pth",
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])
