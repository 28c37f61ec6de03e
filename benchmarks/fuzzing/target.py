"""A target: where inputs come from, and a check that raises where one of them is treated wrongly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

__all__ = ["Target", "check_sentence", "run"]


@dataclass(frozen=True)
class Target:
    """
    Args:
        name: what is fuzzed.
        inputs: where inputs come from.
        check: raises where one is treated wrongly.
        cost: what one input takes beside others', so that the quick suite tries fewer of the dear ones.
    """

    name: str
    inputs: SearchStrategy[Any]
    check: Callable[[Any], None]
    cost: int = 1


def run(target: Target, examples: int, first: int | None = None, tried: Callable[[], None] = lambda: None) -> None:
    """Try inputs of a target; raises what the smallest wrong one raises, with the input as a note.

    Args:
        target: the target.
        examples: how many inputs.
        first: decides which; by default hypothesis does, and remembers wrong ones for the next time.
        tried: called for every input, also those by which a wrong one is made smaller.
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
    """A message is one line, with words in it, that does not end in the middle."""
    assert "\n" not in text.strip(), f"more than one line: {text!r}"
    assert len(text.split()) >= 4, f"no sentence: {text!r}"
    assert not re.search(r"Traceback|object at 0x", text), f"no sentence for people: {text!r}"
