"""Training: epochs, steps, evaluation and rematching on one rank of a run."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from classification.checkpoint import STUDENT_LAST
from classification.data import (
    Batch,
    ImageDataset,
    image_statistics,
    loader,
    rematch_indices,
    renormalize,
    strided_batches,
)
from classification.data_parallel import over_same_gpus
from classification.distillation import Classifier, Forward
from classification.evaluation import Evaluation, evaluate, progress_bar, until_signal
from classification.metrics import Journal
from classification.options import as_values, gives_student
from classification.records import write_checkpoint, write_epoch, write_matching
from classification.schedules import Schedules
from classification.state import Progress, Run, restore_training, training_state
from classification.steps import Found, backward
from d2_mgd.distill.rematching import observe_pass, rematch
from d2_mgd.errors import UserError, located
from d2_mgd.training import Interrupted, received_signal
from d2_mgd.training.clocks import Remaining, Throughput
from d2_mgd.training.nonfinite import StepReport
from d2_mgd.training.processes import all_gather, average_buffers, failing_together
from d2_mgd.training.services import open_logs
from d2_mgd.training.sums import Sums

logger = logging.getLogger(__name__)


class Trainer(Run):
    """Trains one rank of a run; the arguments are those of :class:`Run`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.workers = math.ceil(self.options.workers / self.process.local_world)
        self.batches = loader(self.data["train"], self.order, self.workers, self.process.device, keep=True)
        self.schedules = Schedules(self.options, self.student.distiller, self.order.steps, self.together)

    def fit(self) -> Progress:
        """Train to the last epoch.

        Raises:
            SystemExit: a signal ended the run, and its state is saved; the status is 143 (SIGTERM) or 130 (Ctrl-C).
        """
        if self.process.is_main:
            self.options.output_dir.mkdir(parents=True, exist_ok=True)
            options, folder = self.options, self.options.output_dir
            logs = open_logs(options.log, folder, as_values(options), "step", resume=self.finished_steps > 0)
            self.journal = Journal(folder, self.finished_steps, logs)
        self.remaining = Remaining(self.finished_steps, self.options.epochs * self.order.steps)
        try:
            if self.schedules.starts_matched(self.progress.epoch) and not self.distiller.matched:
                self._observe_pass(self.progress.epoch)
                self._rematch(self.progress.epoch)
            while self.progress.epoch < self.options.epochs:
                self._epoch()
        except Interrupted as stopped:
            self.leave(stopped.number)
        if self.journal is not None:
            student = self.options.output_dir / STUDENT_LAST if self.options.log_student else None
            self.journal.close(student, success=True)
        return self.progress

    def leave(self, number: int) -> NoReturn:
        """Exit after a signal; within an epoch, save first (collective)."""
        message = "stopped before the first step; there is nothing to save."
        if self.progress.step:
            self.save()
            done = f"{self.progress.epoch} epochs and {self.progress.step} of {self.order.steps} steps"
            message = f"stopped after {done}, all of it saved; the same command with --resume continues."
        if self.process.is_main:
            logger.warning("%s: %s", signal.Signals(number).name, message)
        if self.journal is not None:
            self.journal.close()
        raise SystemExit(128 + number)

    # ---- an epoch

    def _epoch(self) -> None:
        epoch = self.progress.epoch
        rate = self.schedules.learning_rate(epoch)
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
        self.compare_with_teacher(found.err1)
        if self.schedules.rematch_due(epoch + 1):
            if self.options.mgd_update_source == "pass" or not self.distiller.matched:
                self._observe_pass(epoch + 1)
            line.update(self._rematch(epoch + 1))
        line["broken_images"] = len(set().union(*all_gather(self.intake.broken)))
        line["skipped_steps"] = self.nonfinite.skipped
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
                    "no image of a training batch can be read; tools/check_imagefolder.py lists such images."
                )
            losses = self._train_step(batch)
            clock.images += len(batch.targets) * self.process.world
            last = self.progress.step == self.order.steps
            if losses and (last or self.progress.step % self.options.print_freq == 0):
                self._report(losses, bar, clock)
            if not last and self.options.checkpoint_freq and self.progress.step % self.options.checkpoint_freq == 0:
                self.save()

    def _train_step(self, batch: Batch) -> dict[str, Tensor]:
        """Run one step, and return this rank's mean losses; empty if a non-finite step was skipped.

        Raises:
            NonFiniteError: losses or gradients are not finite, and no more steps may be skipped.
            Interrupted: a rank received a signal.
        """
        factor = self.schedules.distill_factor(self.finished_steps)
        observing = factor > 0.0 and self.schedules.observing(self.finished_steps)
        self.nonfinite.before_step()
        found = backward(
            self.stepper, self.step, self.intake, batch, self.options.accumulate, keep_maps=observing, factor=factor
        )
        distiller = self.student.distiller
        measured = None if distiller is None else distiller.measured
        received, stop = self.stepper.agree(found.losses, received_signal(), measured)
        means: dict[str, Tensor] = {}
        if stop:
            self._not_finite(batch, found.losses)
        else:
            self.nonfinite.after_finite_step()
            self.stepper.apply()
            means = self._add_up(len(batch.targets), found)
            if distiller is not None:
                distiller.update_balance(reduced=True)
        self.progress.step += 1
        if received:
            raise Interrupted(received)
        return means

    def _add_up(self, images: int, found: Found) -> dict[str, Tensor]:
        """Add a step to the matching costs and the epoch's sums; returns its mean losses."""
        for output in found.outputs:
            self.distiller.observe(output.student_maps, output.teacher_maps)
        sums = {**found.losses, "loss": torch.stack([*found.losses.values()]).sum(), **found.wrong}
        if self.student.distiller is not None:
            sums |= {name: images * ratio for name, ratio in self.student.distiller.balance.step_ratios().items()}
        self.summed = [*sums]
        self.sums.add(images, sums)
        return {name: value / images for name, value in found.losses.items()}

    def _not_finite(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        epoch, step = self.progress.epoch + 1, self.progress.step + 1
        folder = self.data["train"].folder
        report = StepReport(
            losses={name: float(loss) / max(1, len(batch.targets)) for name, loss in losses.items()},
            gradients=self.stepper.nonfinite_gradients(),
            images=[str(folder.path(key.number)) for key in self.order.keys(self.progress.step)],
        )
        copy = {"images": batch.images, "targets": batch.targets}
        self.nonfinite.handle(f"epoch_{epoch:04d}_step_{step:06d}", f"epoch {epoch}, step {step}", report, lambda: copy)

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
            bar.set_postfix_str(f"{text}, {left} left in the run")
        rate = self.stepper.optimizer.param_groups[0]["lr"]
        values = {**values, "lr": rate, "images_per_second": clock.per_second}
        if self.options.method != "base":
            values["distill_factor"] = self.schedules.distill_factor(self.finished_steps - 1)
        if self.student.distiller is not None:
            values.update(self.student.distiller.balance.report())
            for warning in self.student.distiller.balance.warnings():
                logger.warning(warning)
        self.journal.step(values, self.finished_steps)

    # ---- evaluation and rematching

    def compare_with_teacher(self, err1: float) -> None:
        """Under the balance ``auto``, set the share of the weight from the student's top-1 error, in percent."""
        teacher, weight, distiller = self.progress.teacher, self.schedules.weight, self.student.distiller
        if teacher is None or distiller is None or not distiller.balance.active:
            return
        was_active = weight.active(self.finished_steps / self.order.steps)
        trained = self.finished_steps == 0 and gives_student(self.options)
        chance = 100.0 / len(self.data["train"].folder.classes)
        weight.compare(100.0 - teacher["err1"], 100.0 - err1, chance, trained)
        if was_active and weight.share == 0.0:
            logger.info(
                "the student (top-1 error %.2f) is as good as its teacher (%.2f): the distillation stops (auto)",
                err1, teacher["err1"],
            )  # fmt: skip
        elif trained:
            logger.info(
                "the student has top-1 error %.2f already: the distillation has %.2f of its weight (auto)",
                err1, weight.share,
            )  # fmt: skip
        self.progress.share = weight.share

    def evaluate(self, network: nn.Module | None = None) -> Evaluation:
        """Evaluate a network, by default the student, on the evaluation split (collective)."""
        network = self.student.network if network is None else network
        statistics = image_statistics(self.student.network), image_statistics(network)
        renormalized = renormalize(*statistics).to(self.process.device)
        model = over_same_gpus(self.step, Classifier(network, self.student.precision, renormalized))
        data = self.data["valid"]
        batches = self._strided(data, range(len(data)))
        return evaluate(model, batches, self.intake, self.process.is_main)

    def _strided(self, data: ImageDataset, indices: Any) -> Any:
        order = strided_batches(indices, self.batch_size, self.process.rank, self.process.world)
        return loader(data, order, self.workers, self.process.device)

    def _observe_pass(self, epoch: int) -> None:
        """Measure the matching cost on this rank's share of training images (collective at the end)."""
        data = self.data["rematch"]
        indices = rematch_indices(len(data), self.options.mgd_update_images, self.options.seed, epoch)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            return until_signal(self._strided(data, indices), self.intake, "matching", self.process.is_main)

        def maps_of(batch: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            output: Forward = self.step(batch[0])
            return output.student_maps, output.teacher_maps

        observe_pass(self.distiller, self.student, batches, maps_of)

    def _rematch(self, epoch: int) -> dict[str, float]:
        """Rematch from the observed costs (collective); returns metrics, empty if the old matching stays."""
        reports = rematch(self.distiller, f"{epoch} epochs")
        if reports:
            with failing_together():
                write_matching(self, epoch, reports)
        metrics: dict[str, float] = {}
        for name, report in reports.items():
            metrics[f"matching/{name}/mean_cost"] = report.mean_cost
            metrics[f"matching/{name}/changed"] = report.changed
        return metrics

    # ---- checkpoints

    def save(self) -> None:
        """Write a checkpoint and point ``checkpoint.pth`` to it (collective).

        Raises:
            CommonError: the checkpoint cannot be written.
        """
        state = training_state(self)
        with failing_together():
            write_checkpoint(self, state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint.

        Raises:
            UserError: the checkpoint has another distiller.
        """
        with located("the checkpoint does not fit these options: "):
            restore_training(self, state)
        self.schedules.weight.share = self.progress.share
