"""The state of a distiller and of its running costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from d2_mgd.distill import MatchingGuidedDistiller
from tests.distill.test_distiller import CHANNELS, batch, ready


@pytest.mark.parametrize(
    "options", [{}, {"reducer": "sm"}, {"align": "conv1x1"}, {"norm": "gn", "mode": "even"}], ids=str
)
def test_state_restores_everything_and_holds_no_network(options: dict[str, Any]) -> None:
    distiller = ready(margins={"a": -torch.rand(10)}, **options)
    maps = batch(seed=5)
    distiller(*maps)
    state = copy.deepcopy(distiller.state_dict())
    other = MatchingGuidedDistiller(CHANNELS, **{"loss": "mse", **options})
    other.load_state_dict(state)
    for name, loss in distiller(*maps).items():
        assert torch.equal(loss, other(*maps)[name])
    assert other.matchings == distiller.matchings
    assert not any("margin" in key for key in state)


@pytest.mark.parametrize("num_teacher", [6, 7])
def test_a_state_of_another_teacher_is_refused(num_teacher: int) -> None:
    """Whose groups are as long: of 8 channels, as of 6, a student of 4 takes two each."""
    state = {}
    for width in (8, num_teacher):
        distiller = MatchingGuidedDistiller({"a": (4, width)})
        distiller.observe({"a": torch.randn(2, 4, 3, 3)}, {"a": torch.randn(2, width, 3, 3)})
        distiller.rematch()
        state[width] = distiller.state_dict()
    MatchingGuidedDistiller({"a": (4, 8)}).load_state_dict(MatchingGuidedDistiller({"a": (4, 8)}).state_dict())
    with pytest.raises(RuntimeError, match="feature a: the stored matching is not one of these channels"):
        MatchingGuidedDistiller({"a": (4, num_teacher)}).load_state_dict(state[8])
    with pytest.raises(RuntimeError, match=f"feature a: the stored matching is of {num_teacher} teacher channels"):
        MatchingGuidedDistiller({"a": (4, 8)}).load_state_dict(state[num_teacher])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (({"a.x": (4, 8)}, "auto"), r"of the features \['a.x', 'b'\], this one of \['a.x'\]"),
        (({"a.x": (4, 8), "b": (4, 8)}, "fixed"), "the balance auto, this one fixed"),
    ],
)
def test_a_state_of_other_features_or_balance_is_refused(changed: tuple[Any, str], expected: str) -> None:
    state = MatchingGuidedDistiller({"a.x": (4, 8), "b": (4, 8)}, balance="auto").state_dict()
    channels, balance = changed
    with pytest.raises(ValueError, match=expected):
        MatchingGuidedDistiller(channels, balance=balance).load_state_dict(state)


def test_running_costs_resume() -> None:
    whole, half = MatchingGuidedDistiller(CHANNELS), MatchingGuidedDistiller(CHANNELS)
    whole.observe(*batch())
    half.load_cost_state_dict(whole.cost_state_dict())
    for distiller in (whole, half):
        distiller.observe(*batch(seed=3))
    first, second = whole.rematch(), half.rematch()
    assert all((first[name].cost == second[name].cost).all() for name in CHANNELS)
    with pytest.raises(ValueError, match="stored costs are of"):
        MatchingGuidedDistiller({"a": (4, 10)}).load_cost_state_dict(whole.cost_state_dict())
