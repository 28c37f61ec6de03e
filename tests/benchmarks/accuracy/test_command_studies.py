"""Studies whose runs are command lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.accuracy.data import StudyError
from benchmarks.accuracy.loading import load_study
from tests.benchmarks.accuracy.conftest import run

COMMANDS = {
    "kind": "commands",
    "name": "lines",
    "title": "Commands",
    "seeds": [4, 5],
    "metric": {"name": "AP", "file": "metrics.json", "key": "bbox/AP"},
    "command": "python {data}/train.py {row} --seed {seed} --output {output}",
    "parts": {"taught": "--teacher {teacher}/weights"},
    "rows": {
        "teacher": "--gain 9",
        "student": "",
        "kd": "{taught}",
        "conv1x1": "{taught} --gain 1",
        "mgd": '{taught} --gain 2 --name "a b"',
    },
}


TRAIN = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("gain", "seed"):
    parser.add_argument(f"--{name}", type=float, default=0)
for name in ("teacher", "output", "name"):
    parser.add_argument(f"--{name}")
o = parser.parse_args()
if o.teacher and not pathlib.Path(o.teacher).exists():
    raise SystemExit("no teacher")
if o.name and not (pathlib.Path(__file__).parent / "allowed").exists():
    raise SystemExit("mgd is not allowed yet")
output = pathlib.Path(o.output)
(output / "weights").touch()
lines = [{"loss": 1.0}, {"bbox/AP": 10 + o.gain, "bbox/AP50": 20.0, "loss": 0.5}, {"bbox/AP": float("nan")}]
(output / "metrics.json").write_text("".join(json.dumps(line) + chr(10) for line in lines))
"""


def test_a_study_of_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    study = tmp_path / "lines.yaml"
    study.write_text(yaml.safe_dump(COMMANDS, sort_keys=False))
    (tmp_path / "train.py").write_text(TRAIN)
    assert run(study, tmp_path, tmp_path) == 1
    assert "mgd, seed 4, ended with status 1. Its last line: mgd is not allowed yet" in caplog.text
    assert "| mgd |" not in capsys.readouterr().out
    (tmp_path / "allowed").touch()
    assert run(study, tmp_path, tmp_path, "--jobs", "2") == 0
    shown = capsys.readouterr().out
    assert "| teacher | 19.00 | 19.00 | 1/1 |" in shown and "| mgd | 12.00 ± 0.00 | 12.00 ± 0.00 | 2/2 | 22% |" in shown
    lines = [json.loads(line) for line in (tmp_path / "results" / "lines.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    assert all(line["metrics"] == {"bbox/AP": line["last"], "bbox/AP50": 20.0} for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"teacher": "", "student": "", "kd": ""}}, "rows lacks conv1x1: the baselines are always in"),
        (
            {"rows": {"teacher": "", "student": "", "conv1x1": "-a"}},
            "rows lacks kd: the baselines are always in; where kd cannot be, without_kd says why",
        ),
        ({"without_kd": "no logits."}, "without_kd says why there is no kd, but rows has one"),
        ({"command": "python x.py {row}"}, "command needs the places {row} and {output}"),
        ({"command": "python x.py {row} {output} {weights}"}, "'weights' is no place that can be filled"),
        ({"metric": {"name": "AP"}}, "metric needs name, file and key"),
        ({"recipe": {}}, "a study of commands has no key recipe"),
    ],
)
def test_studies_of_commands_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.yaml"
    path.write_text(yaml.safe_dump({**COMMANDS, **changes}))
    with pytest.raises(StudyError, match=message):
        load_study(path)
