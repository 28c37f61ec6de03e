"""The ten-line front end, by what a training loop sees of it."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2_mgd.distill import Distillation, RematchSchedule, Tap
from d2_mgd.errors import UserError
from tests.ranks import in_processes

SNIPPET = """
from d2_mgd.distill import Distillation
distillation = Distillation(student, teacher)          # finds the stages, measures widths on the first batch
optimizer = SGD([*student.parameters(), *distillation.parameters()], lr=0.1)
for images, labels in loader:
    loss = F.cross_entropy(student(images), labels) + distillation(images)
    ...
"""
BODY = "optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(float(distillation.losses[last]))"


def network(width: int) -> nn.Sequential:
    """Strides 2 and 4, each ending in batch-norm and ReLU."""
    stages = [
        nn.Sequential(nn.Conv2d(inputs, outputs, 2, 2), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
        for inputs, outputs in ((3, width), (width, 2 * width))
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5))


def batches(number: int, seed: int = 0, images: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(images, 3, 16, 16, generator=generator), torch.randint(5, (images,), generator=generator))
        for _ in range(number)
    ]


class Training:
    """A student of width 4, taught by a network of width 8."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.student, self.teacher = network(4), network(8)
        self.distillation = Distillation(self.student, self.teacher, **options)
        parameters = [*self.student.parameters(), *self.distillation.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    def step(self, images: Tensor, labels: Tensor) -> float:
        loss = F.cross_entropy(self.student(images), labels) + self.distillation(images)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def states(self) -> list[dict[str, Any]]:
        return copy.deepcopy([part.state_dict() for part in (self.student, self.distillation, self.optimizer)])


def _snippet(student: nn.Module, teacher: nn.Module, last: str) -> tuple[Distillation, list[float]]:
    before = [parameter.detach().clone() for parameter in student.parameters()]
    loader = [(torch.randn(2, 3, 64, 64), torch.randint(1000, (2,))) for _ in range(3)]
    scope: dict[str, Any] = {
        "student": student, "teacher": teacher, "loader": loader, "SGD": torch.optim.SGD, "F": F, "last": last,
        "losses": [],
    }  # fmt: skip
    exec(SNIPPET.replace("...", BODY), scope)
    assert len(scope["losses"]) == 3 and all(0 < loss < float("inf") for loss in scope["losses"])
    assert all(not torch.equal(old, new) for old, new in zip(before, student.parameters()))
    return scope["distillation"], scope["losses"]


def test_the_snippet_trains_resnet18_from_resnet50() -> None:
    distillation, _ = _snippet(torchvision.models.resnet18(), torchvision.models.resnet50(), "loss_distill/stride32")
    assert "stride16: layer3.1@pre (S=256) <- layer3.5@pre (T=1024)" in repr(distillation)
    assert distillation.loss == "partial_l2" and len(distillation.reports) == 4


def test_the_snippet_trains_mobilenetv3_from_vit_tiny() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    student, teacher = (
        timm.create_model("mobilenetv3_small_100"),
        timm.create_model("vit_tiny_patch16_224", img_size=64),
    )
    distillation, _ = _snippet(student, teacher, "loss_distill/stride16")
    assert distillation.loss == "pearson" and not [*distillation.parameters()]
    assert distillation.distiller.balance.steps.tolist() == [2.0]  # the third step's gradients are used in the fourth
    with pytest.raises(UserError, match=r"the teacher cannot run on images of shape \(3, 32, 32\): .*images of 64 px"):
        student(torch.rand(2, 3, 32, 32)), distillation(torch.rand(2, 3, 32, 32))


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    torch.manual_seed(0)
    student = network(4).eval()
    distillation = Distillation(student, copy.deepcopy(student), loss="mse", norm="none", balance="fixed")
    ((images, _),) = batches(1)
    student(images)
    assert float(distillation(images).detach()) == 0.0


def test_save_and_restore_changes_nothing() -> None:
    schedule = RematchSchedule([3])
    whole = Training(schedule=schedule)
    data = batches(8)
    for batch in data[:4]:
        whole.step(*batch)
    states = whole.states()
    resumed = Training(schedule=schedule)
    for part, state in zip((resumed.student, resumed.distillation, resumed.optimizer), states):
        part.load_state_dict(state)
    assert [whole.step(*batch) for batch in data[4:]] == [resumed.step(*batch) for batch in data[4:]]
    assert not any("teacher" in key or "student" in key for key in states[1])
    with pytest.raises(UserError, match="the stored distiller has the balance auto, this one fixed"):
        Training(schedule=schedule, balance="fixed").distillation.load_state_dict(states[1])


def test_matchings_follow_the_schedule_and_use_the_maps_of_the_last_steps() -> None:
    training = Training(schedule=RematchSchedule([4]), observed=2)
    images = []
    for batch in batches(6):
        training.step(*batch)
        images.append(training.distillation.reports["stride4"].num_images)
    assert images == [4, 4, 4, 4, 8, 8]


def test_features_are_named_by_modules_or_taps() -> None:
    features = {"low": (Tap("0", before_activation=True), Tap("0", before_activation=True)), "high": ("1", "1")}
    training = Training(features=features, weight=2.0)
    assert training.distillation.distiller.channels == {"low": (4, 8), "high": (8, 16)}
    assert (
        training.distillation.distiller.weights == {"low": 2.0, "high": 2.0} and training.distillation.loss == "pearson"
    )
    training.step(*batches(1)[0])
    with pytest.raises(UserError, match="the teacher: there is no module 'layer9'"):
        Training(features={"low": ("0", "layer9")})


def test_evaluation_counts_no_step() -> None:
    training = Training()
    ((images, labels),) = batches(1)
    training.step(images, labels)
    training.distillation.eval(), training.student.eval()
    state = training.states()
    with torch.no_grad():
        training.student(images)
        assert float(training.distillation(images)) > 0
    assert training.distillation.steps == 1 and str(training.states()) == str(state)
    extra = str(training.distillation.get_extra_state())
    with torch.no_grad():
        training.distillation.train(), training.student(images), training.distillation(images)
    assert str(training.distillation.get_extra_state()) == extra


def test_a_factor_of_zero_leaves_the_teacher_out() -> None:
    training = Training(balance="fixed")
    (images, _), (others, _) = batches(2)
    found = []
    for factor in (1.0, 0.5):
        training.distillation.factor = factor
        training.student(images)
        found.append(float(training.distillation(images).detach()))
    assert found[1] == pytest.approx(0.5 * found[0])
    training.distillation.factor = 0.0
    training.student(others)
    assert float(training.distillation("no images").detach()) == 0.0 and training.distillation.steps == 2


def test_calls_that_cannot_work_are_one_sentence() -> None:
    training = Training()
    ((images, _),) = batches(1)
    with pytest.raises(UserError, match=r"the student has not run since the last call .*: call student\(images\)"):
        training.distillation(images)
    training.student(images)
    training.distillation(images)
    with pytest.raises(UserError, match="the student has not run since the last call"):
        training.distillation(images)
    with torch.no_grad():
        training.student(images)
    with pytest.raises(UserError, match="last forward pass was without gradients"):
        training.distillation(images)
    other = Distillation(training.student, training.teacher).eval()
    training.student(images)
    with pytest.raises(UserError, match="there is no matching yet"):
        other(images)
    with pytest.raises(UserError, match=r"no maps of a common stride: the student's strides are 2, the teacher's 4\."):
        Distillation(network(4)[:1], nn.Sequential(nn.Conv2d(3, 8, 4, 4)))
    with pytest.raises(UserError, match="use DistributedDataParallel"):
        Distillation(nn.DataParallel(training.student), training.teacher)


def test_no_hook_is_left_after_a_with_block_or_by_a_forgotten_distillation() -> None:
    student, teacher = network(4), network(8)
    with Distillation(student, teacher) as distillation:
        student(torch.rand(2, 3, 16, 16)), distillation(torch.rand(2, 3, 16, 16))
    student(torch.rand(2, 3, 16, 16))
    with pytest.raises(UserError, match="the hooks of this distillation are removed, by remove"):
        distillation(torch.rand(2, 3, 16, 16))
    forgotten = Distillation(student, teacher)
    del distillation, forgotten
    gc.collect()
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not teacher.training


def test_the_teacher_in_bfloat16_gives_nearly_the_same_loss() -> None:
    ((images, labels),) = batches(1)
    plain, fast = (Training(balance="fixed", precision=precision) for precision in ("student", "bfloat16"))
    assert fast.step(images, labels) == pytest.approx(plain.step(images, labels), rel=0.02)
    assert fast.step(images, labels) != plain.step(images, labels)


def test_the_teacher_is_channels_last_only_in_a_precision_of_its_own_and_may_be_trained() -> None:
    for precision, last in (("student", False), ("float32", True)):
        training = Training(precision=precision)
        seen: list[Tensor] = []
        training.teacher[0][0].register_forward_pre_hook(lambda module, args, seen=seen: seen.extend(args))
        ((images, labels),) = batches(1)
        training.step(images, labels)
        weight = training.teacher[1][0].weight
        for tensor in (*seen, weight):
            assert tensor.is_contiguous(memory_format=torch.channels_last) == last
        assert len(seen) == 1 and weight.requires_grad and weight.grad is None


def test_under_autocast_the_losses_are_float32() -> None:
    training = Training()
    ((images, _),) = batches(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = training.distillation(images) if training.student(images).dtype == torch.bfloat16 else None
    assert loss is not None and loss.dtype == torch.float32 and torch.isfinite(loss)
    loss.backward()


def _train_rank(words: list[str]) -> int:
    (folder,) = words
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    student = DistributedDataParallel(network(4))
    distillation = Distillation(student, network(8), align="conv1x1", loss="mse")
    parameters = [*student.parameters(), *distillation.parameters()]
    start = [parameter.detach().clone() for parameter in distillation.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for images, labels in batches(4, seed=dist.get_rank()):
        loss = F.cross_entropy(student(images), labels) + distillation(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(start, distillation.parameters()))
    if dist.get_rank() == 0:  # evaluating takes no other rank
        student.module(images), distillation.eval()(images)
        distillation.train()
    torch.save([parameter.detach() for parameter in parameters], f"{folder}/{dist.get_rank()}.pth")
    dist.destroy_process_group()
    return 0


def test_two_ranks_keep_one_student_and_one_projection(tmp_path: Path) -> None:
    assert in_processes(_train_rank, [tmp_path], world=2) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    assert len(first) > 10 and all(torch.equal(one, other) for one, other in zip(first, second))
