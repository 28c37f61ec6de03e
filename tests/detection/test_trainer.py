from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import build_model
from training_runs import in_process_trainer, same_tensors, write_coco

from d2_mgd.detection import Trainer
from d2_mgd.detection.config import student_config
from d2_mgd.detection.datasets import register_coco
from d2_mgd.errors import UserError
from d2_mgd.visualize import read_metrics


def checkpoint(output: Path, name: str = "model_final.pth") -> dict[str, Any]:
    return torch.load(output / name, weights_only=True)


@pytest.fixture(scope="module")
def finished(workplace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a distilled training of six steps, with checkpoints after three and six."""
    output = tmp_path_factory.mktemp("finished")
    in_process_trainer(workplace, output).train()
    return output


def test_the_checkpoint_is_the_plain_student(workplace: Any, finished: Path) -> None:
    trainer = in_process_trainer(workplace, finished, resume=True)
    plain = build_model(student_config(trainer.cfg)).eval()
    left = DetectionCheckpointer(plain)._load_model(checkpoint(finished))
    assert not left.missing_keys and not left.unexpected_keys and not left.incorrect_shapes
    sample = [{"image": torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8), "height": 64, "width": 80}]
    with torch.no_grad():
        ours, theirs = trainer.detector.eval()(sample), plain(sample)
    assert torch.equal(ours[0]["instances"].pred_boxes.tensor, theirs[0]["instances"].pred_boxes.tensor)
    assert torch.equal(ours[0]["instances"].scores, theirs[0]["instances"].scores)


def test_a_checkpoint_holds_what_continues_and_not_the_teacher(workplace: Any, finished: Path) -> None:
    state = checkpoint(finished, "model_0000002.pth")
    assert state["iteration"] == 2
    assert (finished / "last_checkpoint").read_text() == "model_final.pth"
    assert state["distillation"]["teacher"]["weights"] == str(workplace.teacher_weights)
    assert len(state["distillation"]["teacher"]["digest"]) == 64
    (process,) = state["training"]["processes"]
    assert process["numbers"]["student"]["loss_normalizer"] > 0  # RetinaNet's running mean, in no state_dict
    size = sum(value.numel() for value in state["model"].values())
    teacher = sum(value.numel() for value in torch.load(workplace.teacher_weights)["model"].values())
    assert size < teacher and not any("teacher" in name for name in state["distillation"]["distiller"])


def test_a_new_training_in_the_folder_of_another_says_so(
    workplace: Any, finished: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("d2_mgd"), "propagate", True)
    in_process_trainer(workplace, finished)
    assert f"{finished} holds an earlier training" in caplog.text
    caplog.clear()
    in_process_trainer(workplace, finished, resume=True)
    assert "earlier training" not in caplog.text


def test_a_new_training_starts_its_metrics_anew(workplace: Any, tmp_path: Path) -> None:
    """Those of a longer one before it would stand for its own. A resumed training goes on with its rows."""
    metrics, settings = tmp_path / "metrics.json", ("SOLVER.STEPS", "(1,)", "SOLVER.MAX_ITER")
    metrics.write_text('{"iteration": 99, "bbox/AP": 50.0}\n{"iteration": 199, "bb')
    in_process_trainer(workplace, tmp_path, *settings, "2").train()
    assert {row["iteration"] for row in read_metrics(metrics)} == {0, 1, 2}
    in_process_trainer(workplace, tmp_path, *settings, "4", resume=True).train()
    assert {row["iteration"] for row in read_metrics(metrics)} == {0, 1, 2, 3, 4}
    assert metrics.read_text().startswith('{"iteration": 99, "bbox/AP": 50.0}')


def test_a_student_alone_begins_as_the_distilled_one_and_sees_the_same_images(workplace: Any, tmp_path: Path) -> None:
    distilled = in_process_trainer(workplace, tmp_path / "a")
    alone = in_process_trainer(workplace, tmp_path / "b", "MGD.ENABLED", "False")
    assert same_tensors(distilled.student.state_dict(), alone.student.state_dict())
    first, second = (next(iter(trainer.data_loader)) for trainer in (distilled, alone))
    assert [sample["file_name"] for sample in first] == [sample["file_name"] for sample in second]
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(first, second))


def test_a_student_alone_trains_and_is_no_distilled_training(workplace: Any, tmp_path: Path, finished: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path, "MGD.ENABLED", "False")
    results = trainer.train()
    assert "bbox" in results and "distillation" not in checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"was trained without a teacher: MGD.ENABLED cannot change"):
        in_process_trainer(workplace, tmp_path, resume=True)
    with pytest.raises(ValueError, match="was trained with a teacher"):
        in_process_trainer(workplace, finished, "MGD.ENABLED", "False", resume=True)


def test_resuming_online_costs_continues_to_the_bit(workplace: Any, tmp_path: Path) -> None:
    online = ("MGD.REMATCH.SOURCE", "online", "MGD.REMATCH.EVERY", "1", "MGD.REMATCH.PERIODS", "[5]")
    in_process_trainer(workplace, tmp_path, *online).train()
    whole = checkpoint(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    resumed = in_process_trainer(workplace, tmp_path, *online, resume=True)
    assert resumed.start_iter == 3 and resumed.detector.distiller.costs["p4"].num_images == 4
    resumed.train()
    assert same_tensors(checkpoint(tmp_path)["model"], whole["model"])
    assert same_tensors(checkpoint(tmp_path)["distillation"]["distiller"], whole["distillation"]["distiller"])


def test_a_drawn_seed_is_kept_when_resuming(workplace: Any, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path, "SEED", "-1")
    trainer.train()
    assert trainer.cfg.SEED == trainer.seed >= 0
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    whole = checkpoint(tmp_path)
    resumed = in_process_trainer(workplace, tmp_path, "SEED", "-1", resume=True)
    assert resumed.seed == trainer.seed
    resumed.train()
    assert same_tensors(checkpoint(tmp_path)["model"], whole["model"])


def test_a_loader_of_its_own_draws_a_seed_where_there_is_none(workplace: Any, tmp_path: Path) -> None:
    cfg = in_process_trainer(workplace, tmp_path).cfg.clone()
    cfg.defrost()
    cfg.SEED = -1
    assert len(next(iter(Trainer.build_train_loader(cfg)))) == 2


def test_changes_that_forbid_resuming_are_named(workplace: Any, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other_teacher.pth"
    weights = torch.load(workplace.teacher_weights)
    weights["model"]["backbone.fpn_output4.bias"] += 1
    torch.save(weights, other)
    with pytest.raises(ValueError, match=r"other_teacher\.pth differs"):
        in_process_trainer(workplace, finished, "MGD.TEACHER.WEIGHTS", str(other), resume=True)
    with pytest.raises(ValueError, match="another student than the config describes"):
        in_process_trainer(workplace, finished, "MODEL.FPN.OUT_CHANNELS", "9", resume=True)
    with pytest.raises(ValueError, match=r"model_final\.pth does not continue with this config"):
        in_process_trainer(workplace, finished, "MGD.FEATURES", "['p4','p5']", "MGD.LOSS", "mse", resume=True)


def test_weights_are_the_students(workplace: Any, finished: Path, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path, "MODEL.WEIGHTS", str(finished / "model_final.pth"))
    assert trainer.start_iter == 0
    assert same_tensors(trainer.student.state_dict(), checkpoint(finished)["model"])


def test_evaluation_writes_strict_json_and_disturbs_nothing(workplace: Any, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path)
    trainer.detector.train()
    frozen = trainer.student.backbone.bottom_up.res4.eval()
    state = torch.get_rng_state()
    results = Trainer.test(trainer.cfg, trainer.detector)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.student.training and not frozen.training

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    path = tmp_path / "inference" / "tiny_valid" / "results.json"
    written = json.loads(path.read_text(), parse_constant=refuse)
    assert written["bbox"].keys() == results["bbox"].keys()
    assert written["bbox"]["APl"] is None  # no large object in the set


def test_several_test_sets_are_evaluated_each(workplace: Any, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path, "DATASETS.TEST", "('tiny_valid','tiny_train')")
    results = Trainer.test(trainer.cfg, trainer.detector)
    assert set(results) == {"tiny_valid", "tiny_train"}
    assert (tmp_path / "inference" / "tiny_train" / "results.json").exists()
    assert not isinstance(Trainer.build_evaluator(trainer.cfg, "tiny_valid"), DatasetEvaluators)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("TEST.PRECISE_BN.ENABLED", "True"), "PRECISE_BN"),
        (("TEST.AUG.ENABLED", "True"), "TEST.AUG"),
        (("SOLVER.AMP.ENABLED", "True", "MGD.PRECISION", "float16"), "float16 needs a GPU, .* use bfloat16"),
        (("MGD.ACCUMULATE", "3"), "IMS_PER_BATCH is 2, .* cannot be cut into MGD.ACCUMULATE 3 equal parts"),
    ],
)
def test_what_cannot_be_done_is_refused(workplace: Any, tmp_path: Path, override: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_process_trainer(workplace, tmp_path, *override)


def test_an_image_that_is_missing_is_found_before_anything_is_built(workplace: Any, tmp_path: Path) -> None:
    path, root = write_coco(tmp_path, "an_image_less", 4, seed=0)
    (root / "002.png").unlink()
    register_coco("an_image_less", str(path), str(root))
    with pytest.raises(UserError, match=r"'an_image_less': the image .*002\.png does not exist"):
        in_process_trainer(workplace, tmp_path / "out", "DATASETS.TRAIN", "('an_image_less',)")
