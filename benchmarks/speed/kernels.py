"""The solver beside SciPy's, and the loss beside a GPU's memory bandwidth.

Shape shorthand: S student channels, T teacher channels, N images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from benchmarks.speed.measure import NOT_ON_A_GPU, Row, in_turn, ratio_row
from d2_mgd.distill import MatchingGuidedDistiller
from d2_mgd.matching import ChannelCost, solve_matching

__all__ = ["copied_rows", "loss_row", "solve_rows"]


def solve_rows(quick: bool, reference: Callable[[np.ndarray], None] | None = None) -> list[Row]:
    """Build and solve, over SciPy's linear_sum_assignment on the problem of copied rows."""
    found = []
    rounds = 1 if quick else 9
    for num_student, num_teacher in ((64, 256), (58, 256)) if quick else ((512, 2048), (464, 2048)):
        for kind, cost in _costs(num_student, num_teacher).items():
            matching = solve_matching(cost)
            expanded = copied_rows(cost)
            optimum = float(expanded[linear_sum_assignment(expanded)].sum())
            error = abs(matching.total_cost - optimum)
            if error > 1e-6 * np.ptp(cost):
                raise RuntimeError(f"the matching costs {matching.total_cost}, SciPy's {optimum}.")
            things: dict[str, Callable[[], object]] = {
                "solve_matching": partial(solve_matching, cost),
                "SciPy": partial(_with_scipy, cost),
            }
            seconds = in_turn(things, rounds)
            note = f"{kind}; same optimum to {error:.1e}, certified over all arcs"
            name = f"solve, balanced, {num_student} x {num_teacher} / SciPy"
            found.append(ratio_row(name, 0.3, seconds, "solve_matching", "SciPy", note))
            if reference is not None and num_teacher % num_student == 0:
                published = in_turn({"published": partial(reference, cost)}, 1, warmup=0)["published"][0]
                found[-1].seconds["published"] = published
    return found


def _with_scipy(cost: np.ndarray) -> None:
    linear_sum_assignment(copied_rows(cost))


def copied_rows(cost: np.ndarray) -> np.ndarray:
    """The assignment problem of the ``balanced`` mode with T >= S: T // S copies of each row must be used, and T % S
    rows are used once more, which (T - S * (T // S)) fewer dummy columns than rows leave free to choose."""
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
    uniform = np.random.default_rng(0).random((num_student, num_teacher))
    return {"uniform costs": uniform, "costs of rectified mixtures of 40 maps": cost.mean().numpy()}


def loss_row(device: str | None = None, quick: bool = False) -> Row:
    """Bytes that must move over time, over the bandwidth of a copy; on a GPU unless a device is named."""
    name = "loss on a GPU: bandwidth / that of a copy"
    if device is None and not torch.cuda.is_available():
        return Row(name, 0.6, note=NOT_ON_A_GPU, at_least=True)
    device = device or "cuda"
    images, students, teachers, side = (2, 8, 32, 14) if quick else (64, 256, 1024, 28)
    student = torch.randn(images, students, side, side, device=device, requires_grad=True)
    teacher = torch.randn(images, teachers, side, side, device=device)
    distiller = MatchingGuidedDistiller({"map": (students, teachers)}, norm="none").to(device)
    distiller.observe({"map": student.detach()}, {"map": teacher})
    distiller.rematch()
    target = torch.empty_like(teacher)

    def loss() -> None:
        student.grad = None
        distiller({"map": student}, {"map": teacher})["loss_distill/map"].backward()

    seconds = in_turn({"loss": loss, "copy": lambda: target.copy_(teacher)}, 20, warmup=5)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    moved = teacher.nbytes + 2 * student.nbytes  # both maps read once, the gradient written once
    value = (moved / medians["loss"]) / (2 * teacher.nbytes / medians["copy"])
    note = f"{images} images, {teachers} to {students} channels of {side} x {side}, float32, {device}"
    return Row(name, 0.6, value, seconds=medians, note=note, at_least=True)
