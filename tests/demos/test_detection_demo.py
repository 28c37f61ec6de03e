"""The demo through its command line, with few scenes and iterations; what it finishes, goes on with, and refuses."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import torch
from demos import detection_stages as demo
from demos import running
from demos.detection_demo import main
from demos.results import share_recovered, start_report
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from d2_mgd.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tools" / "demos" / "detection_demo.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(DEMO), "--quick", "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "The teacher is worth " in run.stdout and "student distilled" in run.stdout
    return output


def test_three_detectors_are_measured(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert list(results) == ["teacher", "student", "distilled"]
    for result in results.values():
        assert {"AP", "AP50", "AP75", "AP-ball", "AP-mushroom", "parameters", "seconds"} <= set(result)
        assert 0.0 <= result["AP"] <= 100.0
    assert results["student"]["parameters"] == results["distilled"]["parameters"] < results["teacher"]["parameters"]


def test_the_report_has_every_part(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    markdown = (finished / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((figures/.+?)\)", markdown)
    names = {Path(link).stem for link in links}
    assert {"curves", "distillation_loss", "rematches", "detections", "group_best"} <= names
    assert {"matching_p3", "matching_p4", "matching_p5"} <= names
    assert all((finished / link).stat().st_size > 2000 for link in links)
    assert page.count("data:image/png;base64,") == len(links)
    assert (finished / "result.jpg").stat().st_size > 2000
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    for text in (page, markdown):
        assert "student distilled" in text
        assert "tools/train_net.py" in text


def test_finished_trainings_are_kept_and_others_continue(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {name: (finished / name / demo.RESULT).read_text() for name in ("teacher", "student", "distilled")}
    (finished / "student" / demo.RESULT).unlink()
    assert main(["--quick", "--output", str(finished)]) == 0
    said = capsys.readouterr().out
    for name in ("teacher", "distilled"):
        assert f"{finished / name} is finished" in said
    after = json.loads((finished / "student" / demo.RESULT).read_text())
    assert after["AP"] == json.loads(results["student"])["AP"]


def test_the_distilled_checkpoint_is_a_plain_student(finished: Path) -> None:
    cfg = get_cfg()  # an unmodified Detectron2's
    cfg.merge_from_file(str(finished / "distilled" / "student.yaml"))
    stored = torch.load(finished / "distilled" / "model_final.pth", map_location="cpu", weights_only=True)
    assert build_model(cfg).load_state_dict(stored["model"], strict=False).unexpected_keys == []


def test_both_students_start_alike_and_see_the_same_images(finished: Path) -> None:
    from d2_mgd.detection import Trainer
    from d2_mgd.detection.datasets import register_coco

    run = demo.Demo(finished, 0, demo.QUICK)
    for name, split in ((demo.TRAIN, "train"), (demo.TEST, "test")):
        register_coco(name, str(finished / "scenes" / f"{split}.json"), str(finished / "scenes" / split))
    started = []
    for stage in (demo.STUDENT, demo.DISTILLED):
        cfg = run.config(stage)
        cfg.merge_from_list(["OUTPUT_DIR", str(finished / "unused"), "DATALOADER.NUM_WORKERS", "0"])
        cfg.MGD.TEACHER.WEIGHTS = str(finished / "teacher" / "model_final.pth")
        trainer = Trainer(cfg)
        batches = list(itertools.islice(iter(trainer.data_loader), 2))
        started.append((trainer.student.state_dict(), batches, cfg))
    (alone, alone_batches, alone_cfg), (distilled, distilled_batches, distilled_cfg) = started
    assert all(torch.equal(distilled[name], value) for name, value in alone.items())
    for first, second in zip(alone_batches, distilled_batches):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second))
    assert alone_cfg.SOLVER == distilled_cfg.SOLVER
    assert alone_cfg.INPUT == distilled_cfg.INPUT


def test_another_seed_starts_over(tmp_path: Path) -> None:
    size, described = demo.Size(train=2, test=1), tmp_path / "scenes" / "train.json"
    demo.Demo(tmp_path, 0, size).prepare(fresh=False)
    first, stamp = described.read_text(), described.stat().st_mtime_ns
    demo.Demo(tmp_path, 0, size).prepare(fresh=False)
    assert described.stat().st_mtime_ns == stamp
    demo.Demo(tmp_path, 1, size).prepare(fresh=False)
    assert described.read_text() != first


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "precious.txt").write_text("mine")
    for arguments in ([], ["--fresh"]):
        assert main(["--quick", "--output", str(tmp_path), *arguments]) == running.BAD_INPUT
        assert f"{tmp_path / 'scenes'} is not of this demo" in capsys.readouterr().err
    assert (tmp_path / "scenes" / "precious.txt").read_text() == "mine"


def test_a_training_that_fails_shows_its_last_lines(tmp_path: Path, capfd: Any) -> None:
    broken = demo.Size(train=2, test=1, overrides=(*demo.QUICK.overrides, "MODEL.RETINANET.NUM_CLASSES", "5"))
    run = demo.Demo(tmp_path, 0, broken)
    run.prepare(fresh=False)
    with pytest.raises(UserError, match="training the teacher failed with status 2"):
        run.train(demo.TEACHER)
    assert "classes" in capfd.readouterr().err


def test_a_training_that_continues_counts_its_own_iterations_alone() -> None:
    with running.progress_bar("teacher", 1000) as bar:
        running.show_progress("[d2.engine.train_loop]: Starting training from iteration 900", bar)
        running.show_progress("[d2.utils.events]:  eta: 0:00:10  iter: 919  total_loss: 1.5  lr: 0.01", bar)
        state = bar.format_dict
    assert (state["initial"], state["n"]) == (900, 920)


def test_told_to_leave_it_waits_for_its_training_to_save(tmp_path: Path) -> None:
    """By Ctrl-C, of this process alone; a test of the other demo sends SIGTERM."""
    command = [sys.executable, str(DEMO), "--output", str(tmp_path)]
    small = "from demos import detection_demo as demo; demo.FULL = demo.QUICK.__class__(8, 4)"
    command[1:2] = ["-c", f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); {small}; sys.exit(demo.main())"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "teacher" / "log.txt"
    try:
        _wait_for(lambda: log.exists() and " iter: " in log.read_text(), process)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Waiting for the training of the teacher to save and exit." in said
    assert "the same command continues from here" in said
    assert "SIGINT: stopped after" in log.read_text()
    assert (tmp_path / "teacher" / (tmp_path / "teacher" / "last_checkpoint").read_text()).exists()


def _wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("teacher", "alone", "distilled", "share", "words"),
    [
        (40.0, 20.0, 30.0, 0.5, "+10.0 AP"),
        (40.0, 20.0, 15.0, -0.25, "-5.0 AP"),
        (20.0, 25.0, 30.0, None, "+5.0 AP"),
        (None, 25.0, 25.0, None, "+0.0 AP"),
        (0.03, 0.01, 0.02, None, "+0.0 AP"),
    ],
)
def test_the_report_begins_with_the_gain(
    tmp_path: Path, teacher: float | None, alone: float, distilled: float, share: float | None, words: str
) -> None:
    report = start_report({"teacher": teacher, "alone": alone, "distilled": distilled}, "AP", "some scenes")
    markdown, page = report.write(tmp_path)
    assert markdown.read_text().splitlines()[0] == f"# The teacher is worth {words}"
    assert f"<h1>The teacher is worth <strong>{words}</strong></h1>" in page.read_text()
    assert share_recovered(teacher, alone, distilled) == share
    assert ("of the gap" in markdown.read_text()) == (share is not None)
