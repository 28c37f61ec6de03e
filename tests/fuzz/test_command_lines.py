from __future__ import annotations

import pytest

from benchmarks.fuzzing.command_lines import DETECTRON2_TARGETS, TARGETS
from benchmarks.fuzzing.target import Target, run


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_must_hold(target: Target) -> None:
    run(target, examples=400 // target.cost)


@pytest.mark.parametrize("target", DETECTRON2_TARGETS, ids=lambda target: target.name)
def test_what_must_hold_with_detectron2(target: Target) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    run(target, examples=400 // target.cost)
