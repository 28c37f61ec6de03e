"""Writes the report of the detection demo: results, curves, matchings, detections and commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from detection_run import detections_of, feature_maps
from PIL import Image
from run_folder import open_run
from visualize_matching import add_costs, add_rematches, group_figure

from d2_mgd import visualize
from d2_mgd.detection.distillers import distiller_options
from d2_mgd.visualize.report import Report
from demos.detection_stages import DISTILLED, STAGES, STUDENT, TEACHER, TEST, Demo
from demos.results import COLOURS, start_report, terminal_table
from demos.scenes import CLASSES

_COLOURS = {stage.caption: COLOURS[stage.name] for stage in STAGES}
_SHOWN_SCENES = 5
_PICTURE_SCENES = 2
_LEAST_SCORE = 0.4
_TRUTH = "ground truth"
_HEADER = ["detector", "AP", "AP50", "AP75", "parameters", "minutes"]

Results = Mapping[str, Mapping[str, Any]]
Columns = dict[str, list[visualize.Detections]]


def write_report(demo: Demo, results: Results) -> str:
    """Write ``report.md``, ``report.html`` and ``result.jpg`` into the demo's folder.

    Args:
        demo: with all stages finished.
        results: stage -> as :meth:`Demo.train` returns it.

    Returns:
        str: the summary for the terminal.
    """
    report = start_report(
        {stage.caption: results[stage.name]["AP"] for stage in STAGES}, "AP", f"{demo.size.test} scenes of a test set"
    )
    rows = [_row(stage.caption, results[stage.name]) for stage in STAGES]
    _add_results(report, rows, results)
    _add_curves(report, demo)
    _add_matchings(report, demo)
    images, columns = _detections(demo)
    _add_detections(report, images, columns)
    _add_method(report, demo)
    markdown, page = report.write(demo.output)
    _draw_result(images, columns, results, demo.output / "result.jpg")
    return f"{report.headline}\n\n{terminal_table(_HEADER, rows)}\n\n{markdown}\n{page}"


def _row(caption: str, result: Mapping[str, Any]) -> list[str]:
    aps = [_number(result[metric]) for metric in ("AP", "AP50", "AP75")]
    return [caption, *aps, f"{result['parameters']:,}", f"{result['seconds'] / 60:.1f}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _add_results(report: Report, rows: list[list[str]], results: Results) -> None:
    report.heading("Results")
    report.table(_HEADER, rows, emphasised=[2])
    report.text(
        "COCO AP in percent on scenes that were not trained on. Minutes include all evaluations; those of the "
        "distilled student include its teacher's forward passes."
    )
    per_class = [
        [stage.caption, *(_number(results[stage.name].get(f"AP-{kind}")) for kind in CLASSES)] for stage in STAGES
    ]
    report.table(["AP by class", *CLASSES], per_class, emphasised=[2])


def _add_curves(report: Report, demo: Demo) -> None:
    report.heading("Training")
    runs = {
        stage.caption: visualize.read_metrics(demo.output / stage.name / "metrics.json")
        for stage in (TEACHER, STUDENT, DISTILLED)
    }
    panels = {"classification loss": "loss_cls", "box loss": "loss_box_reg", "AP on the test scenes": "bbox/AP"}
    report.figure(
        "curves",
        visualize.draw_curves(runs, panels, _COLOURS),
        "Task losses on training scenes, raw values with a moving average, and AP on the test scenes.",
    )
    distilled = runs[DISTILLED.caption]
    names = sorted({key for row in distilled for key in row if key.startswith("loss_distill/")})
    features = {
        feature: [
            {**row, "loss": row.get(f"loss_distill/{feature}"), "ratio": row.get(f"ratio/{feature}")}
            for row in distilled
        ]
        for feature in (name.split("/")[1] for name in names)
    }
    loss, ratio = "distillation loss", "gradient, distillation / task"
    report.figure(
        "distillation_loss",
        visualize.draw_curves(features, {loss: "loss", ratio: "ratio"}, logarithmic=[ratio]),
        "Distillation loss of each feature, its weight included, and the norm of its gradient at the student's map "
        "divided by that of the task's.",
    )


def _add_matchings(report: Report, demo: Demo) -> None:
    run = open_run(demo.output / DISTILLED.name)
    history, steps = run.history()
    newest = history[max(history)]
    report.heading("The matching")
    report.text(
        "Teacher and student have different widths. For each feature the matching states which teacher channels guide "
        "which student channel, so that the sum of the costs of all pairs is the least possible. Channels are ordered "
        "by the matching, so its pairs, framed, lie on the diagonal."
    )
    add_costs(report, newest)
    add_rematches(report, history, steps)
    feature, found = next(iter(newest.items()))
    best = int(visualize.matching_order(found.cost, found.matching)[0][0])
    maps = feature_maps(run, demo.output / "scenes" / "test" / "000000.jpg")
    report.figure(
        "group_best",
        group_figure(found, maps, best, run.reducer),
        f"The best matched student channel of `{feature}` on the first test scene: its map, those of its group of "
        "teacher channels, and the one map that the reducer makes of them.",
    )


def _detections(demo: Demo) -> tuple[list[np.ndarray], Columns]:
    """The first test scenes, and the objects and detections in each."""
    data = demo.output / "scenes"
    content = json.loads((data / "test.json").read_text(encoding="utf-8"))
    chosen = content["images"][:_SHOWN_SCENES]
    images = [np.asarray(Image.open(data / "test" / image["file_name"]).convert("RGB")) for image in chosen]
    ids, categories = [image["id"] for image in chosen], [category["id"] for category in content["categories"]]
    columns = {_TRUTH: detections_of(content["annotations"], ids, categories)}
    for stage in STAGES:
        path = demo.output / stage.name / "inference" / TEST / "coco_instances_results.json"
        columns[stage.caption] = detections_of(json.loads(path.read_text(encoding="utf-8")), ids, categories)
    return images, columns


def _add_detections(report: Report, images: list[np.ndarray], columns: Columns) -> None:
    report.heading("Detections")
    report.figure(
        "detections",
        visualize.draw_detections(images, columns, CLASSES, threshold=_LEAST_SCORE, truth=_TRUTH),
        f"The first {len(images)} test scenes. Detections with a score of {_LEAST_SCORE:.0%} or more, the score beside "
        "each; dashed where no object of that class is there.",
    )


def _draw_result(images: list[np.ndarray], columns: Columns, results: Results, path: Path) -> None:
    """Write one picture of the demo: two scenes with the detections of all three detectors, and their AP."""
    captions = {_TRUTH: _TRUTH}
    for stage in (STUDENT, DISTILLED, TEACHER):
        captions[stage.caption] = f"{stage.caption}: {_number(results[stage.name]['AP'])} AP"
    shown = {text: columns[caption][:_PICTURE_SCENES] for caption, text in captions.items()}
    figure = visualize.draw_detections(images[:_PICTURE_SCENES], shown, CLASSES, threshold=_LEAST_SCORE, truth=_TRUTH)
    figure.savefig(path, pil_kwargs={"quality": 90})


def _add_method(report: Report, demo: Demo) -> None:
    cfg = demo.config(DISTILLED)
    cost = distiller_options(cfg)["metric"]
    report.heading("How it was made")
    report.text(
        f"{demo.size.train} rendered scenes to train on, seed {demo.seed}. Both students start from the same weights "
        f"and see the same images in the same order for {cfg.SOLVER.MAX_ITER} iterations of "
        f"{cfg.SOLVER.IMS_PER_BATCH}, with the same schedule: a short training, in which a student alone learns "
        "less than it could. The distilled one has, beside its task losses, the "
        f"distance of its maps {', '.join(f'`{name}`' for name in cfg.MGD.FEATURES)} to the teacher's: reducer "
        f"`{cfg.MGD.REDUCER}`, loss `{cfg.MGD.LOSS}`, matching cost `{cost}`. Its checkpoint is the plain "
        "student: Detectron2 loads it with `distilled/student.yaml`, without this project."
    )
    report.text("The commands of the three trainings:")
    for stage in STAGES:
        report.code(demo.command(stage))
