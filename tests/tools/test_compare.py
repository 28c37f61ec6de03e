"""Real trainings side by side: the numbers are those of their files, and what cannot be compared is one sentence."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compare import _difference, _likeliest, main, open_runs
from run_folder import Run
from run_numbers import RATIOS, Compared, Measure, spread, training_seconds, with_sums

from d2_mgd.visualize import Detections

ROOT = Path(__file__).resolve().parents[2]


def _figures(folder: Path) -> set[str]:
    page = (folder / "report.html").read_text(encoding="utf-8")
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    return names


def _table(folder: Path, first: str) -> dict[str, dict[str, str]]:
    """The table whose first column has that name: row -> column -> cell."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    start = next(index for index, cells in enumerate(lines) if cells[0] == first)
    found = {}
    for cells in lines[start + 2 :]:
        if len(cells) != len(lines[start]) or cells[0] == "setting":
            break
        found[cells[0]] = dict(zip(lines[start], cells))
    return found


# --- whole pages ---


def test_detection_runs(detection_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(detection_runs / name) for name in ("alone", "distilled")]
    assert main([*folders, "--output", str(tmp_path)]) == 0
    page, difference = capsys.readouterr().out.splitlines()
    assert page == str(tmp_path / "report.html")
    assert re.fullmatch(r"distilled is .* alone: (box AP|top-1 error) \d+\.\d\d against .* %, after .*\.", difference)
    assert difference in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert _figures(tmp_path) == {"losses", "ratios", "accuracy_bbox_AP", "detections"}
    table = _table(tmp_path, "run")
    for name in ("alone", "distilled"):
        results = detection_runs / name / "inference" / "tiny_valid" / "results.json"
        measured = json.loads(results.read_text(encoding="utf-8"))["bbox"]
        assert table[name]["last box AP, %"] == f"{measured['AP']:.2f}"
        assert table[name]["last AP50"] == f"{measured['AP50']:.2f}"
        assert table[name]["iterations"] == "6"
        assert table[name]["at iteration"] in ("2", "4", "6")
    settings = _table(tmp_path, "setting")
    assert settings["`MGD.ENABLED`"] == {"setting": "`MGD.ENABLED`", "alone": "`False`", "distilled": "`True`"}
    assert set(settings) == {"`MGD.ENABLED`", "`MODEL.RETINANET.SCORE_THRESH_TEST`"}


def test_classification_runs(classification_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(classification_runs / name) for name in ("alone", "distilled")]
    assert main([*folders, "--output", str(tmp_path)]) == 0
    page, difference = capsys.readouterr().out.splitlines()
    assert page == str(tmp_path / "report.html")
    assert re.fullmatch(r"distilled is .* alone: (box AP|top-1 error) \d+\.\d\d against .* %, after .*\.", difference)
    assert difference in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert _figures(tmp_path) == {"losses", "ratios", "accuracy_err1", "predictions"}
    table = _table(tmp_path, "run")
    for name in ("alone", "distilled"):
        lines = (classification_runs / name / "metrics.json").read_text(encoding="utf-8").splitlines()
        errors = [json.loads(line)["err1"] for line in lines]
        assert table[name]["best top-1 error, %"] == f"{min(errors):.2f}"
        assert table[name]["last top-1 error, %"] == f"{errors[-1]:.2f}"
        assert table[name]["at epoch"] == str(errors.index(min(errors)) + 1)
    settings = _table(tmp_path, "setting")
    assert settings["`method`"]["distilled"] == "`mgd-amp`"
    assert "`arch`" not in settings
    assert not {"`output_dir`", "`mgd_reducer`", "`kd_weight`"} & set(settings)  # the student alone has no teacher


def test_classification_needs_no_detectron2(classification_runs: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['detectron2'] = None; import compare; sys.exit(compare.main())"
    words = [classification_runs / "alone", classification_runs / "distilled", "--output", tmp_path]
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT / "tools", capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == str(tmp_path / "report.html")
    assert "predictions" in _figures(tmp_path)


def test_what_is_gone_is_left_out(
    detection_runs: Path, classification_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluations = shutil.ignore_patterns("inference", "*.pth")
    shutil.copytree(detection_runs / "alone", tmp_path / "detection", ignore=evaluations)
    shutil.copytree(classification_runs / "alone", tmp_path / "classification", ignore=evaluations)
    for kept, gone in ((detection_runs, "detection"), (classification_runs, "classification")):
        output = tmp_path / f"{gone}_page"
        assert main([str(kept / "distilled"), str(tmp_path / gone), "--output", str(output)]) == 0
        page, *_, left_out = capsys.readouterr().out.splitlines()
        assert page == str(output / "report.html")
        assert left_out.startswith("The images are left out: ")
        assert left_out in (output / "report.md").read_text(encoding="utf-8")
        assert not _figures(output) & {"detections", "predictions"}


def test_runs_that_detect_nothing_have_no_curve(detection_runs: Path, tmp_path: Path) -> None:
    for name in ("alone", "distilled"):
        shutil.copytree(detection_runs / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pth"))
        path = tmp_path / name / "metrics.json"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        nothing = [{key: math.nan if key.startswith("bbox/") else row[key] for key in row} for row in rows]
        path.write_text("\n".join(map(json.dumps, nothing)), encoding="utf-8")
    assert main([str(tmp_path / "alone"), str(tmp_path / "distilled"), "--output", str(tmp_path / "page")]) == 0
    assert _figures(tmp_path / "page") == {"losses", "ratios", "detections"}
    text = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    assert "No curves of box AP, % and AP50: no run has a finite value." in text


def test_what_cannot_be_compared_is_one_sentence(
    detection_runs: Path, classification_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(classification_runs / "alone", tmp_path / "begun", ignore=shutil.ignore_patterns("metrics.json"))
    (tmp_path / "other").mkdir()
    (tmp_path / "lazy").mkdir()
    (tmp_path / "lazy" / "config.yaml").write_text("model: {_target_: d2.Model, shape: !!python/object:d2.Shape {}}")
    one = classification_runs / "alone"
    for folders, said in [
        ([one], "two folders or more"),
        ([one, one], "is given twice"),
        ([one, tmp_path / "nowhere"], "there is no folder"),
        ([one, tmp_path / "other"], "is not the output folder of a training"),
        ([one, tmp_path / "lazy"], "is of a python config (LazyConfig), which this tool does not read"),
        ([one, tmp_path / "begun"], "has measured nothing yet"),
        ([one, detection_runs / "alone"], "compare runs of one kind"),
    ]:
        assert main([*map(str, folders), "--output", str(tmp_path / "page")]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert len(captured.err.splitlines()) == 1
        assert not (tmp_path / "page").exists()


def test_every_data_set_and_task_is_a_measure(detection_runs: Path) -> None:
    compared = open_runs([detection_runs / "alone", detection_runs / "distilled"])
    rows = [{"iteration": 9, "valid/bbox/AP": 1.0, "valid/segm/AP": 2.0, "bbox/AP-box": 3.0, "total_loss": 1.0}]
    titles = [measure.title for measure in Compared(compared.runs, {"alone": rows}).measures()]
    assert titles == ["mask AP on valid, %", "box AP on valid, %"]
    rows = [{"iteration": 9, "bbox/AP": 1.0, "sem_seg/mIoU": 2.0, "sem_seg/mIoU-box": 2.0, "panoptic_seg/PQ": 3.0}]
    measures = Compared(compared.runs, {"alone": rows}).measures()
    assert [measure.title for measure in measures] == ["panoptic quality, %", "box AP, %", "mIoU, %"]
    assert measures[0].beside == {"SQ": "panoptic_seg/SQ", "RQ": "panoptic_seg/RQ"}


@pytest.mark.parametrize(
    ("kind", "rows", "said"),
    [
        (
            "detection",
            [("bbox/AP", 10.0), ("bbox/AP", 12.5)],
            "b is 2.50 points better than a: box AP 12.50 against 10.00 %, after one training each.",
        ),
        (
            "classification",
            [("err1", 10.0), ("err1", 12.5)],
            "b is 2.50 points worse than a: top-1 error 12.50 against 10.00 %, after one training each.",
        ),
        (
            "classification",
            [("err1", 10.0), ("err1", 10.0)],
            "b is as good as a: top-1 error 10.00 against 10.00 %, after one training each.",
        ),
        (
            "detection",
            [("bbox/AP", 10.0), ("bbox/AP", float("nan"))],
            "No verdict: no finite box AP of b.",
        ),
        ("classification", [("err1", 10.0), ("loss", 10.0)], "No verdict: no finite top-1 error of b."),
        ("detection", [("total_loss", 10.0), ("total_loss", 10.0)], "No verdict: neither run has been evaluated yet."),
    ],
)
def test_the_second_of_two_runs_is_judged_by_the_first(kind: str, rows: list, said: str) -> None:
    runs = {name: Run(Path(), kind, {"options": {}}) for name in "ab"}
    assert _difference(Compared(runs, {name: [{key: value}] for name, (key, value) in zip("ab", rows)})) == said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([{"SEED": 1, "SOLVER": {"MAX_ITER": 9}}, {"SEED": 1, "SOLVER": {"MAX_ITER": 9}}], "one training each."),
        (
            [{"SEED": 1, "SOLVER": {"MAX_ITER": 9}}, {"SEED": 2, "SOLVER": {"MAX_ITER": 8}}],
            "in SEED, SOLVER.MAX_ITER.",
        ),
        ([{"SEED": -1}, {"SEED": -1}], "each, which differ in SEED."),
        (
            [{"DATASETS": {"TEST": ["one"]}}, {"DATASETS": {"TEST": ["other"]}}],
            "No verdict: a was evaluated on one, and b on other.",
        ),
    ],
)
def test_the_verdict_names_what_else_differs(settings: list, said: str) -> None:
    runs = {name: Run(Path(), "detection", one) for name, one in zip("ab", settings)}
    rows = {name: [{"bbox/AP": float(value)}] for value, name in enumerate("ab")}
    assert _difference(Compared(runs, rows)).endswith(said)


def test_settings_of_the_distillation_do_not_differ_from_those_of_a_student_alone() -> None:
    alone = Run(Path(), "detection", {"MODEL": {}, "MGD": {"ENABLED": False, "LOSS": "mse"}})
    assert not alone.uses("MGD.LOSS") and not alone.uses("MGD.REMATCH.AT") and alone.uses("MGD.NONFINITE.SKIP")
    assert alone.uses("MGD.ENABLED") and alone.uses("SOLVER.MAX_ITER")
    assert Run(Path(), "detection", {"MGD": {"ENABLED": True}}).uses("MGD.LOSS")


# --- numbers ---


def test_best_and_last_pass_over_what_is_no_number() -> None:
    rows = [{"epoch": number, "err1": value} for number, value in enumerate([40.0, 30.0, 35.0, float("nan")], start=1)]
    rows.append({"epoch": 5})
    error = Measure("top-1 error, %", "err1", min, {})
    best, last = error.best(rows), error.last(rows)
    assert best is not None
    assert last is not None
    assert (best["epoch"], last["epoch"]) == (2, 3)
    assert error.best(rows[3:]) is None


def test_losses_are_summed_by_what_they_are_for() -> None:
    row = {"iteration": 1, "total_loss": 9.0, "loss_cls": 1.0, "loss_box_reg": 2.0, "loss_distill/p3": 4.0, "lr": 0.1}
    row.update({"loss_dense_kd/scores": 0.5, "loss_cross_head/boxes": 0.25})
    assert with_sums(row)["task loss"] == 3.0
    assert with_sums(row)["distillation loss"] == 4.75
    row = {"epoch": 1, "train_loss": 9.0, "train_loss_class": 1.0, "train_loss_kd": 2.0, "loss": 5.0}
    assert with_sums(row)["task loss"] == 1.0
    row.update({"train_ratio/stage3": 0.5, "train_ratio/stage4": 3.0})
    assert with_sums(row)["distillation loss"] == 2.0
    assert [with_sums(row)[name] for name in RATIOS] == [2.0, 1.75]
    assert set(with_sums({"iteration": 1, "bbox/AP": 3.0})) == {"iteration", "bbox/AP"}


def test_seconds_of_a_detection_run_weigh_each_interval() -> None:
    rows = [{"iteration": 19, "time": 1.0}, {"iteration": 29, "time": 2.0}, {"iteration": 29, "bbox/AP": 0.0}]
    runs = {"run": Run(Path(), "detection", {})}
    assert training_seconds(rows, Compared(runs, {"run": rows})) == 20 * 1.0 + 10 * 2.0


def test_the_surest_detections_are_kept() -> None:
    found = Detections(np.arange(12.0).reshape(3, 4), np.array([2, 1, 0]), np.array([0.2, 0.9, 0.4]))
    assert list(_likeliest(found, 2).labels) == [1, 0]
    assert list(_likeliest(found, 9).labels) == [1, 0, 2]


def test_images_are_spread_over_all() -> None:
    assert spread(range(3), 6) == [0, 1, 2]
    assert spread([], 6) == []
    assert spread(["ant"] * 5 + ["bee"] * 5 + ["cat"] * 5, 3) == ["ant", "bee", "cat"]
    chosen = spread(range(101), 6)
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, 100, 6)
