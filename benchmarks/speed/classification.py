"""ResNet-50 teaches MobileNet-V1: a step, a rematch pass, and rematching from the training steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks.speed.measure import Row, in_turn, ratio_row
from benchmarks.speed.pair import Pair
from d2_mgd.distill.teacher_forward import TeacherForward

_IMAGENET = 1281167  # training images
_OBSERVED, _EPOCHS = 20000, 2  # as published: a rematch every two epochs on 20,000 images

Reference = Callable[[Pair], dict[str, Callable[[], None]]]


def rows(quick: bool, reference: Reference | None = None) -> Iterator[Row]:
    """Yield the rows of the CPU; ``reference`` adds the published implementation's step and pass."""
    batch, size, rounds = (2, 64, 2) if quick else (16, 224, 9)
    pair = Pair(batch, size, runs=TeacherForward("auto"))
    fastest = Pair(batch, size, dtype=torch.bfloat16, runs=TeacherForward("auto", compile=True))
    variants: dict[str, Callable[[], None]] = {
        "step, teacher as the student": Pair(batch, size, runs=TeacherForward("student")).distilled,
        "step, teacher compiled": Pair(batch, size, runs=TeacherForward("auto", compile=True)).distilled,
        "step, student in bfloat16": Pair(batch, size, dtype=torch.bfloat16, runs=TeacherForward("auto")).distilled,
        "step, student in bfloat16, teacher compiled": fastest.distilled,
    }
    others = {} if reference is None else reference(pair)
    note = (
        f"ResNet-50 to MobileNet-V1, batch {batch}, {size} px, amp + partial_l2, float32, teacher in "
        f"{pair.teacher.runs.describe(pair.images.device)}, CPU"
    )
    variants.update({name: other for name, other in others.items() if "step" in name})
    yield from step_rows(pair, "CPU", 0.7, rounds, 1, note, variants)
    things = {"student alone": fastest.student_alone, "distilled": fastest.distilled}
    name = "step, student in bfloat16, teacher compiled / student alone in bfloat16"
    yield ratio_row(name, None, in_turn(things, rounds), "distilled", "student alone", note)

    auto = Pair(batch, size, runs=TeacherForward("auto"), balance="auto")
    things = {"fixed": pair.distilled, "auto": auto.distilled}
    yield ratio_row("step, balance auto / fixed", 1.01, in_turn(things, 3 * rounds), "auto", "fixed", note)

    things = {"two forwards": pair.two_forwards, "rematch pass": pair.rematch_pass}
    passes = {name: thing for name, thing in others.items() if "pass" in name}
    seconds = in_turn({**things, **passes}, rounds)
    yield ratio_row("rematch pass / two forwards", 0.6, seconds, "rematch pass", "two forwards", note)
    for name in passes:
        yield ratio_row(f"{name} / two forwards", None, seconds, name, "two forwards", note)
    yield _online(pair, rounds, note)


def gpu_rows(quick: bool, device: str = "cuda") -> Iterator[Row]:
    """Yield the step's rows on a GPU, in bfloat16."""
    batch, size, rounds, calls = (4, 64, 1, 1) if quick else (64, 224, 9, 10)
    pair = Pair(batch, size, device, torch.bfloat16, TeacherForward("auto"))
    note = f"ResNet-50 to MobileNet-V1, {size} px, amp + partial_l2; all in bfloat16 and channels_last, eager"
    yield from step_rows(pair, f"GPU, bf16, batch {batch}", 0.9, rounds, calls, note)


def step_rows(
    pair: Pair,
    where: str,
    goal: float,
    rounds: int,
    calls: int,
    note: str,
    others: dict[str, Callable[[], None]] | None = None,
) -> Iterator[Row]:
    """Yield the distilled step, and each of ``others``, over the floor, and the step over the student's alone."""
    things = {"floor": pair.floor, "distilled": pair.distilled, "student alone": pair.student_alone, **(others or {})}
    seconds = in_turn(things, rounds, warmup=2, calls=calls)
    yield ratio_row(f"step, classification, {where} / floor", goal, seconds, "distilled", "floor", note)
    name = f"step, classification, {where} / student alone"
    yield ratio_row(name, None, seconds, "distilled", "student alone", note)
    for name in others or {}:
        yield ratio_row(f"{name} / floor", None, seconds, name, "floor", note)


def _online(pair: Pair, rounds: int, note: str) -> Row:
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
        + note,
    )
