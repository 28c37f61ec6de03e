"""The optimum equals SciPy's on the expanded problem, and brute force at small sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from d2_mgd.matching import ChannelCost, solve_matching


def expanded_optimum(cost: np.ndarray, mode: str) -> float:
    """The least total by SciPy: rows are copied as often as a channel may be used, dummies take what is left out."""
    num_student, num_teacher = cost.shape
    if mode == "balanced" and num_teacher < num_student:
        return expanded_optimum(cost.T, mode)
    base, spare = divmod(num_teacher, num_student)
    forbidden = 1e6
    if mode == "one_to_one":
        rows, dummies = cost, np.zeros((num_teacher - num_student, num_teacher))
    elif mode == "even":
        rows, dummies = np.repeat(cost, base, axis=0), np.zeros((spare, num_teacher))
    else:  # base copies must be used; of one more copy each, exactly `spare` are
        rows = np.concatenate([np.repeat(cost, base, axis=0), cost])
        columns = np.full((rows.shape[0], num_student - spare), forbidden)
        columns[num_student * base :] = 0.0
        rows = np.concatenate([rows, columns], axis=1)
        dummies = np.zeros((0, rows.shape[1]))
    expanded = np.concatenate([rows, dummies])
    row, column = linear_sum_assignment(expanded)
    return float(expanded[row, column].sum())


def random_features(num_student: int, num_teacher: int, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(6, 4, 25, generator=generator)
    student = torch.relu(torch.einsum("sk,knp->nsp", torch.randn(num_student, 6, generator=generator), basis))
    teacher = torch.relu(torch.einsum("tk,knp->ntp", torch.randn(num_teacher, 6, generator=generator), basis))
    cost = ChannelCost(num_student, num_teacher)
    cost.update(student.unflatten(2, (5, 5)), teacher.unflatten(2, (5, 5)))
    return cost.mean().numpy()


SIZES = [(1, 1), (1, 7), (7, 1), (4, 4), (4, 8), (5, 13), (16, 40), (13, 5), (40, 16), (24, 116), (32, 33)]


SIZES_AND_MODES = [
    (size, mode)
    for size in SIZES
    for mode in ("balanced", "even", "one_to_one")
    if mode == "balanced" or size[1] >= size[0]
]


@pytest.mark.parametrize(("size", "mode"), SIZES_AND_MODES, ids=str)
@pytest.mark.parametrize("kind", ["random", "tied", "constant", "features", "negative"])
def test_total_is_the_least(size: tuple[int, int], mode: str, kind: str) -> None:
    num_teacher = size[1]
    rng = np.random.default_rng(7)
    cost = {
        "random": lambda: rng.random(size),
        "tied": lambda: rng.integers(0, 3, size).astype(float),
        "constant": lambda: np.full(size, 1.25),
        "features": lambda: random_features(*size, seed=3),
        "negative": lambda: -5.0 + rng.random(size) * 1e-3,
    }[kind]()
    matching = solve_matching(cost, mode)
    assert matching.total_cost == pytest.approx(expanded_optimum(cost, mode), abs=1e-6)
    assert matching.total_cost == pytest.approx(cost[matching.pairs].sum(), abs=1e-9)
    check_mode(matching.group_sizes, np.bincount(matching.pairs[1], minlength=num_teacher), size, mode)


def check_mode(sizes: np.ndarray, uses: np.ndarray, size: tuple[int, int], mode: str) -> None:
    num_student, num_teacher = size
    if mode == "one_to_one":
        assert (sizes == 1).all() and uses.max() == 1
    elif mode == "even":
        assert (sizes == num_teacher // num_student).all() and uses.max() == 1
    elif num_teacher >= num_student:
        assert (uses == 1).all() and sizes.max() - sizes.min() <= 1
    else:
        assert (sizes == 1).all() and uses.max() - uses.min() <= 1


@given(
    num_student=st.integers(1, 4),
    num_teacher=st.integers(1, 5),
    mode=st.sampled_from(["balanced", "even", "one_to_one"]),
    seed=st.integers(0, 10_000),
    tied=st.booleans(),
)
def test_brute_force(num_student: int, num_teacher: int, mode: str, seed: int, tied: bool) -> None:
    if mode != "balanced" and num_teacher < num_student:
        return
    rng = np.random.default_rng(seed)
    cost = (
        rng.integers(0, 3, (num_student, num_teacher)).astype(float) if tied else rng.random((num_student, num_teacher))
    )
    best = np.inf
    if num_teacher >= num_student:  # each teacher channel picks a student channel or none
        for guided in itertools.product(range(-1, num_student), repeat=num_teacher):
            sizes = np.bincount([g for g in guided if g >= 0], minlength=num_student)
            left_out = guided.count(-1)
            base = num_teacher // num_student
            allowed = {
                "balanced": left_out == 0 and sizes.min() >= base and sizes.max() - sizes.min() <= 1,
                "even": (sizes == base).all(),
                "one_to_one": (sizes == 1).all(),
            }[mode]
            if allowed:
                best = min(best, sum(cost[g, t] for t, g in enumerate(guided) if g >= 0))
    else:  # each student channel picks a teacher channel
        for guide in itertools.product(range(num_teacher), repeat=num_student):
            uses = np.bincount(guide, minlength=num_teacher)
            if uses.max() - uses.min() <= 1:
                best = min(best, sum(cost[s, t] for s, t in enumerate(guide)))
    assert solve_matching(cost, mode).total_cost == pytest.approx(best, abs=1e-9)


def test_leaving_channels_out_is_part_of_the_optimum() -> None:
    """The published code drops the last T mod S teacher channels by index; here the cheap ones are last."""
    cost = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 2.0]])
    assert solve_matching(cost, "even").groups.tolist() == [[2], [1]]
    by_index = min(cost[0, 0] + cost[1, 1], cost[0, 1] + cost[1, 0])
    assert solve_matching(cost, "even").total_cost < by_index


def test_permuted_channels_are_found() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(48)
    cost = 1.0 + rng.random((48, 48))
    cost[np.arange(48), order] = 0.0
    matching = solve_matching(torch.from_numpy(cost))
    assert matching.groups[:, 0].tolist() == order.tolist() and matching.total_cost == 0.0


def test_tiny_differences_beside_large_costs_are_seen() -> None:
    cost = np.array([[1.0, 1.0 + 1e-9], [1.0, 1.0]])
    assert solve_matching(cost).groups.tolist() == [[0], [1]]
    assert solve_matching(cost[::-1].copy()).groups.tolist() == [[1], [0]]


def test_costs_whose_range_is_beyond_float64() -> None:
    assert solve_matching(np.array([[1.7e308, -1.7e308], [0.0, 0.0]])).groups.tolist() == [[1], [0]]
    assert solve_matching(np.array([[-1.7e308, 1.7e308], [0.0, 0.0]])).groups.tolist() == [[0], [1]]


def test_full_size_is_exact() -> None:
    cost = np.random.default_rng(1).random((464, 2048))
    matching = solve_matching(cost)
    assert matching.total_cost == pytest.approx(expanded_optimum(cost, "balanced"), abs=1e-6)
    assert sorted(set(matching.group_sizes.tolist())) == [4, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
def test_tensors_of_any_dtype(dtype: torch.dtype) -> None:
    cost = torch.tensor([[0, 2], [1, 1]]).to(dtype)
    assert solve_matching(cost).total_cost == 1.0


@pytest.mark.parametrize(
    ("cost", "mode", "message"),
    [
        ([[0.0, float("nan")], [1.0, 2.0]], "balanced", "nan at student channel 0, teacher channel 1"),
        ([[0.0, 1.0], [float("inf"), 2.0]], "balanced", "inf at student channel 1, teacher channel 0"),
        ([1.0, 2.0], "balanced", r"matrix \(S, T\).*\(2,\)"),
        (np.zeros((0, 3)), "balanced", r"\(0, 3\)"),
        (np.zeros((2, 3), dtype=complex), "balanced", "real numbers"),
        (np.zeros((2, 3)), "nearest", "unknown matching mode 'nearest'; there are: balanced, even, one_to_one"),
        (np.zeros((3, 2)), "even", "T=2 < S=3"),
        (np.zeros((3, 2)), "one_to_one", "T=2 < S=3"),
    ],
)
def test_bad_input_is_one_sentence(cost: object, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_matching(cost, mode)  # type: ignore[arg-type]
