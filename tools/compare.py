#!/usr/bin/env python
"""Compare trainings: one HTML page that needs no other file, and PNGs.

    python tools/compare.py output/student output/distilled
    python tools/compare.py output/classification/*

The folders are those of trainings with tools/train_net.py, or all of classification/main_*.py. The page shows the best
and the last accuracy, the seconds, the curves, the settings that differ, and on the same images the detections, or the
five likeliest classes. Without the images or a network the page says so and has the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works without an installation too

import numpy as np
from run_folder import distinct_names, open_run, read_image, write_page
from run_numbers import RATIOS, Compared, Measure, finished_steps, finite, spread, training_seconds, with_sums

from d2_mgd import visualize
from d2_mgd.errors import UserError
from d2_mgd.visualize import Detections
from d2_mgd.visualize.report import Bar, Report

SHOWN_IMAGES = 6
_CHANCE_AND_LENGTH = ("SEED", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "seed", "epochs", "batch_size")
_PLACES = ("output_dir", "OUTPUT_DIR")  # settings that differ between any two runs


def open_runs(folders: Sequence[Path]) -> Compared:
    """Read the runs in these folders.

    Raises:
        UserError: fewer than two folders, one twice, one without a run or metrics, or runs of both kinds.
    """
    if len(folders) < 2:
        raise UserError("name two folders or more, each the output of a training.")
    names = distinct_names(folders)
    runs = {name: open_run(folder) for name, folder in zip(names, folders)}
    for run in runs.values():
        if run.kind == "matchings":
            raise UserError(
                f"{run.folder} is not the output folder of a training: it has neither the config.yaml of "
                "tools/train_net.py nor the run.json of classification/main_*.py."
            )
    kinds = {run.kind: run.folder for run in runs.values()}
    if len(kinds) > 1:
        raise UserError(
            f"{kinds['detection']} is of detection and {kinds['classification']} of classification: compare runs of "
            "one kind."
        )
    return Compared(runs, {name: [with_sums(row) for row in run.metrics()] for name, run in runs.items()})


def build_report(compared: Compared) -> tuple[Report, str]:
    """Return the page, and lines to print: how far two runs are apart, and what the page lacks."""
    names = [f"`{name}`" for name in compared.runs]
    difference = _difference(compared)
    lead = difference or f"{', '.join(names[:-1])} and {names[-1]}."
    report = Report(f"{len(names)} {compared.kind} runs side by side", lead=lead)
    _add_results(report, compared)
    report.heading("Curves")
    _add_curves(report, compared)
    report.heading("Settings that differ")
    _add_settings(report, compared)
    report.heading("On the same images")
    try:
        _add_detections(report, compared) if compared.kind == "detection" else _add_predictions(report, compared)
    except UserError as error:
        left_out = f"The images are left out: {error}"
        report.text(left_out)
        return report, f"{difference}\n{left_out}".strip()
    return report, difference


# ---- numbers


def _difference(compared: Compared) -> str:
    """How much better the second of two runs is, on the same data, or why there is no verdict; empty for more runs."""
    if len(compared.runs) != 2:
        return ""
    (first, reference), (second, rows) = compared.rows.items()
    data = [run.evaluated_on for run in compared.runs.values()]
    if data[0] != data[1]:
        return f"No verdict: {first} was evaluated on {data[0]}, and {second} on {data[1]}."
    for measure in compared.measures():
        before, after = measure.last(reference), measure.last(rows)
        if before is not None and after is not None:
            gain = (after[measure.key] - before[measure.key]) * (1 if measure.better is max else -1)
            judged = f"{abs(gain):.2f} points {'better' if gain > 0 else 'worse'} than" if gain else "as good as"
            values = f"{after[measure.key]:.2f} against {before[measure.key]:.2f}"
            title = measure.title.removesuffix(", %")
            unequal = [key for key in _CHANCE_AND_LENGTH if _differs(key, compared)]
            caveat = f", which differ in {', '.join(unequal)}" if unequal else ""
            return f"{second} is {judged} {first}: {title} {values} %, after one training each{caveat}."
    measures = compared.measures()
    if not measures:
        return "No verdict: neither run has been evaluated yet."
    lacking = [name for name, rows in compared.rows.items() if measures[0].last(rows) is None]
    return f"No verdict: no finite {measures[0].title.removesuffix(', %')} of {' and '.join(lacking)}."


def _differs(key: str, compared: Compared) -> bool:
    """Whether runs have different values of a setting; an unset seed is another one in each run."""
    values = [_shown(run.settings.get(key)) for run in compared.runs.values()]
    return len(set(values)) > 1 or (key == "SEED" and values[0] == "`-1`")


def _add_results(report: Report, compared: Compared) -> None:
    measures = compared.measures()
    if not measures:
        report.text("None of the runs has been evaluated yet.")
    for measure in measures:
        bars = []
        for name, rows in compared.rows.items():
            last = measure.last(rows)
            bars.append(Bar(name, None if last is None else float(last[measure.key]), compared.colours[name]))
        report.text(f"**{measure.title}**, at the last evaluation ({_better(measure)}):")
        report.bars(bars, digits=2)
        best = f"best {measure.title}"
        header = ["run", best, f"at {compared.step}", f"last {measure.title}", *(f"last {t}" for t in measure.beside)]
        header += [f"{compared.step}s", "seconds"]
        report.table(header, [_row(name, compared, measure) for name in compared.runs])
    report.text(_WHAT_SECONDS_ARE[compared.kind])


_WHAT_SECONDS_ARE = {
    "detection": "Seconds are those of the training steps, teacher and data loading included, without evaluations and "
    "rematches: the median step of each interval between two lines of `metrics.json`, times its steps.",
    "classification": "Seconds are those of all epochs, with evaluations and rematches.",
}


def _row(name: str, compared: Compared, measure: Measure) -> list[str]:
    rows = compared.rows[name]
    best, last = measure.best(rows), measure.last(rows)
    return [
        name,
        _number(best, measure.key),
        "-" if best is None else f"{finished_steps(best, rows, compared):,}",
        _number(last, measure.key),
        *(_number(last, key) for key in measure.beside.values()),
        f"{finished_steps(rows[-1], rows, compared):,}",
        f"{training_seconds(rows, compared):,.0f}",
    ]


def _add_curves(report: Report, compared: Compared) -> None:
    metrics = {key for rows in compared.rows.values() for row in rows for key in row}
    losses = [name for name in ("task loss", "distillation loss") if name in metrics]
    if losses:
        caption = (
            "Losses on training images. The task loss is that of a student alone; the distillation loss, its weight "
            "included, is what a teacher adds."
        )
        _add_curve(report, compared, "losses", dict(zip(losses, losses)), caption)
    ratios = [name for name in RATIOS if name in metrics]
    if ratios:
        caption = (
            "How much the distillation weighs against the task: the quotient of the losses, which begins far above 1 "
            "with the balance auto, and that of the gradients' norms at the student's maps, the features' median. "
            "If the latter stays far above 1 in the last third of the training, let the distillation fade."
        )
        _add_curve(report, compared, "ratios", dict(zip(ratios, ratios)), caption)
    for measure in compared.measures():
        panels = dict(list({measure.title: measure.key, **measure.beside}.items())[:2])
        caption = f"Evaluations during the training ({_better(measure)})."
        _add_curve(report, compared, f"accuracy_{measure.key.replace('/', '_')}", panels, caption)


def _add_curve(report: Report, compared: Compared, name: str, panels: Mapping[str, str], caption: str) -> None:
    rows = [row for rows in compared.rows.values() for row in rows]
    if not any(finite(row.get(key)) is not None for row in rows for key in panels.values()):
        report.text(f"No curves of {' and '.join(panels)}: no run has a finite value.")
        return
    ratios = set(RATIOS) & set(panels)
    curves = visualize.draw_curves(compared.rows, panels, compared.colours, step=compared.step, logarithmic=ratios)
    report.figure(name, curves, caption)


# ---- settings


def _add_settings(report: Report, compared: Compared) -> None:
    settings = {name: run.settings for name, run in compared.runs.items()}
    keys = sorted({key for one in settings.values() for key in one if key.rpartition(".")[2] not in _PLACES})
    using = {key: [one for name, one in settings.items() if compared.runs[name].uses(key)] for key in keys}
    differing = [key for key in keys if len({_shown(one.get(key)) for one in using[key]}) > 1]
    if not differing:
        report.text("None but the output folder.")
        return
    rows = [[f"`{key}`", *(_shown(one.get(key)) for one in settings.values())] for key in differing]
    report.table(["setting", *compared.runs], rows)
    same = len(keys) - len(differing)
    report.text(
        f"The other {same:,} settings are the same in all runs, but for the output folder and, in a run without a "
        "teacher, those of the distillation."
    )


def _shown(value: Any) -> str:
    return "-" if value is None or value == "" else f"`{value}`"


# ---- images


def _add_detections(report: Report, compared: Compared) -> None:
    import detection_run

    sets = {name: detection_run.read_test_set(run) for name, run in compared.runs.items()}
    first = next(iter(sets.values()))
    for name, other in sets.items():
        if other.json_file != first.json_file and other.content != first.content:
            raise UserError(f"{next(iter(sets))} was evaluated on {first.json_file}, and {name} on {other.json_file}.")
    annotations = first.content.get("annotations") or []
    annotated = {annotation["image_id"] for annotation in annotations}
    chosen = spread([image for image in first.content["images"] if image["id"] in annotated], SHOWN_IMAGES)
    if not chosen:
        raise UserError(f"{first.json_file} has no annotations to compare with.")
    images = [read_image(first.image_root / image["file_name"]) for image in chosen]
    ids = [image["id"] for image in chosen]
    truth = detection_run.detections_of(annotations, ids, first.categories)
    columns = {"ground truth": truth}
    for name, run in compared.runs.items():
        records = detection_run.stored_detections(run, first.name)
        found = detection_run.detections_of(records, ids, first.categories)
        columns[name] = [_likeliest(one, len(objects.boxes)) for one, objects in zip(found, truth)]
    report.figure(
        "detections",
        visualize.draw_detections(images, columns, first.classes, threshold=0.0, truth="ground truth"),
        f"{len(images)} images of `{first.name}` at each run's last evaluation. Of each run as many detections as "
        "there are objects, those of the highest scores, in percent; dashed where no object of that class is there.",
    )


def _likeliest(found: Detections, count: int) -> Detections:
    """Return the ``count`` detections of the highest scores."""
    if found.scores is None:
        return found
    order = np.argsort(-found.scores, kind="stable")[:count]
    return Detections(found.boxes[order], found.labels[order], found.scores[order])


def _add_predictions(report: Report, compared: Compared) -> None:
    import classification_run

    first = next(iter(compared.runs.values()))
    chosen = spread(list(zip(*classification_run.validation_images(first))), SHOWN_IMAGES)
    files, truth = [path for path, _ in chosen], [name for _, name in chosen]
    classifiers = {name: classification_run.read_classifier(run) for name, run in compared.runs.items()}
    size = next(iter(classifiers.values())).image_size
    report.figure(
        "predictions",
        visualize.draw_predictions(
            [classification_run.seen_pixels(path, size) for path in files],
            truth,
            {name: one.predict(files) for name, one in classifiers.items()},
        ),
        f"{len(files)} images that `{next(iter(compared.runs))}` was evaluated on, and the five classes that each run "
        "finds likeliest after its last epoch; the true class in green.",
    )


# ---- words


def _better(measure: Measure) -> str:
    return "the higher the better" if measure.better is max else "the lower the better"


def _number(row: Mapping[str, Any] | None, key: str) -> str:
    value = None if row is None else finite(row.get(key))
    return "-" if value is None else f"{value:.2f}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="OUTPUT_DIR", help="output folders of trainings")
    parser.add_argument(
        "--output", type=Path, default=Path("output/comparison"), metavar="FOLDER", help="default: output/comparison"
    )
    options = parser.parse_args(argv)
    return write_page(lambda: build_report(open_runs(options.runs)), options.output)


if __name__ == "__main__":
    sys.exit(main())
