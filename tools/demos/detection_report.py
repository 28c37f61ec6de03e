"""What tools/demos/detection_demo.py found, as a report: table, curves, matchings, maps, detections."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from detection_run import detections_of, feature_maps
from matplotlib.figure import Figure
from PIL import Image
from run_folder import open_run
from visualize_matching import add_costs, add_rematches, group_figure

from d2_mgd import visualize
from d2_mgd.distill import RematchReport
from d2_mgd.visualize.report import Bar, Report
from demos.result_figure import COLOURS, result_figure
from demos.scenes import CLASSES

if TYPE_CHECKING:
    from demos.detection_demo import Demo, Stage

_SHOWN_SCENES = 5
_LEAST_SCORE = 0.4
_LEAST_AP = 1.0  # percent; less, of a detector or between two, says nothing on so few scenes


@dataclass(frozen=True)
class Written:
    """Paths of the report, and the table for the terminal."""

    markdown: Path
    html: Path
    summary: str


def write_report(demo: Demo, results: dict[str, dict[str, Any]]) -> Written:
    """Write ``report.md``, ``report.html`` and ``result.png`` into the demo's folder.

    Args:
        demo: with all stages finished.
        results: stage -> what :meth:`Demo.train` gave.
    """
    stages = demo.stages
    report = Report("What a teacher is worth: distillation on rendered scenes", lead=_lead(results))
    report.bars(
        [
            Bar(stage.caption, results[name]["AP"] or 0.0, f"{_number(results[name]['AP'])} AP", COLOURS[name])
            for name, stage in stages.items()
        ],
        "COCO AP of the three detectors",
    )
    _add_results(report, demo, stages, results)
    _add_curves(report, demo, stages)
    _add_matchings(report, demo)
    _add_detections(report, demo, stages)
    _add_method(report, demo, stages)
    markdown, page = report.write(demo.output)
    result_figure(results).savefig(demo.output / "result.png")
    return Written(markdown, page, _terminal_table(stages, results))


def share_recovered(results: dict[str, dict[str, Any]]) -> float | None:
    """Share of the AP between student alone and teacher that distillation gained; None without a gap to speak of."""
    teacher, student, distilled = (results[name]["AP"] for name in ("teacher", "student", "distilled"))
    if None in (teacher, student, distilled) or teacher - student < _LEAST_AP:
        return None
    return float((distilled - student) / (teacher - student))


def _lead(results: dict[str, dict[str, Any]]) -> str:
    student, distilled = (results[name]["AP"] or 0.0 for name in ("student", "distilled"))
    gain, share = distilled - student, share_recovered(results)
    if max(results[name]["AP"] or 0.0 for name in results) < _LEAST_AP:
        return f"None of the three reaches {_LEAST_AP:.0f} AP: so short a training compares nothing."
    if gain <= 0:
        return (
            f"Here distillation did not help: the student has {student:.1f} AP alone and {distilled:.1f} AP with "
            "its teacher."
        )
    told = (
        f"The same student, from the same start, on the same images: {student:.1f} AP alone, {distilled:.1f} AP with "
        "its teacher"
    )
    return f"{told}." if share is None else f"{told}. That is {share:.0%} of the way to the teacher itself."


def _add_results(report: Report, demo: Demo, stages: dict[str, Stage], results: dict[str, dict[str, Any]]) -> None:
    report.heading("Results")
    rows = [_row(stage.caption, results[name]) for name, stage in stages.items()]
    share = share_recovered(results)
    report.table(["detector", "AP", "AP50", "AP75", "parameters", "minutes"], rows, emphasised=[2])
    recovered = (
        "no gap to recover" if share is None else f"{share:.0%} of the gap between student and teacher recovered"
    )
    report.text(
        f"COCO AP in percent on {demo.size.test} scenes that were not trained on; {recovered}. Minutes are those of "
        "training with all evaluations; the distilled student's include its teacher's forward passes."
    )
    per_class = [
        [stage.caption, *(_number(results[name].get(f"AP-{kind}")) for kind in CLASSES)]
        for name, stage in stages.items()
    ]
    report.table(["AP by class", *CLASSES], per_class, emphasised=[2])


def _row(caption: str, result: dict[str, Any]) -> list[str]:
    aps = [_number(result[metric]) for metric in ("AP", "AP50", "AP75")]
    return [caption, *aps, f"{result['parameters']:,}", f"{result['seconds'] / 60:.1f}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _terminal_table(stages: dict[str, Stage], results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':<18}{'AP':>7}{'AP50':>7}{'AP75':>7}{'parameters':>13}{'minutes':>9}"]
    for name, stage in stages.items():
        caption, ap, ap50, ap75, parameters, minutes = _row(stage.caption, results[name])
        lines.append(f"{caption:<18}{ap:>7}{ap50:>7}{ap75:>7}{parameters:>13}{minutes:>9}")
    share = share_recovered(results)
    lines.append(f"recovered: {'no gap to recover' if share is None else f'{share:.0%} of the gap'}")
    return "\n".join(lines)


# ---- curves


def _add_curves(report: Report, demo: Demo, stages: dict[str, Stage]) -> None:
    report.heading("Training")
    runs = {stage.caption: visualize.read_metrics(demo.folder(name) / "metrics.json") for name, stage in stages.items()}
    colours = {stage.caption: COLOURS[name] for name, stage in stages.items()}
    panels = {"classification loss": "loss_cls", "box loss": "loss_box_reg", "AP on the test scenes": "bbox/AP"}
    report.figure(
        "curves",
        visualize.draw_curves(runs, panels, colours),
        "Task losses on training scenes, a moving average over their raw values, and AP on the test scenes.",
    )
    distilled = runs[stages["distilled"].caption]
    names = sorted({key for row in distilled for key in row if key.startswith("loss_distill/")})
    report.figure(
        "distillation_loss",
        visualize.draw_curves({name.split("/")[1]: _renamed(distilled, name) for name in names}, {"": "loss"}),
        "Distillation loss of each feature, its weight included.",
    )


def _renamed(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [{"iteration": row["iteration"], "loss": row.get(name)} for row in rows]


# ---- matchings


def _add_matchings(report: Report, demo: Demo) -> None:
    history = visualize.load_history(demo.folder("distilled") / "matching")
    newest = list(history.values())[-1]
    report.heading("Who guides whom")
    report.text(
        "Teacher and student have different widths. For each feature the matching says which teacher channels guide "
        "which student channel, so that the sum of the costs of all pairs is the least possible. Channels are ordered "
        "by the matching, so its pairs, framed, run down the diagonal."
    )
    add_costs(report, newest)
    add_rematches(report, history, "iterations")
    feature = next(iter(newest))
    for place, figure in _group_figures(demo, newest[feature]).items():
        report.figure(
            f"group_{place.split()[-1]}",
            figure,
            f"The student channel of `{feature}` that is matched {place}, on the first test scene: its map, those of "
            "its group of teacher channels, and the one map that the reducer makes of them.",
        )


def _group_figures(demo: Demo, found: RematchReport) -> dict[str, Figure]:
    """The best matched student channel and the median one, with their groups."""
    run = open_run(demo.folder("distilled"))
    maps = feature_maps(run, demo.folder("scenes") / "test" / "000000.jpg")
    rows, _ = visualize.matching_order(found.cost, found.matching)
    places = {"best": int(rows[0]), "in the middle": int(rows[len(rows) // 2])}
    return {place: group_figure(found, maps, channel, run.reducer) for place, channel in places.items()}


# ---- detections


def _add_detections(report: Report, demo: Demo, stages: dict[str, Stage]) -> None:
    report.heading("Detections")
    data = demo.folder("scenes")
    described = json.loads((data / "test.json").read_text(encoding="utf-8"))
    chosen = described["images"][:_SHOWN_SCENES]
    images = [np.asarray(Image.open(data / "test" / image["file_name"]).convert("RGB")) for image in chosen]
    ids = [image["id"] for image in chosen]
    categories = [category["id"] for category in described["categories"]]
    columns = {"ground truth": detections_of(described["annotations"], ids, categories)}
    for name, stage in stages.items():
        path = demo.folder(name) / "inference" / "demo_test" / "coco_instances_results.json"
        columns[stage.caption] = detections_of(json.loads(path.read_text(encoding="utf-8")), ids, categories)
    report.figure(
        "detections",
        visualize.draw_detections(images, columns, CLASSES, threshold=_LEAST_SCORE, truth="ground truth"),
        f"The first {len(images)} test scenes. Detections with a score of {_LEAST_SCORE:.0%} or more, the score beside "
        "each; dashed where no object of that class is there.",
    )


# ---- how it was made


def _add_method(report: Report, demo: Demo, stages: dict[str, Stage]) -> None:
    cfg = demo.config_of("distilled")
    report.heading("How it was made")
    report.text(
        f"{demo.size.train} rendered scenes to train on, seed {demo.seed}. Both students start from the same weights "
        f"and see the same images in the same order for {cfg.SOLVER.MAX_ITER} iterations of "
        f"{cfg.SOLVER.IMS_PER_BATCH}, with the same schedule. The distilled one has, beside its task losses, the "
        f"distance of its maps {', '.join(f'`{name}`' for name in cfg.MGD.FEATURES)} to the teacher's: reducer "
        f"`{cfg.MGD.REDUCER}`, loss `{cfg.MGD.LOSS}`, matching cost `{cfg.MGD.METRIC}`. Its checkpoint is the plain "
        "student: Detectron2 loads it with `distilled/student.yaml`, without this project."
    )
    report.text("Each of the three was trained by a command of this form:")
    for stage in stages.values():
        report.code(demo.command(stage))
