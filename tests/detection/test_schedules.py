"""When a detector is distilled and how much, from the config to the training loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from tiny_detectors import SIZES, batch, built, distilled_config, matched
from training_runs import in_process_trainer, same_tensors

from d2_mgd.detection.config_checks import rematch_schedule, validate_config, weight_schedule


def losses_at(iteration: int, *overrides: Any) -> dict[str, float]:
    torch.manual_seed(0)
    model = matched(built("retinanet", "retinanet", "MGD.FEATURES", ["res4", "p3"], *overrides))
    with EventStorage(iteration):
        return {name: float(loss) for name, loss in model(batch(*SIZES)).items()}


def test_every_decay_multiplies_the_distillation_alone() -> None:
    whole = losses_at(0)
    for decay, expected in (("constant", 1.0), ("linear", 0.75), ("cosine", 0.5 + math.sqrt(0.5) / 2)):
        found = losses_at(30, "MGD.SCHEDULE.DECAY", decay, "MGD.SCHEDULE.START", 10, "MGD.SCHEDULE.STOP", 90)
        for name, value in whole.items():
            assert found[name] == pytest.approx(value * (expected if name.startswith("loss_distill") else 1.0))
    assert losses_at(45000, "MGD.SCHEDULE.DECAY", "linear", "MGD.SCHEDULE.END", 0.2)["loss_distill/p3"] == (
        pytest.approx(0.6 * whole["loss_distill/p3"])  # to SOLVER.MAX_ITER, 90,000
    )
    assert losses_at(1, "MGD.SCHEDULE.WARMUP", 4)["loss_distill/p3"] == pytest.approx(whole["loss_distill/p3"] / 4)


@pytest.mark.parametrize("iteration", [9, 20, 10**6])
def test_where_it_weighs_nothing_only_the_student_runs(iteration: int) -> None:
    model = matched(built("retinanet", "retinanet", "MGD.SCHEDULE.START", 10, "MGD.SCHEDULE.STOP", 20))
    with EventStorage(11):
        model(batch(*SIZES))
    model.student.loss_normalizer = 100.0  # a moving average, as at the beginning
    ran: list[str] = []
    model.teacher.model.backbone.register_forward_pre_hook(lambda module, args: ran.append("teacher"))
    with EventStorage(iteration):
        losses = model(batch(*SIZES))
        sum(losses.values()).backward()
        own = {name: p.grad.clone() for name, p in model.student.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.student.loss_normalizer = 100.0
        alone = model.student(batch(*SIZES))
        sum(alone.values()).backward()
    assert not ran and model.distiller.costs["p3"].num_images == 0
    assert {name: float(losses[name]) for name in losses} == {
        **{name: float(value) for name, value in alone.items()},
        **{f"loss_distill/{name}": 0.0 for name in ("p3", "p4", "p5")},
    }
    assert own and same_tensors(own, {n: p.grad for n, p in model.student.named_parameters() if p.grad is not None})


def test_every_parameter_takes_part_where_it_weighs_nothing() -> None:
    model = matched(built("retinanet", "retinanet", "MGD.SCHEDULE.START", 10))
    with EventStorage(0):
        sum(model(batch(*SIZES)).values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.distiller.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SCHEDULE.DECAY", "step"], r"MGD\.SCHEDULE: unknown decay 'step' .* constant, linear, cosine"),
        (["SCHEDULE.START", 90000], r"MGD\.SCHEDULE\.START is 90000, and SOLVER\.MAX_ITER 90000: nothing would be"),
        (["SCHEDULE.START", 9, "SCHEDULE.STOP", 9], r"MGD\.SCHEDULE: .* 0 <= start < stop"),
        (["SCHEDULE.END", 1.5], r"MGD\.SCHEDULE: .* a share of 0 to 1 of itself, got 1.5"),
        (["REMATCH.AT", [0]], r"MGD\.REMATCH: rematch steps must be positive"),
        (["REMATCH.LOG_SPACED", [4]], r"MGD\.REMATCH: LOG_SPACED is \[first, last, count\], got \[4\]"),
        (["REMATCH.LOG_SPACED", [10, 5, 3]], r"MGD\.REMATCH: log-spaced rematches need 0 < first <= last"),
        (["REMATCH.START", False, "REMATCH.PERIODS", []], "nothing would ever be matched"),
    ],
)
def test_schedules_that_do_not_fit(overrides: list[Any], message: str) -> None:
    keys = [f"MGD.{value}" if index % 2 == 0 else value for index, value in enumerate(overrides)]
    with pytest.raises(ValueError, match=message):
        validate_config(distilled_config("retinanet", "retinanet", *keys))


def test_rematches_of_a_config() -> None:
    def due(*overrides: Any) -> list[int]:
        schedule = rematch_schedule(distilled_config("retinanet", "retinanet", *overrides))
        return [step for step in range(40001) if schedule.due(step)]

    assert due() == [0, 5000, 10000, 15000, 31000]  # published
    assert due("MGD.REMATCH.AT", [7, 3], "MGD.REMATCH.START", False) == [3, 7]
    assert due("MGD.REMATCH.LOG_SPACED", [10, 1000, 3]) == [0, 10, 100, 1000]
    assert due("MGD.REMATCH.LOG_SPACED", [10, 1000, 3], "MGD.REMATCH.AT", [50]) == [0, 10, 50, 100, 1000]
    assert weight_schedule(distilled_config()).factor(10**9) == 1.0


class Recorder(HookBase):
    """What each step was given."""

    def __init__(self) -> None:
        self.factors: list[float] = []
        self.losses: list[float] = []

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.factors.append(latest["distill_factor"][0])
        self.losses.append(latest["loss_distill/p4"][0])


def test_a_training_follows_its_schedules_and_resumes_on_them(
    workplace: Any, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    node = {"DECAY": "linear", "START": 1, "STOP": 5}
    given = [word for key, value in node.items() for word in (f"MGD.SCHEDULE.{key}", str(value))]
    given += ["MGD.REMATCH.AT", "[2,5]", "MGD.REMATCH.LOG_SPACED", "[1,4,2]"]
    trainer, recorder = in_process_trainer(workplace, tmp_path, *given), Recorder()
    trainer.register_hooks([recorder])
    trainer.train()
    assert recorder.factors == pytest.approx([0.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert [loss > 0 for loss in recorder.losses] == [False, True, True, True, True, False]
    assert messages.text.count("The distillation has ended after 5 iterations") == 1
    # that before the first step is the one before the start, and there is none from the stop on
    files = sorted(path.name for path in (tmp_path / "matching").iterdir())
    assert files == ["iter_0000001.npz", "iter_0000002.npz", "iter_0000004.npz"]
    whole = torch.load(tmp_path / "model_final.pth", weights_only=False)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    resumed, again = in_process_trainer(workplace, tmp_path, *given, resume=True), Recorder()
    resumed.register_hooks([again])
    resumed.train()
    assert again.factors == recorder.factors[3:] and again.losses == recorder.losses[3:]
    assert same_tensors(torch.load(tmp_path / "model_final.pth", weights_only=False)["model"], whole["model"])
