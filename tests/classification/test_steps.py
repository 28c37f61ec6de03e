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
from classification.distillation import DistillationStep, Precision, Student, Teacher
from classification.engine import Trainer
from classification.evaluation import Intake
from classification.models import build
from classification.options import parse_mgd
from classification.processes import Process
from classification.steps import Stepper, parts_of
from d2_mgd.data.class_folders import find_folders
from d2_mgd.distill import LogitLoss, MatchingGuidedDistiller, Tap
from d2_mgd.errors import CommonError
from d2_mgd.training.processes import largest
from tests.classification.conftest import CLASSES, SMALL, Run, free_port, settled

CPU = torch.device("cpu")


def batch_of(images: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch(pixels, torch.arange(images) % 3, ["broken.png"])


def network(width: int) -> nn.Sequential:
    """Without batch statistics."""
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def stepper_of(
    accumulate: int = 1,
    dtype: torch.dtype | None = None,
    world: int = 1,
    restorable: bool = False,
    norm: str = "none",
) -> Stepper:
    """A small student that is distilled by features and logits, without batch statistics unless ``norm`` has them."""
    torch.manual_seed(0)
    precision = Precision(dtype)
    distiller = MatchingGuidedDistiller({"a": (4, 8)}, norm=norm, loss="mse", reduction="image_sum")
    student = Student(network(4), {"a": Tap("0")}, distiller, LogitLoss("kd", temperature=2.0), precision)
    teacher = Teacher(network(8), {"a": Tap("0")}, True, precision)
    intake = Intake(CPU, skip_broken=True)
    maps = DistillationStep(student, teacher)(intake(batch_of(6))[0])
    distiller.observe(maps.student_maps, maps.teacher_maps)
    distiller.rematch()
    wrapped: nn.Module = student if world == 1 else nn.parallel.DistributedDataParallel(student)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    return Stepper(DistillationStep(wrapped, teacher), student, optimizer, intake, accumulate, restorable=restorable)


def gradients(stepper: Stepper) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in stepper.student.named_parameters()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_batch_in_parts_gives_the_gradients_and_sums_of_the_whole(parts: int, dtype: torch.dtype | None) -> None:
    """To rounding; 13 images, so that parts are unequal."""
    whole, apart = stepper_of(1, dtype), stepper_of(parts, dtype)
    expected, found = whole.backward(batch_of(13), keep_maps=True), apart.backward(batch_of(13), keep_maps=True)
    tolerance = 1e-5 if dtype is None else 0.02  # bfloat16 has eight bits
    for name, gradient in gradients(whole).items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients(apart)[name], gradient, rtol=0, atol=tolerance * scale, msg=name)
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


def _in_two(rank: int, url: str, folder: Path, dtype: torch.dtype | None) -> None:
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    stepper, batch = stepper_of(2, dtype, world=2), batch_of(12)
    exchanged = []
    ddp = stepper.step.student
    assert isinstance(ddp, nn.parallel.DistributedDataParallel)

    def count(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        exchanged.append(bucket.buffer().numel())
        return allreduce_hook(torch.distributed.group.WORLD, bucket)

    ddp.register_comm_hook(None, count)
    stepper.backward(Batch(batch.images[rank::2], batch.targets[rank::2], []))
    trained = sum(parameter.numel() for parameter in stepper.student.parameters())
    torch.save(
        {"gradients": gradients(stepper), "exchanged": sum(exchanged), "trained": trained}, folder / f"{rank}.pth"
    )
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_two_processes_with_a_step_in_parts_exchange_gradients_once(tmp_path: Path, dtype: torch.dtype | None) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    torch.multiprocessing.start_processes(_in_two, (url, tmp_path, dtype), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert one["exchanged"] == two["exchanged"] == one["trained"]
    whole = stepper_of(1, dtype)
    whole.backward(batch_of(12))
    for name, gradient in gradients(whole).items():
        assert torch.equal(one["gradients"][name], two["gradients"][name])
        scale = float(gradient.abs().max())
        tolerance = 1e-5 if dtype is None else 0.02
        torch.testing.assert_close(one["gradients"][name], gradient, rtol=0, atol=tolerance * scale, msg=name)


# ---- what is not finite


def test_what_is_not_finite_is_found_and_undone() -> None:
    stepper = stepper_of(restorable=True, norm="bn")
    before = {name: value.clone() for name, value in stepper.student.state_dict().items()}
    fine = stepper.backward(batch_of(6))
    assert int(fine.offence) == 0
    for name, value in stepper.student.state_dict().items():
        value.copy_(before[name])
    with torch.no_grad():
        stepper.student.network[0].weight[0, 0, 0, 0] = math.nan
    before = {name: value.clone() for name, value in stepper.student.state_dict().items()}
    bad = stepper.backward(batch_of(6))
    assert stepper.name_of(int(bad.offence), bad.losses) == "loss_class"
    stepper.discard()
    for name, value in stepper.student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(parameter.grad is None for parameter in stepper.student.parameters())


def test_a_gradient_that_is_not_finite_is_named() -> None:
    stepper = stepper_of()
    stepper.student.network[4].bias.register_hook(lambda gradient: gradient / 0.0)
    found = stepper.backward(batch_of(6))
    assert all(torch.isfinite(loss) for loss in found.losses.values())
    assert stepper.name_of(int(found.offence), found.losses) == "the gradient of network.4.bias"


def test_a_scaler_bears_infinite_gradients_while_it_can_scale_less() -> None:
    stepper = stepper_of()
    stepper.scaler = torch.amp.GradScaler("cpu")
    stepper.student.network[4].bias.register_hook(lambda gradient: gradient * math.nan)
    borne = 0
    while not int((found := stepper.backward(batch_of(6))).offence) and borne < 100:
        stepper.apply()
        borne += 1
    assert stepper.name_of(int(found.offence), found.losses) == "the gradient of network.4.bias"
    assert 15 < borne < 40 and 0.0 < stepper.scaler.get_scale() < 1.0


class Spoiler(nn.Module):
    """Makes one forward pass of a training not finite, as a flipped bit in a GPU's memory would."""

    def __init__(self, inner: nn.Module, passes: set[int]) -> None:
        super().__init__()
        self.inner = inner
        self.passes = passes
        self.count = 0

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return self.inner(images * math.inf if self.training and self.count in self.passes else images)


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
    assert [folder.name for folder in (tmp_path / "nonfinite").iterdir()] == ["epoch_0001_step_000002"]


def test_more_in_a_row_than_allowed_stop_the_run(data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(data, tmp_path, Process(0, 1, 0, 1, CPU), {2, 3}, "--skip-nonfinite", 1)
    with pytest.raises(CommonError, match=r"loss_class is not finite at epoch 1, step 3 \(rank 0\)") as stopped:
        trainer.fit()
    assert "the last checkpoint is from before" in str(stopped.value)


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
    found = {"said": said, "skipped": trainer.progress.skipped, "weights": trainer.student.network.state_dict()}
    torch.save(found, folder / f"found_{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("allowed", [2, 1])
def test_processes_skip_and_stop_alike(data: Path, tmp_path: Path, allowed: int) -> None:
    """Only the second of two processes meets what is not finite."""
    url = f"tcp://127.0.0.1:{free_port()}"
    arguments = (url, data, tmp_path, allowed)
    torch.multiprocessing.start_processes(_skipping, arguments, nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"found_{rank}.pth", weights_only=True) for rank in (0, 1))
    assert one["skipped"] == two["skipped"] == 2
    assert one["said"] == two["said"]
    assert ("(rank 1)" in one["said"]) == (allowed == 1)
    weights = [name for name, value in one["weights"].items() if value.is_floating_point() and "running" not in name]
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in weights)
    if allowed == 2:
        assert all(torch.isfinite(value).all() for value in one["weights"].values())
        return
    folder = tmp_path / "nonfinite" / "epoch_0001_step_000003"
    assert sorted(file.name for file in folder.iterdir()) == ["rank_0000.pth", "rank_0001.pth", "student.pth"]


def test_what_was_kept_repeats_the_step(base: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Weights that a rate of 1e30 drove out of what float32 holds; dropout, and so random numbers, too."""
    assert base(data, "--arch", "mobilenet_v2", "--lr", "1e30", "--epochs", 3) == 2
    said = capsys.readouterr().err
    assert "is not finite at epoch 1, step 2 (rank 0)" in said
    folder = tmp_path / "run" / "nonfinite" / "epoch_0001_step_000002"
    assert f"{folder} has what is needed to repeat it" in said
    state, own = (torch.load(folder / name, weights_only=True) for name in ("student.pth", "rank_0000.pth"))
    assert len(own["files"]) == len(own["targets"]) == 8
    assert all((data / "train" / file).exists() for file in own["files"])
    student = Student(build(state["arch"], len(CLASSES)))
    student.network.load_state_dict(state["student"])
    student.network.to(memory_format=torch.channels_last)
    torch.set_rng_state(own["random"]["torch"])
    images, targets = Intake(CPU, False)(Batch(own["images"], own["targets"], []))
    losses = student.train()(images, targets, {}, None).losses
    repeated = losses["loss_class"].item() / len(targets)
    kept = own["losses"]["loss_class"]
    assert repeated == kept or (math.isnan(repeated) and math.isnan(kept))
    assert not math.isfinite(repeated)


def test_the_largest_of_one_process_is_its_own() -> None:
    assert largest(torch.tensor([3, 0])) == [3, 0]
