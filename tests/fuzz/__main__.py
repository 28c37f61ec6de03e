"""Fuzzing for some minutes (`make fuzz`), from the root of the repository:

    python -m tests.fuzz --minutes 4 [--only solver,images] [--seed 0] [--output benchmarks/results/fuzz_cpu.json]

Inputs are drawn by hypothesis. `numbers` has the targets for matchings and reducers, `files` those for weights, images
and json, `command_lines` those for options and configs. Each target says what must hold of every input.
`test_targets.py` tries some inputs of each in the suite.

Each target gets an equal share of the time. Prints a line a target: inputs tried and failures, with the smallest input
for each. Failures at the same place count once. The exit status is 1 if there was a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, machine, versions
from tests.fuzz import command_lines, files, numbers
from tests.fuzz.target import Target, run

_EXAMPLES = 40  # between two looks at the clock
_PACKAGES = ("hypothesis", "pillow", "safetensors", "pyyaml", "scipy")


@dataclass
class Outcome:
    """How the inputs of one target ended.

    Args:
        target: its name.
        inputs: number of inputs, those that hypothesis used to shrink a failing one included.
        seconds: time that this took.
        failures: error, place, and the smallest input that raises it.
    """

    target: str
    inputs: int = 0
    seconds: float = 0.0
    failures: list[dict[str, str]] = field(default_factory=list)

    def count(self) -> None:
        self.inputs += 1

    def add(self, error: BaseException) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        if all((known["error"], known["where"]) != (type(error).__name__, where) for known in self.failures):
            shown = "\n".join(getattr(error, "__notes__", []))
            self.failures.append(
                {"error": type(error).__name__, "where": where, "message": str(error)[:500], "input": shown[:2000]}
            )


def targets(only: Sequence[str] = ()) -> list[Target]:
    """Return all targets that this machine can try, or those whose name begins with one of ``only``."""
    found = [*numbers.TARGETS, *files.TARGETS, *command_lines.TARGETS]
    if find_spec("detectron2") is not None:
        found += [*files.DETECTRON2_TARGETS, *command_lines.DETECTRON2_TARGETS]
    return [target for target in found if not only or target.name.startswith(tuple(only))]


def fuzz(target: Target, seconds: float, seed: int) -> Outcome:
    """Try inputs of one target for some time.

    Args:
        target: the target.
        seconds: at least.
        seed: of the first batch of inputs; each further batch adds 1.
    """
    outcome, start = Outcome(target.name), time.monotonic()
    while outcome.seconds < seconds:
        try:
            run(target, _EXAMPLES, seed, outcome.count)
        except Exception as error:
            outcome.add(error)
        seed += 1
        outcome.seconds = time.monotonic() - start
    return outcome


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what libraries print about broken input, also those that are not Python."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _line(outcome: Outcome) -> str:
    return f"{outcome.target}: {outcome.inputs:,} inputs in {outcome.seconds:.0f} s, {len(outcome.failures)} failures"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="for all targets together")
    parser.add_argument("--only", default="", help="names, or how they begin, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="decides the inputs")
    parser.add_argument("--output", type=Path, help="write the figures to this json file")
    options = parser.parse_args(arguments)
    chosen = targets([name.strip() for name in options.only.split(",") if name.strip()])
    if not chosen or not options.minutes > 0:
        parser.error(f"--only {options.only!r} names no target, or --minutes is not above 0.")
    outcomes = []
    for target in chosen:
        with _quiet():
            outcomes.append(fuzz(target, options.minutes * 60 / len(chosen), options.seed))
        print(_line(outcomes[-1]), flush=True)
        for failure in outcomes[-1].failures:
            print(f"  {failure['error']} at {failure['where']}: {failure['message']}\n{failure['input']}", flush=True)
    failures = sum(len(outcome.failures) for outcome in outcomes)
    print(f"{sum(outcome.inputs for outcome in outcomes):,} inputs, {failures} failures")
    if options.output:
        _write(options.output, options, outcomes)
    return int(failures > 0)


def _write(path: Path, options: argparse.Namespace, outcomes: Sequence[Outcome]) -> None:
    about = machine()
    about["versions"] |= versions(_PACKAGES)
    result: dict[str, Any] = {
        "command": f"python -m tests.fuzz --minutes {options.minutes:g} --seed {options.seed}"
        + (f" --only '{options.only}'" if options.only else ""),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": about,
        "inputs": sum(outcome.inputs for outcome in outcomes),
        "failures": sum(len(outcome.failures) for outcome in outcomes),
        "targets": [{**asdict(outcome), "seconds": round(outcome.seconds, 1)} for outcome in outcomes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
