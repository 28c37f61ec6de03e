"""Runs of a study from the command line: resumed, reproducible, continued, failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.__main__ import main
from benchmarks.accuracy.engine import WeightStore
from benchmarks.accuracy.loading import load_study
from benchmarks.accuracy.results import Results, table
from tests.benchmarks.accuracy.conftest import STUDY, command, run, written


def test_a_study_from_the_command_line_cut_short_and_gone_on_with(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tmp_path)
    lines = tmp_path / "results" / "tiny.jsonl"
    assert run(study, tmp_path, data, "--methods", "student", "--seeds", "0") == 0
    assert len(lines.read_text().splitlines()) == 1
    shown = capsys.readouterr().out
    assert (
        "| student | " in shown and " | 1/2 |" in shown and "| mgd-amp |" not in shown
    )  # rows without a run are left out
    first = lines.read_text()
    lines.write_text(first + '{"digest": "cut sh')  # stopped in the middle of a line
    assert run(study, tmp_path, data, "--seeds", "0", "--methods", "teacher", "mgd-amp", "conv1x1") == 0
    kept = lines.read_text()
    assert kept.startswith(first)
    assert run(study, tmp_path, data) == 0
    whole = lines.read_text()
    assert whole.startswith(kept)  # nothing ran twice
    assert run(study, tmp_path, data) == 0 and lines.read_text() == whole
    found = [json.loads(line) for line in whole.splitlines()]
    assert len(found) == 11
    for line in found:
        assert line["best"] == max(line["accuracy"]) and line["last"] == line["accuracy"][-1]
        assert len(line["accuracy"]) == line["epochs"] == 2
        assert {"commit", "versions", "device", "seed", "digest", "seconds"} <= set(line)
    matched = next(line for line in found if line["method"] == "mgd-amp")
    assert [entry["epoch"] for entry in matched["rematches"]] == [0, 0, 0, 1, 1, 1]
    assert all(entry["cost"] < entry["chance"] for entry in matched["rematches"])
    assert all(
        entry["kept"] >= entry["cost"] - 1e-6 for entry in matched["rematches"][3:]
    )  # the new one is the optimum
    learned = next(line for line in found if line["method"] == "conv1x1")
    assert len(learned["projections"]) == 3 and not matched["projections"]
    assert all(0 < entry["share"] <= entry["best"] <= 1 for entry in learned["projections"])
    assert all(entry["chance"] < entry["best"] for entry in learned["projections"])
    capsys.readouterr()
    assert command("table", study, tmp_path) == 0
    shown = capsys.readouterr().out
    assert "| mgd-amp |" in shown and "| OFD |" in shown and "cost over chance" in shown
    assert "|  | feature | on matched pairs | by chance | at best |\n" in shown
    picture = tmp_path / "plot" / "tiny.png"
    assert command("plot", study, tmp_path, "--output", str(picture)) == 0 and picture.stat().st_size > 10000


def test_runs_are_reproducible_and_processes_change_nothing(tmp_path: Path, data: Path) -> None:
    study = written(tmp_path, methods={"mgd-rd": {"reducer": "rd"}}, seeds=[3])
    for folder, more in ((tmp_path / "a", ()), (tmp_path / "b", ("--jobs", "2"))):
        assert run(study, folder, data, "--methods", "student", "mgd-rd", *more) == 0
    a, b = (
        {
            line["method"]: line["accuracy"]
            for line in Results(tmp_path / name / "results/tiny.jsonl").by_digest.values()
        }
        for name in "ab"
    )
    assert a == b and set(a) == {"teacher", "student", "mgd-rd"}


def test_continuing_from_the_student_alone_and_transfer_to_other_classes(tmp_path: Path, data: Path) -> None:
    before = {"recipe": STUDY["recipe"]}
    study = written(
        tmp_path, seeds=[0], student_start=before, recipe={"epochs": 1, "batch": 16, "lr": 1e-6, "drops": []}
    )
    loaded = load_study(study)
    assert loaded.rows[:3] == ["teacher", "student before", "student"]
    assert run(study, tmp_path, data, "--methods", "student before", "student") == 0
    results = Results(tmp_path / "results" / "tiny.jsonl")
    weights = WeightStore(tmp_path / "weights")
    runs = {found.method: found for found in loaded.runs()}
    old, new = (weights.load(runs[name])["head.weight"] for name in ("student before", "student"))
    torch.testing.assert_close(old, new, atol=1e-4, rtol=0)  # it went on from there, at hardly any rate
    assert not torch.equal(old, new) and results.of(runs["student before"])
    start = {"data": {"pixels": 8, "classes": [0, 2]}}
    moved = {"pixels": 8, "classes": [1, 3]}
    other = written(tmp_path, name="transfer", seeds=[0], data=moved, student_start=start, teacher_start=start)
    assert "student before" not in load_study(other).rows  # its accuracy is that of other classes
    assert run(other, tmp_path, data, "--methods", "student", "mgd-amp") == 0
    assert len((tmp_path / "results" / "transfer.jsonl").read_text().splitlines()) == 3  # and the teacher


def test_a_run_that_fails_leaves_the_others_alone(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    methods = {"conv1x1": {"align": "conv1x1", "weight": 1e30, "reduction": "mean"}, "mgd-amp": {}}
    study = written(tmp_path, seeds=[0], methods=methods)
    assert run(study, tmp_path, data) == 1
    assert "conv1x1, seed 0: the loss is not finite in epoch" in caplog.text
    results = Results(tmp_path / "results" / "tiny.jsonl")
    text = table(load_study(study), results)
    assert "| conv1x1 |" not in text and "| mgd-amp |" in text


def test_whatever_ends_a_run_the_others_go_on_and_it_is_named_at_the_end(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = written(tmp_path, seeds=[0])
    assert run(study, tmp_path, data, "--methods", "teacher") == 0
    teacher, student, *taught_ = load_study(study).runs()
    WeightStore(tmp_path / "weights").path(teacher).write_bytes(b"no weights")  # no error that the runner knows of
    capsys.readouterr()
    assert run(study, tmp_path, data) == 1
    results = Results(tmp_path / "results" / "tiny.jsonl")
    assert results.of(student) and not any(map(results.of, taught_))
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert [line.split(", ")[0] for line in named] == [f"failed: {lost.method}" for lost in taught_]
    assert all("seed 0: UnpicklingError: " in line for line in named)


def test_what_could_not_be_measured_is_named_beside_its_result(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = {"align": "conv1x1", "mode": "one_to_one", "rematch": {"images": 12}}
    study = written(tmp_path, teacher="resnet8", student="resnet8x2", seeds=[0], methods={"conv1x1": impossible})
    only = ("--methods", "conv1x1")
    assert run(study, tmp_path, data, *only) == 1
    shown = capsys.readouterr()
    assert "| conv1x1 |" in shown.out
    assert "failed: conv1x1, seed 0: the learned projections were not measured: UserError" in shown.err
    assert run(study, tmp_path, data, *only) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "mgd"], "tiny has no mgd; it has: teacher, student, kd"),
        (["--seeds", "7"], "tiny has no seed 7; it has: 0, 1"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["--data", "no.npz"], "there is no data at no.npz"),
        (["--device", "tpu9"], "--device tpu9 is no device"),
        (["--compile", "fast"], "--compile fast is no backend of torch.compile; there are: "),
    ],
)
def test_bad_command_lines(
    more: list[str], message: str, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(written(tmp_path), tmp_path, data, *more) == 2
    assert message in capsys.readouterr().err
    assert main(["table", "nothing"]) == 2
    assert "there is no study 'nothing'; there are: aquarium_" in capsys.readouterr().err
