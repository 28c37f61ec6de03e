"""The real command line, in processes of its own."""

from __future__ import annotations

import json
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import detectron2
import train_net as command_line
from detectron2.config import get_cfg
from training_runs import ROOT, run, same_tensors, train_net

from d2_mgd.distill import load_reports
from tests.ranks import fork_launched_ranks


@pytest.fixture(scope="module")
def whole(workplace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed training: evaluation and rematch every two steps, checkpoints after three and six."""
    output = tmp_path_factory.mktemp("whole")
    done = train_net(*workplace.arguments(output))
    (output / "stdout.txt").write_text(done.stdout)
    (output / "stderr.txt").write_text(done.stderr)
    return output


def checkpoint(output: Path) -> dict[str, Any]:
    return torch.load(output / "model_final.pth", weights_only=True)


def stopped(source: Path, output: Path) -> Path:
    """A folder as ``source`` was when its first checkpoint had been written."""
    output.mkdir()
    shutil.copy(source / "model_0000002.pth", output)
    (output / "last_checkpoint").write_text("model_0000002.pth")
    return output


def assert_same_end(one: Path, other: Path) -> None:
    first, second = checkpoint(one), checkpoint(other)
    assert same_tensors(first["model"], second["model"])
    assert same_tensors(first["distillation"]["distiller"], second["distillation"]["distiller"])
    assert first["training"]["processes"][0]["numbers"] == second["training"]["processes"][0]["numbers"]
    assert torch.equal(
        first["training"]["processes"][-1]["random"]["torch"], second["training"]["processes"][-1]["random"]["torch"]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_that_was_stopped_ends_as_if_it_was_not(
    workplace: Any, whole: Path, tmp_path: Path, workers: int
) -> None:
    output = stopped(whole, tmp_path / "resumed")
    shutil.copy(whole / "config.yaml", output)
    # a process of its own, as the whole training had: TorchScript rounds otherwise once it has optimised a function
    train_net(*workplace.arguments(output, "DATALOADER.NUM_WORKERS", workers, flags=("--resume",)))
    assert_same_end(whole, output)
    changed = re.findall(r"Changed since the training to resume: (.*)", (output / "log.txt").read_text())
    assert changed == [*["DATALOADER.NUM_WORKERS 0 -> 2"][: workers // 2], f"OUTPUT_DIR {whole} -> {output}"]


def test_two_processes_match_as_one_and_resume_to_the_bit(workplace: Any, whole: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    learned = ("MGD.ALIGN", "matched_projection", "MGD.BALANCE", "auto")
    judged = ("MGD.TEACHER.EVALUATE", "True", "MGD.EARLY_STOP.PATIENCE", "1")
    train_net(*workplace.arguments(two, *learned, *judged, flags=("--num-gpus", "2")))
    first, second = (load_reports(output / "matching" / "iter_0000000.npz") for output in (whole, two))
    for name in ("res4", "p4"):
        assert np.array_equal(first[name].matching.groups, second[name].matching.groups)
        assert first[name].num_images == second[name].num_images == 5
        np.testing.assert_allclose(first[name].cost, second[name].cost, rtol=0, atol=1e-9)
    assert len(checkpoint(two)["training"]["processes"]) == 2 and checkpoint(two)["iteration"] == 3
    for file in ("inference/tiny_valid/results.json", "teacher/inference/tiny_valid/results.json", "model_best.pth"):
        assert (two / file).exists()
    resumed = stopped(two, tmp_path / "resumed")
    train_net(*workplace.arguments(resumed, *learned, *judged, flags=("--resume", "--num-gpus", "2")))
    assert_same_end(two, resumed)


@pytest.mark.parametrize(
    ("flag", "overrides"),
    [
        ("--resume", ("MODEL.FPN.OUT_CHANNELS", 48)),
        ("--eval-only", ("MODEL.WEIGHTS", "model_final.pth", "SOLVER.MAX_ITER", 9)),
    ],
)
def test_what_trains_nothing_leaves_the_configs_of_the_training(
    workplace: Any, whole: Path, tmp_path: Path, flag: str, overrides: tuple[Any, ...]
) -> None:
    output = stopped(whole, tmp_path / "run")
    overrides = tuple(output / value if str(value).endswith(".pth") else value for value in overrides)
    before = {}
    for name in ("config.yaml", "student.yaml"):
        shutil.copy(whole / name, output)
        before[name] = (output / name).read_text()
    shutil.copy(whole / "model_final.pth", output)
    with suppress(SystemExit):  # with --resume: of another student
        command_line.main(workplace.arguments(output, *overrides, flags=(flag,)))
    assert {name: (output / name).read_text() for name in before} == before


PLAIN_DETECTRON2 = """
import sys
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.evaluation import COCOEvaluator

config, output, annotations, images = sys.argv[1:]
register_coco_instances("tiny_valid", {}, annotations, images)
cfg = get_cfg()
cfg.merge_from_file(config)
cfg.OUTPUT_DIR = output
model = DefaultTrainer.build_model(cfg)
DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
cfg.DATASETS.TEST = ("tiny_valid",)
DefaultTrainer.test(cfg, model, [COCOEvaluator("tiny_valid", output_dir=output)])
assert not any(name.startswith("d2_mgd") for name in sys.modules)
"""


def test_plain_detectron2_detects_the_same(workplace: Any, whole: Path, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(PLAIN_DETECTRON2)
    arguments = [str(whole / "student.yaml"), str(tmp_path), *map(str, workplace.valid)]
    done = run([sys.executable, str(script), *arguments])
    assert "not found in the checkpoint" not in done.stdout and "not used by the model" not in done.stdout
    ours = whole / "inference" / "tiny_valid" / "coco_instances_results.json"
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == json.loads(ours.read_text())


def test_a_run_starts_with_its_purpose_and_without_warnings(whole: Path) -> None:
    first = (whole / "stdout.txt").read_text().splitlines()[0]
    assert re.search(r"Training \w+ of \S+ from the teacher \S+ on tiny_train; output: \S+$", first), first
    assert not re.search(r"Warning: |deprecated", (whole / "stderr.txt").read_text())


def test_the_outcome_of_a_training_is_all_there(whole: Path) -> None:
    cfg = get_cfg()
    cfg.merge_from_file(str(whole / "student.yaml"))
    assert Path(cfg.MODEL.WEIGHTS) == whole / "model_final.pth"
    assert Path(cfg.OUTPUT_DIR) == whole / "student"
    assert "MGD:" in (whole / "config.yaml").read_text()
    metrics = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    names = {name for line in metrics for name in line}
    assert {
        "loss_distill/res4",
        "loss_distill/p4",
        "loss_cls",
        "bbox/AP",
        "rematch/p4_cost",
        "rematch/seconds",
    } <= names
    assert list(whole.glob("events.out.tfevents.*"))
    assert "The seed of this run is 7" in (whole / "log.txt").read_text()


def test_evaluation_alone_gives_the_metrics_of_the_training(workplace: Any, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "evaluated"
    weights = ("MODEL.WEIGHTS", whole / "model_final.pth")
    command_line.main(workplace.arguments(output, *weights, flags=("--eval-only",)))
    results = Path("inference") / "tiny_valid" / "results.json"
    assert (output / results).read_text() == (whole / results).read_text()
    assert not (output / "student.yaml").exists()


def test_the_teacher_alone_is_evaluated(workplace: Any, tmp_path: Path) -> None:
    command_line.main(workplace.arguments(tmp_path, flags=("--eval-teacher",)))
    written = json.loads((tmp_path / "teacher" / "inference" / "tiny_valid" / "results.json").read_text())
    assert "AP" in written["bbox"] and not (tmp_path / "model_final.pth").exists()


def test_bad_input_leaves_with_one_sentence_from_several_processes_too(
    workplace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fork_launched_ranks(monkeypatch)
    odd = ("SOLVER.IMS_PER_BATCH", 3)
    with pytest.raises(SystemExit) as left:
        command_line.main(workplace.arguments(tmp_path / "out", *odd, flags=("--num-gpus", "2")))
    assert left.value.code == 2
    said = capfd.readouterr().err
    sentence = "error: SOLVER.IMS_PER_BATCH is 3, which 2 processes cannot share evenly."
    assert said.count("error:") == said.count(sentence) == 1
    assert "Traceback" not in said


def test_detectron2_is_as_it_was_installed() -> None:
    """Everything plugs in from outside: no file of Detectron2 is there twice."""
    assert Path(detectron2.__file__).parent not in ROOT.parents and not (ROOT / "detectron2").exists()


def test_with_a_baseline_both_trainings_are_those_without_it_and_compared(
    workplace: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = workplace.arguments(tmp_path, "MGD.LOSS", "partial_l2,mse", flags=("--with-baseline",))
    command_line.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == str(tmp_path / "comparison" / "report.html")
    assert re.search(
        r" than baseline: box AP \d+\.\d\d against \d+\.\d\d %, after one training each\.$|as good as baseline",
        lines[-1],
    )
    assert_same_end(whole, tmp_path)
    alone = checkpoint(tmp_path / "baseline")
    assert "distillation" not in alone
    logs = [(folder / "log.txt").read_text() for folder in (tmp_path / "baseline", tmp_path)]
    assert ["without a teacher" in log for log in logs] == [True, False]

    # a baseline that was interrupted continues, and a finished one is not trained again
    (tmp_path / "baseline" / "finished.yaml").unlink()
    (tmp_path / "baseline" / "model_final.pth").unlink()
    (tmp_path / "baseline" / "last_checkpoint").write_text("model_0000002.pth")
    command_line.main([*arguments[:8], "--resume", *arguments[8:]])
    assert same_tensors(checkpoint(tmp_path / "baseline")["model"], alone["model"])
    written = (tmp_path / "baseline" / "model_final.pth").stat().st_mtime_ns
    command_line.main([*arguments[:8], "--resume", *arguments[8:]])
    assert (tmp_path / "baseline" / "model_final.pth").stat().st_mtime_ns == written


def test_a_baseline_needs_a_distilled_training(workplace: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        command_line.main(workplace.arguments(tmp_path, "MGD.ENABLED", "False", flags=("--with-baseline",)))
    assert left.value.code == 2
