"""Read and check the YAML of a study."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from benchmarks.accuracy.commands import CommandStudy, Metric
from benchmarks.accuracy.data import Choice, StudyError
from benchmarks.accuracy.networks import build_network
from benchmarks.accuracy.study import BEFORE, STUDENT, TEACHER, AnyStudy, Method, Recipe, Study, new_distiller
from d2_mgd.distill.teacher_forward import TeacherForward

T = TypeVar("T")

_REMATCH_KEYS = ("every", "log", "images", "source")


def load_study(path: Path) -> AnyStudy:
    """Read and check a study.

    Raises:
        StudyError: the file is no study.
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
    """Return the entries that both kinds of studies have."""
    return {
        "published": {str(k): float(v) for k, v in _mapping(content.get("published"), "published").items()},
        "aims": tuple(str(aim) for aim in content.get("aims", ())),
        "note": str(content.get("note", "")),
    }


def _start(content: Any, where: str, data: Choice, recipe: Recipe) -> tuple[Choice, Recipe]:
    """Return data and recipe of an earlier training; by default those of the study."""
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
        raise StudyError(f"{where} has no key {', '.join(unknown)}. Available: {', '.join(known)}.")
    return dict(content)


def _made(kind: type[T], content: Any, where: str, default: T | None = None) -> T:
    """Build a dataclass from a mapping. Numbers that YAML reads as text (1e-3) are converted."""
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
    """Check names, widths and numbers before the first step."""
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
            TeacherForward(method.teacher_precision)
            _mapping(method.rematch, "rematch", _REMATCH_KEYS)
            method.rematch_schedule()
            if method.rematch_source not in ("pass", "online"):
                raise ValueError(f"rematch source is 'pass' or 'online', not {method.rematch_source!r}.")
            if method.compares_features:
                new_distiller(method, student.widths, teacher.widths)
        except (StudyError, TypeError, ValueError) as error:
            raise StudyError(f"methods.{name}: {error}") from error
