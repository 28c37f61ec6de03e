"""A study: one small YAML that says which pair is trained by which methods on which data, and the runs that it means.

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
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from benchmarks.accuracy.commands import CommandRun, CommandStudy, Metric
from benchmarks.accuracy.data import Choice, StudyError
from benchmarks.accuracy.networks import build_network
from d2_mgd.distill import LogitLoss, MatchingGuidedDistiller, RematchSchedule, WeightSchedule

__all__ = ["BEFORE", "STUDENT", "TEACHER", "AnyRun", "AnyStudy", "Method", "Recipe", "Run", "Study", "load_study",
           "new_distiller"]  # fmt: skip

TEACHER, STUDENT, BEFORE = "teacher", "student", "student before"

T = TypeVar("T")


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
    """What is added to the loss of the labels.

    Args:
        features: stages to compare; None is all that both networks have, () is none.
        align, reducer, loss, metric, mode, norm, reduction, spatial, tie, balance: see
            :class:`~d2_mgd.distill.MatchingGuidedDistiller`.
        weight: of the compared features. With the reduction ``image_sum`` the deepest has all of it, each one before
            half of the next (Heo et al., ICCV 2019; their CIFAR weight is 1e-3), else each has all of it.
        logits: options of :class:`~d2_mgd.distill.LogitLoss`; None is none.
        task_weight: of the loss of the labels.
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


_REMATCH_KEYS = ("every", "log", "images", "source")


@dataclass(frozen=True)
class Run:
    """One training, with all that decides its result.

    Args:
        method: the row of the table.
        network: what is trained.
        data, recipe, seed: on what, how, and from which random state.
        start: the run whose weights it begins with.
        teacher, distil: who teaches, and how.
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
        """The same for runs that compute the same, whatever study or row they are in."""
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
        """Runs whose weights it needs."""
        return [run for run in (self.start, self.teacher) if run is not None]


def _other_than_default(value: Any) -> dict[str, Any]:
    """The fields that say something, so that an option added later changes no digest."""
    plain = type(value)()
    changed = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: given for name, given in changed.items() if given != getattr(plain, name)}


@dataclass(frozen=True)
class Study:
    """A study as its YAML says it; ``methods`` with the baselines, in the order of the table."""

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


def load_study(path: Path) -> AnyStudy:
    """Read and check a study.

    Raises:
        StudyError: the file is no study; one sentence that names the key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"{path} is no YAML that can be read: {error}.") from error
    try:
        is_commands = isinstance(content, dict) and content.get("kind") == "commands"
        return _command_study(content) if is_commands else _study(content)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from error


_OWN_KEYS = ("name", "title", "teacher", "student", "seeds", "data", "recipe", "teacher_recipe", "methods", "distil",
             "student_start", "teacher_start", "published", "aims", "note")  # fmt: skip


def _study(content: Any) -> Study:
    content = _mapping(content, "a study", _OWN_KEYS)
    for key in ("name", "title", "teacher", "student", "seeds", "methods"):
        if not content.get(key):
            raise StudyError(f"a study needs {key!r}.")
    data = _made(Choice, content.get("data"), "data")
    recipe = _made(Recipe, content.get("recipe"), "recipe")
    start = {
        key: _start(content[key], key, data, recipe) for key in ("student_start", "teacher_start") if key in content
    }
    common = _mapping(content.get("distil"), "distil", [field.name for field in dataclasses.fields(Method)])
    given = {"kd": {}, "conv1x1": {}, **_mapping(content["methods"], "methods")}
    defaults = {
        "kd": {"features": (), "logits": {"name": "kd", "temperature": 4.0, "weight": 0.9}, "task_weight": 0.1},
        "conv1x1": {**common, "align": "conv1x1"},
    }
    reserved = {TEACHER, STUDENT, BEFORE} & set(given)
    if reserved:
        raise StudyError(f"methods: {', '.join(sorted(reserved))} is a baseline and has no options.")
    study = Study(
        name=str(content["name"]),
        title=str(content["title"]),
        teacher=str(content["teacher"]),
        student=str(content["student"]),
        seeds=_whole_numbers(content["seeds"], "seeds"),
        data=data,
        recipe=recipe,
        teacher_recipe=_made(Recipe, content.get("teacher_recipe"), "teacher_recipe", recipe),
        methods={
            str(name): _made(Method, {**defaults.get(name, common), **(options or {})}, f"methods.{name}")
            for name, options in given.items()
        },
        student_start=start.get("student_start"),
        teacher_start=start.get("teacher_start"),
        **_common(content),
    )
    _check(study)
    return study


_COMMAND_KEYS = ("kind", "name", "title", "seeds", "metric", "command", "parts", "rows", "published", "aims", "note",
                 "without_kd")  # fmt: skip


def _command_study(content: Any) -> CommandStudy:
    content = _mapping(content, "a study of commands", _COMMAND_KEYS)
    for key in ("name", "title", "seeds", "metric", "command", "rows"):
        if not content.get(key):
            raise StudyError(f"a study of commands needs {key!r}.")
    metric = _mapping(content["metric"], "metric", [field.name for field in dataclasses.fields(Metric)])
    if not {"name", "file", "key"} <= set(metric):
        raise StudyError(f"metric needs name, file and key, got {metric}.")
    return CommandStudy(
        name=str(content["name"]),
        title=str(content["title"]),
        seeds=_whole_numbers(content["seeds"], "seeds"),
        metric=Metric(**metric),
        command=str(content["command"]),
        commands={
            str(name): _with_parts(str(text or ""), _mapping(content.get("parts"), "parts"))
            for name, text in _mapping(content["rows"], "rows").items()
        },
        without_kd=str(content.get("without_kd") or "").strip(),
        **_common(content),
    )


def _with_parts(text: str, parts: Mapping[str, Any]) -> str:
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", str(part))
    return text


def _common(content: Mapping[str, Any]) -> dict[str, Any]:
    """What both kinds of studies say beside their runs."""
    return {
        "published": {str(k): float(v) for k, v in _mapping(content.get("published"), "published").items()},
        "aims": tuple(str(aim) for aim in content.get("aims", ())),
        "note": str(content.get("note", "")),
    }


def _start(content: Any, where: str, data: Choice, recipe: Recipe) -> tuple[Choice, Recipe]:
    """On what and how a network was trained before: the study's own data and recipe where nothing else is said."""
    given = _mapping(content, where, ("data", "recipe"))
    earlier = _made(Choice, given["data"], f"{where}.data") if "data" in given else data
    return earlier, _made(Recipe, given.get("recipe"), f"{where}.recipe", recipe)


def _mapping(content: Any, where: str, known: Any = None) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StudyError(f"{where} must be a mapping, got {content!r}.")
    unknown = [str(key) for key in content if known is not None and key not in known]
    if unknown:
        raise StudyError(f"{where} knows no {', '.join(unknown)}; it knows: {', '.join(known)}.")
    return dict(content)


def _made(kind: type[T], content: Any, where: str, default: T | None = None) -> T:
    """A dataclass from a mapping; numbers that YAML took for text (1e-3) become numbers."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = _mapping(content, where, list(fields))
    for name, value in values.items():
        wanted = str(fields[name].type)
        try:
            if wanted in ("float", "int"):
                values[name] = float(value) if wanted == "float" else int(value)
            elif isinstance(value, list):
                values[name] = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        except (TypeError, ValueError):
            raise StudyError(f"{where}.{name} must be a number, got {value!r}.") from None
    return kind(**values) if default is None else dataclasses.replace(default, **values)  # type: ignore[type-var]


def _whole_numbers(content: Any, where: str) -> tuple[int, ...]:
    if not isinstance(content, list) or any(not isinstance(value, int) for value in content):
        raise StudyError(f"{where} must be a list of whole numbers, got {content!r}.")
    return tuple(content)


def _check(study: Study) -> None:
    """All that can be known before the first step: names, widths, numbers."""
    for what, recipe in (("recipe", study.recipe), ("teacher_recipe", study.teacher_recipe)):
        if recipe.epochs < 1 or recipe.batch < 2 or not recipe.lr > 0:
            raise StudyError(f"{what} needs 1 epoch, a batch of 2 and a rate above 0 at least, got {recipe}.")
    with torch.device("meta"):
        try:
            student, teacher = build_network(study.student, 2), build_network(study.teacher, 2)
        except ValueError as error:
            raise StudyError(str(error)) from error
    for name, method in study.methods.items():
        try:
            method.logit_loss()
            method.weight_schedule()
            _mapping(method.rematch, "rematch", _REMATCH_KEYS)
            method.rematch_schedule()
            if method.rematch_source not in ("pass", "online"):
                raise ValueError(f"rematch source is 'pass' or 'online', not {method.rematch_source!r}.")
            if method.compares_features:
                new_distiller(method, student.widths, teacher.widths)
        except (StudyError, TypeError, ValueError) as error:
            raise StudyError(f"methods.{name}: {error}") from error


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
