"""From a matching cost to the cheapest matching, exactly, by minimum-cost flow.

Shape shorthand: S student channels, T teacher channels.

The published code copies the rows of the cost T // S times and solves a T x T assignment problem. The same optimum is
a flow over S x T arcs in which a node may take several units, which also covers widths that do not divide and T < S.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from ortools.graph.python import min_cost_flow

from d2_mgd.errors import UserError
from d2_mgd.matching.certificate import sink_prices, violated_arcs
from d2_mgd.matching.channel_matching import PADDING, ChannelMatching

__all__ = ["MODES", "SolverError", "solve_matching"]

MODES = ("balanced", "even", "one_to_one")

_LARGEST_UNIT_COST = 2**40  # times the nodes it stays far below 2^63, the solver's own limit

# How the arcs are chosen that the flow is solved over; none of these changes a result.
_ARCS_OF_A_SOURCE = 32
_ROUNDS = 5  # before all arcs are taken
_LARGEST_SHARE = 1 / 4  # of all arcs: with more, a round takes nearly as long as all at once
_TEMPERATURE = 0.1  # of the smoothed assignment, in standard deviations of the costs
_LARGEST_EXPONENT = 40.0  # keeps its kernel and scales within float32
_SINKHORN_ITERATIONS = 20
_LEAST_FACTOR = 0.5  # with 0.8, three-valued costs need two rounds


class SolverError(RuntimeError):
    """No matching was found, for no fault of the cost."""


def solve_matching(cost: np.ndarray | torch.Tensor, mode: str = "balanced") -> ChannelMatching:
    """The matching of least total cost (Yue et al., ECCV 2020).

    Args:
        cost: (S, T) finite cost of letting teacher channel ``t`` guide student channel ``s``.
        mode: which matchings are allowed.

            - ``balanced``: where T >= S, every teacher channel guides exactly one student channel and groups differ in
              size by at most one. Where T < S, every student channel has exactly one teacher channel, and teacher
              channels are used equally to within one.
            - ``even``: every group has exactly T // S channels (T >= S); which T % S channels are left out is part of
              the optimum.
            - ``one_to_one``: every student channel has one teacher channel of its own (T >= S).

    Returns:
        ChannelMatching: the optimum; its ``total_cost`` is within 1e-6 (relative to the range of the costs) of the
        least one. Members of a group are in ascending order.

    Raises:
        ValueError: an unknown mode, a mode that needs T >= S, or a cost that is empty, not a matrix, not real or not
            finite (the message says where).
        SolverError: the flow solver gave up (it says with which status).
    """
    matrix = _checked_cost(cost)
    num_student, num_teacher = matrix.shape
    if mode not in MODES:
        raise UserError(f"unknown matching mode {mode!r}; there are: {', '.join(MODES)}.")
    if mode != "balanced" and num_teacher < num_student:
        raise UserError(
            f"mode {mode!r} needs at least as many teacher as student channels, got T={num_teacher} < S={num_student}; "
            "mode 'balanced' lets student channels share a teacher channel."
        )
    problem = _transport_problem(num_student, num_teacher, mode)
    student, teacher = _solve(matrix, problem)
    return ChannelMatching(
        groups=_as_groups(student, teacher, num_student),
        num_teacher=num_teacher,
        total_cost=float(matrix[student, teacher].sum()),
    )


class _TransportProblem(NamedTuple):
    """Every source goes to one sink; sink ``j`` takes ``least[j]`` to ``most[j]`` sources.

    Sources are teacher channels and sinks student channels, or the other way round where T < S. With ``leaves_out`` a
    last sink, which costs nothing, takes the sources that are left out.
    """

    teacher_is_source: bool
    leaves_out: bool
    least: np.ndarray
    most: np.ndarray


def _transport_problem(num_student: int, num_teacher: int, mode: str) -> _TransportProblem:
    teacher_is_source = num_teacher >= num_student
    sources, sinks = (num_teacher, num_student) if teacher_is_source else (num_student, num_teacher)
    base = 1 if mode == "one_to_one" else sources // sinks
    spare = sources - base * sinks
    least = np.full(sinks, base, dtype=np.int64)
    if mode == "balanced":
        return _TransportProblem(teacher_is_source, False, least, least + (spare > 0))
    if spare:
        least = np.append(least, spare)
    return _TransportProblem(teacher_is_source, spare > 0, least, least)


def _checked_cost(cost: Any) -> np.ndarray:
    if isinstance(cost, torch.Tensor):
        cost = cost.detach().cpu()
        cost = (cost.double() if cost.is_floating_point() else cost).numpy()  # numpy has no bfloat16
    matrix = np.asarray(cost)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise UserError(f"a matching cost must be a matrix (S, T) with S, T >= 1, got the shape {matrix.shape}.")
    if matrix.dtype.kind not in "fiu":
        raise UserError(f"a matching cost must hold real numbers, got dtype {matrix.dtype}.")
    matrix = matrix.astype(np.float64)
    finite = np.isfinite(matrix)
    if not finite.all():
        student, teacher = (int(i) for i in np.argwhere(~finite)[0])
        raise UserError(
            f"the matching cost is {matrix[student, teacher]} at student channel {student}, teacher channel {teacher} "
            f"({int((~finite).sum())} of {matrix.size} entries are not finite)."
        )
    return matrix


def _as_integers(matrix: np.ndarray) -> np.ndarray:
    """Costs as int64 from 0 to 2^40.

    Every matching of a mode has the same number of pairs, so a shift and a positive scale keep the optimum. Rounding
    moves a total by at most half a unit a pair, 2^-41 of the range.
    """
    lowest = matrix.min()
    with np.errstate(over="ignore"):
        spread = matrix.max() - lowest
    if not np.isfinite(spread):  # beyond float64: a quarter of the costs has the same optimum
        return _as_integers(matrix / 4.0)
    if spread == 0.0:
        return np.zeros(matrix.shape, dtype=np.int64)
    return np.rint((matrix / spread - lowest / spread) * _LARGEST_UNIT_COST).astype(np.int64)


def _solve(matrix: np.ndarray, problem: _TransportProblem) -> tuple[np.ndarray, np.ndarray]:
    """Matched pairs as two index arrays: student channels, teacher channels."""
    costs = _as_integers(np.ascontiguousarray(matrix.T) if problem.teacher_is_source else matrix)
    if problem.leaves_out:
        costs = np.concatenate([costs, np.zeros((costs.shape[0], 1), dtype=np.int64)], axis=1)
    sink = _cheapest_sinks(costs, problem.least, problem.most)
    source = np.arange(sink.size)
    if problem.leaves_out:
        source = source[sink < costs.shape[1] - 1]
        sink = sink[source]
    return (sink, source) if problem.teacher_is_source else (source, sink)


def _cheapest_sinks(costs: np.ndarray, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The sink of each source, from (sources, sinks) integer costs.

    Few arcs can be part of an optimum, so the flow is solved over promising ones, and then proved, or not, to be the
    optimum over all; arcs that contradict the proof join the next round.
    """
    if costs.shape[1] <= 2 * _ARCS_OF_A_SOURCE:
        return _flow(np.ones(costs.shape, dtype=bool), costs, least, most)[0]
    candidates = _promising_arcs(costs, least, most)
    for _ in range(_ROUNDS):
        sink, arcs, unit_costs = _flow(candidates, costs, least, most)
        prices = sink_prices(arcs, unit_costs, sink, least, most)
        if prices is None:
            raise SolverError("the flow solver called a matching optimal that is not.")
        violated = violated_arcs(costs, sink, prices)
        if not violated.any():
            return sink
        candidates |= violated
        if candidates.mean() > _LARGEST_SHARE:
            break
    return _flow(np.ones(costs.shape, dtype=bool), costs, least, most)[0]


def _promising_arcs(costs: np.ndarray, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """(sources, sinks) boolean: the cheapest arcs of each source at estimated prices, and enough to have a solution.

    Prices come from the assignment smoothed by an entropy (Sinkhorn iterations), which costs a few products of a
    matrix and a vector. They are estimates: only how many rounds are needed depends on them.
    """
    num_sources, num_sinks = costs.shape
    temperature = max(_TEMPERATURE * float(costs.std()), float(costs.max()) / _LARGEST_EXPONENT, 1.0)
    kernel = np.exp((costs * (-1.0 / temperature)).astype(np.float32))
    share = (least / least.sum() * num_sources).astype(np.float32)
    sink_scale = np.ones(num_sinks, dtype=np.float32)
    for _ in range(_SINKHORN_ITERATIONS):
        source_scale = 1.0 / (kernel @ sink_scale)
        sink_scale = share / (source_scale @ kernel)
    kernel *= sink_scale  # the larger the more promising
    # Of equal costs, all sources would keep the same few sinks. So each source scales the sinks by other factors.
    factors = np.random.default_rng(0).uniform(_LEAST_FACTOR, 1.0, num_sources + num_sinks - 1).astype(np.float32)
    kernel *= np.lib.stride_tricks.sliding_window_view(factors, num_sinks)
    candidates = np.zeros(costs.shape, dtype=bool)
    kept = np.argpartition(kernel, num_sinks - _ARCS_OF_A_SOURCE, axis=1)[:, num_sinks - _ARCS_OF_A_SOURCE :]
    np.put_along_axis(candidates, kept, True, axis=1)
    sinks = np.arange(num_sinks)
    some_solution = np.concatenate([np.repeat(sinks, least), np.repeat(sinks, most - least)])[:num_sources]
    candidates[np.arange(num_sources), some_solution] = True
    return candidates


def _flow(
    candidates: np.ndarray, costs: np.ndarray, least: np.ndarray, most: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Solve over some arcs; nodes are sources, then sinks, then one that takes what sinks have above their least.

    Returns:
        the sink of each source; the arcs' sources and sinks, ascending in the sinks; and the arcs' costs.
    """
    num_sources, num_sinks = costs.shape
    extra = num_sources + num_sinks
    sink, source = np.nonzero(candidates.T)
    unit_costs = costs[source, sink]
    growing = np.flatnonzero(most > least)

    flow = min_cost_flow.SimpleMinCostFlow()
    flow.add_arcs_with_capacity_and_unit_cost(
        np.concatenate([source, num_sources + growing]).astype(np.int32),
        np.concatenate([num_sources + sink, np.full(growing.size, extra)]).astype(np.int32),
        np.concatenate([np.ones(source.size, dtype=np.int64), (most - least)[growing]]),
        np.concatenate([unit_costs, np.zeros(growing.size, dtype=np.int64)]),
    )
    supplies = np.concatenate([np.ones(num_sources, dtype=np.int64), -least, [least.sum() - num_sources]])
    flow.set_nodes_supplies(np.arange(extra + 1, dtype=np.int32), supplies)
    status = flow.solve()
    if status != flow.OPTIMAL:
        raise SolverError(
            f"the flow solver ended with status {getattr(status, 'name', status)} on a matching of {num_sources} to "
            f"{num_sinks} channels."
        )
    used = flow.flows(np.arange(source.size, dtype=np.int32)) > 0
    chosen = np.empty(num_sources, dtype=np.int64)
    chosen[source[used]] = sink[used]
    return chosen, (source, sink), unit_costs


def _as_groups(student: np.ndarray, teacher: np.ndarray, num_student: int) -> np.ndarray:
    """(S, G) padded groups from matched pairs, members ascending."""
    order = np.lexsort((teacher, student))
    student, teacher = student[order], teacher[order]
    sizes = np.bincount(student, minlength=num_student)
    starts = np.cumsum(sizes) - sizes
    groups = np.full((num_student, int(sizes.max())), PADDING, dtype=np.int64)
    groups[student, np.arange(student.size) - np.repeat(starts, sizes)] = teacher
    return groups
