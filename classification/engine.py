"""Training: epochs, steps, evaluation and rematching of one process's share of a run."""

from __future__ import annotations

import argparse
import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from classification.checkpoint import CHECKPOINT, STUDENT_BEST, STUDENT_LAST, save_atomically, save_training_state
from classification.data import ImageDataset, ShuffledBatches, StridedBatches, loader, rematch_indices
from classification.distillation import Student
from classification.distributed import Process, average_buffers, barrier, gather_objects, sum_over_processes
from classification.errors import UserError, user_errors
from classification.evaluation import Evaluation, Intake, evaluate, progress_bar
from classification.metrics import Journal, Sums, Throughput, errors
from classification.options import as_values, rematch_schedule, weight_schedule
from d2_mgd.distill import MatchingGuidedDistiller, RematchSchedule, WeightSchedule, save_reports

__all__ = ["Progress", "Trainer", "learning_rate_factor"]

logger = logging.getLogger(__name__)

_WARMUP_FACTOR = 0.1  # published


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
    """

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    teacher: dict[str, float] | None = None


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
        self.intake = Intake(process.device, options.skip_broken_images)
        self.progress = Progress(epoch=options.start_epoch)
        self.sums = Sums(process.device)
        self.optimizer = torch.optim.SGD(
            student.parameters(),
            options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=bool(options.nesterov),
        )
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=options.mixed_precision == "fp16")
        self.batch_size = options.batch_size // process.local_world
        self.workers = math.ceil(options.workers / process.local_world)
        self.order = ShuffledBatches(len(data["train"]), self.batch_size, options.seed, process.rank, process.world)
        self.batches = loader(data["train"], self.order, self.workers, process.device, keep=True)
        self.schedule = RematchSchedule(start=False)
        if student.distiller is not None and student.distiller.align == "matching":
            self.schedule = rematch_schedule(options)
        self.weight = WeightSchedule() if options.method == "base" else weight_schedule(options)
        self.journal: Journal | None = None

    @property
    def distiller(self) -> MatchingGuidedDistiller:
        assert self.student.distiller is not None
        return self.student.distiller

    @property
    def finished_steps(self) -> int:
        """Steps of the whole run."""
        return self.progress.epoch * self.order.steps + self.progress.step

    def fit(self) -> Progress:
        """Train to the last epoch."""
        if self.process.is_main:
            self.options.output_dir.mkdir(parents=True, exist_ok=True)
            self.journal = Journal(self.options.output_dir, self.finished_steps)
        if self.schedule.start and self.weight.active(self.progress.epoch) and not self.distiller.matched:
            self._observe_pass(self.progress.epoch)
            self._rematch(self.progress.epoch)
        while self.progress.epoch < self.options.epochs:
            self._epoch()
        if self.journal is not None:
            self.journal.close()
        return self.progress

    # ---- an epoch

    def _epoch(self) -> None:
        epoch, options = self.progress.epoch, self.options
        warmup = options.warmup_epochs if options.warmup else 0
        rate = options.lr * learning_rate_factor(epoch, options.lr_drop_epochs, options.lr_drop_ratio, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        clock = Throughput()
        names = self._train(epoch, clock)
        line: dict[str, Any] = {"epoch": epoch + 1, "lr": rate}
        line.update({f"train_{name}": value for name, value in self.sums.means(names).items()})
        line.update({f"train_{name}": 100.0 * line[f"train_{name}"] for name in ("err1", "err5")})
        line["images_per_second"] = round(clock.per_second, 1)
        average_buffers(self.student)
        found = self.evaluate()
        line.update(err1=found.err1, err5=found.err5, loss=found.loss)
        if self._rematch_due(epoch + 1):
            if options.mgd_update_source == "pass" or not self.distiller.matched:
                self._observe_pass(epoch + 1)
            line.update(self._rematch(epoch + 1))
        line["broken_images"] = len(self.intake.broken)
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
            "epoch %d of %d: error top-1 %.3f, top-5 %.3f; best top-1 %.3f (epoch %d); %.0f s",
            line["epoch"], self.options.epochs, line["err1"], line["err5"],
            progress.best["err1"], progress.best["epoch"], line["seconds"],
        )  # fmt: skip
        for name in [STUDENT_LAST, *([STUDENT_BEST] if is_best else [])]:
            self._save_student(name, line)
        if self.journal is not None:
            self.journal.epoch(progress.history, self.finished_steps)
        self.save([])

    def _train(self, epoch: int, clock: Throughput) -> list[str]:
        """Train to the end of an epoch; returns the names of what was summed."""
        self.step.train()
        self.order.set_epoch(epoch, self.progress.step)
        bar = progress_bar(self.batches, f"epoch {epoch + 1}", self.process.is_main, self.progress.step)
        names: list[str] = []
        for batch in bar:
            images, targets = self.intake(batch)
            if images.shape[0] == 0:
                raise UserError(
                    "a whole batch of training images cannot be read; tools/check_imagefolder.py names them."
                )
            losses = self._train_step(images, targets)
            names = [*losses, "loss", "err1", "err5"]
            self.progress.step += 1
            clock.images += images.shape[0] * self.process.world
            last = self.progress.step == self.order.steps
            if last or self.progress.step % self.options.print_freq == 0:
                self._report(losses, bar, clock)
            if not last and self.options.checkpoint_freq and self.progress.step % self.options.checkpoint_freq == 0:
                self._check_finite(losses)
                self.save(names)
        return names

    def _train_step(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        count = images.shape[0]
        factor = self.weight.factor(self.finished_steps / self.order.steps)
        observing = factor > 0.0 and self._observing()
        output = self.step(images, targets, observing, factor)
        sums = {name: loss.sum() for name, loss in output.losses.items()}
        total = torch.stack(list(sums.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total / count).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if observing:
            self.distiller.observe(output.student_maps, output.teacher_maps)
        self.sums.add(count, {**sums, "loss": total, **errors(output.logits.detach(), targets)})
        return {name: value.detach() / count for name, value in sums.items()}

    def _rematch_due(self, epoch: int) -> bool:
        """After so many finished epochs, of which the run has more: else nobody would use the matching.

        The first is before the distillation starts.
        """
        if not self.weight.active(epoch) or epoch >= self.options.epochs:
            return False
        return self.schedule.due(epoch) or (epoch == self.weight.start and self.schedule.start)

    def _observing(self) -> bool:
        """Whether the next matching looks at this step: at the last steps before it, as many as hold enough images."""
        if self.options.mgd_update_source == "pass" or not self.schedule.start:
            return False
        later = range(self.progress.epoch + 1, self.options.epochs)
        due = next((epoch for epoch in later if self._rematch_due(epoch)), None)
        if due is None:
            return False
        batch = self.batch_size * self.process.world
        left = due * self.order.steps - self.finished_steps
        return left <= math.ceil(self.options.mgd_update_images / batch)

    def _report(self, losses: Mapping[str, Tensor], bar: Any, clock: Throughput) -> None:
        self._check_finite(losses)
        if self.journal is None:
            return
        values = {name: float(loss) for name, loss in losses.items()}
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if bar.disable:
            logger.info(
                "epoch %d, step %d of %d: %s; %.0f images/s",
                self.progress.epoch + 1, self.progress.step, self.order.steps, text, clock.per_second,
            )  # fmt: skip
        else:
            bar.set_postfix_str(text)
        rate = self.optimizer.param_groups[0]["lr"]
        values = {**values, "lr": rate, "images_per_second": clock.per_second}
        if self.options.method != "base":
            values["distill_factor"] = self.weight.factor((self.finished_steps - 1) / self.order.steps)
        self.journal.step(values, self.finished_steps)

    def _check_finite(self, losses: Mapping[str, Tensor]) -> None:
        bad = [name for name, loss in losses.items() if not math.isfinite(float(loss))]
        if bad:
            raise UserError(
                f"{bad[0]} is not finite at epoch {self.progress.epoch + 1}, step {self.progress.step}: try a smaller "
                "--learning-rate, --warmup 1 or another --mixed-precision; the last checkpoint is from before."
            )

    # ---- evaluation and rematching

    def evaluate(self, network: nn.Module | None = None) -> Evaluation:
        """A network, by default the student, on the evaluation split (collective)."""
        model = self.student.network if network is None else network
        if isinstance(self.step, nn.DataParallel):
            model = nn.DataParallel(model)
        data = self.data["valid"]
        batches = self._strided(data, range(len(data)))
        return evaluate(model, batches, self.intake, self.student.precision, "evaluation", self.process.is_main)

    def _strided(self, data: ImageDataset, indices: Any) -> Any:
        order = StridedBatches(indices, self.batch_size, self.process.rank, self.process.world)
        return loader(data, order, self.workers, self.process.device)

    @torch.no_grad()
    def _observe_pass(self, epoch: int) -> None:
        """Measure the matching cost on training images, this process on its share of them."""
        data = self.data["rematch"]
        indices = rematch_indices(len(data), self.options.mgd_update_images, self.options.seed, epoch)
        self.step.eval()
        for batch in progress_bar(self._strided(data, indices), "matching", self.process.is_main):
            images, _ = self.intake(batch)
            if images.shape[0]:
                output = self.step(images)
                self.distiller.observe(output.student_maps, output.teacher_maps)

    def _rematch(self, epoch: int) -> dict[str, float]:
        """Solve what was observed (collective); returns what the metrics keep of it."""
        with user_errors("matching failed: "):
            reports = self.distiller.rematch()
        kept: dict[str, float] = {}
        for name, report in reports.items():
            logger.info(
                "matching of %s: mean cost %.4f over %d images, %.1f%% of student channels changed, solved in %.2f s",
                name, report.mean_cost, report.num_images, 100.0 * report.changed, report.seconds,
            )  # fmt: skip
            kept[f"matching/{name}/mean_cost"] = report.mean_cost
            kept[f"matching/{name}/changed"] = report.changed
        if self.process.is_main:
            save_reports(self.options.output_dir / "matching" / f"epoch_{epoch:04d}.npz", reports)
        return kept

    # ---- checkpoints

    def _save_student(self, name: str, line: Mapping[str, Any]) -> None:
        if self.process.is_main:
            content = {
                "arch": self.options.arch,
                "classes": list(self.data["train"].folder.classes),
                "image_size": self.options.image_size,
                "epoch": line["epoch"],
                "err1": line["err1"],
                "err5": line["err5"],
                "state_dict": self.student.network.state_dict(),
            }
            save_atomically(content, self.options.output_dir / name)

    def save(self, names: Sequence[str]) -> None:
        """Write ``checkpoint.pth`` (collective).

        What each process holds of its own (running statistics, sums, costs) is put together first, in the run that goes
        on as well, so that a run from the checkpoint is the same run.

        Args:
            names: of the sums of an unfinished epoch.
        """
        average_buffers(self.student)
        self.sums.gather(names, self.process.is_main)
        costs = self._gathered_costs()
        random = gather_objects(_random_state(self.process.device))
        if self.process.is_main:
            state = {
                "arch": self.options.arch,
                "classes": list(self.data["train"].folder.classes),
                "options": as_values(self.options),
                "world": self.process.world,
                "teacher": self.teacher,
                "progress": vars(self.progress),
                "sums": self.sums.state_dict(),
                "student": self.student.network.state_dict(),
                "distiller": None if self.student.distiller is None else self.student.distiller.state_dict(),
                "costs": costs,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": random,
            }
            save_training_state(state, self.options.output_dir / CHECKPOINT)
        barrier()

    def _gathered_costs(self) -> dict[str, Any] | None:
        if self.student.distiller is None:
            return None
        for cost in self.distiller.costs.values():
            state = cost.state_dict()
            shape = (cost.num_student, cost.num_teacher)
            packed = torch.zeros(math.prod(shape) + 1, dtype=torch.float64, device=self.process.device)
            if state["similarity"] is not None:
                packed[:-1] = state["similarity"].flatten()
            packed[-1] = state["count"]
            sum_over_processes(packed)
            cost.reset()
            if self.process.is_main and float(packed[-1]):
                cost.load_state_dict({"similarity": packed[:-1].view(shape), "count": float(packed[-1])})
        return self.distiller.cost_state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`save` wrote.

        Raises:
            UserError: the state is of another distiller.
        """
        self.progress = Progress(**state["progress"])
        with user_errors("the checkpoint does not fit these options: "):
            self._load_modules(state)
        if self.process.is_main:
            self.sums.load_state_dict(state["sums"])
            if state["costs"]:
                self.distiller.load_cost_state_dict(state["costs"])
        if self.process.world == state["world"]:
            _set_random_state(state["random"][self.process.rank], self.process.device)
        else:
            logger.warning(
                "the checkpoint is of %d processes and these are %d: the run goes on, but not exactly the same.",
                state["world"], self.process.world,
            )  # fmt: skip

    def _load_modules(self, state: Mapping[str, Any]) -> None:
        if (state["distiller"] is None) != (self.student.distiller is None):
            raise ValueError("one of the two has a feature distiller, and the other has not.")
        try:
            self.student.network.load_state_dict(state["student"])
            if self.student.distiller is not None:
                self.student.distiller.load_state_dict(state["distiller"])
        except RuntimeError as error:
            raise ValueError(" ".join(str(error).split())) from error
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
