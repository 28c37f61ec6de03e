"""Some inputs of every target; the long form is `make fuzz`."""

from __future__ import annotations

import pytest

from tests.fuzz import command_lines, files, numbers
from tests.fuzz.target import Target, run


def _examples(target: Target) -> int:
    return (400 if target in [*command_lines.TARGETS, *command_lines.DETECTRON2_TARGETS] else 200) // target.cost


@pytest.mark.filterwarnings("ignore")  # Pillow and torch warn about what they read
@pytest.mark.parametrize(
    "target", [*numbers.TARGETS, *files.TARGETS, *command_lines.TARGETS], ids=lambda target: target.name
)
def test_what_must_hold(target: Target) -> None:
    run(target, _examples(target))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "target", [*files.DETECTRON2_TARGETS, *command_lines.DETECTRON2_TARGETS], ids=lambda target: target.name
)
def test_what_must_hold_with_detectron2(target: Target) -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    run(target, _examples(target))
