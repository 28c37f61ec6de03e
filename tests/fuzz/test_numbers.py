from __future__ import annotations

import pytest

from benchmarks.fuzzing.numbers import TARGETS
from benchmarks.fuzzing.target import Target, run


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_must_hold(target: Target) -> None:
    run(target, examples=200 // target.cost)
