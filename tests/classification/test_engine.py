"""The learning rate, the errors, rematching from the training steps, data parallel replicas, and precision."""

import argparse
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from classification.assembly import TeacherNetwork, make_trainer
from classification.checkpoint import CHECKPOINT, read_training_state
from classification.data import IMAGENET
from classification.distillation import DistillationStep, Forward
from classification.engine import Trainer
from classification.metrics import errors
from classification.models import build
from classification.options import parse_base, parse_mgd
from classification.processes import Process
from classification.schedules import Schedules, learning_rate_factor
from d2_mgd.data.class_folders import find_folders
from d2_mgd.training.sums import Sums
from d2_mgd.training.tables import table
from tests.classification.conftest import CLASSES, SMALL, settled

CPU = torch.device("cpu")


def test_learning_rate_is_the_published_one() -> None:
    """MultiStepLR at 31, 61 and 81; the warm-up of ten epochs shifts all, and starts at a tenth."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0)
    published = torch.optim.lr_scheduler.MultiStepLR(optimizer, [31, 61, 81], 0.1)
    options = parse_mgd(["data"])
    warm = parse_mgd(["data", "--warmup", "1"])
    assert (options.epochs, warm.epochs) == (100, 110)
    for epoch in range(100):
        plain = learning_rate_factor(epoch, options.lr_drop_epochs, options.lr_drop_ratio)
        assert plain == pytest.approx(published.get_last_lr()[0])
        shifted = learning_rate_factor(epoch + 10, warm.lr_drop_epochs, warm.lr_drop_ratio, warm.warmup_epochs)
        assert shifted == pytest.approx(plain)
        optimizer.step()
        published.step()
    starts = [learning_rate_factor(epoch, warm.lr_drop_epochs, 0.1, 10) for epoch in range(11)]
    assert starts == pytest.approx([0.1 + 0.09 * epoch for epoch in range(11)])


@pytest.mark.parametrize("published", [["--recipe", "published"], ["--mgd-reducer", "amp"], ["--loss-factor", "1e4"]])
def test_published_defaults(published: list[str]) -> None:
    mgd, base = parse_mgd(["data", *published]), parse_base(["data"])
    common = {
        "arch": "resnet18",
        "epochs": 100,
        "batch_size": 256,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "print_freq": 10,
    }
    for options in (mgd, base):
        assert {name: getattr(options, name) for name in common} == common
    assert (base.nesterov, base.lr_drop_epochs, mgd.nesterov, mgd.lr_drop_epochs) == (0, [30, 60, 90], 1, [31, 61, 81])
    assert (mgd.mgd_reducer, mgd.mgd_update_freq, mgd.mgd_update_images, mgd.loss_factor) == ("amp", 2, 20000, 1e4)
    assert (mgd.mgd_align, mgd.balance, mgd.distill_decay) == ("matching", "fixed", "constant")
    assert (mgd.kd_temperature, mgd.with_kd, mgd.mgd_metric) == (1.5, False, None)  # by the networks


def test_recommended_defaults() -> None:
    given = parse_mgd(["data", "--mgd-with-kd", "1", "--learning-rate", "0.2", "--kd-weight", "0"])
    assert (given.method, given.lr, given.kd_weight, given.kd_temperature) == ("matched_projection-kd", 0.2, 0.0, 1.5)
    assert (given.mgd_align, given.balance, given.distill_decay) == ("matched_projection", "auto", "cosine")
    fixed = parse_mgd(["data", "--loss", "pearson", "--loss-weight", "2", "--mgd-align", "conv1x1"])
    assert (fixed.mgd_align, fixed.balance, fixed.distill_decay) == ("conv1x1", "fixed", "cosine")


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_errors_count_images_outside_the_best(classes: int) -> None:
    logits, targets = torch.randn(40, classes), torch.randint(0, classes, (40,))
    order = np.argsort(-logits.numpy(), axis=1)
    expected = {k: sum(int(t) not in row[:k] for row, t in zip(order, targets)) for k in (1, 5)}
    found = errors(logits, targets)
    assert (int(found["err1"]), int(found["err5"])) == (expected[1], expected[5])


def test_sums_do_not_depend_on_how_images_are_batched() -> None:
    losses = torch.rand(37)
    for size in (1, 8, 37):
        sums = Sums(CPU)
        for part in losses.split(size):
            sums.add(len(part), {"loss": part})
        assert sums.means(["loss"])["loss"] == pytest.approx(float(losses.double().mean()), rel=1e-9)
    copy = Sums(CPU)
    copy.load_state_dict(sums.state_dict())
    assert copy.totals(["loss"]) == sums.totals(["loss"])


def test_counting_sends_nothing_to_the_device() -> None:
    """A number that travels there makes the process wait; ``meta`` stands for a GPU."""

    class Sent(TorchDispatchMode):
        found: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in args):
                self.found.append(str(function))
            return function(*args, **(kwargs or {}))

    meta = torch.device("meta")
    sums = Sums(meta)
    with Sent():
        for _ in range(2):
            wrong = errors(torch.empty(8, 7, device=meta), torch.empty(8, dtype=torch.int64, device=meta))
            sums.add(8, wrong)
    assert Sent.found == []
    assert {value.device for value in sums.values.values()} == {meta}


def test_table_is_aligned() -> None:
    lines = table([["a", 1.0, None], ["longer", 22.333, 4]], ["name", "error", "epoch"]).splitlines()
    assert lines[2:] == ["a        1.00      -", "longer  22.33      4"]


# ---- a trainer of a small student


def trainer_of(data: Path, folder: Path, *arguments: object, student: str = "shufflenet_v2_x0_5") -> Trainer:
    given = ["--arch", student, "--teacher-arch", "resnet18", "--output-dir", folder, *arguments]
    options: argparse.Namespace = parse_mgd([str(data), *SMALL, *map(str, given)])
    network = build(student, len(CLASSES))
    teacher = TeacherNetwork("resnet18", settled(build("resnet18", len(CLASSES))), len(CLASSES))
    return make_trainer(Process(0, 1, 0, 1, CPU), options, network, teacher, find_folders(data))


def test_online_costs_are_those_of_the_last_steps_before_a_rematch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(
        data,
        tmp_path,
        "--epochs",
        5,
        "--mgd-update-freq",
        2,
        "--mgd-update-source",
        "online",
        "--mgd-update-images",
        12,
    )
    seen = []
    observing = Schedules.observing

    def watch(self: Schedules, finished_steps: int) -> bool:
        due = observing(self, finished_steps)
        seen.append((*divmod(finished_steps, 3), due))
        return due

    monkeypatch.setattr(Schedules, "observing", watch)
    progress = trainer.fit()
    # three steps an epoch; matchings after epochs 2 and 4 on twelve images, which take two batches of eight
    assert [(epoch, step) for epoch, step, due in seen if due] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert ["matching/stage3/changed" in line for line in progress.history] == [False, True, False, True, False]


@pytest.mark.parametrize("balance", ["auto", "fixed"])
def test_under_auto_a_student_better_than_its_teacher_trains_alone_also_after_a_resume(
    data: Path, tmp_path: Path, balance: str
) -> None:
    arguments = ("--epochs", 3, "--mgd-reducer", "amp", "--balance", balance, "--mgd-update-freq", 1)
    trainer = trainer_of(data, tmp_path, *arguments)
    trainer.progress.teacher = {"err1": 100.0, "err5": 100.0}  # below it after any epoch
    history = trainer.fit().history
    alone = balance == "auto"
    assert [line["train_loss_distill/stage4"] > 0 for line in history] == [True, not alone, not alone]
    assert ["matching/stage4/changed" in line for line in history] == [not alone, not alone, False]

    resumed = trainer_of(data, tmp_path, *arguments)
    resumed.restore(read_training_state(tmp_path / CHECKPOINT, "shufflenet_v2_x0_5", list(CLASSES)))
    assert resumed.schedules.distill_factor(resumed.finished_steps - 1) == (0.0 if alone else 1.0)


def replicas(module: nn.Module, count: int) -> list[nn.Module]:
    """What nn.DataParallel makes of a module, with the replicas' tensors on one device."""
    modules = list(module.modules())
    copies = [[m._replicate_for_data_parallel() for m in modules] for _ in range(count)]
    place = {m: index for index, m in enumerate(modules)}
    for copied in copies:
        for original, copy in zip(modules, copied):
            for name, child in original._modules.items():
                copy._modules[name] = None if child is None else copied[place[child]]
            for name, parameter in original._parameters.items():
                if parameter is None:
                    copy._parameters[name] = None
                else:  # a tensor that is no parameter, as a broadcast gives
                    setattr(copy, name, parameter.view_as(parameter))
            for name, buffer in original._buffers.items():
                copy._buffers[name] = buffer
    return [copied[0] for copied in copies]


def test_data_parallel_replicas_give_the_cost_and_losses_of_one_device(data: Path, tmp_path: Path) -> None:
    """Two replicas in two threads, each with a half of the batch: maps and losses are put together again."""
    trainer = trainer_of(data, tmp_path, "--mgd-with-kd", 1)
    step = trainer.step.eval()
    assert isinstance(step, DistillationStep)
    images, targets = torch.randn(6, 3, 32, 32), torch.arange(6) % 3
    alone = step(images)
    trainer.distiller.observe(alone.student_maps, alone.teacher_maps)
    expected_cost = trainer.distiller.costs["stage3"].mean()
    trainer.distiller.rematch()

    def parallel(*arguments: Tensor) -> list[Forward]:
        found: list[Forward | None] = [None, None]

        def work(index: int, replica: nn.Module) -> None:
            found[index] = replica(*(argument[index::2] for argument in arguments))

        threads = [threading.Thread(target=work, args=pair) for pair in enumerate(replicas(step, 2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [output for output in found if output is not None]

    halves = parallel(images)
    assert len(halves) == 2
    for half in halves:
        trainer.distiller.observe(half.student_maps, half.teacher_maps)
    torch.testing.assert_close(trainer.distiller.costs["stage3"].mean(), expected_cost, rtol=0, atol=1e-6)

    whole, halves = step(images, targets), parallel(images, targets)
    for name, loss in whole.losses.items():
        together = sum(half.losses[name] for half in halves)
        torch.testing.assert_close(together, loss, rtol=1e-4, atol=1e-5)
    assert {"loss_class", "loss_kd", "loss_distill/stage4"} <= set(whole.losses)


def test_teacher_stays_frozen_and_stops_where_its_logits_are_not_wanted(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path)
    teacher = trainer.step.teacher
    calls = []
    teacher.network.fc.register_forward_hook(lambda *_: calls.append(1))
    trainer.step.train()
    assert not any(module.training for module in teacher.modules())
    assert trainer.student.training
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    trainer.fit()
    assert calls == []
    assert all(torch.equal(value, before[key]) for key, value in teacher.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_student_network_stays_plain(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path, "--mgd-align", "conv1x1", "--loss", "mse")
    assert trainer.student.network.state_dict().keys() == build("shufflenet_v2_x0_5", 3).state_dict().keys()
    trained = {id(parameter) for group in trainer.stepper.optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in trainer.distiller.parameters()} <= trained
    assert {id(parameter) for parameter in trainer.student.network.parameters()} <= trained


def test_bfloat16_is_used_inside_and_losses_are_float32(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path, "--mixed-precision", "bf16", "--mgd-with-kd", 1)
    output = trainer.step.eval()(torch.randn(4, 3, 32, 32))
    assert output.student_maps["stage3"].dtype == torch.bfloat16
    trainer.distiller.observe(output.student_maps, output.teacher_maps)
    trainer.distiller.rematch()
    losses = trainer.step.train()(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])).losses
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


def test_each_network_sees_images_as_it_takes_them(data: Path, tmp_path: Path) -> None:
    """timm's networks say in ``pretrained_cfg`` by which mean and deviation; here a teacher does."""
    half = (0.5, 0.5, 0.5)

    def make(network: nn.Module) -> Trainer:
        options = parse_mgd([str(data), *SMALL, "--arch", "resnet18", "--output-dir", str(tmp_path)])
        teacher = TeacherNetwork("resnet18", network, len(CLASSES))
        torch.manual_seed(0)
        return make_trainer(Process(0, 1, 0, 1, CPU), options, build("resnet18", 3), teacher, find_folders(data))

    network = settled(build("resnet18", len(CLASSES)))
    network.pretrained_cfg = {"mean": half, "std": half}
    trainer = make(network)
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    network.conv1.register_forward_pre_hook(lambda _, inputs: seen["teacher"].append(inputs[0]))
    trainer.student.network.conv1.register_forward_pre_hook(lambda _, inputs: seen["student"].append(inputs[0]))
    trainer._observe_pass(0)
    trainer.evaluate(network)
    trainer.evaluate()
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET.std, IMAGENET.mean))
    assert len(seen["teacher"]) == len(seen["student"]) == 5  # three batches for training, two for evaluation
    for of_teacher, of_student in zip(seen["teacher"], seen["student"]):
        torch.testing.assert_close(of_teacher / 2 + 0.5, of_student * std + mean)


def test_evaluation_has_the_precision_of_the_training_on_several_gpus(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DataParallel runs replicas in threads, which start without mixed precision."""

    def in_a_thread(self: nn.DataParallel, images: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.module, images).result()

    trainer = trainer_of(data, tmp_path, "--mixed-precision", "bf16")
    trainer.step = nn.DataParallel(trainer.step)
    monkeypatch.setattr(nn.DataParallel, "forward", in_a_thread)
    seen = set()
    trainer.student.network.fc.register_forward_hook(lambda module, images, logits: seen.add(logits.dtype))
    assert trainer.evaluate().images == 15
    assert seen == {torch.bfloat16}


@pytest.mark.gpu
def test_data_parallel_and_float16_on_a_gpu(data: Path, tmp_path: Path) -> None:
    from classification import main_mgd

    teacher = tmp_path / "t.pth"
    torch.save(settled(build("resnet18", len(CLASSES))).state_dict(), teacher)
    words = [
        data,
        *SMALL[:-2],
        "--arch",
        "shufflenet_v2_x0_5",
        "--teacher-arch",
        "resnet18",
        "--teacher-resume",
        teacher,
    ]
    for extra in (
        ["--mixed-precision", "fp16", "--gpu", 0, "--accumulate", 2, "--skip-nonfinite", 1],
        ["--mixed-precision", "bf16", "--device", "cuda"],
    ):
        folder = tmp_path / extra[1]
        assert main_mgd.main([str(word) for word in [*words, *extra, "--output-dir", folder]]) == 0
        assert (
            main_mgd.main(
                [str(word) for word in [*words, *extra, "--epochs", 2, "--resume", folder / "checkpoint.pth"]]
            )
            == 0
        )
