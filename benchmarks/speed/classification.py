"""ResNet-50 teaches MobileNet-V1: a step, its memory, a rematch pass, rematching from the training steps.

The floor of a step is the plain student's forward, backward and optimiser step and the plain teacher's forward to its
last stage without a graph, with no hook of this project on either. N images of 224 px.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.measure import NOT_ON_A_GPU, Row, in_turn, peak_tensor_bytes, ratio_row
from classification.distillation import DistillationStep, Student, Teacher
from classification.features import margins, pair_features
from classification.models import build
from d2_mgd.distill import MatchingGuidedDistiller

__all__ = ["RETURNED", "Pair", "memory_rows", "rows"]

# glibc: blocks of 1 MiB and more have pages of their own; else the bound grows to 32 MiB with the first that is freed
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
_SETTLED = 6  # steps after which the allocator's heap no longer grows

_IMAGENET = 1281167  # training images
_OBSERVED, _EPOCHS = 20000, 2  # as published: a rematch every two epochs on 20,000 images


class Pair:
    """Both networks twice with the same weights: plain, and in a distillation step.

    Args:
        batch: N.
        size: side of the images.
        device: where.
        dtype: of mixed precision, or None.
    """

    def __init__(self, batch: int, size: int, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        torch.manual_seed(0)
        student, teacher = (
            build(name, 1000).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for name in ("mobilenet_v1", "resnet50")
        )
        self.images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        self.targets = torch.randint(0, 1000, (batch,), device=device)
        self.device, self.dtype = device, dtype
        self.plain_student, self.plain_teacher = copy.deepcopy(student), _trunk(copy.deepcopy(teacher))
        self.plain_optimizer = _sgd(self.plain_student)
        pairs = pair_features("mobilenet_v1", "resnet50")
        taps = {name: pair.teacher for name, pair in pairs.items()}
        self.teacher = Teacher(teacher, taps, with_logits=False)
        self.student = Student(student, {name: pair.student for name, pair in pairs.items()})
        with torch.no_grad():
            student_maps, (teacher_maps, _) = self.student.maps(self.images[:2]), self.teacher(self.images[:2])
        channels = {name: (student_maps[name].shape[1], teacher_maps[name].shape[1]) for name in pairs}
        self.distiller = MatchingGuidedDistiller(channels, margins=margins("resnet50", teacher, pairs)).to(device)
        self.student.distiller = self.distiller
        self.distiller.observe(student_maps, teacher_maps)
        self.distiller.rematch()
        self.step = DistillationStep(self.student, self.teacher)
        self.optimizer = _sgd(self.student)

    def floor(self) -> None:
        """Student's step and teacher's forward."""
        with torch.no_grad(), self._precision():
            self.plain_teacher(self.images)
        self.student_alone()

    def student_alone(self) -> None:
        with self._precision():
            logits = self.plain_student(self.images)
        loss = F.cross_entropy(logits.float(), self.targets)
        self.plain_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.plain_optimizer.step()

    def distilled(self, observe: bool = False) -> None:
        """A distilled step; with ``observe`` its maps count for the next matching."""
        self.step.train()
        with self._precision():
            output = self.step(self.images, self.targets, observe)
        loss: Tensor = torch.stack(list(output.losses.values())).sum() / self.images.shape[0]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if observe:
            self.distiller.observe(output.student_maps, output.teacher_maps)

    def two_forwards(self) -> None:
        """What a rematch pass needs: both networks to their last stage."""
        self.plain_student.eval()
        with torch.no_grad(), self._precision():
            self.plain_teacher(self.images)
            self.plain_student.get_submodule("model")(self.images)
        self.plain_student.train()

    def rematch_pass(self) -> None:
        """One batch of a rematch pass."""
        self.step.eval()
        with torch.no_grad(), self._precision():
            output = self.step(self.images)
        self.distiller.observe(output.student_maps, output.teacher_maps)

    def _precision(self) -> Any:
        return torch.autocast(self.device, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)


def rows(quick: bool, reference: Callable[[Pair], dict[str, Callable[[], None]]] | None = None) -> list[Row]:
    """All rows of this pair of networks; ``reference`` adds the published implementation's step and pass."""
    batch, size, rounds = (2, 224, 2) if quick else (16, 224, 9)
    pair = Pair(batch, size)
    others = {} if reference is None else reference(pair)
    conditions = f"ResNet-50 to MobileNet-V1, batch {batch}, {size} px, amp + partial_l2, float32, CPU"
    found: list[Row] = []

    things = {"floor": pair.floor, "distilled": pair.distilled}
    things.update({name: thing for name, thing in others.items() if "step" in name})
    seconds = in_turn(things, rounds)
    found.append(ratio_row("step, classification, CPU / floor", 1.08, seconds, "distilled", "floor", conditions))
    found += [
        ratio_row(f"{name} / floor", None, seconds, name, "floor", conditions) for name in things if name in others
    ]

    things = {"two forwards": pair.two_forwards, "rematch pass": pair.rematch_pass}
    things.update({name: thing for name, thing in others.items() if "pass" in name})
    seconds = in_turn(things, rounds)
    found.append(ratio_row("rematch pass / two forwards", 1.05, seconds, "rematch pass", "two forwards", conditions))
    found += [
        ratio_row(f"{name} / two forwards", None, seconds, name, "two forwards", conditions)
        for name in things
        if name in others
    ]
    found.append(_online(pair, rounds, conditions))
    found += memory_rows(pair)
    found.append(_on_gpu(quick))
    return found


def _online(pair: Pair, rounds: int, conditions: str) -> Row:
    seconds = in_turn({"step": pair.distilled, "observing step": lambda: pair.distilled(observe=True)}, rounds)
    solve = in_turn({"solve": pair.distiller.rematch}, 1, warmup=0)["solve"][0]
    plain, observing = (statistics.median(seconds[name]) for name in ("step", "observing step"))
    steps = _EPOCHS * _IMAGENET / pair.images.shape[0]
    extra = _OBSERVED / pair.images.shape[0] * max(0.0, observing - plain) + solve
    return Row(
        "run that rematches from training steps / run without",
        1.01,
        1.0 + extra / (steps * plain),
        seconds={"step": plain, "observing step": observing, "solve, all features": solve},
        note=f"computed from a step with and one without: {_OBSERVED} images observed in {_EPOCHS} epochs of ImageNet; "
        + conditions,
    )


def memory_rows(pair: Pair) -> list[Row]:
    """Peak of the tensors that a step makes, and of the process over a few steps.

    Of the process twice: as it is, where the allocator keeps much of what was freed, and with every large block given
    back when it is freed, so that the peak is what is needed at a time.
    """
    for step in (pair.floor, pair.distilled):  # so that the optimiser has its state
        step()
    tensors = {what: peak_tensor_bytes(getattr(pair, what)) for what in ("floor", "distilled")}
    batch, size = pair.images.shape[0], pair.images.shape[-1]
    rows = [_memory_row("memory of a step, tensors / floor, CPU", 1.10, tensors, batch, size)]
    for how, goal, returned in (("resident", None, False), ("resident, freed blocks returned", 1.10, True)):
        name = f"memory of a step, {how} / floor, CPU"
        try:
            peaks = {what: _in_a_process(what, batch, size, returned) for what in ("floor", "distilled")}
        except OSError:
            rows.append(Row(name, note="not measured: this system does not tell a process's peak"))
        else:
            rows.append(_memory_row(name, goal, peaks, batch, size))
    return rows


def _memory_row(name: str, goal: float | None, peaks: Mapping[str, int], batch: int, size: int) -> Row:
    megabytes = ", ".join(f"{what} {peak / 2**20:.0f} MiB" for what, peak in peaks.items())
    note = f"peak above what both networks take before the step ({megabytes}); batch {batch}, {size} px"
    return Row(name, goal, peaks["distilled"] / peaks["floor"], note=note)


def _in_a_process(what: str, batch: int, size: int, returned: bool) -> int:
    context = multiprocessing.get_context("spawn")
    with _variables(RETURNED if returned else {}), context.Pool(1) as pool:
        return pool.apply(_peak, (what, batch, size))


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes that start meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _peak(what: str, batch: int, size: int) -> int:
    """Bytes that a few steps add to the process at most."""
    pair = Pair(2, 64)
    pair.images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    pair.targets = torch.randint(0, 1000, (batch,))
    # getrusage's peak will not do: a process inherits it from the one that started it
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    before = _status("VmRSS")
    for _ in range(_SETTLED):
        getattr(pair, what)()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _on_gpu(quick: bool) -> Row:
    name = "step, classification, GPU, bf16, batch 64 / floor"
    if not torch.cuda.is_available():
        return Row(name, 1.04, note=NOT_ON_A_GPU)
    pair = Pair(64, 224, "cuda", torch.bfloat16)
    seconds = in_turn({"floor": pair.floor, "distilled": pair.distilled}, 5 if quick else 30, warmup=5)
    return ratio_row(name, 1.04, seconds, "distilled", "floor", "ResNet-50 to MobileNet-V1, 224 px, amp + partial_l2")


def _trunk(resnet: Any) -> nn.Module:
    """A ResNet to its last stage."""
    trunk = nn.Sequential(*list(resnet.children())[:-2])
    return trunk.requires_grad_(False).eval()


def _sgd(network: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, 1e-4, momentum=0.9, weight_decay=4e-5)
