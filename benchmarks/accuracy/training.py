"""Train the network of a run, with a teacher or alone.

Shape shorthand: N images, K classes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.data import Images, Split, StudyError, batches, drawn, normalised, shuffled
from benchmarks.accuracy.distillation import Distillation
from benchmarks.accuracy.engine import Engine, Outcome, WeightStore, error_line
from benchmarks.accuracy.networks import Staged, build_network
from benchmarks.accuracy.steps import Maps, Steps
from benchmarks.accuracy.study import Recipe, Run

logger = logging.getLogger(__name__)

_PASS_BATCH = 500


def train(run: Run, split: Split, engine: Engine, weights: WeightStore) -> Outcome:
    """Train the network of a run and store its weights.

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
        distillation = Distillation(run.distil, network, engine.placed(teacher), engine)
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
            outcome.metrics.update(distillation.distiller.balance.report())
        _look_at_projections(distillation, training)
    return outcome


def _look_at_projections(distillation: Distillation, training: _Training) -> None:
    try:
        training.outcome.projections = distillation.measure_projections(training.matching_batches)
    except Exception as error:  # any: the run is finished and its accuracy is valid
        logger.exception("the learned projections were not measured")
        training.outcome.trouble = f"the learned projections were not measured: {error_line(error)}"


def _start_from(network: Staged, state: dict[str, Tensor], same_classes: bool) -> None:
    """Load earlier weights; without their head if the classes differ."""
    fresh = network.state_dict()
    network.load_state_dict({k: v if same_classes or not k.startswith("head.") else fresh[k] for k, v in state.items()})


@torch.no_grad()
def accuracy(network: Staged, images: Images, batch: int = 1000) -> float:
    """Return top-1 in percent, always in float32: in bfloat16 the logits of close classes are often equal."""
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
        distillation: Distillation | None,
        outcome: Outcome,
    ) -> None:
        self.run, self.network, self.split, self.engine = run, network, split, engine
        self.distillation, self.outcome = distillation, outcome
        # separate generators for rematches, so that all methods see the same batches
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
        """Return batches for an observe pass. They are large, because costs are means over images."""
        return batches(self.split.train, max(_PASS_BATCH, self.run.recipe.batch), *self.matching)

    def rematch(self, epoch: int) -> None:
        if self.distillation is not None and self.distillation.measure_and_rematch(
            epoch, self.matching_batches, self.outcome
        ):
            self.step.changed()

    def all_epochs(self) -> None:
        recipe = self.run.recipe
        auto = self.distillation if self.run.distil is not None and self.run.distil.balance == "auto" else None
        goal = math.inf if auto is None else accuracy(auto.teacher, self.split.test)
        if auto is not None and self.run.start is not None:
            before = accuracy(self.network, self.split.test)
            auto.schedule.compare(goal, before, chance=100.0 / self.split.classes, trained=True)
            self.outcome.metrics["share"] = auto.schedule.share
        self.rematch(0)
        for epoch in range(recipe.epochs):
            for group in self.optimizer.param_groups:
                if group["lr"] != rate(recipe, epoch):
                    group["lr"] = rate(recipe, epoch)
                    self.step.changed()
            self._epoch(epoch)
            self.outcome.accuracy.append(round(accuracy(self.network, self.split.test), 4))
            logger.info("epoch %d: %.2f", epoch + 1, self.outcome.accuracy[-1])
            if auto is not None and auto.schedule.share:
                auto.schedule.compare(goal, self.outcome.accuracy[-1])
                if not auto.schedule.share:
                    self.outcome.metrics["stopped"] = epoch + 1
            if epoch + 1 < recipe.epochs:
                self.rematch(epoch + 1)

    def _epoch(self, epoch: int) -> None:
        self.network.train()
        steps = max(1, len(self.split.train) // self.run.recipe.batch)
        self.step.total.zero_()
        for step, chosen in enumerate(shuffled(self.split.train, self.run.recipe.batch, self.training[1])):
            factor = 1.0 if self.distillation is None else self.distillation.schedule.factor(epoch + step / steps)
            maps = self.step(chosen, factor)
            if self.distillation is not None:
                self.distillation.observe_online(epoch + 1, steps - step, len(chosen), *maps)
        if not math.isfinite(float(self.step.total)):  # checked once an epoch: a step must not synchronise
            raise StudyError(
                f"{self.run.method}, seed {self.run.seed}: the loss is not finite in epoch {epoch + 1}; lower the "
                "rate or the method's weight."
            )


def rate(recipe: Recipe, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 0."""
    return recipe.lr * recipe.drop_ratio ** sum(epoch >= drop for drop in recipe.drops)
