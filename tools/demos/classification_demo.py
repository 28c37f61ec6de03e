#!/usr/bin/env python
"""Trains a teacher, a student alone and distilled students on drawn beetles, and writes a report.

    python tools/demos/classification_demo.py
    python tools/demos/classification_demo.py --output DIR --seed 1

The species differ by the marks on their wing covers (beetles.py, beside this file). All students have the same start
and budget: alone, with the teacher's logits (KD), with its features (MGD), and with both. After an interruption the
same command continues.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works without an installation too

import numpy as np
from matplotlib.figure import Figure

from d2_mgd import visualize
from d2_mgd.visualize.report import Report
from d2_mgd.visualize.style import new_figure
from demos import beetles, running
from demos.results import start_report, terminal_table

TEACHER, STUDENT = "resnet18", "shufflenet_v2_x0_5"
DISTILLED: dict[str, tuple[str, ...]] = {"KD": ("--distiller", "kd"), "MGD": (), "MGD + KD": ("--mgd-with-kd", "1")}
TITLES = ("teacher", "student alone", *DISTILLED)
_HEADER = ("network", "accuracy, %", "best epoch's, %", "epochs", "seconds")


class Budget(NamedTuple):
    """How much the demo does.

    Args:
        counts: images a species.
        teacher_epochs, student_epochs: the warm-up's one epoch comes on top.
        image_size: of the crops that the networks see.
    """

    counts: dict[str, int]
    teacher_epochs: int
    student_epochs: int
    image_size: int
    batch_size: int
    learning_rate: float


FULL = Budget({"train": 150, "valid": 75}, 12, 12, 64, 32, 0.02)
QUICK = Budget({"train": 4, "valid": 2}, 1, 1, 32, 16, 0.002)


def folder_name(title: str) -> str:
    return title.lower().replace(" + ", "_").replace(" ", "_")


def arguments(title: str, output: Path, budget: Budget, seed: int, device: str) -> list[str]:
    """The script and the arguments that train the network of that title."""
    is_teacher, is_distilled = title == "teacher", title in DISTILLED
    words = ["--arch", TEACHER if is_teacher else STUDENT, *DISTILLED.get(title, ())]
    if is_distilled:
        words += ["--teacher-arch", TEACHER, "--teacher-resume", str(output / "teacher" / "student_last.pth")]
    epochs = budget.teacher_epochs if is_teacher else budget.student_epochs
    words += f"--image-size {budget.image_size} --epochs {epochs} --batch-size {budget.batch_size}".split()
    words += f"--learning-rate {budget.learning_rate} --warmup 1 --warmup-epochs 1 --nesterov 1".split()
    words += f"--lr-drop-epochs {round(0.7 * epochs)} {round(0.9 * epochs)} --workers 1 --seed {seed}".split()
    words += ["--device", device, "--output-dir", str(output / folder_name(title)), "--resume", "auto"]
    script = ROOT / "classification" / ("main_mgd.py" if is_distilled else "main_base.py")
    return [str(script), str(output / "beetles"), *words]


def read_histories(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Title -> a row an epoch, with the accuracy in percent."""
    paths = {title: output / folder_name(title) / "metrics.json" for title in TITLES}
    rows = {title: visualize.read_metrics(path, "epoch") for title, path in paths.items()}
    return {title: [{**row, "accuracy": 100 - row["err1"]} for row in history] for title, history in rows.items()}


def table_rows(histories: Mapping[str, list[dict[str, Any]]], num_images: int) -> list[list[str]]:
    """A row a network; accuracies with the standard error that so many validation images leave."""
    rows = []
    for title, history in histories.items():
        last, best = history[-1]["accuracy"], max(history, key=lambda row: row["accuracy"])
        error = 100 * math.sqrt(last * (100 - last) / 1e4 / num_images)
        cells = [f"{last:.1f} ± {error:.1f}", f"{best['accuracy']:.1f} (epoch {best['epoch']})", str(len(history))]
        network = f"{title} ({TEACHER if title == 'teacher' else STUDENT})"
        rows.append([network, *cells, f"{sum(row['seconds'] for row in history):.0f}"])
    return rows


def write_report(output: Path, budget: Budget, commands: Mapping[str, list[str]]) -> str:
    """Write report.md, report.html and results.json; the summary for the terminal."""
    num_images = {split: count * len(beetles.SPECIES) for split, count in budget.counts.items()}
    histories = read_histories(output)
    accuracies = {title: history[-1]["accuracy"] for title, history in histories.items()}
    report: Report = start_report(accuracies, "points", f"{num_images['valid']:,} validation images")
    rows = table_rows(histories, num_images["valid"])
    report.heading("Results")
    report.table(_HEADER, rows)
    report.text(
        f"Top-1 accuracy, {num_images['train']:,} training images of {len(beetles.SPECIES)} species, one seed: "
        "differences of less than two standard errors mean nothing."
    )
    curves = visualize.draw_curves(histories, {"accuracy on the validation images, %": "accuracy"}, step="epoch")
    report.figure("curves", curves, "Accuracy over the epochs.")
    report.figure("specimens", _draw_specimens(), "Some images, two species a row.")
    report.heading("Commands")
    typed = [shlex.join(word.removeprefix(f"{ROOT}/") for word in ["python", *line]) for line in commands.values()]
    report.code("\n\n".join(typed))
    markdown, page = report.write(output)
    results = {"accuracy": accuracies, "histories": histories, "commands": dict(zip(commands, typed))}
    (output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    return f"{report.headline}\n\n{terminal_table(_HEADER, rows)}\n\n{markdown}\n{page}"


def _draw_specimens(columns: int = 6) -> Figure:
    rows = [
        np.concatenate(
            [beetles.render_beetle(name, np.random.default_rng((7, index, n)), 64) for n in range(columns)], 1
        )
        for index, name in enumerate(beetles.SPECIES)
    ]
    sheet = np.hstack([np.vstack(rows[::2]), np.vstack(rows[1::2])])
    figure = new_figure(9.0, 9.0 * sheet.shape[0] / sheet.shape[1])
    axes = figure.subplots()
    axes.imshow(sheet)
    axes.axis("off")
    return figure


def run(output: Path, budget: Budget, seed: int, device: str, fresh: bool) -> str:
    """Draw, train, report; what to print in the end."""
    commands = {title: arguments(title, output, budget, seed, device) for title in TITLES}
    asked = [budget, *commands.values(), Path(str(beetles.__file__)).read_text(encoding="utf-8")]
    running.prepare_folder(output, asked, ["beetles", *map(folder_name, TITLES)], fresh)
    beetles.write_image_folder(output / "beetles", budget.counts, size=round(1.25 * budget.image_size), seed=seed)
    for number, (title, line) in enumerate(commands.items(), start=1):
        print(f"\n[{number}/{len(commands)}] {title}", flush=True)
        running.train(title, [sys.executable, *line])
    return write_report(output, budget, commands)


def main(argv: list[str] | None = None) -> int:
    parser = running.parser(__doc__, "demo_output/classification")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args(argv)
    budget, output = QUICK if options.quick else FULL, options.output.resolve()
    demo = lambda: run(output, budget, options.seed, options.device, options.fresh)  # noqa: E731
    return running.run("classification_demo.py", demo, options.output)


if __name__ == "__main__":
    sys.exit(main())
