"""A fuzzing target: a strategy for inputs, and a check that raises if an input is treated wrongly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Args:
        name: what is fuzzed.
        inputs: strategy that draws inputs.
        check: raises if an input is treated wrongly.
        cost: relative time of one input; the suite tries fewer inputs of a target with a higher cost.
    """

    name: str
    inputs: SearchStrategy[Any]
    check: Callable[[Any], None]
    cost: int = 1


def run(target: Target, examples: int, first: int | None = None, tried: Callable[[], None] = lambda: None) -> None:
    """Try inputs of a target. Raises the error of the smallest failing input, with the input as a note.

    Args:
        target: the target.
        examples: number of inputs.
        first: seed; without it hypothesis chooses, and stores failing inputs for the next time.
        tried: called for every input, also while a failing one is shrunk.
    """

    def one(value: Any) -> None:
        tried()
        target.check(value)

    remembered: dict[str, Any] = {} if first is None else {"database": None}
    chosen = settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[phase for phase in Phase if phase is not Phase.explain],
        report_multiple_bugs=False,
        **remembered,
    )
    test = chosen(given(target.inputs)(one))
    (test if first is None else seed(first)(test))()


def check_sentence(text: str) -> None:
    """Check that a message is one line of words without a traceback."""
    assert "\n" not in text.strip(), f"more than one line: {text!r}"
    assert len(text.split()) >= 4, f"no sentence: {text!r}"
    assert not re.search(r"Traceback|object at 0x", text), f"no sentence for people: {text!r}"
