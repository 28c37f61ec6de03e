"""Studies whose runs are command lines of this project: its classification and detection pipelines.

::

    kind: commands
    name: aquarium_retinanet_r50_r18
    title: Aquarium, RetinaNet R50 teaches R18
    seeds: [0, 1, 2]
    metric: {name: AP, file: metrics.json, key: bbox/AP}
    command: python tools/train_net.py --resume ... OUTPUT_DIR {output} SEED {seed} MODEL.DEVICE {device}
    parts:
      mgd: --config-file ... MGD.TEACHER.WEIGHTS {teacher}/model_final.pth
    rows:
      teacher: --config-file ...
      student: --config-file ...
      mgd-amp: "{mgd}"
      mgd-mean: "{mgd} MGD.REDUCER mean"

A row's text replaces ``{row}`` in the command, a part's text replaces its name in a row. ``{data}``, ``{device}``,
``{output}``, ``{seed}`` and ``{teacher}``, the output folder of the teacher's run, are filled in everywhere. A command
must resume in its output folder. Its metric is read from json lines in that folder; lines without the key are skipped.

The baselines ``teacher``, ``student``, ``kd`` and ``conv1x1`` are always rows. Only ``kd`` may be missing, where there
are no logits to compare; then ``without_kd`` is a sentence with the reason, for the page of results.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accuracy.data import StudyError

ROOT = Path(__file__).resolve().parents[2]
FINISHED = "finished"
PLACES = ("data", "device", "output", "row", "seed", "teacher")


@dataclass(frozen=True)
class Metric:
    """The measure of a run, and the file that contains it.

    Args:
        name: for the table.
        file: json lines in the output folder.
        key: of each line.
        error: whether it is an error in percent; 100 minus it is stored.
    """

    name: str
    file: str
    key: str
    error: bool = False


@dataclass(frozen=True)
class CommandRun:
    """One command. ``line`` contains the places that depend on the machine: data, device, output, teacher."""

    method: str
    seed: int
    line: str
    metric: Metric
    teacher: CommandRun | None = None

    @property
    def digest(self) -> str:
        """Equal for runs with equal settings."""
        content = [self.line, self.metric.key, None if self.teacher is None else self.teacher.digest]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()[:16]

    @property
    def needs(self) -> list[CommandRun]:
        return [] if self.teacher is None else [self.teacher]


@dataclass(frozen=True)
class CommandStudy:
    """A study of command lines; the interface of :class:`~benchmarks.accuracy.study.Study`."""

    name: str
    title: str
    seeds: tuple[int, ...]
    metric: Metric
    command: str
    commands: Mapping[str, str]
    published: Mapping[str, float] = field(default_factory=dict)
    aims: tuple[str, ...] = ()
    note: str = ""
    without_kd: str = ""

    def __post_init__(self) -> None:
        baselines = ("teacher", "student", *(() if self.without_kd else ("kd",)), "conv1x1")
        missing = [name for name in baselines if name not in self.commands]
        if missing:
            hint = "; where kd cannot be, without_kd says why" if "kd" in missing else ""
            raise StudyError(f"rows lacks {', '.join(missing)}: the baselines are always in{hint}.")
        if self.without_kd and "kd" in self.commands:
            raise StudyError("without_kd says why there is no kd, but rows has one.")
        if "{row}" not in self.command or "{output}" not in self.command:
            raise StudyError("command needs the places {row} and {output}.")
        for run in self.runs():
            filled(run.line, dict.fromkeys(PLACES, ""))

    @property
    def rows(self) -> list[str]:
        return list(self.commands)

    def runs(self) -> Iterator[CommandRun]:
        """The teacher's (one, that of the first seed), then each seed's."""
        teacher = self._run("teacher", self.seeds[0], None)
        yield teacher
        for seed in self.seeds:
            for name in self.rows:
                if name != "teacher":
                    uses = "{teacher}" in self.commands[name]
                    yield self._run(name, seed, teacher if uses else None)

    def _run(self, name: str, seed: int, teacher: CommandRun | None) -> CommandRun:
        line = self.command.replace("{row}", self.commands[name]).replace("{seed}", str(seed))
        return CommandRun(name, seed, " ".join(line.split()), self.metric, teacher)


def filled(line: str, places: Mapping[str, str]) -> list[str]:
    """Return the words of a command with every place filled in.

    Raises:
        StudyError: an unknown place, or quotes that do not close.
    """
    try:
        return [word.format(**places) for word in shlex.split(line)]
    except (KeyError, IndexError, ValueError) as error:
        raise StudyError(f"{line}: {error} is no place that can be filled; there are: {', '.join(PLACES)}.") from error


def run_command(run: CommandRun, folder: Path, data: Path, device: str) -> tuple[list[float], dict[str, Any], float]:
    """Run a command in ``folder``/digest, from the root of the repository; its output goes to ``command.log``.

    Returns:
        The metric after each evaluation; the last line of metrics; seconds of this start.

    Raises:
        StudyError: the command failed (with its last line of output), or wrote no metric.
    """
    output = (folder / run.digest).resolve()
    output.mkdir(parents=True, exist_ok=True)
    teacher = "" if run.teacher is None else str((folder / run.teacher.digest).resolve())
    places = {"data": str(data.resolve()), "device": device, "output": str(output), "teacher": teacher}
    words = filled(run.line, places)
    if words[0] == "python":
        words[0] = sys.executable
    start = time.perf_counter()
    with open(output / "command.log", "ab") as log:
        status = subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    seconds = time.perf_counter() - start
    if status:
        said = (output / "command.log").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "nothing")
        raise StudyError(f"{run.method}, seed {run.seed}, ended with status {status}. Its last line: {last}")
    values, line = _metrics(output / run.metric.file, run.metric)
    (output / FINISHED).touch()
    return values, line, seconds


def _metrics(path: Path, metric: Metric) -> tuple[list[float], dict[str, Any]]:
    values: list[float] = []
    found: dict[str, Any] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        line = json.loads(text)
        value = line.get(metric.key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            values.append(round(100.0 - value if metric.error else value, 4))
            found = line
    if not values:
        raise StudyError(f"{path} has no line with a number at {metric.key!r}.")
    group = metric.key.split("/")[0] + "/" if "/" in metric.key else metric.key
    return values, {key: value for key, value in found.items() if key.startswith(group)}
