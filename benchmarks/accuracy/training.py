"""One run: a network trained on data that lies on the device, with a teacher or alone.

Shape shorthand: N images, K classes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.data import Images, Split, StudyError, batches, drawn, normalised, shuffled
from benchmarks.accuracy.networks import Staged, build_network
from benchmarks.accuracy.steps import Maps, Steps
from benchmarks.accuracy.study import Method, Recipe, Run, new_distiller
from d2_mgd.distill import MatchingGuidedDistiller, batch_norm_margin
from d2_mgd.matching import projection_agreement

__all__ = ["Engine", "Outcome", "WeightStore", "accuracy", "error_line", "train"]

logger = logging.getLogger(__name__)

_PASS_BATCH = 500

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]  # an epoch of images and labels


@dataclass(frozen=True)
class Engine:
    """What a run is computed with; it decides how fast, not what.

    Args:
        device: where networks and data are.
        mixed_precision: forward passes of training under bfloat16 autocast.
        compiled: backend of ``torch.compile`` for a step's forward, or None.
        graphs: replay a whole step (augmentation, both networks, losses, optimiser) as one CUDA graph. Small networks
            at small batches spend most of a step on launching kernels.
    """

    device: torch.device
    mixed_precision: bool = False
    compiled: str | None = None
    graphs: bool = False

    def placed(self, network: Staged) -> Staged:
        """The network on the device; channels last on a GPU, where convolutions in bfloat16 are faster so."""
        on_gpu = self.device.type == "cuda"
        return network.to(self.device, memory_format=torch.channels_last if on_gpu else torch.preserve_format)

    def autocast(self) -> torch.autocast:
        # a graph must not keep casts of weights from before its capture
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.mixed_precision, cache_enabled=not self.graphs
        )


@dataclass
class Outcome:
    """What a run gave.

    Args:
        accuracy: top-1 in percent on the test images, after each epoch.
        seconds: of training and evaluation, without reading data.
        rematches: for each feature of each rematch, see :meth:`_Distillation.measure_and_rematch`.
        projections: for each feature of a learned projection, see :meth:`_Distillation.measure_projections`.
        metrics: what else was reported at the end, by name: by a command line, or by the balance of a distiller.
        trouble: what could not be measured beside the accuracy, and why.
    """

    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rematches: list[dict[str, Any]] = field(default_factory=list)
    projections: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    trouble: str = ""


class WeightStore:
    """Weights of finished runs, by digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.digest}.pt"

    def save(self, run: Run, network: nn.Module) -> None:
        """The file appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{run.digest}.{os.getpid()}.tmp"
        torch.save(network.state_dict(), temporary)
        os.replace(temporary, self.path(run))

    def load(self, run: Run) -> dict[str, Tensor]:
        """On the CPU."""
        return torch.load(self.path(run), map_location="cpu", weights_only=True)


def train(run: Run, split: Split, engine: Engine, weights: WeightStore) -> Outcome:
    """Train as the run says, and store the network's weights.

    Raises:
        StudyError: the loss is no longer finite, or the pair does not fit the method.
    """
    if engine.compiled is not None:
        torch._dynamo.reset()  # else the graphs of earlier runs count against the limit, and later runs do not compile
    torch.manual_seed(run.seed)
    network = build_network(run.network, split.classes)
    if run.start is not None:
        _start_from(network, weights.load(run.start), same_classes=run.start.data.classes == run.data.classes)
    network = engine.placed(network)
    distillation = None
    if run.teacher is not None and run.distil is not None:
        teacher = build_network(run.teacher.network, split.classes)
        teacher.load_state_dict(weights.load(run.teacher))
        distillation = _Distillation(run.distil, network, engine.placed(teacher), engine)
    outcome = Outcome()
    start = time.perf_counter()
    training = _Training(run, network, split, engine, distillation, outcome)
    training.all_epochs()
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    outcome.seconds = time.perf_counter() - start
    weights.save(run, network)
    if distillation is not None:
        if distillation.distiller is not None:
            outcome.metrics.update(distillation.distiller.balance_report())
        _look_at_projections(distillation, training)
    return outcome


def _look_at_projections(distillation: _Distillation, training: _Training) -> None:
    try:
        training.outcome.projections = distillation.measure_projections(training.matching_batches)
    except Exception as error:  # whatever it is, the run is done and its accuracy stands
        logger.exception("the learned projections were not measured")
        training.outcome.trouble = f"the learned projections were not measured: {error_line(error)}"


def error_line(error: Exception) -> str:
    """One line that says what happened: the message of an error of this package, else its kind too."""
    said = (str(error).strip() or "no message").splitlines()[0]
    return said if isinstance(error, StudyError) else f"{type(error).__name__}: {said}"


def _start_from(network: Staged, state: dict[str, Tensor], same_classes: bool) -> None:
    """The body of earlier weights, and their head where the classes are the same."""
    fresh = network.state_dict()
    network.load_state_dict({k: v if same_classes or not k.startswith("head.") else fresh[k] for k, v in state.items()})


@torch.no_grad()
def accuracy(network: Staged, images: Images, batch: int = 1000) -> float:
    """Top-1 in percent, in float32 whatever the training's precision was: in bfloat16 close classes are often equal."""
    network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.labels.device)
    for start in range(0, len(images), batch):
        logits = network(normalised(images.images[start : start + batch]))
        correct += (logits.argmax(dim=1) == images.labels[start : start + batch]).sum()
    return 100.0 * int(correct) / len(images)


class _Training:
    def __init__(
        self,
        run: Run,
        network: Staged,
        split: Split,
        engine: Engine,
        distillation: _Distillation | None,
        outcome: Outcome,
    ) -> None:
        self.run, self.network, self.split, self.engine = run, network, split, engine
        self.distillation, self.outcome = distillation, outcome
        # a rematch draws from generators of its own, so that all methods see the same batches
        self.training, self.matching = (
            (torch.Generator(engine.device).manual_seed(seed), torch.Generator().manual_seed(seed))
            for seed in (2 * run.seed, 2 * run.seed + 1)
        )
        parameters = [*network.parameters(), *(distillation.parameters() if distillation else [])]
        recipe = run.recipe
        self.optimizer = torch.optim.SGD(
            parameters,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=engine.device.type == "cuda",
        )
        self.loss = self._alone if distillation is None else distillation.loss
        if engine.compiled is not None:
            self.loss = torch.compile(self.loss, backend=engine.compiled)
        self.step = Steps(self._chosen_loss, self.optimizer, self.training[0], engine.graphs)

    def _chosen_loss(self, chosen: Tensor, factor: Tensor) -> tuple[Tensor, Maps, Maps]:
        return self.loss(*drawn(self.split.train, chosen, self.training[0]), factor)

    def _alone(self, images: Tensor, labels: Tensor, factor: Tensor) -> tuple[Tensor, Maps, Maps]:
        with self.engine.autocast():
            logits = self.network(images)
        return F.cross_entropy(logits.float(), labels), {}, {}

    def matching_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for a pass that only observes: large ones, since costs are means over images."""
        return batches(self.split.train, max(_PASS_BATCH, self.run.recipe.batch), *self.matching)

    def rematch(self, epoch: int) -> None:
        if self.distillation is not None and self.distillation.measure_and_rematch(
            epoch, self.matching_batches, self.outcome
        ):
            self.step.changed()

    def all_epochs(self) -> None:
        recipe = self.run.recipe
        self.rematch(0)
        for epoch in range(recipe.epochs):
            for group in self.optimizer.param_groups:
                if group["lr"] != rate(recipe, epoch):
                    group["lr"] = rate(recipe, epoch)
                    self.step.changed()
            self._epoch(epoch)
            if epoch + 1 < recipe.epochs:
                self.rematch(epoch + 1)
            self.outcome.accuracy.append(round(accuracy(self.network, self.split.test), 4))
            logger.info("epoch %d: %.2f", epoch + 1, self.outcome.accuracy[-1])

    def _epoch(self, epoch: int) -> None:
        self.network.train()
        steps = max(1, len(self.split.train) // self.run.recipe.batch)
        self.step.total.zero_()
        for step, chosen in enumerate(shuffled(self.split.train, self.run.recipe.batch, self.training[1])):
            factor = 1.0 if self.distillation is None else self.distillation.schedule.factor(epoch + step / steps)
            maps = self.step(chosen, factor)
            if self.distillation is not None:
                self.distillation.observe_online(epoch + 1, steps - step, len(chosen), *maps)
        if not math.isfinite(float(self.step.total)):  # looked at once an epoch: a step must not wait for the device
            raise StudyError(
                f"{self.run.method}, seed {self.run.seed}: the loss is not finite in epoch {epoch + 1}; lower the "
                "rate or the method's weight."
            )


def rate(recipe: Recipe, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0."""
    return recipe.lr * recipe.drop_ratio ** sum(epoch >= drop for drop in recipe.drops)


class _Distillation:
    """A method at work between two networks."""

    def __init__(self, method: Method, student: Staged, teacher: Staged, engine: Engine) -> None:
        self.method, self.student, self.engine = method, student, engine
        self.teacher = teacher.requires_grad_(False).eval()
        self.logits = method.logit_loss()
        self.schedule = method.weight_schedule()
        self.rematches = method.rematch_schedule()
        self.distiller = None
        if method.compares_features:
            try:
                margins = _margins(method, teacher)
                if engine.compiled is not None and method.balance != "fixed":
                    raise ValueError("--compile hides the task's gradient at the maps from a balance: use --graphs.")
                self.distiller = new_distiller(method, student.widths, teacher.widths, margins).to(engine.device)
            except ValueError as error:
                raise StudyError(str(error)) from error

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(()) if self.distiller is None else self.distiller.parameters()

    def loss(self, images: Tensor, labels: Tensor, factor: Tensor) -> tuple[Tensor, Maps, Maps]:
        """The loss of a batch, and both networks' maps without gradients.

        Args:
            images, labels: (N, 3, P, P) and (N,).
            factor: () of all that the teacher says.
        """
        if self.distiller is not None:
            self.distiller.update_balance()  # of the step before this one
        student_maps, logits, teacher_maps, teacher_logits = self._forward(images)
        total = self.method.task_weight * F.cross_entropy(logits.float(), labels)
        if self.distiller is not None:
            losses = self.distiller(student_maps, teacher_maps, factor=factor)
            total = total + torch.stack([*losses.values()]).sum()
        if self.logits is not None:
            total = total + factor * self.logits(logits, teacher_logits, labels)
        return total, {name: found.detach() for name, found in student_maps.items()}, teacher_maps

    def _forward(self, images: Tensor) -> tuple[Maps, Tensor, Maps, Tensor]:
        with self.engine.autocast():
            student_maps, logits = self.student.maps_and_logits(images)
            with torch.no_grad():
                teacher_maps, teacher_logits = self.teacher.maps_and_logits(images)
        if self.distiller is not None:
            student_maps, teacher_maps = (
                {name: maps[name] for name in self.distiller.channels} for maps in (student_maps, teacher_maps)
            )
        return student_maps, logits, teacher_maps, teacher_logits

    def observe_online(self, epoch: int, left: int, images: int, student: Maps, teacher: Maps) -> None:
        """In the last steps before a rematch, add a step's own maps.

        Args:
            epoch: how many are finished after this one.
            left: steps of the epoch that remain, this one counted.
            images: of a step.
            student, teacher: their maps.
        """
        if not self._matches or self.method.rematch_source != "online" or not self.rematches.due(epoch):
            return
        if left <= math.ceil(self.method.rematch_images / images):
            assert self.distiller is not None
            self.distiller.observe(student, teacher)

    @property
    def _matches(self) -> bool:
        return self.distiller is not None and self.distiller.needs_matching

    def measure_and_rematch(self, epoch: int, batches: Batches, outcome: Outcome) -> bool:
        """Rematch after ``epoch`` epochs if it is due, and note for each feature what came of it; whether it was due.

        ``cost`` is the mean of the matched pairs, ``chance`` that of all pairs, so of a random matching; ``changed``
        the share of student channels whose group changed, ``kept`` the mean that the old matching would have now.
        """
        if not self._matches or not self.rematches.due(epoch):
            return False
        assert self.distiller is not None
        if epoch == 0 or self.method.rematch_source == "pass":
            self._pass(batches, self.distiller.observe)
        old = self.distiller.matchings
        for name, report in self.distiller.rematch().items():
            before = old[name]
            outcome.rematches.append(
                {
                    "epoch": epoch,
                    "feature": name,
                    "cost": round(report.mean_cost, 6),
                    "chance": round(float(report.cost.mean()), 6),
                    "changed": round(report.changed, 6),
                    "kept": None if before is None else round(float(report.cost[before.pairs].mean()), 6),
                }
            )
        return True

    def measure_projections(self, batches: Batches) -> list[dict[str, Any]]:
        """How far each learned projection agrees with the matching of the same two networks' channels.

        ``share`` is what of the projection's contributions lies on matched pairs, ``chance`` the same for a random
        matching, ``best`` for the matching that the projection itself would choose.
        """
        if self.distiller is None or not self.distiller.projections:
            return []
        widths = self.distiller.channels
        matched = MatchingGuidedDistiller(widths, metric=self.method.metric, mode=self.method.mode)
        power = {name: torch.zeros(student, device=self.engine.device) for name, (student, _) in widths.items()}

        def observe(student: Maps, teacher: Maps) -> None:
            matched.observe(student, teacher)
            for name, found in student.items():
                power[name] += found.float().var(dim=(0, 2, 3))

        self._pass(batches, observe)
        reports = matched.rematch()
        found = []
        for name, weight in self.distiller.projections.items():
            agreement = projection_agreement(weight * power[name].sqrt(), reports[name].matching)
            found.append({"feature": name, **{k: round(v, 6) for k, v in dataclasses.asdict(agreement).items()}})
        return found

    @torch.no_grad()
    def _pass(self, batches: Batches, observe: Callable[[Maps, Maps], None]) -> None:
        """Give maps of training batches, the student with the statistics of each, which also fit fresh weights."""
        seen = 0
        with _kept_statistics(self.student):
            while seen < self.method.rematch_images:
                for images, _ in batches():
                    student_maps, _, teacher_maps, _ = self._forward(images)
                    observe(student_maps, teacher_maps)
                    seen += len(images)
                    if seen >= self.method.rematch_images:
                        break


def _margins(method: Method, teacher: Staged) -> dict[str, Tensor] | None:
    if method.loss != "partial_l2":
        return None
    names = [name for name in teacher.widths if method.features is None or name in method.features]
    return {name: batch_norm_margin(teacher.last_norm(name)) for name in names}


@contextmanager
def _kept_statistics(network: nn.Module) -> Iterator[None]:
    """Training mode in which batch-norms do not move their running statistics."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.train()
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
