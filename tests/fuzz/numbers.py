"""Matchings against SciPy's optimum, and reducers against their definitions.

Shape shorthand: N images, S student channels, T teacher channels, G the size of the largest group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from d2_mgd.distill import REDUCERS
from d2_mgd.matching import MODES, ChannelMatching, solve_matching
from tests.fuzz.target import Target, check_sentence

_SOLVER_ERROR = 2.0**-40  # of the range of the costs, a pair: costs are rounded to 2^-40 of it


# --- the solver ---


def expanded_optimum(cost: np.ndarray, mode: str) -> float:
    """The least total by SciPy: rows are copied as often as a channel may be used, dummies take what is left out.

    Args:
        cost: (S, T).
        mode: of :func:`solve_matching`.
    """
    num_student, num_teacher = cost.shape
    if mode == "balanced" and num_teacher < num_student:
        return expanded_optimum(cost.T, mode)
    base, spare = divmod(num_teacher, num_student)
    if mode == "one_to_one":
        row, column = linear_sum_assignment(cost)
        return float(cost[row, column].sum())
    if mode == "even":
        rows = np.concatenate([np.repeat(cost, base, axis=0), np.zeros((spare, num_teacher))])
        row, column = linear_sum_assignment(rows)
        return float(rows[row, column].sum())
    # `base` copies of a row must be used; of one more copy of each, exactly `spare` are
    rows = np.concatenate([np.repeat(cost, base, axis=0), cost])
    columns = np.full((rows.shape[0], num_student - spare), np.inf)
    columns[num_student * base :] = 0.0
    rows = np.concatenate([rows, columns], axis=1)
    row, column = linear_sum_assignment(rows)
    return float(rows[row, column].sum())


@st.composite
def _costs(draw: st.DrawFn) -> tuple[np.ndarray, str]:
    """(S, T) costs of any size and scale, often tied, and a mode that allows them."""
    shape = draw(st.integers(1, 10)), draw(st.integers(1, 24))
    modes = MODES if shape[1] >= shape[0] else ("balanced",)
    values = draw(
        st.sampled_from(
            [
                st.floats(0.0, 4.0),
                st.floats(allow_nan=False, allow_infinity=False),
                st.integers(0, 2).map(float),
                st.floats(-1e-300, 1e-300),
                st.floats(1e307, 1.7e308),
                st.floats(1.0, 1.0 + 1e-12),
            ]
        )
    )
    return draw(arrays.arrays(np.float64, shape, elements=values)), draw(st.sampled_from(modes))


def _check_optimum(value: tuple[np.ndarray, str]) -> None:
    cost, mode = value
    with np.errstate(over="ignore"):  # of a total that float64 cannot hold
        matching = solve_matching(cost, mode)
    student, teacher = matching.pairs
    _check_shape_of(matching, cost.shape, mode)
    # in units of the range, so that SciPy's sums do not overflow where the costs themselves do not
    half = cost / 2 - cost.min() / 2
    relative = half / (half.max() or 1.0)
    found, least = float(relative[student, teacher].sum()), expanded_optimum(relative, mode)
    assert found <= least + student.size * _SOLVER_ERROR + 1e-12, f"{found} where {least} is possible"
    with np.errstate(over="ignore"):
        total = cost[student, teacher].sum()
    assert matching.total_cost == total or abs(matching.total_cost - total) <= 1e-9 * np.abs(cost).max()


def _check_shape_of(matching: ChannelMatching, shape: tuple[int, ...], mode: str) -> None:
    num_student, num_teacher = shape
    sizes, uses = matching.group_sizes, np.bincount(matching.pairs[1], minlength=num_teacher)
    assert (matching.num_student, matching.num_teacher) == shape
    if mode == "one_to_one":
        assert (sizes == 1).all() and uses.max() == 1
    elif mode == "even":
        assert (sizes == num_teacher // num_student).all() and uses.max() == 1
    elif num_teacher >= num_student:
        assert (uses == 1).all() and sizes.max() - sizes.min() <= 1
    else:
        assert (sizes == 1).all() and uses.max() - uses.min() <= 1


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.complex_numbers(),
    st.just([]),
    st.just({}),
)
_ODD_COSTS = st.one_of(
    _SCALARS,
    st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=8),
    arrays.arrays(
        st.sampled_from(["f2", "f4", "f8", "i1", "i8", "u8", "?", "c8", "O", "U2", "M8[s]"]),
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    ),
    st.tuples(
        st.sampled_from([torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64]),
        st.lists(st.integers(0, 3), max_size=3),
    ).map(lambda drawn: torch.ones(drawn[1], dtype=drawn[0])),
)  # fmt: skip


def _check_odd(value: tuple[Any, Any]) -> None:
    cost, mode = value
    try:
        matching = solve_matching(cost, mode)
    except ValueError as error:
        check_sentence(str(error))
        return
    dense = cost.double().numpy() if isinstance(cost, Tensor) else np.asarray(cost, dtype=np.float64)
    _check_shape_of(matching, dense.shape, mode)


@st.composite
def _groups(draw: st.DrawFn) -> tuple[Any, int]:
    shape = arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
    numbers = draw(arrays.arrays(np.int64, shape, elements=st.integers(-2, 6)))
    return numbers.astype(draw(st.sampled_from(["i8", "i1", "f4"]))), draw(st.integers(-1, 7))


def _check_groups(value: tuple[Any, int]) -> None:
    groups, num_teacher = value
    try:
        matching = ChannelMatching(groups, num_teacher)
    except ValueError as error:
        check_sentence(str(error))
        return
    student, teacher = matching.pairs
    assert set(student.tolist()) == set(range(matching.num_student))
    assert ((teacher >= 0) & (teacher < num_teacher)).all()
    assert matching.changed(matching) == 0.0 and matching == ChannelMatching(matching.groups, num_teacher)
    if num_teacher >= matching.num_student:
        assert np.unique(teacher).size == teacher.size


# --- reducers ---


@st.composite
def _reductions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Teacher maps (N, T, H, W), groups (S, G), margins (T,) or None, a seed."""
    num_teacher = draw(st.integers(1, 9))
    order = draw(st.permutations(range(num_teacher)))
    cuts = sorted(draw(st.sets(st.integers(1, num_teacher), min_size=1)))
    members = [order[start:end] for start, end in zip([0, *cuts], cuts)]
    width = max(map(len, members))
    groups = torch.tensor([list(group) + [-1] * (width - len(group)) for group in members])
    shape = (draw(st.integers(0, 2)), num_teacher, draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    largest = float(torch.finfo(dtype).max) / 2  # a difference of two is within the dtype
    values = st.sampled_from([st.floats(-4, 4, width=16), st.sampled_from([0.0, -0.0, largest, -largest, 1.0, -1.0])])
    numbers = draw(values.flatmap(lambda kind: arrays.arrays(np.float64, shape, elements=kind)))
    teacher = torch.from_numpy(numbers).to(dtype)
    if draw(st.booleans()):
        teacher = teacher.to(memory_format=torch.channels_last)
    margin = torch.linspace(-1.0, 0.5, num_teacher) if draw(st.booleans()) else None
    return teacher, groups, margin, draw(st.integers(0, 2**31))


def _check_reducers(value: tuple[Tensor, Tensor, Tensor | None, int]) -> None:
    teacher, groups, margin, seed = value
    for name in ("amp", "max", "sp", "mean", "rd", "sm"):
        generator = torch.Generator().manual_seed(seed)
        try:
            guided, guided_margin = REDUCERS.get(name)(teacher, groups, margin, generator)
        except ValueError as error:
            assert name == "sm" and groups.shape[1] > 1
            check_sentence(str(error))
            continue
        images, _, height, width = teacher.shape
        assert guided.shape == (images, len(groups), height, width)
        assert (guided_margin is None) == (margin is None)
        for channel, row in enumerate(groups):
            group = row[row >= 0]
            own = None if margin is None or guided_margin is None else (margin[group], guided_margin[channel])
            _check_channel(name, teacher[:, group], guided[:, channel], own)


def _check_channel(name: str, group: Tensor, guided: Tensor, margins: tuple[Tensor, Tensor] | None) -> None:
    """One guided channel (N, H, W) against the members of its group (N, G, H, W)."""
    is_member = (guided.unsqueeze(1) == group).any(dim=1)
    if name == "mean":
        wide = group.double()
        scale = wide.abs().max().item() if wide.numel() else 0.0  # large members may cancel
        torch.testing.assert_close(guided.double(), (wide / wide.shape[1]).sum(dim=1), rtol=0.0, atol=1e-6 * scale)
    else:
        assert guided.dtype == group.dtype and is_member.all()
    if name == "amp" and group.numel():
        assert torch.equal(guided.abs(), group.abs().amax(dim=1))
    if name in ("max", "sp") and group.numel():
        assert torch.equal(guided, group.amax(dim=1))
    if group.shape[1] == 1:
        assert torch.equal(guided, group[:, 0].to(guided.dtype))
    if margins is not None:
        members, margin = margins
        expected = {"max": members.max(), "sp": members.max(), "amp": members.mean(), "mean": members.mean()}
        assert torch.isclose(margin, expected[name]) if name in expected else (margin == members).any()


TARGETS = [
    Target("solver: the optimum", _costs(), _check_optimum),
    Target("solver: odd input", st.tuples(_ODD_COSTS, st.one_of(st.sampled_from(MODES), _SCALARS)), _check_odd),
    Target("matching: any groups", _groups(), _check_groups),
    Target("reducers", _reductions(), _check_reducers, cost=4),
]
