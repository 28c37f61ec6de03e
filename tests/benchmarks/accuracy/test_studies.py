"""Studies as files: their runs, digests, and errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.__main__ import STUDIES
from benchmarks.accuracy.data import Choice, StudyError
from benchmarks.accuracy.loading import load_study
from benchmarks.accuracy.study import Method, Recipe, Run
from benchmarks.accuracy.training import rate
from tests.benchmarks.accuracy.conftest import written


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_the_project_are_sound(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    assert {"teacher", "student", "conv1x1"} <= set(study.rows)  # the baselines are always in
    assert ("kd" in study.rows) == (path.stem != "aquarium_faster_rcnn_r50_r18")  # which has no dense logits
    digests = [found.digest for found in study.runs()]
    assert len(set(digests)) == len(digests)  # no row twice under two names


def test_a_study_means_these_runs(tmp_path: Path) -> None:
    study = load_study(written(tmp_path))
    assert study.rows == ["teacher", "student", "kd", "conv1x1", "mgd-amp", "mgd-pearson + dkd"]
    runs = list(study.runs())
    assert [(found.method, found.seed) for found in runs[:3]] == [("teacher", 0), ("student", 0), ("kd", 0)]
    assert len(runs) == 1 + 2 * 5
    assert study.methods["conv1x1"].align == "conv1x1" and study.methods["conv1x1"].weight == 1.0
    assert not study.methods["kd"].compares_features and study.methods["mgd-amp"].compares_features
    own = {"features": [], "logits": {"name": "kd", "weight": 0.1}}
    other = load_study(written(tmp_path, methods={"kd": own}))  # in place of the baseline's options
    assert other.methods["kd"].logits == own["logits"] and other.methods["kd"].task_weight == 0.1


def test_digests_change_with_what_decides_the_result_only() -> None:
    plain = Run("a", "resnet8", Choice(), Recipe(), 0, distil=Method())
    assert plain.digest == dataclasses.replace(plain, method="b").digest
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"network": "resnet14"},
        {"data": Choice(pixels=16)},
        {"recipe": Recipe(lr=0.1)},
        {"distil": Method(reducer="max")},
        {"start": plain},
        {"teacher": plain},
    ]
    assert len({plain.digest, *(dataclasses.replace(plain, **change).digest for change in changes)}) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "vgg8"}, "unknown network 'vgg8'"),
        ({"methds": {}}, "a study has no key methds. Available: name, title"),
        ({"seeds": "012"}, "seeds must be a list of whole numbers"),
        ({"methods": {}}, "a study needs 'methods'"),
        ({"recipe": {"lr": "fast"}}, "recipe.lr must be a number, got 'fast'"),
        ({"recipe": {"epochs": 0}}, "recipe needs 1 epoch"),
        ({"methods": {"teacher": {}}}, "teacher is a baseline"),
        ({"methods": {"a": {"reducer": "median"}}}, "methods.a: unknown reducer 'median'"),
        (
            {"methods": {"a": {"features": ["stage9"]}}},
            "methods.a: both networks have stage1, stage2, stage3, not stage9",
        ),
        ({"methods": {"a": {"logits": {"name": "kl"}}}}, "methods.a: unknown logit loss 'kl'"),
        ({"methods": {"a": {"schedule": {"decay": "linear"}}}}, "methods.a: a linear decay .* needs a step"),
        ({"methods": {"a": {"rematch": {"often": 3}}}}, "methods.a: rematch has no key often"),
        ({"methods": {"a": {"rematch": {"source": "air"}}}}, "methods.a: rematch source is 'pass' or 'online'"),
    ],
)
def test_studies_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=message):
        load_study(written(tmp_path, **changes))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(StudyError, match="no YAML that can be read"):
        load_study(tmp_path / "broken.yaml")


def test_rates() -> None:
    recipe = Recipe(lr=0.5, drops=(2, 4), drop_ratio=0.1)
    assert [rate(recipe, epoch) for epoch in range(6)] == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
