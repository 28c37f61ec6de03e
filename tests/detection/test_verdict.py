"""Verdicts: the teacher before the first step, the best student, and an early end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.modeling import SemanticSegmentor
from torch import nn
from training_runs import in_process_trainer, same_tensors

from d2_mgd.detection import Trainer
from d2_mgd.detection.image_network import ImageNetwork
from d2_mgd.detection.teacher_evaluation import cache_path, evaluate_once
from d2_mgd.detection.verdict import TeacherVerdict, main_metric
from d2_mgd.distill import WeightSchedule
from d2_mgd.errors import CommonError, UserError
from d2_mgd.training.verdict import verdict

EVALUATE = ("MGD.TEACHER.EVALUATE", "True")
OFTEN = ("TEST.EVAL_PERIOD", "1", "MGD.EARLY_STOP.PATIENCE", "2")


def measured_as(monkeypatch: pytest.MonkeyPatch, student: list[float], teacher: float = 30.0) -> list[str]:
    """Evaluations without images: these AP of the student one after the other; returns what was evaluated."""
    evaluated, left = [], list(student)

    def test(cls: Any, cfg: Any, model: Any, evaluators: Any = None) -> dict[str, Any]:
        is_teacher = cfg.OUTPUT_DIR.endswith("teacher")
        evaluated.append("teacher" if is_teacher else "student")
        return {"bbox": {"AP": teacher if is_teacher else left.pop(0), "AP50": 50.0}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    return evaluated


def test_a_teacher_is_evaluated_once_for_all_trainings(
    workplace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    one = ("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()")
    evaluated = measured_as(monkeypatch, [4.0, 4.0])
    in_process_trainer(workplace, tmp_path / "a", *EVALUATE, *one).train()
    in_process_trainer(workplace, tmp_path / "b", *EVALUATE, *one).train()
    assert evaluated == ["teacher", "student", "student"]
    assert messages.text.count("teacher: bbox/AP 30.00") == 2
    # another input size is another evaluation; a trained student as teacher was evaluated at its training's end
    size = ("MGD.TEACHER.OPTS", "['INPUT.MIN_SIZE_TEST', 48]")
    in_process_trainer(workplace, tmp_path / "c", *EVALUATE, *one, *size)._judge_teacher()
    assert evaluated[3:] == ["teacher"]
    final = str(tmp_path / "a" / "model_final.pth")
    trained = ("MGD.TEACHER.CONFIG_FILE", str(workplace.config), "MGD.TEACHER.WEIGHTS", final, "MGD.LOSS", "mse")
    student = in_process_trainer(workplace, tmp_path / "d", *EVALUATE, *one, *trained)
    student._judge_teacher()
    assert len(evaluated) == 4 and student.verdict.metrics["bbox/AP"] == 4.0


def test_a_teacher_is_evaluated_with_its_own_settings_on_the_real_data(workplace: Any, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path, *EVALUATE, "SOLVER.MAX_ITER", "5")
    results = Trainer.test_teacher(trainer.cfg, trainer.detector.teacher)
    written = json.loads((tmp_path / "teacher" / "inference" / "tiny_valid" / "results.json").read_text())
    assert written["bbox"].keys() == results["bbox"].keys()
    assert not trainer.detector.teacher.model.training


def test_metrics_are_kept_by_all_that_they_depend_on(workplace: Any, tmp_path: Path) -> None:
    cfg = in_process_trainer(workplace, tmp_path).cfg.clone()
    cfg.defrost()
    program = tmp_path / "teacher.py"
    program.write_text("depth = 50")
    paths = [cache_path(cfg, "digest")]
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1]
    paths.append(cache_path(cfg, "digest"))
    cfg.MODEL.LAZY_CONFIG = str(program)
    paths.append(cache_path(cfg, "digest"))
    program.write_text("depth = 18")
    paths += [cache_path(cfg, "digest"), cache_path(cfg, "other")]
    assert None not in paths and len(set(paths)) == len(paths)


def test_a_set_without_evaluator_type_is_kept_and_a_missing_json_file_is_an_error_of_all_ranks(
    workplace: Any, tmp_path: Path
) -> None:
    cfg = in_process_trainer(workplace, tmp_path).cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ("own_set",)
    known = MetadataCatalog.get("own_set")
    known.thing_classes, known.json_file = ["disc", "box", "cross"], str(workplace.valid[0])
    try:
        assert cache_path(cfg, "digest")
        known.__dict__["json_file"] = str(tmp_path / "missing.json")
        teacher = SimpleNamespace(model=nn.Identity(), cfg=cfg, weights_path="a.pth", digest="digest")
        with pytest.raises(CommonError, match=r"ground truth of data set 'own_set' cannot be read: .*missing.json"):
            evaluate_once(cfg, teacher, test=pytest.fail)
    finally:
        MetadataCatalog.remove("own_set")


class FiveClasses(nn.Module):
    num_classes = 5


@pytest.mark.parametrize(
    ("model", "weights", "why"),
    [
        (FiveClasses, "a.pth", "has 5 classes but the data set 'tiny_valid' has 3"),
        (SemanticSegmentor, "a.pth", "SemanticSegmentor predicts no instances, by which 'tiny_valid' is evaluated"),
        (ImageNetwork, "timm:resnet18", "ImageNetwork predicts no instances"),
        (FiveClasses, "untrained", "it is untrained"),
    ],
)
def test_a_teacher_that_cannot_be_evaluated_is_one_line(
    workplace: Any, tmp_path: Path, messages: pytest.LogCaptureFixture, model: Any, weights: str, why: str
) -> None:
    cfg = in_process_trainer(workplace, tmp_path).cfg
    teacher = SimpleNamespace(model=model.__new__(model), cfg=cfg, weights_path=weights, digest="")
    messages.clear()
    assert evaluate_once(cfg, teacher, test=pytest.fail) is None
    assert len(messages.records) == 1 and "The teacher is not evaluated: " in messages.text and why in messages.text


def test_a_bad_teacher_is_a_warning_before_the_first_step_and_in_the_last_lines(
    workplace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    measured_as(monkeypatch, [10.0, 31.0, 29.0], teacher=30.0)
    two = ("SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", "1")
    in_process_trainer(workplace, tmp_path, *EVALUATE, *two).train()
    warnings = [record.getMessage() for record in messages.records if record.levelname == "WARNING"]
    outgrown = [text for text in warnings if "(bbox/AP 30.00) is not better than the student (31.00)" in text]
    assert len(outgrown) == 2 and warnings[-1] == outgrown[1]
    assert "best student: bbox/AP 31.00 after 2 iterations, model_best.pth; last: 29.00, model_final" in messages.text

    messages.clear()  # a training that continues knows what it measured before
    resumed = in_process_trainer(workplace, tmp_path, *EVALUATE, *two, resume=True)
    resumed._judge_teacher()
    assert "is not better than the student (31.00)" in messages.text

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "empty"))  # as for data whose metrics are not kept
    evaluated = measured_as(monkeypatch, [])
    in_process_trainer(workplace, tmp_path, *EVALUATE, *two, resume=True)._judge_teacher()
    assert not evaluated and messages.text.count("is not better than the student (31.00)") == 2


class Factors(HookBase):
    """Of the distillation, step by step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def after_step(self) -> None:
        self.seen.append(self.trainer.storage.latest()["distill_factor"][0])


@pytest.mark.parametrize("balance", ["auto", "fixed"])
def test_under_auto_a_student_better_than_its_teacher_trains_alone_also_after_a_resume(
    workplace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balance: str
) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    measured_as(monkeypatch, [np.float64(31.0), *[29.0] * 4], teacher=np.float64(30.0))
    settings = (*EVALUATE, "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "3", "MGD.BALANCE", balance)
    settings += ("MGD.SCHEDULE.DECAY", "constant", "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()")
    factors = Factors()
    trainer = in_process_trainer(workplace, tmp_path, *settings)
    trainer.register_hooks([factors])
    trainer.train()
    alone = balance == "auto"  # from the third step on
    assert factors.seen == ([1.0, 1.0, 0.0, 0.0] if alone else [1.0] * 4)

    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")  # between two evaluations
    resumed = in_process_trainer(workplace, tmp_path, *settings, resume=True)
    assert resumed.start_iter == 3 and resumed.detector.schedule.share == float(not alone)
    assert resumed.verdict.metrics == {"bbox/AP": 30.0, "bbox/AP50": 50.0}


def test_under_auto_a_trained_student_has_less_weight_also_after_a_resume(
    workplace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    weights = tmp_path / "student.pth"
    torch.save({"model": in_process_trainer(workplace, tmp_path / "before").student.state_dict()}, weights)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    measured_as(monkeypatch, [np.float64(22.5), *[26.0] * 4], teacher=30.0)
    settings = (*EVALUATE, "TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "2", "MGD.BALANCE", "auto")
    settings += ("MGD.SCHEDULE.DECAY", "constant")
    settings += ("SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()", "MODEL.WEIGHTS", str(weights))
    factors = Factors()
    trainer = in_process_trainer(workplace, tmp_path, *settings)
    trainer.register_hooks([factors])
    trainer.train()
    assert factors.seen == [0.25] * 4
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    resumed = in_process_trainer(workplace, tmp_path, *settings, resume=True)
    assert resumed.detector.schedule.share == 0.25 and resumed.verdict.before == 22.5
    messages.clear()
    resumed._judge_teacher()
    resumed.verdict.summarise({"bbox/AP": 20.0})
    assert "The distillation has 0.25 of its weight: the student is trained already" in messages.text
    assert "better before this training: bbox/AP 22.50, now 20.00 at best" in messages.text


def test_the_verdict_on_numbers() -> None:
    assert "hardly better than chance" in verdict("AP", 1.0, None, chance=1.0)
    assert "hardly better than chance" in verdict("AP", float("nan"), 3.0, chance=1.0)
    assert verdict("AP", 30.0, None, chance=1.0) == verdict("AP", 30.0, 29.9, chance=1.0) == ""


def test_a_teacher_without_any_detection_has_no_accuracy() -> None:
    """Its AP is NaN, and any student is better."""
    judged = TeacherVerdict({"bbox/AP": float("nan")}, "")
    schedule = WeightSchedule()
    judged.weigh(schedule, 1, 2)
    assert schedule.share == 1.0 and "hardly better than chance (bbox/AP 0.00)" in judged.warning
    judged.measured({"bbox/AP": 1.0})
    judged.weigh(schedule, 1, 2)
    assert schedule.share == 0.0


def test_the_main_metric() -> None:
    assert main_metric(["bbox/AP50", "bbox/AP", "segm/AP"]) == "segm/AP"
    assert main_metric(["one/bbox/AP", "two/bbox/AP"]) == "one/bbox/AP"
    assert main_metric(["bbox/AP", "bbox/AP50"], "bbox/AP50") == "bbox/AP50"
    assert main_metric(["box_proposals/AR"]) is None
    with pytest.raises(UserError, match=r"EARLY_STOP.METRIC bbox/ap is none .* Available: bbox/AP\."):
        main_metric(["bbox/AP"], "bbox/ap")


def test_a_training_ends_when_it_stops_improving_and_stays_ended(
    workplace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    evaluated = measured_as(monkeypatch, [1.0, 3.0, 2.0, 3.0, 9.0, 9.0])
    trainer = in_process_trainer(workplace, tmp_path, *OFTEN)
    assert trainer.train() == {"bbox": {"AP": 3.0, "AP50": 50.0}}
    assert len(evaluated) == 4
    assert "Stopping after 4 of 6 iterations: bbox/AP has not improved in 2 evaluations" in messages.text
    assert "best student: bbox/AP 3.00 after 2 iterations, model_best.pth; last: 3.00" in messages.text
    last, best = (torch.load(tmp_path / f"model_{name}.pth", weights_only=True) for name in ("final", "best"))
    assert last["iteration"] == 3 and best["iteration"] == 1 and set(best) == {"model", "iteration"}
    assert set(best["model"]) == set(last["model"]) and not same_tensors(best["model"], last["model"])
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"

    again = in_process_trainer(workplace, tmp_path, *OFTEN, resume=True)
    again.train()
    assert again.iter == 4 and len(evaluated) == 4
    longer = in_process_trainer(workplace, tmp_path, *OFTEN[:2], "MGD.EARLY_STOP.PATIENCE", "3", resume=True)
    longer.train()
    assert len(evaluated) == 6 and longer.best.best_metric == 9.0


def test_patience_without_a_main_metric_is_one_warning(
    workplace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, cfg, model: {"box_proposals": {"AR@100": 3.0}}))
    in_process_trainer(workplace, tmp_path, *OFTEN, "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()").train()
    assert messages.text.count("PATIENCE does not end this training") == 1
    assert "Set MGD.EARLY_STOP.METRIC to one of: box_proposals/AR@100" in messages.text


def test_a_resumed_training_counts_as_one_that_was_not_stopped(
    workplace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_as(monkeypatch, [3.0, 2.0, 2.0])
    in_process_trainer(workplace, tmp_path, *OFTEN).train()
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")  # written before the third evaluation
    (tmp_path / "model_final.pth").unlink()
    evaluated = measured_as(monkeypatch, [2.0, 5.0])
    resumed = in_process_trainer(workplace, tmp_path, *OFTEN, resume=True)
    resumed.train()
    assert len(evaluated) == 1 and resumed.iter == 3
    last, before = (torch.load(tmp_path / f"model_{name}.pth", weights_only=True) for name in ("final", "0000002"))
    assert last["iteration"] == 2 and same_tensors(last["model"], before["model"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "bbox/AP" in row][-1] == 2
