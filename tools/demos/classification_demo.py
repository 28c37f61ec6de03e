"""Shows the classification pipeline at work in minutes on a CPU, through its own command lines.

    python tools/demos/classification_demo.py
    python tools/demos/classification_demo.py --output DIR --seed 1

Draws beetles whose species differ by the marks on their wing covers (beetles.py, beside this file), trains a teacher,
then the same student from the same start and with the same budget: alone, with the teacher's logits (KD), with its
features (MGD), and with both. Writes report.md and report.html (one file, no network needed): table, curves, pictures.
An interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works without an installation too

import numpy as np
from PIL import Image

from d2_mgd.training import Interrupted, forwarded_signals, lasting_output, raised_signals, system_reason
from demos.beetles import SPECIES, render_beetle, write_image_folder

FOLDER = ROOT / "classification"
TEACHER, STUDENT = "resnet18", "shufflenet_v2_x0_5"


class Budget(NamedTuple):
    """What the demo spends: full, or just enough to see that all of it runs.

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


class Run(NamedTuple):
    """One training: what it is called, its entry point, and what its command line has beyond the common options."""

    title: str
    script: str
    options: tuple[str, ...]


DISTILLED = {
    "KD": ("--distiller", "kd"),
    "MGD": ("--distiller", "mgd", "--mgd-reducer", "amp", "--mgd-update-freq", "1"),
    "MGD + KD": ("--distiller", "mgd", "--mgd-reducer", "amp", "--mgd-update-freq", "1", "--mgd-with-kd", "1"),
}


def commands(output: Path, budget: Budget, seed: int, device: str) -> dict[str, list[str]]:
    """Title -> command line, in the order in which they run."""
    teacher_weights = output / "teacher" / "student_last.pth"
    # Published for 224 px: the loss is summed over a map, whose area shrinks with the image's.
    factor = f"{1e4 * (budget.image_size / 224) ** 2:.1f}"
    guided = ("--teacher-arch", TEACHER, "--teacher-resume", str(teacher_weights))
    features = ("--loss-factor", factor)
    runs = [
        Run("teacher", "main_base.py", ("--arch", TEACHER)),
        Run("student alone", "main_base.py", ("--arch", STUDENT)),
        *(
            Run(title, "main_mgd.py", ("--arch", STUDENT, *guided, *options, *(features if "mgd" in options else ())))
            for title, options in DISTILLED.items()
        ),
    ]
    lines = {}
    for run in runs:
        common = _common(output / folder_name(run.title), run.title == "teacher", budget, seed, device)
        lines[run.title] = [sys.executable, str(FOLDER / run.script), str(output / "beetles"), *run.options, *common]
    return lines


def _common(folder: Path, is_teacher: bool, budget: Budget, seed: int, device: str) -> list[str]:
    epochs = budget.teacher_epochs if is_teacher else budget.student_epochs
    drops = [round(epochs * share) for share in (0.7, 0.9)]
    values: dict[str, Any] = {
        "--image-size": budget.image_size,
        "--epochs": epochs,
        "--batch-size": budget.batch_size,
        "--learning-rate": budget.learning_rate,
        "--warmup": 1,
        "--warmup-epochs": 1,
        "--workers": 1,
        "--seed": seed,
        "--device": device,
        "--output-dir": folder,
    }
    options = [str(part) for pair in values.items() for part in pair]
    return [*options, "--nesterov", "1", "--lr-drop-epochs", *map(str, drops), "--resume", "auto"]


def folder_name(title: str) -> str:
    return title.lower().replace(" + ", "_").replace(" ", "_")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.json, one an epoch."""
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


# ---- the report


def measure(output: Path, titles: Sequence[str], num_images: int) -> list[dict[str, Any]]:
    """A row a network; errors in percent, with the standard error that so many validation images leave."""
    rows = []
    for title in titles:
        history = read_history(output / folder_name(title))
        best = min(history, key=lambda line: line["err1"])
        share = history[-1]["err1"] / 100
        rows.append(
            {
                "network": f"{title} ({TEACHER if title == 'teacher' else STUDENT})",
                "err1": history[-1]["err1"],
                "standard_error": 100 * math.sqrt(share * (1 - share) / num_images),
                "best_err1": best["err1"],
                "best_epoch": best["epoch"],
                "epochs": len(history),
                "seconds": sum(line["seconds"] for line in history),
            }
        )
    return rows


HEADER = ("network", "top-1 error, %", "best epoch's, %", "epochs", "seconds")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    error = f"{row['err1']:.1f} ± {row['standard_error']:.1f}"
    best = f"{row['best_err1']:.1f} (epoch {row['best_epoch']})"
    return row["network"], error, best, str(row["epochs"]), f"{row['seconds']:.0f}"


def conclusion(rows: Sequence[dict[str, Any]]) -> str:
    """What the numbers say, in a sentence that follows from them alone."""
    by_title = {row["network"].split(" (")[0]: row for row in rows}
    alone, teacher = by_title["student alone"], by_title["teacher"]
    found = []
    for title in DISTILLED:
        gain = alone["err1"] - by_title[title]["err1"]
        noise = math.hypot(alone["standard_error"], by_title[title]["standard_error"])
        verdict = "within the noise of" if abs(gain) < 2 * noise else "better than" if gain > 0 else "worse than"
        found.append(f"{title} ends {abs(gain):.1f} points {'below' if gain >= 0 else 'above'} ({verdict} the student)")
    return (
        f"The student alone ends at an error of {alone['err1']:.1f} %, its teacher at {teacher['err1']:.1f} %; "
        f"{'; '.join(found)}. One seed: differences of less than two standard errors mean nothing."
    )


def draw_curves(output: Path, titles: Sequence[str]) -> bytes:
    """A PNG of every network's validation error over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for title in titles:
        history = read_history(output / folder_name(title))
        style: dict[str, Any] = {"color": "0.6", "linestyle": "--"} if title == "teacher" else {"marker": "o"}
        axes.plot([line["epoch"] for line in history], [line["err1"] for line in history], label=title, **style)
    axes.set(xlabel="epoch", ylabel="top-1 error on the validation images, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def draw_specimens(columns: int = 6) -> bytes:
    """A PNG with a row a species, which are read in two columns."""
    rows = [
        np.concatenate([render_beetle(name, np.random.default_rng((7, index, n)), 64) for n in range(columns)], axis=1)
        for index, name in enumerate(SPECIES)
    ]
    half = len(rows) // 2
    sheet = np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG")
    return buffer.getvalue()


def write_report(output: Path, lines: dict[str, list[str]], num_images: dict[str, int], seconds: float) -> str:
    """Writes report.md, report.html, results.json and the pictures; returns the table as text."""
    rows = measure(output, list(lines), num_images["valid"])
    pictures = {"curves.png": draw_curves(output, list(lines)), "specimens.png": draw_specimens()}
    for name, content in pictures.items():
        (output / name).write_bytes(content)
    intro = (
        f"{num_images['train']:,} drawn training and {num_images['valid']:,} validation images of {len(SPECIES)} "
        f"species; {seconds / 60:.1f} minutes in all. All students have the same start and the same budget."
    )
    table = [HEADER, *map(cells, rows)]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in (table[0], ["---"] * len(HEADER), *table[1:]))
    shown = {title: " ".join(_short(part, output) for part in line) for title, line in lines.items()}
    told = "\n".join(f"    {line}" for line in shown.values())
    (output / "report.md").write_text(
        f"# Classification with a teacher, on drawn beetles\n\n{intro}\n\n{markdown}\n\n{conclusion(rows)}\n\n"
        f"![error over the epochs](curves.png)\n\n![some specimens](specimens.png)\n\n## Commands\n\n{told}\n"
    )
    (output / "report.html").write_text(_page(intro, table, conclusion(rows), pictures, list(shown.values())))
    (output / "results.json").write_text(json.dumps({"rows": rows, "commands": shown}, indent=2) + "\n")
    return f"{markdown}\n\n{conclusion(rows)}"


def _short(part: str, output: Path) -> str:
    part = "python" if part == sys.executable else part.replace(str(FOLDER), "classification")
    return part.replace(str(output), "OUTPUT")


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Classification with a teacher</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse}}td,th{{padding:.3rem .8rem;border-bottom:1px solid #ccc;text-align:right}}
td:first-child,th:first-child{{text-align:left}}img{{max-width:100%}}pre{{white-space:pre-wrap;font-size:80%}}</style>
<h1>Classification with a teacher, on drawn beetles</h1><p>{intro}</p><table>{table}</table><p>{conclusion}</p>
{pictures}<h2>Commands</h2><pre>{commands}</pre></html>
"""


def _page(
    intro: str, table: Sequence[Sequence[str]], told: str, pictures: dict[str, bytes], commands: Sequence[str]
) -> str:
    """One HTML file with its pictures inside."""
    body = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for tag, line in (("th" if index == 0 else "td", line) for index, line in enumerate(table))
    )
    images = "".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(content).decode()}"></p>\n'
        for name, content in pictures.items()
    )
    escaped = html.escape("\n\n".join(commands))
    return _PAGE.format(
        intro=html.escape(intro), table=body, conclusion=html.escape(told), pictures=images, commands=escaped
    )


# ---- the command line


def run(output: Path, budget: Budget, seed: int, device: str) -> str:
    """Draws, trains, reports; returns the table as text.

    Raises:
        ValueError: ``output`` holds images of another demo.
        subprocess.CalledProcessError: a training failed; it has said why.
        Interrupted: by SIGTERM or Ctrl-C.
    """
    start = time.perf_counter()
    write_image_folder(output / "beetles", budget.counts, size=80, seed=seed, workers=min(4, os.cpu_count() or 1))
    lines = commands(output, budget, seed, device)
    for number, (title, line) in enumerate(lines.items(), start=1):
        print(f"\n[{number}/{len(lines)}] {title}", flush=True)
        _train(title, line)
    num_images = {split: count * len(SPECIES) for split, count in budget.counts.items()}
    return write_report(output, lines, num_images, time.perf_counter() - start)


def _train(title: str, line: list[str]) -> None:
    with forwarded_signals(f"Waiting for the training ({title}) to save and leave.") as signals:
        status = signals.start(line).wait()
    signals.raise_received()
    if status != 0:
        raise subprocess.CalledProcessError(status, line)


@lasting_output()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output") / "classification")
    parser.add_argument("--seed", type=int, default=0, help="of the images, the fresh weights and the order of images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="a few images and steps, to see that it runs")
    options = parser.parse_args(arguments)
    try:
        with raised_signals():
            text = run(options.output, QUICK if options.quick else FULL, options.seed, options.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(
            f"error: a training ended with status {error.returncode}; start the demo again to go on.", file=sys.stderr
        )
        return 1
    except OSError as error:
        place, reason = error.filename or options.output, system_reason(error)
        print(f"error: --output {options.output} cannot be used: {place}: {reason}.", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print("interrupted; the same command goes on from here.", file=sys.stderr)
        return 128 + stopped.number
    print(f"\n{text}\n\n{options.output / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
