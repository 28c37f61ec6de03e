"""When to rematch in log-spaced steps, and how much the distillation counts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from d2_mgd.distill import RematchSchedule, WeightSchedule


def due(schedule: RematchSchedule, steps: int) -> list[int]:
    return [step for step in range(steps + 1) if schedule.due(step)]


def test_log_spaced_rematches() -> None:
    assert due(RematchSchedule.log_spaced(10, 1000, 3), 2000) == [0, 10, 100, 1000]
    assert due(RematchSchedule.log_spaced(1, 64, 7, start=False), 100) == [1, 2, 4, 8, 16, 32, 64]
    assert due(RematchSchedule.log_spaced(1, 4, 9), 10) == [0, 1, 2, 3, 4]  # steps that round to one are one
    assert due(RematchSchedule.log_spaced(5, 90, 1), 100) == [0, 90]


def test_extra_steps_join_the_periods() -> None:
    assert due(RematchSchedule([4], at=[1, 6]), 9) == [0, 1, 4, 6, 8]


@pytest.mark.parametrize("arguments", [(0, 10, 3), (10, 5, 3), (1, 10, 0)])
def test_log_spaced_rematches_that_do_not_fit(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="log-spaced rematches need 0 < first <= last"):
        RematchSchedule.log_spaced(*arguments)
    with pytest.raises(ValueError, match="rematch steps must be positive"):
        RematchSchedule(at=[0])


def test_decays() -> None:
    assert [WeightSchedule().factor(step) for step in (0, 10**9)] == [1.0, 1.0]
    for decay, half in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        schedule = WeightSchedule(decay, start=10, stop=30)
        assert [schedule.factor(step) for step in (0, 9, 30, 99)] == [0.0, 0.0, 0.0, 0.0]
        assert schedule.factor(10) == 1.0
        assert schedule.factor(20) == pytest.approx(half)
        falling = [schedule.factor(step) for step in range(10, 30)]
        assert falling == sorted(falling, reverse=True)
    assert WeightSchedule("linear", stop=100).factor(25) == pytest.approx(0.75)
    assert WeightSchedule("cosine", stop=100).factor(25) == pytest.approx(0.5 + math.sqrt(0.5) / 2)


def test_decays_to_a_share() -> None:
    for decay in ("linear", "cosine"):
        falling = WeightSchedule(decay, start=10, stop=30, end=0.2)
        plain = WeightSchedule(decay, start=10, stop=30)
        for step in range(10, 30):
            assert falling.factor(step) == pytest.approx(0.2 + 0.8 * plain.factor(step))
        assert falling.factor(30) == 0.0
    assert WeightSchedule("constant", stop=30, end=0.2).factor(29) == 1.0


def test_active_between_start_and_stop() -> None:
    schedule = WeightSchedule(start=2, stop=5, warmup=3)
    assert [schedule.active(step) for step in range(7)] == [False, False, True, True, True, False, False]
    assert WeightSchedule().active(10**9)


def test_warm_up_multiplies() -> None:
    assert [WeightSchedule(warmup=4).factor(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    both = WeightSchedule("linear", start=2, stop=10, warmup=4)
    assert both.factor(4) == pytest.approx(0.5 * 0.75)


def test_a_share_multiplies_and_ends_it() -> None:
    schedule = WeightSchedule("linear", stop=10)
    schedule.share = 0.5
    assert schedule.factor(5) == 0.25
    schedule.share = 0.0
    assert not schedule.active(5) and schedule.factor(5) == 0.0


@pytest.mark.parametrize(
    ("metrics", "trained", "share"),
    [
        ((41.0, 31.0, 1.0), True, 0.25),
        ((41.0, 31.0, 1.0), False, 1.0),
        ((41.0, 0.5, 1.0), True, 1.0),  # worse than chance
        ((41.0, 41.0), True, 0.0),
        ((41.0, 41.5), False, 0.0),
        ((0.5, 0.4, 1.0), True, 1.0),  # a teacher that is worse than chance
    ],
)
def test_the_share_follows_from_the_distance_to_the_teacher(
    metrics: tuple[float, ...], trained: bool, share: float
) -> None:
    schedule = WeightSchedule()
    schedule.compare(*metrics, trained=trained)
    assert schedule.share == share


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "step"}, "unknown decay 'step' of the distillation weight; there are: constant, linear, cosine"),
        ({"decay": "linear"}, "a linear decay of the distillation weight needs a step at which it stops"),
        ({"start": 5, "stop": 5}, "0 <= start < stop"),
        ({"start": -1}, "0 <= start < stop"),
        ({"warmup": -1}, "warm-up of 0 or more"),
        ({"decay": "linear", "stop": 5, "end": 1.1}, "a share of 0 to 1 of itself, got 1.1"),
    ],
)
def test_weight_schedules_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSchedule(**options)
