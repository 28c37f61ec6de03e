"""A study: a small YAML with a pair, methods and data; and its runs.

::

    name: cifar100_r32x4_r8x4
    title: CIFAR-100, ResNet-32x4 teaches ResNet-8x4
    teacher: resnet32x4
    student: resnet8x4
    seeds: [0, 1, 2]
    recipe: {epochs: 240, batch: 64, lr: 0.05, drops: [150, 180, 210]}
    methods:
      mgd-amp: {reducer: amp}
      mgd-amp + kd: {reducer: amp, logits: {name: kd, temperature: 4}}

The baselines are always in: ``teacher``, ``student`` (trained alone), ``kd``, ``conv1x1``. A method named ``kd`` or
``conv1x1`` replaces the options of that baseline.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.accuracy.commands import CommandRun, CommandStudy
from benchmarks.accuracy.data import Choice
from d2_mgd.distill import LogitLoss, MatchingGuidedDistiller, RematchSchedule, WeightSchedule

TEACHER, STUDENT, BEFORE = "teacher", "student", "student before"


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with a rate that drops at the start of given epochs (the CRD protocol's)."""

    epochs: int = 240
    batch: int = 64
    lr: float = 0.05
    drops: tuple[int, ...] = (150, 180, 210)
    drop_ratio: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class Method:
    """The distillation that is added to the loss of the labels.

    Args:
        features: stages to compare; None is all that both networks have, () is none.
        align, reducer, loss, metric, mode, norm, reduction, spatial, tie, balance: see
            :class:`~d2_mgd.distill.MatchingGuidedDistiller`.
        weight: of the compared features. With the reduction ``image_sum`` the deepest has all of it, each one before
            half of the next (Heo et al., ICCV 2019; their CIFAR weight is 1e-3), else each has all of it.
        logits: options of :class:`~d2_mgd.distill.LogitLoss`; None is none.
        task_weight: of the loss of the labels.
        teacher_precision: of the teacher's forward, see :class:`~d2_mgd.distill.teacher_forward.TeacherForward`.
        schedule: options of :class:`~d2_mgd.distill.WeightSchedule`, in epochs.
        rematch: ``every`` so many epochs (0: never after the start), or ``log: [first, last, count]``; on how many
            training ``images``; from which ``source``: ``pass``, one of its own, or ``online``, the last steps.
    """

    features: tuple[str, ...] | None = None
    align: str = "matching"
    reducer: str = "amp"
    loss: str = "partial_l2"
    metric: str = "cosine"
    mode: str | None = None
    norm: str = "bn"
    reduction: str = "image_sum"
    spatial: str = "all"
    tie: tuple[tuple[str, ...], ...] = ()
    balance: str = "fixed"
    weight: float = 1e-3
    logits: Mapping[str, Any] | None = None
    task_weight: float = 1.0
    teacher_precision: str = "student"
    schedule: Mapping[str, Any] = field(default_factory=dict)
    rematch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compares_features(self) -> bool:
        return self.features is None or len(self.features) > 0

    def logit_loss(self) -> LogitLoss | None:
        return None if self.logits is None else LogitLoss(**self.logits)

    def weight_schedule(self) -> WeightSchedule:
        return WeightSchedule(**self.schedule)

    def rematch_schedule(self) -> RematchSchedule:
        """In epochs."""
        if "log" in self.rematch:
            return RematchSchedule.log_spaced(*self.rematch["log"])
        return RematchSchedule([int(self.rematch.get("every", 2))])

    @property
    def rematch_images(self) -> int:
        return int(self.rematch.get("images", 20000))

    @property
    def rematch_source(self) -> str:
        return str(self.rematch.get("source", "pass"))


@dataclass(frozen=True)
class Run:
    """One training, with all settings that decide its result.

    Args:
        method: the row of the table.
        network: what is trained.
        data, recipe, seed: images, schedule, and seed of the weights and batches.
        start: the run whose weights are the initial weights.
        teacher, distil: the teacher's run, and the method.
    """

    method: str
    network: str
    data: Choice
    recipe: Recipe
    seed: int
    start: Run | None = None
    teacher: Run | None = None
    distil: Method | None = None

    @property
    def digest(self) -> str:
        """Equal for runs with equal settings, in any study or row."""
        return hashlib.sha1(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()[:16]

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {"network": self.network, "seed": self.seed}
        for key, value in (("data", self.data), ("recipe", self.recipe), ("distil", self.distil)):
            content[key] = None if value is None else _other_than_default(value)
        for key, run in (("start", self.start), ("teacher", self.teacher)):
            content[key] = None if run is None else run.digest
        return content

    @property
    def needs(self) -> list[Run]:
        """Runs whose weights this one needs."""
        return [run for run in (self.start, self.teacher) if run is not None]


def _other_than_default(value: Any) -> dict[str, Any]:
    """Return the fields that differ from their default, so that an option added later changes no digest."""
    plain = type(value)()
    changed = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: given for name, given in changed.items() if given != getattr(plain, name)}


@dataclass(frozen=True)
class Study:
    """A study; ``methods`` include the baselines, in the order of the table."""

    name: str
    title: str
    teacher: str
    student: str
    seeds: tuple[int, ...]
    data: Choice
    recipe: Recipe
    teacher_recipe: Recipe
    methods: Mapping[str, Method]
    student_start: tuple[Choice, Recipe] | None = None
    teacher_start: tuple[Choice, Recipe] | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    aims: tuple[str, ...] = ()
    note: str = ""

    @property
    def rows(self) -> list[str]:
        """Names of the table's rows."""
        before = [BEFORE] if self._starts_on_its_data else []
        return [TEACHER, *before, STUDENT, *self.methods]

    @property
    def _starts_on_its_data(self) -> bool:
        return self.student_start is not None and self.student_start[0] == self.data

    def runs(self) -> Iterator[Run]:
        """All runs of the table: the teacher's (one, that of the first seed), then each seed's."""
        teacher = self._run(TEACHER, self.seeds[0])
        yield teacher
        for seed in self.seeds:
            plain = self._run(STUDENT, seed)
            if self._starts_on_its_data:
                assert plain.start is not None
                yield plain.start
            yield plain
            for name, method in self.methods.items():
                yield dataclasses.replace(plain, method=name, teacher=teacher, distil=method)

    def _run(self, who: str, seed: int) -> Run:
        start, recipe = (
            (self.teacher_start, self.teacher_recipe) if who == TEACHER else (self.student_start, self.recipe)
        )
        network = self.teacher if who == TEACHER else self.student
        first = None if start is None else Run(f"{who} before", network, start[0], start[1], seed)
        return Run(who, network, self.data, recipe, seed, start=first)


AnyRun = Run | CommandRun
AnyStudy = Study | CommandStudy


def new_distiller(
    method: Method,
    student: Mapping[str, int],
    teacher: Mapping[str, int],
    margins: Mapping[str, torch.Tensor] | None = None,
) -> MatchingGuidedDistiller:
    """The distiller of a method between networks of given widths (stage name -> channels).

    Raises:
        ValueError: stages or options that do not exist.
    """
    shared = [name for name in student if name in teacher]
    unknown = [name for name in method.features or () if name not in shared]
    if unknown:
        raise ValueError(f"both networks have {', '.join(shared)}, not {', '.join(unknown)}.")
    names = shared if method.features is None else [name for name in shared if name in method.features]
    last = len(shared) - 1
    halved = method.reduction == "image_sum"
    return MatchingGuidedDistiller(
        {name: (student[name], teacher[name]) for name in names},
        reducer=method.reducer,
        loss=method.loss,
        metric=method.metric,
        mode=method.mode,
        align=method.align,
        norm=method.norm,
        weights={name: method.weight * (0.5 ** (last - shared.index(name)) if halved else 1.0) for name in names},
        margins={name: margins[name] for name in names if name in margins} if margins else None,
        reduction=method.reduction,
        spatial=method.spatial,
        tie=method.tie,
        balance=method.balance,
    )
