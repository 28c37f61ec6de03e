"""Tables and the page of results show what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.accuracy.__main__ import REPORT, RESULTS, STUDIES
from benchmarks.accuracy.data import StudyError
from benchmarks.accuracy.loading import load_study
from benchmarks.accuracy.report import report
from benchmarks.accuracy.results import Results, mean_and_deviation, table
from tests.benchmarks.accuracy.conftest import STUDY, run, written
from tests.benchmarks.accuracy.test_command_studies import COMMANDS


def test_means_and_deviations() -> None:
    assert mean_and_deviation([70.0]) == "70.00"
    assert mean_and_deviation([70.0, 71.0, 72.0]) == "71.00 ± 1.00"


def test_results_of_other_settings_do_not_count(tmp_path: Path, data: Path) -> None:
    assert run(written(tmp_path, seeds=[0]), tmp_path, data, "--methods", "student") == 0
    changed = load_study(written(tmp_path, seeds=[0], recipe={**STUDY["recipe"], "lr": 0.01}))
    assert "| student |" not in table(changed, Results(tmp_path / "results" / "tiny.jsonl"))


def test_the_share_of_the_gap(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, seeds=[0]))
    results = Results(tmp_path / "tiny.jsonl")
    for found, last in zip(study.runs(), [80.0, 70.0, 72.5, 69.0]):
        results.add({"digest": found.digest, "best": last, "last": last})
    text = table(study, results)
    assert "| kd | 72.50 | 72.50 | 1/1 | 25% |" in text and "| conv1x1 | 69.00 | 69.00 | 1/1 | -10% |" in text
    assert "| teacher | 80.00 | 80.00 | 1/1 |  | 80.00 |" in text


def test_the_page_has_a_section_for_results_and_a_line_for_what_is_prepared(tmp_path: Path) -> None:
    rows = {name: text for name, text in COMMANDS["rows"].items() if name != "kd"}  # type: ignore[attr-defined]
    (tmp_path / "lines.yaml").write_text(yaml.safe_dump({**COMMANDS, "rows": rows, "without_kd": "no logits."}))
    study = load_study(tmp_path / "lines.yaml")
    assert "kd" not in study.rows
    prepared = "- Commands: `python -m benchmarks.accuracy run lines --data FOLDER`\n"
    assert prepared in report(tmp_path, tmp_path) and "## Commands" not in report(tmp_path, tmp_path)
    versions = {"torch": "2"}
    about = {"device": "CPU", "commit": "a", "versions": versions, "seconds": 60.0}
    first = next(study.runs())
    Results(tmp_path / "lines.jsonl").add({"digest": first.digest, "best": 3.0, "last": 2.0, **about})
    page = report(tmp_path, tmp_path)
    assert "Without `kd`: no logits.\n" in page and "| teacher | 2.00 | 3.00 | 1/1 |  |" in page
    assert prepared not in page and "| student |" not in page


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"digest": "1"}\nnonsense\n')
    with pytest.raises(StudyError, match=r"a\.jsonl, line 2, is no result"):
        Results(tmp_path / "a.jsonl")


def test_the_page_of_results_is_what_the_results_say() -> None:
    assert REPORT.read_text(encoding="utf-8") == report(STUDIES, RESULTS), "run python -m benchmarks.accuracy report"
