"""Results as JSON lines, and the tables and the plot of them."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.data import StudyError
from benchmarks.accuracy.engine import Engine, Outcome
from benchmarks.accuracy.study import BEFORE, STUDENT, TEACHER, AnyRun, AnyStudy, Study
from benchmarks.machine import commit, processor, versions
from benchmarks.tables import markdown


class Results:
    """The JSON lines of a study, one per finished run.

    Lines of other studies in the folder count too, because equal runs have the same digest.

    Args:
        path: the file; it need not exist.

    Raises:
        StudyError: a line is no JSON object with a digest. An incomplete last line is skipped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_digest: dict[str, dict[str, Any]] = {}
        self._whole: int | None = None  # bytes before an incomplete last line
        for found in sorted({path, *path.parent.glob("*.jsonl")}):
            self._read(found)

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    content = json.loads(line)
                    self.by_digest[content["digest"]] = content
            except (ValueError, TypeError, KeyError) as error:
                if number < len(lines):  # the last one has no line end: the writer was stopped
                    raise StudyError(f"{path}, line {number}, is no result: {error}.") from error
        if path == self.path and lines[-1]:
            self._whole = len("\n".join([*lines[:-1], ""]).encode())

    def add(self, line: dict[str, Any]) -> None:
        """Append a result, in place of an incomplete last line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            if self._whole is not None:
                file.truncate(self._whole)
                self._whole = None
            file.write((json.dumps(line) + "\n").encode())
        self.by_digest[line["digest"]] = line

    def of(self, run: AnyRun) -> dict[str, Any] | None:
        """Return the line of a run, or None."""
        return self.by_digest.get(run.digest)


def as_line(study: AnyStudy, run: AnyRun, outcome: Outcome, engine: Engine) -> dict[str, Any]:
    """Return a run's JSON line: settings, commit, versions, device and results."""
    return {
        "study": study.name,
        "method": run.method,
        "seed": run.seed,
        "digest": run.digest,
        "epochs": len(outcome.accuracy),
        "best": max(outcome.accuracy),
        "last": outcome.accuracy[-1],
        "seconds": round(outcome.seconds, 1),
        "device": device_name(engine.device),
        "mixed_precision": engine.mixed_precision,
        "compiled": engine.compiled,
        "graphs": engine.graphs,
        "commit": commit(),
        "versions": versions(("torch", "numpy", "ortools")),
        "accuracy": outcome.accuracy,
        "rematches": outcome.rematches,
        "projections": outcome.projections,
        "metrics": outcome.metrics,
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({processor()})"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return ``72.31 ± 0.24`` (the sample's deviation); without it for one value."""
    text = f"{statistics.fmean(values):.2f}"
    return f"{text} ± {statistics.stdev(values):.2f}" if len(values) > 1 else text


def table(study: AnyStudy, results: Results) -> str:
    """Return Markdown: last and best epoch, mean and deviation over seeds, and the share of the gap.

    Rows without a result are left out, and results of other settings do not count.
    """
    wanted = Counter(run.method for run in study.runs())
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in study.rows}
    for run in study.runs():
        if (line := results.of(run)) is not None:
            found[run.method].append(line)
    last = {name: [line["last"] for line in lines] for name, lines in found.items() if lines}
    means = {name: statistics.fmean(values) for name, values in last.items()}
    published = {name: f"{value:.2f}" for name, value in study.published.items()}
    rows = []
    for name, values in last.items():
        best = mean_and_deviation([line["best"] for line in found[name]])
        runs = f"{len(values)}/{wanted[name]}"
        row = [name, mean_and_deviation(values), best, runs, _recovered(name, means), published.pop(name, "")]
        rows.append(row)
    rows += [[name, "", "", "", "", value] for name, value in published.items()]
    head = ["", "last epoch", "best epoch", "runs", "of the gap", "published"]
    columns = len(head) if study.published else len(head) - 1
    return markdown(head[:columns], [row[:columns] for row in rows])


def _recovered(name: str, means: Mapping[str, float]) -> str:
    """Return the share of the gap between the student alone and the teacher, if both ran and there is one."""
    if name in (TEACHER, STUDENT, BEFORE) or not {TEACHER, STUDENT} <= means.keys() or means[TEACHER] <= means[STUDENT]:
        return ""
    return f"{(means[name] - means[STUDENT]) / (means[TEACHER] - means[STUDENT]):.0%}"


def rematch_table(study: AnyStudy, results: Results) -> str:
    """Return Markdown on the last matching of each method and feature, mean over seeds; "" if none ran.

    ``cost over chance`` is the matching's mean cost over that of a random one; ``changed`` the share of student
    channels whose group the last rematch changed; ``lost by keeping`` by how much the old matching costs more.
    """

    def values(entry: dict[str, Any]) -> tuple[float, ...]:
        lost = math.nan if entry["kept"] is None else entry["kept"] / entry["cost"] - 1.0
        return entry["cost"] / entry["chance"], entry["changed"], lost

    means = _feature_means(study, results, "rematches", values)
    rows = [
        [method, feature, f"{ratio:.3f}", f"{changed:.0%}", "" if math.isnan(lost) else f"{lost:.1%}"]
        for (method, feature), (ratio, changed, lost) in means.items()
    ]
    return markdown(("", "feature", "cost over chance", "changed", "lost by keeping"), rows) if rows else ""


def projection_table(study: AnyStudy, results: Results) -> str:
    """Return Markdown on how far the learned projection of each method and feature agrees with a matching."""
    means = _feature_means(
        study, results, "projections", lambda entry: (entry["share"], entry["chance"], entry["best"])
    )
    rows = [[*names, *(f"{value:.1%}" for value in values)] for names, values in means.items()]
    return markdown(("", "feature", "on matched pairs", "by chance", "at best"), rows) if rows else ""


def _feature_means(
    study: AnyStudy, results: Results, key: str, values: Callable[[dict[str, Any]], tuple[float, ...]]
) -> dict[tuple[str, str], list[float]]:
    """Return for each method and feature the means over seeds of the values of the last entry."""
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for run in study.runs():
        last = {entry["feature"]: entry for entry in (results.of(run) or {}).get(key, [])}
        for feature, entry in last.items():
            found.setdefault((run.method, feature), []).append(values(entry))
    return {names: [statistics.fmean(column) for column in zip(*rows)] for names, rows in found.items()}


def plot(study: AnyStudy, results: Results, path: Path) -> None:
    """Accuracy by epoch of every row that ran: the mean over seeds, and its range; as an image file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[str, list[list[float]]] = {}
    for run in study.runs():
        line = results.of(run)
        if line is not None and run.method in study.rows:
            curves.setdefault(run.method, []).append(line["accuracy"])
    if not curves:
        raise StudyError(f"no run of {study.name} has a result yet, so there is nothing to plot.")
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, (name, runs) in enumerate(curves.items()):
        epochs = range(1, len(runs[0]) + 1)
        mean = [statistics.fmean(values) for values in zip(*runs)]
        axes.plot(epochs, mean, color=f"C{index}", label=f"{name} {mean[-1]:.2f}", linewidth=1.5)
        axes.fill_between(epochs, _each(min, runs), _each(max, runs), color=f"C{index}", alpha=0.15, linewidth=0)
    what = "top-1 on test images (%)" if isinstance(study, Study) else study.metric.name
    axes.set(title=study.title, xlabel="epoch" if isinstance(study, Study) else "evaluation", ylabel=what)
    axes.grid(alpha=0.3)
    axes.legend(title="last epoch", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _each(function: Any, runs: Iterable[Sequence[float]]) -> list[float]:
    return [function(values) for values in zip(*runs)]
