"""Training loops that are not ours, around a model that matches by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import own_project
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from own_project import OwnDetector, OwnTrainer, own_config, own_training
from tiny_detectors import SIZES, batch, built, lively, matched, step, tiny
from torch import nn
from torch.optim.swa_utils import AveragedModel
from training_runs import same_tensors

from d2_mgd.detection import distillation_hooks
from d2_mgd.detection.config import student_config
from d2_mgd.detection.datasets import registered
from d2_mgd.errors import UserError
from tests.ranks import in_processes

DISTILLED = ("loss_distill/res4", "loss_distill/p4")


@pytest.fixture(scope="module")
def sets(workplace: Any) -> Any:
    """The tiny data sets, known to Detectron2."""
    for name, files in (("tiny_train", workplace.train), ("tiny_valid", workplace.valid)):
        try:
            registered(name)
        except UserError:
            register_coco_instances(name, {}, *map(str, files))
    return workplace


def plain_model(cfg: Any, weights: Path) -> tuple[nn.Module, list[str]]:
    """The student as plain Detectron2 loads it, and the keys that it did not know."""
    model = build_model(student_config(cfg))
    left = DetectionCheckpointer(model)._load_model(torch.load(weights, weights_only=True))
    assert not left.missing_keys and not left.incorrect_shapes
    return model, left.unexpected_keys


def test_a_default_trainer_of_ones_own(sets: Any, tmp_path: Path) -> None:
    # anchors of the objects' size, and so many detections that some are right after four steps
    many = [
        "MODEL.ANCHOR_GENERATOR.SIZES", [[24]] * 5,
        "MODEL.RETINANET.NMS_THRESH_TEST", 0.9,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 1000,
        "TEST.DETECTIONS_PER_IMAGE", 300,
        "SOLVER.BASE_LR", 1e-3,
    ]  # fmt: skip
    cfg = own_config(str(sets.config), str(tmp_path), "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,), *many)
    trainer = own_training(cfg)
    assert isinstance(trainer.model.student, OwnDetector)
    losses = trainer.losses.of_steps
    assert len(losses) == 4 and all(one[name] > 0 for one in losses for name in DISTILLED)
    results = trainer._last_eval_results
    model, unknown = plain_model(cfg, tmp_path / "model_final.pth")
    assert unknown and all(name.startswith("distiller.") for name in unknown)
    assert same_tensors(model.state_dict(), trainer.model.student.state_dict())
    again = OwnTrainer.test(student_config(cfg), model)
    assert again["bbox"]["AP"] > 0 and again["bbox"] == pytest.approx(results["bbox"], nan_ok=True)

    cfg.merge_from_list(["SOLVER.MAX_ITER", 6, "TEST.EVAL_PERIOD", 0])
    resumed = OwnTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == resumed.model.rematcher.finished == 4
    assert same_tensors(resumed.model.state_dict(), torch.load(tmp_path / "model_final.pth")["model"])
    resumed.train()
    assert len(resumed.losses.of_steps) == 2 and all(
        one[name] > 0 for one in resumed.losses.of_steps for name in DISTILLED
    )


def test_two_ranks_of_a_default_trainer_match_and_resume_as_one(workplace: Any, tmp_path: Path) -> None:
    words = [workplace.config, tmp_path, *workplace.train]
    for start, end, flags in ((0, 3, []), (3, 5, ["--resume"])):
        assert in_processes(own_project.main, [*words, *flags, "SOLVER.STEPS", (1,), "SOLVER.MAX_ITER", end], 2) == [
            0,
            0,
        ]
        ranks = [torch.load(tmp_path / f"rank_{number}.pth", weights_only=True) for number in (0, 1)]
        assert ranks[0]["groups"] == ranks[1]["groups"] and same_tensors(ranks[0]["student"], ranks[1]["student"])
        for rank in ranks:
            assert (rank["start"], rank["finished"], len(rank["losses"])) == (start, end, end - start)
            assert all(one[name] > 0 for one in rank["losses"] for name in DISTILLED)


def test_a_pass_by_hook_in_another_trainer(sets: Any, tmp_path: Path) -> None:
    overrides = ["MGD.REMATCH.SOURCE", "pass", "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,), "TEST.EVAL_PERIOD", 0]
    cfg = own_config(str(sets.config), str(tmp_path), *overrides)
    with pytest.raises(UserError, match="has no matching"):
        own_training(cfg)
    trainer = OwnTrainer(cfg)
    trainer.register_hooks(distillation_hooks(cfg, trainer.model))
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "matching").iterdir()) == ["iter_0000000.npz", "iter_0000002.npz"]
    assert all(one[name] > 0 for one in trainer.losses.of_steps for name in DISTILLED)


@pytest.mark.parametrize("loop", ["SimpleTrainer", "bare"])
def test_every_loop_rematches_by_schedule(loop: str) -> None:
    model = built("retinanet", "retinanet", "MGD.REMATCH.PERIODS", [2], "MGD.REMATCH.MILESTONES", [])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    if loop == "SimpleTrainer":
        trainer = SimpleTrainer(model, [batch(*SIZES)] * 9, optimizer)
        trainer.train(0, 5)
        storage = trainer.storage
    else:  # as in tools/plain_train_net.py
        with EventStorage(0) as storage:
            for iteration in range(5):
                storage.iter = iteration
                losses = sum(model(batch(*SIZES)).values())
                optimizer.zero_grad()
                losses.backward()
                optimizer.step()
    assert [iteration for _, iteration in storage.history("rematch/p3_cost").values()] == [0, 2, 4]


class Silent(nn.Module):
    """A detector that uses no event storage."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()
        self.backbone = self.inner.backbone

    def forward(self, batched_inputs: Any) -> dict[str, torch.Tensor]:
        maps = self.backbone(self.inner.preprocess_image(batched_inputs).tensor)
        return {"loss": sum(found.square().mean() for found in maps.values())}


def test_without_an_event_storage_the_model_counts_its_steps() -> None:
    model = built("retinanet", "retinanet", "MGD.REMATCH.START", False, "MGD.REMATCH.AT", [2])
    model.student = Silent()
    model._watched.model = model._watched.plain = model.student
    found = [float(model(batch(*SIZES))["loss_distill/p3"].detach()) for _ in range(4)]
    assert [loss > 0 for loss in found] == [False, False, True, True]


class TestStateDict:
    def test_has_the_students_keys_and_takes_both_forms(self) -> None:
        model, other = matched(built()), built()
        state = model.state_dict()
        own = {name: value for name, value in state.items() if not name.startswith("distiller.")}
        assert same_tensors(own, model.student.state_dict())
        other.load_state_dict({f"student.{name}": value for name, value in own.items()})
        assert same_tensors(other.student.state_dict(), own) and not other.distiller.matched
        other.load_state_dict(state)
        assert same_tensors(other.state_dict(), state) and other.distiller.matched
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "head'):
            other.load_state_dict({name: value for name, value in own.items() if not name.startswith("head")})

    def test_a_plain_detector_or_backbone_fills_the_student(self, tmp_path: Path) -> None:
        plain = tiny()
        torch.save(plain.state_dict(), tmp_path / "plain.pth")
        model = built()
        DetectionCheckpointer(model).load(str(tmp_path / "plain.pth"))
        assert same_tensors(model.student.state_dict(), plain.state_dict())
        backbone = lively(tiny("retinanet", 16)).backbone.bottom_up
        torch.save({"model": backbone.state_dict(), "matching_heuristics": True}, tmp_path / "backbone.pth")
        DetectionCheckpointer(model).load(str(tmp_path / "backbone.pth"))
        assert same_tensors(model.student.backbone.bottom_up.state_dict(), backbone.state_dict())

    def test_costs_and_steps_go_on_in_another_checkpointer(self, tmp_path: Path) -> None:
        model, other = built(), built()
        for _ in range(2):
            step(model)
        checkpointer = PeriodicCheckpointer(DetectionCheckpointer(model, str(tmp_path)), 1, max_iter=1)
        checkpointer.step(0)
        DetectionCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
        assert other.rematcher.finished == other.rematcher.checked == 1
        assert {cost.num_images for cost in other.distiller.costs.values()} == {2}
        assert other.distiller.matched

    def test_inside_a_wrapper_and_in_a_moving_average(self) -> None:
        model = matched(built())
        wrapped = nn.DataParallel(model)
        assert {name.removeprefix("module.") for name in wrapped.state_dict()} == set(model.state_dict())
        wrapped.load_state_dict(wrapped.state_dict())
        step(model)  # leaves hooks and maps behind
        for average in (copy.deepcopy(model), AveragedModel(model).module):
            assert same_tensors(average.state_dict(), model.state_dict())
            assert average.teacher is model.teacher
            step(average)
