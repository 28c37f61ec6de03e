"""Losses, gradients and predictions that are not finite."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import train_net
from detectron2.engine import HookBase
from training_runs import in_process_trainer, same_tensors

from d2_mgd.training.nonfinite import NonFiniteError
from tests.ranks import in_processes

# batch-norm on the student's side has running statistics, which a bad batch must not reach
SYNC = ("MGD.NORM", "bn", "MGD.STUDENT.TRAIN_LAST_NORM", "sync_bn")


# all levels have predictions, so that no weight is without a gradient
RPN = ("MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.RPN.IN_FEATURES", "['p3','p4','p5','p6','p7']")
RPN += ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8],[16],[32],[64],[128]]", "MGD.LOSS", "mse", "DATASETS.TEST", "()")


class _Break(HookBase):
    """From iteration ``first`` to ``last`` a bias is NaN."""

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.whole: torch.Tensor | None = None

    def bias(self) -> torch.Tensor:
        raise NotImplementedError

    def before_step(self) -> None:
        bias = self.bias()
        if self.whole is None:
            self.whole = bias.detach().clone()
        with torch.no_grad():
            bias.copy_(self.whole)
            if self.first <= self.trainer.iter <= self.last:
                bias[0] = float("nan")


class BreakTeacher(_Break):
    """The teacher's p4 is NaN."""

    def bias(self) -> torch.Tensor:
        return self.trainer.detector.teacher.model.backbone.fpn_output4.bias


class BreakPredictions(_Break):
    """The student's objectness is NaN, which Detectron2 refuses."""

    def bias(self) -> torch.Tensor:
        return self.trainer.student.proposal_generator.rpn_head.objectness_logits.bias


def checkpoint(output: Path, name: str) -> dict[str, Any]:
    return torch.load(output / name, weights_only=True)


class Recorder(HookBase):
    """Weights and buffers after every step, and the last losses."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.losses: list[dict[str, float]] = []

    def after_step(self) -> None:
        state = self.trainer.detector.state_dict()
        del state["distiller.progress"]  # numbers of steps
        self.states.append({name: value.clone() for name, value in state.items()})
        self.losses.append({name: value for name, (value, _) in self.trainer.storage.latest().items()})


def errors(text: str) -> list[str]:
    """What ranks print at their end, once each."""
    return sorted({line.partition(": error: ")[2] for line in text.splitlines() if ": error: " in line})


def second_breaks(hook: HookBase, arguments: list[str]) -> None:
    """``train_net.py``, with a hook on rank 1."""

    class Disturbed(train_net.Trainer):
        def build_hooks(self) -> list[Any]:
            return [*([hook] if os.environ["RANK"] == "1" else []), *super().build_hooks()]

    train_net.Trainer = Disturbed  # this is a process of its own
    train_net.main(arguments)


def disturbed(workplace: Any, output: Path, hook: HookBase, *overrides: Any, resume: bool = False) -> Any:
    trainer = in_process_trainer(workplace, output, *overrides, resume=resume)
    trainer.register_hooks([hook, Recorder()])
    return trainer


def test_a_loss_that_is_not_finite_is_named_and_can_be_repeated(workplace: Any, tmp_path: Path) -> None:
    trainer = disturbed(workplace, tmp_path / "a", BreakTeacher(3, 3))
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    path = tmp_path / "a" / "nonfinite" / "iter_0000003.pth"
    dump = torch.load(path, weights_only=True)
    (process,) = dump["nonfinite"]["processes"]
    assert str(caught.value) == (
        f"loss_distill/p4 is nan at iteration 3, images {', '.join(process['images'])}; {path} repeats the step; "
        "stopped."
    )
    assert len(process["images"]) == 2 and all(Path(name).exists() for name in process["images"])
    assert process["batch"][0]["image"].dtype == torch.uint8
    assert process["batch"][0]["instances"]["gt_boxes"].shape[1] == 4
    before = checkpoint(tmp_path / "a", "model_0000002.pth")
    assert same_tensors(dump["model"], before["model"])
    assert torch.equal(
        dump["training"]["processes"][0]["random"]["torch"], before["training"]["processes"][0]["random"]["torch"]
    )

    (tmp_path / "b").mkdir()
    path.rename(tmp_path / "b" / "model_0000002.pth")
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000002.pth")
    again = disturbed(workplace, tmp_path / "b", BreakTeacher(9, 9), resume=True)
    assert again.start_iter == 3
    again.train()
    losses = again._hooks[-1].losses[0]
    assert {name: losses[name] for name in process["losses"] if name != "loss_distill/p4"} == {
        name: value for name, value in process["losses"].items() if name != "loss_distill/p4"
    }


def test_steps_may_be_left_out_a_few_times_in_a_row(
    workplace: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = disturbed(workplace, tmp_path, BreakTeacher(1, 2), "MGD.NONFINITE.SKIP", "2", *SYNC)
    with caplog.at_level(logging.WARNING, "d2_mgd"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert [text.rsplit("; ", 1)[1] for text in said] == [
        f"the step is skipped, {number} in a row of at most 2." for number in (1, 2)
    ]
    states = trainer._hooks[-1].states
    assert same_tensors(states[0], states[1]) and not same_tensors(states[2], states[3])
    changed = {name for name in states[1] if not torch.equal(states[1][name], states[2][name])}
    assert changed == {"distiller.features.res4.groups", "distiller.features.res4.total_cost"} & changed  # a rematch
    assert all(torch.isfinite(value).all() for value in states[-1].values())
    assert sorted(path.name for path in (tmp_path / "nonfinite").iterdir()) == ["iter_0000001.pth"]


def test_too_many_in_a_row_stop_also_across_a_restart(workplace: Any, tmp_path: Path) -> None:
    skip = ("MGD.NONFINITE.SKIP", "2", "SOLVER.CHECKPOINT_PERIOD", "2")
    with pytest.raises(NonFiniteError, match=r"at iteration 3, .*; stopped after 2 skipped steps in a row\.$"):
        disturbed(workplace, tmp_path, BreakTeacher(1, 5), *skip).train()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")  # after the first that was left out
    with pytest.raises(NonFiniteError, match=r"at iteration 3, .*; stopped after 2 skipped steps in a row"):
        disturbed(workplace, tmp_path, BreakTeacher(1, 5), *skip, resume=True).train()


def test_online_costs_do_not_count_a_step_that_is_left_out(workplace: Any, tmp_path: Path) -> None:
    online = ("MGD.REMATCH.SOURCE", "online", "MGD.REMATCH.EVERY", "1", "MGD.REMATCH.PERIODS", "[100]")
    trainer = disturbed(workplace, tmp_path, BreakTeacher(1, 2), "MGD.NONFINITE.SKIP", "2", *online)
    trainer.train()
    cost = trainer.detector.distiller.costs["p4"]
    assert cost.num_images == 2 * 3 and torch.isfinite(cost.mean()).all()


class BreakGradient(HookBase):
    """The gradient of a weight is infinite while all losses are finite."""

    def before_train(self) -> None:
        weight = self.trainer.student.backbone.fpn_output4.weight
        weight.register_hook(lambda gradient: gradient * float("inf"))


def test_a_gradient_that_is_not_finite_is_named(workplace: Any, tmp_path: Path) -> None:
    trainer = disturbed(workplace, tmp_path, BreakGradient())
    begin = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    with pytest.raises(
        NonFiniteError, match=r"^the gradient of student\.backbone\.fpn_output4\.weight is not finite at"
    ):
        trainer.train()
    assert same_tensors(trainer.student.state_dict(), begin)


def test_large_gradients_whose_norm_alone_overflows_are_finite(workplace: Any, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path, "SOLVER.BASE_LR", "0.0")
    trainer.student.backbone.fpn_output4.bias.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    trainer.train()


def test_predictions_that_detectron2_refuses_are_treated_alike(workplace: Any, tmp_path: Path) -> None:
    trainer = in_process_trainer(workplace, tmp_path, *RPN)
    with torch.no_grad():
        trainer.student.proposal_generator.rpn_head.objectness_logits.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"contain Inf/NaN\. Training has diverged at iteration 0, images .*png"):
        trainer.train()
    assert (tmp_path / "nonfinite" / "iter_0000000.pth").exists()


def test_a_step_that_fails_before_its_maps_are_there_leaves_the_next_one_unobserved(
    workplace: Any, tmp_path: Path
) -> None:
    online = ("MGD.REMATCH.SOURCE", "online", "MGD.REMATCH.EVERY", "4", "MGD.REMATCH.PERIODS", "[100]")
    trainer = disturbed(workplace, tmp_path, BreakPredictions(0, 0), "MGD.NONFINITE.SKIP", "1", *RPN, *online)
    trainer.train()
    assert trainer.detector.distiller.costs["p4"].num_images == 2  # of iteration 4 alone


@pytest.mark.parametrize(
    "norms",
    [
        ("MGD.NORM", "sync_bn", "MGD.FEATURES", "['p4']"),
        (*("MGD.STUDENT.TRAIN_LAST_NORM", "sync_bn", "MGD.ACCUMULATE", 2, "SOLVER.IMS_PER_BATCH", 4),),
    ],
    ids=["distiller", "student in parts"],
)
def test_no_process_waits_in_a_norm_for_one_whose_predictions_fail(
    workplace: Any, tmp_path: Path, norms: tuple[Any, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    script = functools.partial(second_breaks, BreakPredictions(1, 9))
    assert in_processes(script, workplace.arguments(tmp_path, *RPN, *norms), 2) == [2, 2]
    sentences = errors(capfd.readouterr().err)
    assert len(sentences) == 1
    assert "contain Inf/NaN. Training has diverged at iteration 1 on rank 1, images " in sentences[0]


def test_where_nothing_can_be_written_the_end_is_the_same(workplace: Any, tmp_path: Path) -> None:
    (tmp_path / "nonfinite").write_text("a file in the way of the folder")
    trainer = disturbed(workplace, tmp_path, BreakTeacher(0, 0))
    with pytest.raises(NonFiniteError, match=r"repeat the step, cannot be written: File exists; stopped\.$"):
        trainer.train()


def test_what_happens_to_one_of_two_processes_happens_to_both(
    workplace: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    skip = ("MGD.NONFINITE.SKIP", 1, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0)
    script = functools.partial(second_breaks, BreakTeacher(2, 9))
    assert in_processes(script, workplace.arguments(tmp_path, *skip), 2) == [2, 2]
    sentences = errors(capfd.readouterr().err)
    assert len(sentences) == 1
    assert sentences[0].startswith("loss_distill/p4 is nan at iteration 3 on rank 1, images ")
    assert sentences[0].endswith("; stopped after 1 skipped steps in a row.")
    first, left_out = (checkpoint(tmp_path, f"model_000000{number}.pth")["model"] for number in (1, 2))
    assert same_tensors(first, left_out)
    one, other = checkpoint(tmp_path / "nonfinite", "iter_0000003.pth")["nonfinite"]["processes"]
    assert one["batch"] is None and len(one["images"]) == 1 and other["batch"][0]["file_name"] == other["images"][0]
