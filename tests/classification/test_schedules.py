"""When distillation counts and how much, from the command line to the steps."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

from classification.distillation import DistillationStep, Teacher
from classification.engine import Trainer
from classification.options import parse_mgd, rematch_schedule, weight_schedule
from classification.state import training_state
from d2_mgd.errors import UserError
from tests.classification.conftest import REPOSITORY, SMALL, Run
from tests.classification.test_engine import trainer_of
from tests.classification.test_resume import assert_same_run


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_distillation_from_one_epoch_to_another(
    mgd: Run, data: Path, resnet18_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors: list[float] = []
    teacher_runs: list[bool] = []
    forward, teach = DistillationStep.forward, Teacher.forward

    def watch(self: DistillationStep, images: torch.Tensor, targets=None, keep_maps=False, factor=1.0):  # type: ignore[no-untyped-def]
        if targets is not None:
            factors.append(factor)
        return forward(self, images, targets, keep_maps, factor)

    def watch_teacher(self: Teacher, images: torch.Tensor, with_logits: bool | None = None):  # type: ignore[no-untyped-def]
        teacher_runs.append(with_logits is None)  # a training step
        return teach(self, images, with_logits)

    monkeypatch.setattr(DistillationStep, "forward", watch)
    monkeypatch.setattr(Teacher, "forward", watch_teacher)
    words: list[object] = ["--arch", "shufflenet_v2_x0_5", "--teacher-arch", "resnet18"]
    words += ["--teacher-resume", resnet18_file, "--mgd-with-kd", 1, "--mgd-update-at", 2, "--epochs", 4, "--lr", 0.01]
    words += ["--recipe", "published"]
    words += ["--distill-decay", "linear", "--distill-start", 1, "--distill-stop", 3, "--distill-end", 0.4]
    assert mgd(data, *words) == 0
    # three steps an epoch; the weight falls step by step
    assert factors == pytest.approx([0, 0, 0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0, 0, 0])
    assert sum(teacher_runs) == 6
    for number, line in enumerate(lines(tmp_path / "run")):
        distilled = [value for name, value in line.items() if name.startswith(("train_loss_distill", "train_loss_kd"))]
        assert len(distilled) > 1 and all((value > 0) == (number in (1, 2)) for value in distilled)
    files = sorted(path.name for path in (tmp_path / "run" / "matching").iterdir())
    assert files == ["epoch_0001.npz", "epoch_0002.npz"]  # before the start; as asked for; none for nobody


@pytest.mark.parametrize("source", ["pass", "online"])
def test_a_run_goes_on_in_the_middle_of_a_falling_weight(
    mgd: Run, data: Path, resnet18_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    words: list[object] = [data, *SMALL, "--arch", "shufflenet_v2_x0_5", "--teacher-arch", "resnet18"]
    words += ["--teacher-resume", resnet18_file, "--epochs", 3, "--lr", 0.01, "--checkpoint-freq", 1]
    words += ["--mgd-update-source", source, "--distill-decay", "cosine", "--distill-start", 1]
    words += ["--recipe", "recommended" if source == "pass" else "published"]
    # the teacher was never trained, so here the student surpasses it after two epochs, or never
    compare = Trainer.compare_with_teacher

    def surpassed(self: Trainer, err1: float) -> None:
        compare(self, -1.0 if self.progress.epoch == 1 and source == "pass" else 100.0)

    monkeypatch.setattr(Trainer, "compare_with_teacher", surpassed)

    class Stopped(Exception):
        pass

    save = Trainer.save

    def stop(self: Trainer) -> None:
        save(self)
        if (self.progress.epoch, self.progress.step) == ((2, 1) if source == "pass" else (1, 2)):
            raise Stopped

    assert mgd(*words, "--output-dir", tmp_path / "undisturbed", small=False) == 0
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Trainer, "save", stop)
        mgd(*words, "--output-dir", tmp_path / "stopped", small=False)
    assert mgd(*words, "--output-dir", tmp_path / "stopped", "--resume", "auto", small=False) == 0
    assert_same_run(tmp_path / "undisturbed", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--student-resume", "s.pth"], 0.25), ([], 1.0), (["--student-resume", "s.pth", "--balance", "fixed"], 1.0)],
    ids=str,
)
def test_under_auto_a_trained_student_has_less_weight_until_it_is_better_than_its_teacher(
    data: Path, tmp_path: Path, words: list[str], expected: float
) -> None:
    trainer = trainer_of(data, tmp_path, *words)
    chance = 100.0 / len(trainer.data["train"].folder.classes)
    trainer.progress.teacher = {"err1": 0.0}
    trainer.compare_with_teacher((100.0 - chance) / 4)  # before the first step
    assert trainer.schedules.weight.factor(0) == pytest.approx(expected)
    trainer.progress.epoch = 1
    trainer.compare_with_teacher(99.0)  # later, only a better student counts
    assert trainer.schedules.weight.share == pytest.approx(expected)
    restored = trainer_of(data, tmp_path, *words)
    restored.restore(training_state(trainer))
    assert restored.schedules.weight.share == trainer.schedules.weight.share
    trainer.progress.teacher = {"err1": 50.0}
    trainer.compare_with_teacher(49.0)
    assert trainer.schedules.weight.share == float("fixed" in words)


def test_every_parameter_takes_part_where_nothing_is_compared(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path, "--mgd-with-kd", 1)
    output = trainer.step(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64), False, 0.0)
    torch.stack(list(output.losses.values())).sum().backward()
    assert float(output.losses["loss_kd"]) == 0.0 and not output.student_maps
    assert all(p.grad is not None and not p.grad.any() for p in trainer.distiller.parameters())


def test_options_say_when() -> None:
    def epochs(*words: str) -> list[int]:
        schedule = rematch_schedule(parse_mgd(["data", *words]))
        return [epoch for epoch in range(65) if schedule.due(epoch)]

    assert epochs("--mgd-update-freq", "20") == [0, 20, 40, 60]
    assert epochs("--mgd-update-at", "3", "50") == [0, 3, 50]
    assert epochs("--mgd-update-log", "1", "64", "4") == [0, 1, 4, 16, 64]
    assert epochs("--mgd-update-log", "1", "4", "2", "--mgd-update-at", "9") == [0, 1, 4, 9]
    published, default = (weight_schedule(parse_mgd(["data", *words])) for words in (["--recipe", "published"], []))
    assert [published.factor(epoch) for epoch in (0, 50.5, 99.9)] == [1.0, 1.0, 1.0]
    assert [default.factor(epoch) for epoch in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])
    warm = weight_schedule(parse_mgd(["data", "--warmup", "1", "--distill-decay", "linear"]))
    assert warm.factor(55) == pytest.approx(0.5)  # to the last epoch, those of the warm-up included


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distill-decay", "step"], "invalid choice: 'step'"),
        (["--distill-start", "100"], r"--distill-\.\.\.: a weight schedule needs 0 <= start < stop"),
        (["--distill-start", "5", "--distill-stop", "4"], "0 <= start < stop"),
        (["--distill-end", "1.5"], "a share of 0 to 1 of itself"),
        (["--mgd-update-log", "5", "4", "2"], "log-spaced rematches need 0 < first <= last"),
        (["--mgd-update-at", "0"], "must be 1 or more, not 0"),
    ],
)
def test_options_that_do_not_fit(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_mgd(["data", *words])


@pytest.mark.parametrize("page", ["methods.md", "choosing.md"])
def test_the_docs_name_options_that_exist(page: str) -> None:
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    named = set(re.findall(r"--(?:mgd|kd|distill|balance)[a-z-]*", text))
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
        parse_mgd(["--help"])
    existing = set(re.findall(r"--[a-z-]+", shown.getvalue()))
    assert len(named) > 3 and named <= existing, named - existing
