"""The proof of optimality accepts exactly the optimum, and the solver over few arcs finds the optimum over all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from d2_mgd.matching import ChannelMatching, solve_matching, solver
from d2_mgd.matching.certificate import sink_prices, violated_arcs


def proves(costs: np.ndarray, chosen: np.ndarray, least: np.ndarray, most: np.ndarray) -> bool:
    """Whether the proof over all arcs succeeds."""
    sink, source = np.nonzero(np.ones(costs.shape, dtype=bool).T)
    prices = sink_prices((source, sink), costs[source, sink], chosen, least, most)
    if prices is None:
        return False
    assert not violated_arcs(costs, chosen, prices).any()
    return True


@given(
    num_sources=st.integers(1, 5),
    num_sinks=st.integers(1, 3),
    slack=st.integers(0, 2),
    largest=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)
def test_exactly_the_cheapest_assignments_are_proved(
    num_sources: int, num_sinks: int, slack: int, largest: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, largest, (num_sources, num_sinks))
    least = np.full(num_sinks, num_sources // num_sinks)
    most = least + np.where(num_sources % num_sinks > 0, 1 + slack, rng.integers(0, 2, num_sinks))
    allowed = []
    for choice in itertools.product(range(num_sinks), repeat=num_sources):
        chosen = np.array(choice)
        taken = np.bincount(chosen, minlength=num_sinks)
        if (taken >= least).all() and (taken <= most).all():
            allowed.append((int(costs[np.arange(num_sources), chosen].sum()), chosen))
    best = min(total for total, _ in allowed)
    for total, chosen in allowed:
        assert proves(costs, chosen, least, most) == (total == best)


def test_prices_of_few_arcs_show_the_arc_that_is_missing() -> None:
    costs = np.array([[1, 0], [1, 5]])
    arcs = (np.array([0, 1]), np.array([0, 1]))  # each source can only go to its own sink
    one = np.array([1, 1])
    prices = sink_prices(arcs, np.array([1, 5]), np.array([0, 1]), one, one)
    assert prices is not None
    assert violated_arcs(costs, np.array([0, 1]), prices).tolist() == [[False, True], [True, False]]


def hub_costs(num_student: int, num_teacher: int, rng: np.random.Generator) -> np.ndarray:
    """As between untrained networks: channels are near to or far from all others alike."""
    student, teacher = rng.random((num_student, 3)), rng.random((num_teacher, 3))
    return ((student[:, None] - teacher[None]) ** 2).sum(axis=2) * rng.random((num_student, 1)) ** 4


COSTS = {
    "random": lambda s, t, rng: rng.random((s, t)),
    "tied": lambda s, t, rng: rng.integers(0, 3, (s, t)).astype(float),
    "constant": lambda s, t, rng: np.full((s, t), 0.5),
    "hubs": hub_costs,
    "product": lambda s, t, rng: rng.random((s, 1)) * rng.random((1, t)),
    "sum": lambda s, t, rng: rng.random((s, 1)) + rng.random((1, t)),
    "outlier": lambda s, t, rng: np.where(rng.random((s, t)) < 1e-3, 1e6, rng.random((s, t))),
}


def check_optimum(cost: np.ndarray, mode: str) -> None:
    """Against SciPy on copied rows, and against the proof over all arcs."""
    matching = solve_matching(cost, mode)
    num_student, num_teacher = cost.shape
    spread = float(np.ptp(cost)) or 1.0
    if num_teacher < num_student:
        square = np.repeat(cost, -(-num_student // num_teacher), axis=1)
    else:
        square = np.repeat(cost, 1 if mode == "one_to_one" else num_teacher // num_student, axis=0)
    if mode != "balanced" or max(cost.shape) % min(cost.shape) == 0:
        optimum = square[linear_sum_assignment(square)].sum()
        assert matching.total_cost == pytest.approx(optimum, abs=1e-6 * spread)
    check_proof(cost, matching, mode)


def check_proof(cost: np.ndarray, matching: ChannelMatching, mode: str) -> None:
    student, teacher = matching.pairs
    integers = solver._as_integers(cost)  # of costs that differ by rounding alone, others have another optimum
    from_teacher = cost.shape[1] >= cost.shape[0]
    integers, source, sink = (integers.T, teacher, student) if from_teacher else (integers, student, teacher)
    num_sources, num_sinks = integers.shape
    base = 1 if mode == "one_to_one" else num_sources // num_sinks
    spare = num_sources - base * num_sinks
    least = np.full(num_sinks, base)
    most = least + (1 if spare and mode == "balanced" else 0)
    if mode != "balanced":  # a further sink takes what is left out
        integers = np.concatenate([integers, np.zeros((num_sources, 1), dtype=np.int64)], axis=1)
        least = most = np.append(least, spare)
    chosen = np.full(num_sources, num_sinks)
    chosen[source] = sink
    if mode != "balanced" and spare == 0:
        integers, least, most = integers[:, :-1], least[:-1], most[:-1]
    assert proves(integers, chosen, least, most)


@pytest.mark.parametrize(
    ("size", "mode"),
    [
        ((96, 384), "balanced"),
        ((96, 410), "balanced"),
        ((300, 80), "balanced"),
        ((96, 410), "even"),
        ((80, 150), "one_to_one"),
        ((128, 128), "one_to_one"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", COSTS)
def test_the_optimum_over_few_arcs_is_that_over_all(size: tuple[int, int], mode: str, kind: str) -> None:
    check_optimum(COSTS[kind](*size, np.random.default_rng(5)), mode)


def test_costs_with_many_ties_are_solved_over_few_arcs(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    flow = solver._flow
    monkeypatch.setattr(solver, "_flow", lambda arcs, *problem: solved.append(arcs.sum()) or flow(arcs, *problem))
    cost = COSTS["tied"](256, 512, np.random.default_rng(5))
    assert solve_matching(cost).total_cost == 0.0
    assert max(solved) < cost.size / 4


@pytest.mark.parametrize(("rounds", "share"), [(1, 1.0), (3, 1.0), (50, 1.0), (50, 0.125)])
@pytest.mark.parametrize("kind", ["hubs", "product", "tied"])
def test_bad_guesses_cost_time_and_nothing_else(
    kind: str, rounds: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "_ARCS_OF_A_SOURCE", 1)
    monkeypatch.setattr(solver, "_SINKHORN_ITERATIONS", 0)
    monkeypatch.setattr(solver, "_ROUNDS", rounds)
    monkeypatch.setattr(solver, "_LARGEST_SHARE", share)
    rng = np.random.default_rng(9)
    for size, mode in (((48, 192), "balanced"), ((48, 200), "balanced"), ((48, 200), "even"), ((90, 40), "balanced")):
        check_optimum(COSTS[kind](*size, rng), mode)
