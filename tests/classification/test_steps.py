"""Steps: in parts, in mixed precision, in two processes; and what is not finite, which all processes meet alike."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from classification.assembly import TeacherNetwork, make_trainer
from classification.data import Batch
from classification.distillation import DistillationStep, Student, Teacher
from classification.engine import Trainer
from classification.evaluation import Intake
from classification.models import build
from classification.options import parse_mgd
from classification.processes import Process
from classification.steps import Found, backward, parts_of
from d2_mgd.data.class_folders import find_folders
from d2_mgd.distill import LogitLoss, MatchingGuidedDistiller, Tap
from d2_mgd.errors import CommonError
from d2_mgd.training.processes import distributed, together
from d2_mgd.training.steps import Precision, Stepper
from tests.classification.conftest import CLASSES, SMALL, Run, settled
from tests.ranks import free_port

CPU = torch.device("cpu")


def batch_of(images: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch(pixels, torch.arange(images) % 3, ["broken.png"])


def network(width: int) -> nn.Sequential:
    """Without batch statistics."""
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


class Small:
    """A small student that is distilled by features and logits, without batch statistics."""

    def __init__(self, accumulate: int = 1, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        precision = Precision("cpu", dtype)
        distiller = MatchingGuidedDistiller({"a": (4, 8)}, norm="none", loss="mse", reduction="image_sum")
        self.student = Student(network(4), {"a": Tap("0")}, distiller, LogitLoss("kd", temperature=2.0), precision)
        teacher = Teacher(network(8), {"a": Tap("0")}, True, precision)
        self.intake = Intake(CPU, skip_broken=True)
        self.accumulate = accumulate
        maps = DistillationStep(self.student, teacher)(self.intake(batch_of(6))[0])
        distiller.observe(maps.student_maps, maps.teacher_maps)
        distiller.rematch()
        self.wrapped = distributed(self.student) if together() else self.student
        self.step = DistillationStep(self.wrapped, teacher)
        optimizer = torch.optim.SGD(self.student.parameters(), 0.1)
        self.stepper = Stepper(self.student, optimizer, precision, self.wrapped)

    def backward(self, batch: Batch, keep_maps: bool = False) -> Found:
        return backward(self.stepper, self.step, self.intake, batch, self.accumulate, keep_maps)

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.student.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_batch_in_parts_gives_the_gradients_and_sums_of_the_whole(parts: int, dtype: torch.dtype) -> None:
    """To rounding; 13 images, so that parts are unequal."""
    whole, apart = Small(1, dtype), Small(parts, dtype)
    expected, found = whole.backward(batch_of(13), keep_maps=True), apart.backward(batch_of(13), keep_maps=True)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # bfloat16 has eight bits
    for name, gradient in whole.gradients().items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(apart.gradients()[name], gradient, rtol=0, atol=tolerance * scale, msg=name)
    assert found.losses.keys() == expected.losses.keys() == {"loss_class", "loss_distill/a", "loss_kd"}
    for name, loss in expected.losses.items():
        assert float(found.losses[name]) == pytest.approx(float(loss), rel=tolerance)
        assert found.losses[name].dtype == torch.float32
    assert {name: int(value) for name, value in found.wrong.items()} == {
        name: int(value) for name, value in expected.wrong.items()
    }
    maps = torch.cat([output.student_maps["a"] for output in found.outputs])
    torch.testing.assert_close(maps, expected.outputs[0].student_maps["a"])


@pytest.mark.parametrize("images", [1, 2, 3, 7, 8, 64])
@pytest.mark.parametrize("number", [1, 2, 3, 9])
def test_parts_are_of_two_images_or_more_and_hold_all(images: int, number: int) -> None:
    batch = batch_of(images)
    parts = parts_of(batch, number)
    sizes = [len(part.targets) for part in parts]
    assert len(parts) <= number
    assert min(sizes) >= min(2, images)
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert [path for part in parts for path in part.broken] == batch.broken  # each is told once


def _in_two(rank: int, url: str, folder: Path, dtype: torch.dtype) -> None:
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    small, batch = Small(2, dtype), batch_of(12)
    exchanged = []

    def count(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        exchanged.append(bucket.buffer().numel())
        return allreduce_hook(torch.distributed.group.WORLD, bucket)

    small.wrapped.register_comm_hook(None, count)
    small.backward(Batch(batch.images[rank::2], batch.targets[rank::2], []))
    trained = sum(parameter.numel() for parameter in small.student.parameters())
    torch.save(
        {"gradients": small.gradients(), "exchanged": sum(exchanged), "trained": trained}, folder / f"{rank}.pth"
    )
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_processes_with_a_step_in_parts_exchange_gradients_once(tmp_path: Path, dtype: torch.dtype) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    torch.multiprocessing.start_processes(_in_two, (url, tmp_path, dtype), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert one["exchanged"] == two["exchanged"] == one["trained"]
    whole = Small(1, dtype)
    whole.backward(batch_of(12))
    for name, gradient in whole.gradients().items():
        assert torch.equal(one["gradients"][name], two["gradients"][name])
        scale = float(gradient.abs().max())
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(one["gradients"][name], gradient, rtol=0, atol=tolerance * scale, msg=name)


# ---- what is not finite


class Spoiler(nn.Module):
    """Makes one forward pass of a training not finite, as a flipped bit in a GPU's memory would."""

    def __init__(self, inner: nn.Module, passes: set[int]) -> None:
        super().__init__()
        self.inner = inner
        self.passes = passes
        self.count = [0]  # a plain number would be restored after a skipped step

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.count[0] += 1
        return self.inner(images * math.inf if self.training and self.count[0] in self.passes else images)


def trainer_of(data: Path, folder: Path, process: Process, passes: set[int], *arguments: object) -> Trainer:
    given = ["--arch", "shufflenet_v2_x0_5", "--teacher-arch", "resnet18", "--lr", 0.01, "--output-dir", folder]
    options = parse_mgd([str(word) for word in [data, *SMALL, "--epochs", 2, *given, *arguments]])
    torch.manual_seed(0)
    network = build("shufflenet_v2_x0_5", len(CLASSES))
    network.conv1 = Spoiler(network.conv1, passes)
    teacher = TeacherNetwork("resnet18", settled(build("resnet18", len(CLASSES))), len(CLASSES))
    return make_trainer(process, options, network, teacher, find_folders(data))


def test_steps_are_skipped_as_allowed_and_counted(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path, Process(0, 1, 0, 1, CPU), {2, 3, 5}, "--skip-nonfinite", 2)
    progress = trainer.fit()
    assert [line["skipped_steps"] for line in progress.history] == [2, 3]
    assert all(math.isfinite(line["train_loss"]) for line in progress.history)
    assert all(torch.isfinite(value).all() for value in trainer.student.state_dict().values())
    assert [file.name for file in (tmp_path / "nonfinite").iterdir()] == ["epoch_0001_step_000002.pth"]


def test_more_in_a_row_than_allowed_stop_the_run(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path, Process(0, 1, 0, 1, CPU), {2, 3}, "--skip-nonfinite", 1)
    with pytest.raises(CommonError, match=r"loss_class is nan.* at epoch 1, step 3, .*; stopped after 1 ") as stopped:
        trainer.fit()
    assert "continues from the last checkpoint, written before this step" in str(stopped.value)


def _skipping(rank: int, url: str, data: Path, folder: Path, allowed: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    spoiled = {2, 3} if rank == 1 else set()
    arguments = ["--skip-nonfinite", allowed, "--mgd-update-source", "online", "--mgd-update-freq", 1]
    trainer = trainer_of(data, folder, Process(rank, 2, rank, 2, CPU), spoiled, *arguments)
    said = ""
    try:
        trainer.fit()
    except CommonError as error:
        said = str(error)
    found = {"said": said, "skipped": trainer.nonfinite.skipped, "weights": trainer.student.network.state_dict()}
    torch.save(found, folder / f"found_{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("allowed", [2, 1])
def test_processes_skip_and_stop_alike(data: Path, tmp_path: Path, allowed: int) -> None:
    """Only the second of two processes meets what is not finite."""
    url = f"tcp://127.0.0.1:{free_port()}"
    arguments = (url, data, tmp_path, allowed)
    torch.multiprocessing.start_processes(_skipping, arguments, nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"found_{rank}.pth", weights_only=True) for rank in (0, 1))
    assert one["skipped"] == two["skipped"] == allowed
    assert one["said"] == two["said"]
    assert ("on rank 1" in one["said"]) == (allowed == 1)
    weights = [name for name, value in one["weights"].items() if value.is_floating_point() and "running" not in name]
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in weights)
    if allowed == 2:
        assert all(torch.isfinite(value).all() for value in one["weights"].values())
        return
    kept = torch.load(tmp_path / "nonfinite" / "epoch_0001_step_000003.pth", weights_only=True)
    fine, bad = kept["nonfinite"]["processes"]
    assert fine["batch"] is None and len(bad["batch"]["targets"]) == len(bad["images"])


def test_what_was_kept_repeats_the_step(base: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Weights that a rate of 1e30 drove out of what float32 holds; dropout, and so random numbers, too."""
    assert base(data, "--arch", "mobilenet_v2", "--lr", "1e30", "--epochs", 3) == 2
    said = capsys.readouterr().err
    path = tmp_path / "run" / "nonfinite" / "epoch_0001_step_000002.pth"
    assert f" at epoch 1, step 2, images {data}" in said and f"{path} repeats the step; stopped." in said
    state = torch.load(path, weights_only=True)
    (own,) = state["nonfinite"]["processes"]
    images, targets = own["batch"]["images"], own["batch"]["targets"]
    assert len(own["images"]) == len(targets) == 8 and all(Path(file).exists() for file in own["images"])
    student = Student(build(state["arch"], len(CLASSES)))
    student.network.load_state_dict(state["student"])
    student.network.to(memory_format=torch.channels_last)
    torch.set_rng_state(state["processes"][0]["random"]["torch"])
    losses = student.train()(*Intake(CPU, False)(Batch(images, targets, [])), {}, None).losses
    repeated = losses["loss_class"].item() / len(targets)
    kept = own["losses"]["loss_class"]
    assert repeated == kept or (math.isnan(repeated) and math.isnan(kept))
    assert not math.isfinite(repeated)
