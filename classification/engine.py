"""Training: epochs, steps, evaluation and rematching of one process's share of a run."""

from __future__ import annotations

import argparse
import logging
import math
import signal
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from classification.checkpoint import STUDENT_LAST, checkpoints_of
from classification.data import (
    Batch,
    ImageDataset,
    ShuffledBatches,
    image_statistics,
    loader,
    rematch_indices,
    renormalize,
    strided_batches,
)
from classification.data_parallel import over_same_gpus
from classification.distillation import Classifier, Student
from classification.evaluation import Evaluation, Intake, evaluate, progress_bar, raise_if_interrupted
from classification.metrics import Journal, Remaining, Sums, Throughput
from classification.nonfinite import dump_step
from classification.options import as_values, rematch_schedule, weight_schedule
from classification.processes import Process
from classification.records import write_checkpoint, write_epoch, write_matching
from classification.state import restore_training, training_state
from classification.steps import FINE, Gradients, Stepper
from d2_mgd.distill import MatchingGuidedDistiller, RematchSchedule, WeightSchedule
from d2_mgd.errors import CommonError, UserError, located
from d2_mgd.matching import SolverError
from d2_mgd.training import Interrupted, received_signal
from d2_mgd.training.processes import all_gather, average_buffers, failing_together, largest
from d2_mgd.training.randomness import random_state
from d2_mgd.training.services import open_logs

__all__ = ["Progress", "Trainer", "learning_rate_factor"]

logger = logging.getLogger(__name__)

_WARMUP_FACTOR = 0.1  # published
_OFFENCES = 1 << 48  # more than losses and gradients times processes


def learning_rate_factor(epoch: int, drops: Sequence[int], ratio: float, warmup_epochs: int = 0) -> float:
    """What the learning rate is multiplied by in an epoch (counted from 0): drops, and a linear warm-up."""
    factor = ratio ** bisect_right(sorted(drops), epoch)
    if epoch < warmup_epochs:
        share = epoch / warmup_epochs
        factor *= _WARMUP_FACTOR * (1.0 - share) + share
    return factor


@dataclass
class Progress:
    """Where a run is.

    Args:
        epoch, step: finished epochs, and finished steps of the next one.
        history: a line an epoch.
        best: the line with the least top-1 error.
        teacher: the teacher's errors, where it knows the data's classes.
        skipped, skipped_in_row: steps that were skipped, in all and since the last that was not.
    """

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    teacher: dict[str, float] | None = None
    skipped: int = 0
    skipped_in_row: int = 0


class Trainer:
    """One process of a run.

    Args:
        options: as parsed.
        process: which of the processes this is.
        student: the trainable part, on its device.
        step: the module that a batch goes through: the student (possibly wrapped) and the teacher.
        data: the data sets ``train``, ``valid`` and ``rematch``.
        teacher: what a checkpoint records of the teacher.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        process: Process,
        student: Student,
        step: nn.Module,
        data: Mapping[str, ImageDataset],
        teacher: Mapping[str, Any] | None = None,
    ) -> None:
        self.options = options
        self.process = process
        self.student = student
        self.step = step
        self.data = data
        self.teacher = dict(teacher) if teacher else None
        self.statistics = image_statistics(student.network)
        self.intake = Intake(process.device, options.skip_broken_images, self.statistics)
        self.progress = Progress(epoch=options.start_epoch)
        self.sums = Sums(process.device)
        self.summed: list[str] = []  # names of what is summed over the epoch
        self.checkpoints = checkpoints_of(options.output_dir, options.keep_checkpoints)
        optimizer = torch.optim.SGD(
            student.parameters(),
            options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=bool(options.nesterov),
        )
        self.stepper = Stepper(
            step,
            student,
            optimizer,
            self.intake,
            options.accumulate,
            float16=options.mixed_precision == "fp16",
            restorable=options.skip_nonfinite > 0,
        )
        self.batch_size = options.batch_size // process.local_world
        self.workers = math.ceil(options.workers / process.local_world)
        self.order = ShuffledBatches(len(data["train"]), self.batch_size, options.seed, process.rank, process.world)
        self.batches = loader(data["train"], self.order, self.workers, process.device, keep=True)
        self.schedule = RematchSchedule(start=False)
        if student.distiller is not None and student.distiller.needs_matching:
            self.schedule = rematch_schedule(options)
        self.weight = WeightSchedule() if options.method == "base" else weight_schedule(options)
        self.journal: Journal | None = None

    @property
    def distiller(self) -> MatchingGuidedDistiller:
        assert self.student.distiller is not None
        return self.student.distiller

    @property
    def together(self) -> int:
        """Images of a step of all processes."""
        return self.batch_size * self.process.world

    @property
    def finished_steps(self) -> int:
        """Steps of the whole run."""
        return self.progress.epoch * self.order.steps + self.progress.step

    def fit(self) -> Progress:
        """Train to the last epoch.

        Raises:
            SystemExit: after a signal, when all is saved; the status is 143 (SIGTERM) or 130 (Ctrl-C).
        """
        if self.process.is_main:
            self.options.output_dir.mkdir(parents=True, exist_ok=True)
            options, folder = self.options, self.options.output_dir
            logs = open_logs(options.log, folder, as_values(options), "step", resume=self.finished_steps > 0)
            self.journal = Journal(folder, self.finished_steps, logs)
        self.remaining = Remaining(self.finished_steps, self.options.epochs * self.order.steps)
        try:
            if self.schedule.start and self.weight.active(self.progress.epoch) and not self.distiller.matched:
                self._observe_pass(self.progress.epoch)
                self._rematch(self.progress.epoch)
            while self.progress.epoch < self.options.epochs:
                self._epoch()
        except Interrupted as stopped:
            self._leave(stopped.number)
        if self.journal is not None:
            student = self.options.output_dir / STUDENT_LAST if self.options.log_student else None
            self.journal.close(student, success=True)
        return self.progress

    def _leave(self, received: int) -> NoReturn:
        name = signal.Signals(received).name
        if self.progress.step == 0:  # in the pass for the first matching
            self._say("%s: left before a step; there is nothing to save.", name)
        else:
            self.save()
            self._say(
                "%s: left after %d epochs and %d of %d steps, all of it saved; the same command with --resume goes on.",
                name, self.progress.epoch, self.progress.step, self.order.steps,
            )  # fmt: skip
        if self.journal is not None:
            self.journal.close()
        raise SystemExit(128 + received)

    def _say(self, text: str, *values: object) -> None:
        """A warning that all processes have alike, once."""
        if self.process.is_main:
            logger.warning(text, *values)

    # ---- an epoch

    def _epoch(self) -> None:
        epoch, options = self.progress.epoch, self.options
        warmup = options.warmup_epochs if options.warmup else 0
        rate = options.lr * learning_rate_factor(epoch, options.lr_drop_epochs, options.lr_drop_ratio, warmup)
        for group in self.stepper.optimizer.param_groups:
            group["lr"] = rate
        clock = Throughput()
        self._train(epoch, clock)
        line: dict[str, Any] = {"epoch": epoch + 1, "lr": rate}
        line.update({f"train_{name}": value for name, value in self.sums.means(self.summed).items()})
        line.update({name: 100.0 * line[name] for name in ("train_err1", "train_err5") if name in line})
        line["images_per_second"] = round(clock.per_second, 1)
        average_buffers(self.student)
        found = self.evaluate()
        line.update(err1=found.err1, err5=found.err5, loss=found.loss)
        if self._rematch_due(epoch + 1):
            if options.mgd_update_source == "pass" or not self.distiller.matched:
                self._observe_pass(epoch + 1)
            line.update(self._rematch(epoch + 1))
        line["broken_images"] = len(set().union(*all_gather(self.intake.broken)))
        line["skipped_steps"] = self.progress.skipped
        line["seconds"] = round(clock.seconds, 1)
        self._finish(line)

    def _finish(self, line: dict[str, Any]) -> None:
        progress = self.progress
        is_best = progress.best is None or line["err1"] < progress.best["err1"]
        if is_best:
            progress.best = line
        assert progress.best is not None
        progress.history.append(line)
        progress.epoch, progress.step = progress.epoch + 1, 0
        self.sums = Sums(self.process.device)
        logger.info(
            "epoch %d of %d: error top-1 %.3f, top-5 %.3f; best top-1 %.3f (epoch %d); %.0f s; %s left",
            line["epoch"], self.options.epochs, line["err1"], line["err5"],
            progress.best["err1"], progress.best["epoch"], line["seconds"], self.remaining.after(self.finished_steps),
        )  # fmt: skip
        with failing_together():
            write_epoch(self, line, is_best)
        self.save()

    def _train(self, epoch: int, clock: Throughput) -> None:
        """Train to the end of an epoch."""
        self.step.train()
        self.order.set_epoch(epoch, self.progress.step)
        bar = progress_bar(self.batches, f"epoch {epoch + 1}", self.process.is_main, self.progress.step)
        for batch in bar if self.progress.step < self.order.steps else ():
            if len(batch.targets) == 0:
                raise UserError(
                    "a whole batch of training images cannot be read; tools/check_imagefolder.py names them."
                )
            losses = self._train_step(batch)
            clock.images += len(batch.targets) * self.process.world
            last = self.progress.step == self.order.steps
            if losses and (last or self.progress.step % self.options.print_freq == 0):
                self._report(losses, bar, clock)
            if not last and self.options.checkpoint_freq and self.progress.step % self.options.checkpoint_freq == 0:
                self.save()

    def _train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step, or none where something is not finite; returns mean losses, of this process.

        Raises:
            CommonError: something is not finite, and that is not to be skipped.
            Interrupted: a rank received a signal.
        """
        random = random_state()
        factor = self.weight.factor(self.finished_steps / self.order.steps)
        gradients = self.stepper.backward(batch, factor > 0.0 and self._observing(), factor)
        # In one exchange: whether to leave, and the first that is not finite, of all processes. To read it is to wait
        # for the device, once a step and in a single process too: until it is known, the weights may not change.
        world = self.process.world
        first = gradients.offence * world + self.process.rank
        first = torch.where(gradients.offence > FINE, _OFFENCES - first, 0)
        received, worst = largest(torch.stack([torch.full_like(first, received_signal()), first]))
        if worst:
            self._not_finite(batch, gradients, random, *divmod(_OFFENCES - worst, world))
            found = {}
        else:
            found = self._apply(gradients)
        self.progress.step += 1
        if received:
            raise Interrupted(received)
        return found

    def _apply(self, gradients: Gradients) -> dict[str, Tensor]:
        self.stepper.apply()
        for output in gradients.outputs:
            self.distiller.observe(output.student_maps, output.teacher_maps)
        losses = gradients.losses
        total = torch.stack(list(losses.values())).sum()
        sums = {**losses, "loss": total, **gradients.wrong}
        self.summed = list(sums)
        self.sums.add(gradients.images, sums)
        self.progress.skipped_in_row = 0
        return {name: value / gradients.images for name, value in losses.items()}

    def _not_finite(self, batch: Batch, gradients: Gradients, random: dict[str, Any], offence: int, rank: int) -> None:
        """Skip the step if that is allowed, else stop; in all processes alike."""
        progress, allowed = self.progress, self.options.skip_nonfinite
        what = self.stepper.name_of(offence, gradients.losses)
        where = f"{what} is not finite at epoch {progress.epoch + 1}, step {progress.step + 1} (rank {rank})"
        first = progress.skipped == 0
        progress.skipped += 1
        progress.skipped_in_row += 1
        if first or progress.skipped_in_row > allowed:
            folder = dump_step(self, batch, gradients.losses, random)
            where += f"; {folder} has what is needed to repeat it"
        if progress.skipped_in_row > allowed:
            raise CommonError(
                f"{where}. Try a smaller --learning-rate, --warmup 1 or another --mixed-precision, or skip such steps "
                "by --skip-nonfinite; the last checkpoint is from before."
            )
        self.stepper.discard()
        self._say("%s: the step is skipped, %d in a row of %d.", where, progress.skipped_in_row, allowed)

    def _rematch_due(self, epoch: int) -> bool:
        """After so many finished epochs, of which the run has more: else nobody would use the matching.

        The first is before the distillation starts.
        """
        if not self.weight.active(epoch) or epoch >= self.options.epochs:
            return False
        return self.schedule.due(epoch) or (epoch == self.weight.start and self.schedule.start)

    def _observing(self) -> bool:
        """Whether the next matching looks at this step: at the last steps before it, as many as hold enough images."""
        if not self.schedule.start or self.options.mgd_update_source == "pass":
            return False
        later = range(self.progress.epoch + 1, self.options.epochs)
        due = next((epoch for epoch in later if self._rematch_due(epoch)), None)
        if due is None:
            return False
        left = due * self.order.steps - self.finished_steps
        return left <= math.ceil(self.options.mgd_update_images / self.together)

    def _report(self, losses: Mapping[str, Tensor], bar: Any, clock: Throughput) -> None:
        if self.journal is None:
            return
        values = {name: float(loss) for name, loss in losses.items()}
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        left = self.remaining.after(self.finished_steps)
        if bar.disable:
            logger.info(
                "epoch %d, step %d of %d: %s; %.0f images/s; %s left",
                self.progress.epoch + 1, self.progress.step, self.order.steps, text, clock.per_second, left,
            )  # fmt: skip
        else:
            bar.set_postfix_str(f"{text}, {left} to the end of the run")
        rate = self.stepper.optimizer.param_groups[0]["lr"]
        values = {**values, "lr": rate, "images_per_second": clock.per_second}
        if self.options.method != "base":
            values["distill_factor"] = self.weight.factor((self.finished_steps - 1) / self.order.steps)
        self.journal.step(values, self.finished_steps)

    # ---- evaluation and rematching

    def evaluate(self, network: nn.Module | None = None) -> Evaluation:
        """A network, by default the student, on the evaluation split (collective)."""
        network = self.student.network if network is None else network
        renormalized = renormalize(self.statistics, image_statistics(network)).to(self.process.device)
        model = over_same_gpus(self.step, Classifier(network, self.student.precision, renormalized))
        data = self.data["valid"]
        batches = self._strided(data, range(len(data)))
        return evaluate(model, batches, self.intake, "evaluation", self.process.is_main)

    def _strided(self, data: ImageDataset, indices: Any) -> Any:
        order = strided_batches(indices, self.batch_size, self.process.rank, self.process.world)
        return loader(data, order, self.workers, self.process.device)

    @torch.no_grad()
    def _observe_pass(self, epoch: int) -> None:
        """Measure the matching cost on training images, this process on its share of them (collective at the end)."""
        data = self.data["rematch"]
        indices = rematch_indices(len(data), self.options.mgd_update_images, self.options.seed, epoch)
        self.step.eval()
        try:
            for batch in progress_bar(self._strided(data, indices), "matching", self.process.is_main):
                if received_signal():
                    break
                images, _ = self.intake(batch)
                if images.shape[0]:
                    output = self.step(images)
                    self.distiller.observe(output.student_maps, output.teacher_maps)
            raise_if_interrupted(self.process.device)
        except Interrupted:  # the pass is done again, whole
            self._forget_costs()
            raise

    def _forget_costs(self) -> None:
        for cost in self.distiller.costs.values():
            cost.reset()

    def _rematch(self, epoch: int) -> dict[str, float]:
        """Solve what was observed (collective); returns what the metrics keep of it.

        Raises:
            CommonError: the solver failed, or the cost is empty or not finite, and there is no matching yet. One in
                force stays, with a warning.
        """
        try:
            reports = self.distiller.rematch()
        except (UserError, SolverError) as error:  # of the cost or the solver
            if not self.distiller.matched:
                raise CommonError(f"the first matching cannot be found: {error}") from error
            self._forget_costs()
            self._say("matching after %d epochs: %s The matching in force stays.", epoch, error)
            return {}
        kept: dict[str, float] = {}
        for name, report in reports.items():
            logger.info(
                "matching of %s: mean cost %.4f over %d images, %.1f%% of student channels changed, solved in %.2f s",
                name, report.mean_cost, report.num_images, 100.0 * report.changed, report.seconds,
            )  # fmt: skip
            kept[f"matching/{name}/mean_cost"] = report.mean_cost
            kept[f"matching/{name}/changed"] = report.changed
        with failing_together():
            write_matching(self, epoch, reports)
        return kept

    # ---- checkpoints

    def save(self) -> None:
        """Write a checkpoint and move ``checkpoint.pth`` to it (collective); the run itself stays as it is.

        Raises:
            CommonError: the disk refuses.
        """
        state = training_state(self)
        with failing_together():
            write_checkpoint(self, state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`save` wrote.

        Raises:
            UserError: the state is of another distiller.
        """
        with located("the checkpoint does not fit these options: "):
            restore_training(self, state)
