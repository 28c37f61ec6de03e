"""Run a script that kills itself by SIGKILL at the n-th visit of a place of the program.

    python tests/soak/kill_at.py --place pointer --count 2 --mark FILE -- SCRIPT [ARGUMENTS ...]

FILE is made just before. If it exists, nothing is killed, so that a training that restarts itself is killed once. Of
several processes the one with RANK ``--rank`` is killed. ``--tally FILE`` writes the number of visits of each place at
the end.
"""

from __future__ import annotations

import argparse
import atexit
import io
import json
import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without an installation too

import torch

import d2_mgd.detection.hooks as hooks
import d2_mgd.distill.distiller as distiller

PLACES = {
    "step": "between a step's gradients and the optimiser",
    "write": "inside the write of a checkpoint, half of its bytes on the disk",
    "rename": "between a checkpoint's write and its rename",
    "list": "before a change of the list of checkpoints",
    "pointer": "between the write of a checkpoint and the move of the pointer to it",
    "moved": "after the move of the pointer",
    "pass": "inside the pass of a rematch",
    "solve": "inside a rematch, before a matching is solved",
    "report": "inside a rematch, the new matching in force and not yet written",
}


class Moment:
    """The n-th visit of one place.

    Args:
        place: of ``PLACES``.
        count: n, from 1.
        mark: file that is made at the kill; None only counts.
        rank: of the process to kill.
    """

    def __init__(self, place: str, count: int, mark: Path | None, rank: int) -> None:
        self.place = place
        self.count = count
        self.mark = mark
        self.mine = int(os.environ.get("RANK", 0)) == rank
        self.tally: Counter[str] = Counter()

    def has_come(self, place: str) -> bool:
        """Count a visit; return whether this is the moment."""
        self.tally[place] += 1
        due = self.mine and place == self.place and self.tally[place] == self.count
        return due and self.mark is not None and not self.mark.exists()

    def kill(self) -> None:
        """End by SIGKILL: nothing is flushed or closed."""
        assert self.mark is not None
        self.mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def visit(self, place: str) -> None:
        if self.has_come(place):
            self.kill()


def watch(moment: Moment) -> None:
    """Let all places of this process call ``moment``."""
    _before(torch.optim.SGD, "step", lambda *_: moment.visit("step"))
    _before(distiller.MatchingGuidedDistiller, "observe", lambda *_: moment.visit("pass"))
    _before(distiller, "solve_matching", lambda *_: moment.visit("solve"))
    _before(hooks, "save_reports", lambda *_: moment.visit("report"))
    _watch_writes(moment)
    _watch_renames(moment)


def _before(owner: Any, name: str, visit: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def visited(*args: Any, **options: Any) -> Any:
        visit(*args)
        return original(*args, **options)

    setattr(owner, name, visited)


def _watch_writes(moment: Moment) -> None:
    original = torch.save

    def save(data: Any, file: Any, *args: Any, **options: Any) -> None:
        # not what an evaluation writes, which does not go to a temporary file
        if str(getattr(file, "name", "")).endswith(".tmp") and moment.has_come("write"):
            whole = io.BytesIO()
            original(data, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            moment.kill()
        original(data, file, *args, **options)

    torch.save = save  # type: ignore[assignment]


def _watch_renames(moment: Moment) -> None:
    original = os.replace

    def replace(source: Any, target: Any, **options: Any) -> None:
        name = os.path.basename(os.fspath(target))
        if name.endswith(".pth"):
            moment.visit("rename")
        elif name == "last_checkpoint":
            moment.visit("pointer")
        elif name == "checkpoints.json":
            moment.visit("list")
        original(source, target, **options)
        if name == "last_checkpoint":
            moment.visit("moved")

    os.replace = replace  # type: ignore[assignment]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", choices=sorted(PLACES), default="step")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--mark", type=Path, help="without it nothing is killed")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--tally", type=Path)
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    moment = Moment(options.place, options.count, options.mark, options.rank)
    watch(moment)
    if options.tally is not None:
        atexit.register(lambda: options.tally.write_text(json.dumps(moment.tally)))
    sys.argv = [options.script, *options.arguments]
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
