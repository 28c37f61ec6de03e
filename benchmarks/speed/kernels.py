"""The solver beside SciPy's, and the loss beside a copy of the teacher's map.

Shape shorthand: S student channels, T teacher channels, N images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.speed.measure import Row, in_turn, ratio_row
from d2_mgd.distill import REDUCERS, MatchingGuidedDistiller
from d2_mgd.matching import ChannelCost, solve_matching

_TIES = "three-valued costs"
_CALLS = 10  # of a kernel between two synchronisations: the time to launch it is not what is measured


def solve_rows(quick: bool, reference: Callable[[np.ndarray], None] | None = None) -> Iterator[Row]:
    """Yield build and solve, over SciPy's linear_sum_assignment on the problem of copied rows."""
    rounds = 1 if quick else 9
    for num_student, num_teacher in ((64, 256), (58, 256)) if quick else ((512, 2048), (464, 2048)):
        for kind, cost in _costs(num_student, num_teacher).items():
            error = _check_optimum(cost)
            things: dict[str, Callable[[], object]] = {
                "solve_matching": partial(solve_matching, cost),
                "SciPy": partial(_with_scipy, cost),
            }
            seconds = in_turn(things, rounds)
            note = f"{kind}; same optimum to {error:.1e}, certified over all arcs"
            size = f"{num_student} x {num_teacher}"
            if reference is not None and num_teacher % num_student == 0:
                seconds |= in_turn({"published": partial(reference, cost)}, 1, warmup=0)
            row = ratio_row(f"solve, balanced, {size} / SciPy", 0.3, seconds, "solve_matching", "SciPy", note)
            if kind == _TIES:  # SciPy is quick with ties, so the goal is in seconds
                name, medians = f"solve, balanced, {size}, three-valued costs, seconds", row.seconds
                row = Row(name, 0.3, medians["solve_matching"], seconds=medians, note=note)
            yield row


def _check_optimum(cost: np.ndarray) -> float:
    expanded = copied_rows(cost)
    optimum = float(expanded[linear_sum_assignment(expanded)].sum())
    total = solve_matching(cost).total_cost
    if abs(total - optimum) > 1e-6 * np.ptp(cost):
        raise RuntimeError(f"the matching costs {total}, SciPy's {optimum}.")
    return abs(total - optimum)


def _with_scipy(cost: np.ndarray) -> None:
    linear_sum_assignment(copied_rows(cost))


def copied_rows(cost: np.ndarray) -> np.ndarray:
    """Return the assignment problem that is equal to the ``balanced`` mode with T >= S.

    T // S copies of each row must be used. T % S rows are used once more: (T - S * (T // S)) fewer dummy columns than
    rows leave free which ones.
    """
    num_student, num_teacher = cost.shape
    base, spare = divmod(num_teacher, num_student)
    rows = np.repeat(cost, base, axis=0)
    if spare == 0:
        return rows
    rows = np.concatenate([rows, cost])
    dummies = np.full((rows.shape[0], num_student - spare), 1e6)
    dummies[num_student * base :] = 0.0
    return np.concatenate([rows, dummies], axis=1)


def _costs(num_student: int, num_teacher: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 40, 7, 7, generator=generator)
    student, teacher = (
        torch.relu(torch.einsum("ck,nkhw->nchw", torch.randn(width, 40, generator=generator), basis))
        for width in (num_student, num_teacher)
    )
    cost = ChannelCost(num_student, num_teacher)
    cost.update(student, teacher)
    rng = np.random.default_rng(0)
    return {
        "uniform costs": rng.random((num_student, num_teacher)),
        "costs of rectified mixtures of 40 maps": cost.mean().numpy(),
        _TIES: rng.integers(0, 3, (num_student, num_teacher)) / 2.0,
    }


def loss_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yield rows that compare the loss as it is shipped, its plain operators, and these compiled.

    The first is the bandwidth of the shipped loss over that of a copy: both maps must be read once and the gradient
    written once. The others include the batch-norm of the student's map and are ratios of time.
    """
    shape = (256, 256, 1024, 28) if device == "cuda" else (16, 128, 512, 28)
    images, students, teachers, side = (2, 8, 32, 14) if quick else shape
    student = torch.randn(images, students, side, side, device=device, requires_grad=True)
    teacher = torch.randn(images, teachers, side, side, device=device)
    target = torch.empty_like(teacher)
    note = f"{images} images, {teachers} to {students} channels of {side} x {side}, amp + partial_l2, float32"
    where = "GPU" if device == "cuda" else "CPU"

    distiller = _distiller(student, teacher, "none")
    things: dict[str, Callable[[], object]] = {
        "loss": partial(_backward, student, partial(_shipped, distiller, student, teacher)),
        "copy": partial(target.copy_, teacher),
    }
    medians = {name: statistics.median(values) for name, values in _time(things, quick).items()}
    moved = teacher.nbytes + 2 * student.nbytes
    value = (moved / medians["loss"]) / (2 * teacher.nbytes / medians["copy"])
    goal = 0.6 if device == "cuda" else None
    yield Row(f"loss, {where}: bandwidth / that of a copy", goal, value, seconds=medians, note=note, at_least=True)

    distiller = _distiller(student, teacher, "bn")
    plain = _PlainLoss(students, distiller.features["map"].get_buffer("groups")).to(device).train()
    losses = {
        "shipped": partial(_shipped, distiller, student, teacher),
        "plain operators": partial(plain, student, teacher),
        "torch.compile": partial(torch.compile(plain), student, teacher),
    }
    seconds = _time({name: partial(_backward, student, loss) for name, loss in losses.items()}, quick)
    for name in ("shipped", "torch.compile"):
        title = f"loss with norm, {where}: {name} / plain operators"
        yield ratio_row(title, None, seconds, name, "plain operators", note)


def _distiller(student: Tensor, teacher: Tensor, norm: str) -> MatchingGuidedDistiller:
    channels = {"map": (student.shape[1], teacher.shape[1])}
    distiller = MatchingGuidedDistiller(channels, norm=norm).to(student.device).train()
    distiller.observe({"map": student.detach()}, {"map": teacher})
    distiller.rematch()
    return distiller


def _shipped(distiller: MatchingGuidedDistiller, student: Tensor, teacher: Tensor) -> Tensor:
    return distiller({"map": student}, {"map": teacher})["loss_distill/map"]


class _PlainLoss(nn.Module):
    """Norm, reducer and loss as separate operators, each of which makes a map."""

    def __init__(self, channels: int, groups: Tensor) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("groups", groups.clone())

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            guided, _ = REDUCERS.get("amp")(teacher, self.groups, None, None)
        student = self.norm(student)
        active = (student > guided) | (guided > 0)
        return ((student - guided).square() * active).mean()


def _backward(student: Tensor, loss: Callable[[], Tensor]) -> None:
    student.grad = None
    loss().backward()


def _time(things: dict[str, Callable[[], object]], quick: bool) -> dict[str, list[float]]:
    return in_turn(things, 1 if quick else 9, warmup=2, calls=1 if quick else _CALLS)
