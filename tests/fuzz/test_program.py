"""The long form counts what it tries, and says what fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

import tests.fuzz.__main__ as program
from tests.fuzz.target import Target


def test_inputs_are_counted_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "fuzz.json"
    words = ["--minutes", "0.01", "--only", "matching,file names", "--output", str(path)]
    assert program.main(words) == 0
    result = json.loads(path.read_text())
    assert [target["target"] for target in result["targets"]] == ["matching: any groups", "file names"]
    assert all(target["inputs"] >= 40 and target["failures"] == [] for target in result["targets"])
    assert result["inputs"] == sum(target["inputs"] for target in result["targets"])
    assert result["command"].startswith("python -m tests.fuzz --minutes 0.01 --seed 0 --only")
    assert "0 failures" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["--only", "nothing"])


def test_a_failure_is_counted_once_with_its_smallest_input() -> None:
    def check(value: int) -> None:
        assert value < 100, "too large"

    found = program.fuzz(Target("numbers", st.integers(), check), seconds=0.2, seed=0)
    assert found.inputs > 1
    (failure,) = found.failures
    assert failure["error"] == "AssertionError" and "too large" in failure["message"]
    assert "value=100" in failure["input"]
