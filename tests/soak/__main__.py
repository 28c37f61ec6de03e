"""Kill trainings, start them again, and compare their ends with that of an undisturbed one (`make soak`):

    python -m tests.soak --kills 20 [--seed 0] [--output benchmarks/results/soak_cpu.json]

A small detector is distilled through tools/train_net.py on generated images. Each round is one training. It is killed
by SIGKILL up to three times, at random places of the program (see kill_at.py) or at random times, and is started again
with --resume each time. It must end with the checkpoint of the undisturbed training, equal in every tensor and number
to the bit. Needs Detectron2; takes minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import commit, machine
from benchmarks.tables import markdown
from tests.soak.kill_at import PLACES
from tests.soak.trainings import TIME, Fall, Kill, Soak, differences, final


class _Draw:
    """Random moments: all places in shuffled order, and random times between them."""

    def __init__(self, seed: int, tally: dict[str, int], loop: float) -> None:
        self.random = random.Random(seed)
        self.tally = tally
        self.loop = loop
        self.waiting: list[str] = []

    def kills(self, number: int) -> list[Kill]:
        """Return the kills of one training. Those after the first come early: the training is partly done then."""
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
        training did not reach), ``differences`` and seconds.
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
    """Kill and resume one training to its end. Return the kills that happened and the differences of its end."""
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
    """Return a Markdown table of kills tried and survived, by place."""
    rows = []
    for place, what in [*PLACES.items(), (TIME, "at a random time")]:
        own = [fall["survived"] for fall in falls if fall["kill"]["place"] == place]
        if own:
            rows.append([what, str(len(own)), str(sum(own))])
    rows.append(["all", str(len(falls)), str(sum(fall["survived"] for fall in falls))])
    return markdown(("where", "tried", "survived"), rows)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if every kill was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a json file for the figures")
    options = parser.parse_args(arguments)
    if options.kills < 1:
        parser.error(f"--kills must be at least 1, got {options.kills}.")
    said = sys.argv[1:] if arguments is None else arguments
    result: dict[str, Any] = {
        "command": " ".join(["python -m tests.soak", *said]),
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
