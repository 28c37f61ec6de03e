"""Kill a training, start it again, and compare its end with that of an undisturbed one (`make soak`):

    python -m benchmarks.soak --kills 20 [--seed 0] [--output benchmarks/results/soak_cpu.json]

A small detector is distilled through tools/train_net.py on generated images. Each round is one training that is killed
by SIGKILL up to three times, at random places of the program (see benchmarks/kill_at.py) or at random times, is started
again with --resume each time, and must end with the checkpoint of the undisturbed training, every tensor and number of
it to the bit. Needs Detectron2; minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.results import commit
from benchmarks.kill_at import PLACES
from benchmarks.speed.measure import machine

# the tiny data set, teacher and config are those of the tests
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "detection"))

from training_runs import ROOT, Workplace  # type: ignore[import-not-found]

__all__ = ["Kill", "Soak", "differences", "main"]

TIME = "time"  # a place that is no place: so many seconds after the first step
STARTED = "Starting training from iteration"  # as Detectron2 says it
SCHEDULE = (
    *("SOLVER.MAX_ITER", 12, "SOLVER.STEPS", "(8,)", "SOLVER.CHECKPOINT_PERIOD", 3, "MGD.CHECKPOINT.KEEP", 2),
    *("MGD.REMATCH.PERIODS", "[2]", "TEST.EVAL_PERIOD", 0),
)
_PATIENCE = 300.0  # seconds for one training of seconds


@dataclass(frozen=True)
class Kill:
    """When a training is to be killed.

    Args:
        place: of ``kill_at.PLACES``, or ``TIME``.
        count: which time that the process comes there, from 1.
        seconds: after the start of the training loop, where the place is ``TIME``.
    """

    place: str
    count: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s after the start" if self.place == TIME else f"{self.place} {self.count}"


@dataclass
class Fall:
    """A kill that was tried, and what the process left.

    Args:
        kill: when.
        begun: iterations that the killed process found finished; 0 for a new training.
        pointer: the file that ``last_checkpoint`` names; "" for none yet.
        leftovers: files cut short.
        survived: whether the training ended as the undisturbed one; None until it has.
    """

    kill: Kill
    begun: int
    pointer: str
    leftovers: list[str]
    survived: bool | None = None


@dataclass
class Run:
    """One process.

    Args:
        status: its exit status; minus the signal's number if it was killed.
        begun: iterations that it found finished; None if it did not come to the training loop.
        seconds: in all.
        loop: seconds from the start of the training loop to the end.
        text: what it said.
    """

    status: int
    begun: int | None
    seconds: float
    loop: float
    text: str = field(repr=False)


class Soak:
    """Trainings of one tiny detector, disturbed or not.

    Args:
        folder: for data, teacher and outputs.
        overrides: KEY VALUE pairs after ``SCHEDULE``.
    """

    def __init__(self, folder: Path, *overrides: Any) -> None:
        self.folder = folder
        self.workplace = Workplace(folder / "workplace")
        self.overrides = (*SCHEDULE, *overrides)
        self.outputs = 0

    def output(self) -> Path:
        """A new folder for a training."""
        self.outputs += 1
        return self.folder / f"training_{self.outputs:03d}"

    def run(self, output: Path, *overrides: Any, kill: Kill | None = None, tally: Path | None = None) -> Run:
        """Start or resume a training in a process of its own, and kill it."""
        resume = ("--resume",) if output.exists() else ()
        arguments = self.workplace.arguments(output, *self.overrides, *overrides, flags=resume)
        watch = ["--tally", str(tally)] if tally else []
        if kill is not None and kill.place != TIME:
            mark = output.with_name(f"{output.name}_killed_{time.monotonic_ns()}")
            watch = ["--place", kill.place, "--count", str(kill.count), "--mark", str(mark)]
        script = [str(ROOT / "tools" / "train_net.py"), *arguments]
        if watch:
            script = [str(ROOT / "benchmarks" / "kill_at.py"), *watch, *script]
        return _process([sys.executable, *script], kill.seconds if kill and kill.place == TIME else None)

    def killed(self, output: Path, kill: Kill, *overrides: Any) -> Fall | None:
        """Kill a training; None if it ended before the moment came.

        Raises:
            AssertionError: it ended in another way.
        """
        run = self.run(output, *overrides, kill=kill)
        if run.status == 0:
            return None
        assert run.status == -signal.SIGKILL, f"{kill}: status {run.status}\n{run.text[-4000:]}"
        pointer = output / "last_checkpoint"
        return Fall(
            kill,
            run.begun or 0,
            pointer.read_text() if pointer.exists() else "",
            sorted(path.name for path in output.glob(".*.tmp")),
        )

    def ended(self, output: Path, *overrides: Any) -> dict[str, Any]:
        """Run a training to its end, and read its last checkpoint.

        Raises:
            AssertionError: it failed.
        """
        run = self.run(output, *overrides)
        assert run.status == 0, f"status {run.status}\n{run.text[-6000:]}"
        return final(output)


def final(output: Path) -> dict[str, Any]:
    """The checkpoint of a finished training."""
    return torch.load(output / "model_final.pth", weights_only=True)


def differences(one: Any, other: Any, path: str = "checkpoint") -> Iterator[str]:
    """Where two checkpoints differ, in type, number or any bit of a tensor."""
    if type(one) is not type(other):
        yield path
    elif isinstance(one, torch.Tensor):
        if not (one.dtype == other.dtype and torch.equal(one, other)):
            yield path
    elif isinstance(one, dict):
        for key in {**one, **other}:
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield path
        for index, (left, right) in enumerate(zip(one, other)):
            yield from differences(left, right, f"{path}[{index}]")
    elif one != other:
        yield path


def _process(command: list[str], kill_after: float | None) -> Run:
    """Run a training; ``kill_after`` the start of its loop, in seconds, kill it."""
    begin = time.monotonic()
    started, begun, said = begin, None, []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
    )
    timers = [threading.Timer(_PATIENCE, process.kill)]
    timers[0].start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if STARTED in line and begun is None:
                started, begun = time.monotonic(), int(line.rsplit(maxsplit=1)[1])
                if kill_after is not None:
                    timers.append(threading.Timer(kill_after, process.kill))
                    timers[-1].start()
        status = process.wait()
    finally:
        process.kill()
        for timer in timers:
            timer.cancel()
    end = time.monotonic()
    return Run(status, begun, end - begin, end - started, "".join(said))


class _Draw:
    """Random moments: places in turn, so that none is left out, and times between them."""

    def __init__(self, seed: int, tally: dict[str, int], loop: float) -> None:
        self.random = random.Random(seed)
        self.tally = tally
        self.loop = loop
        self.waiting: list[str] = []

    def kills(self, number: int) -> list[Kill]:
        """For one training; those after the first come early, for they meet a training that is partly done."""
        return [self._kill(1.0 if index == 0 else 0.3) for index in range(number)]

    def _kill(self, share: float) -> Kill:
        if not self.waiting:
            self.waiting = [*self.tally, *[TIME] * (len(self.tally) // 2)]
            self.random.shuffle(self.waiting)
        place = self.waiting.pop()
        if place == TIME:
            return Kill(TIME, seconds=round(self.random.uniform(0, share * self.loop), 3))
        return Kill(place, self.random.randint(1, max(1, round(share * self.tally[place]))))


def soak(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Train undisturbed, then kill until ``kills`` have been tried.

    Returns:
        dict: ``tried``, ``survived``, ``falls`` (see :class:`Fall`), ``rounds``, ``missed`` (moments that a resumed
        training never came to), ``differences`` and seconds.
    """
    begin = time.monotonic()
    place = Soak(folder)
    plain = place.run(place.output())
    assert plain.status == 0, plain.text[-6000:]
    wanted = final(folder / "training_001")
    watched, tally = place.output(), folder / "tally.json"
    place.run(watched, tally=tally)
    different = [*differences(wanted, final(watched))]
    assert not different, f"being watched changes a training: {different}"
    draw = _Draw(seed, json.loads(tally.read_text()), plain.loop)
    _say(f"undisturbed: {plain.seconds:.1f} s, of which the loop {plain.loop:.1f} s; comes to {draw.tally}")

    falls: list[Fall] = []
    rounds, missed = 0, 0
    while len(falls) < kills:
        rounds += 1
        wave = draw.kills(draw.random.randint(1, min(3, kills - len(falls))))
        own, found = _round(place, wave, wanted, draw.random, f"round {rounds}")
        falls += own
        different += [f"round {rounds}: {where}" for where in found]
        missed += len(own) < len(wave)
    return {
        "tried": len(falls),
        "survived": sum(bool(fall.survived) for fall in falls),
        "rounds": rounds,
        "missed": missed,
        "differences": different,
        "seconds": round(time.monotonic() - begin, 1),
        "undisturbed_seconds": round(plain.seconds, 1),
        "falls": [asdict(fall) for fall in falls],
    }


def _round(
    place: Soak, kills: Sequence[Kill], wanted: dict[str, Any], draw: random.Random, name: str
) -> tuple[list[Fall], list[str]]:
    """One training: killed, started again, to the end. The kills that came, and where its end is another."""
    output = place.output()
    falls: list[Fall] = []
    for kill in kills:
        workers = draw.choice([0, 2])
        fall = place.killed(output, kill, "DATALOADER.NUM_WORKERS", workers)
        if fall is None:
            _say(f"{name}: over before {kill}")
            end = final(output)
            break
        falls.append(fall)
        left = f"pointer at {fall.pointer or 'nothing'}, leftovers: {', '.join(fall.leftovers) or 'none'}"
        _say(f"{name}: begun at {fall.begun}, killed at {kill} with {workers} loading processes; {left}")
    else:
        end = place.ended(output)
    different = [*differences(wanted, end)]
    for fall in falls:
        fall.survived = not different
    _say(f"{name}: ends {'as the undisturbed training' if not different else f'otherwise: {different}'}")
    shutil.rmtree(output)
    return falls, different


def as_table(falls: Sequence[dict[str, Any]]) -> str:
    """Markdown: kills tried and survived, by place."""
    lines = ["| where | tried | survived |", "| --- | --- | --- |"]
    for place, what in [*PLACES.items(), (TIME, "at a random time")]:
        own = [fall["survived"] for fall in falls if fall["kill"]["place"] == place]
        if own:
            lines.append(f"| {what} | {len(own)} | {sum(own)} |")
    survived = sum(fall["survived"] for fall in falls)
    return "\n".join([*lines, f"| all | {len(falls)} | {survived} |"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak; the exit status is 0 if every kill was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a json file for the figures")
    options = parser.parse_args(arguments)
    if options.kills < 1:
        parser.error(f"--kills must be at least 1, got {options.kills}.")
    said = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.soak", *said]),
        "commit": commit(),
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        result.update(soak(Path(folder), options.kills, options.seed))
    print(as_table(result["falls"]))
    print(f"{result['survived']} of {result['tried']} kills survived, in {result['seconds']:.0f} s")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["survived"] == result["tried"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
