"""Pictures show what the numbers say, and every figure can be saved. Reports are whole, safe and self-contained."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from PIL import Image

from d2_mgd.distill import RematchReport, save_reports
from d2_mgd.matching import ChannelMatching, solve_matching
from d2_mgd.visualize import (
    Detections,
    Prediction,
    draw_curves,
    draw_detections,
    draw_group,
    draw_matching,
    draw_predictions,
    draw_rematches,
    load_history,
    matching_order,
    read_metrics,
    smoothed,
)
from d2_mgd.visualize.report import Bar, Report


def _report(students: int, teachers: int, seed: int = 0, name: str = "p3") -> RematchReport:
    cost = np.random.default_rng(seed).uniform(0.5, 2.0, (students, teachers))
    return RematchReport(name, solve_matching(cost), cost, changed=0.25 * seed, seconds=0.1, num_images=10)


def _pixels(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


# --- matchings ---


@pytest.mark.parametrize(("students", "teachers"), [(4, 12), (5, 12), (6, 6), (7, 3), (1, 4)])
def test_the_order_puts_matched_pairs_on_the_diagonal(students: int, teachers: int) -> None:
    found = _report(students, teachers)
    rows, columns = matching_order(found.cost, found.matching)
    assert sorted(rows) == list(range(students))
    assert sorted(columns) == list(range(teachers))
    means = [found.cost[row, [m for m in found.matching.groups[row] if m >= 0]].mean() for row in rows]
    assert means == sorted(means)
    if teachers >= students:  # each group's columns follow those of the row before
        place = {int(column): index for index, column in enumerate(columns)}
        ends = [sorted(place[int(m)] for m in found.matching.groups[row] if m >= 0) for row in rows]
        assert [index for group in ends for index in group] == list(range(teachers))


def test_teacher_channels_without_a_student_come_last() -> None:
    matching = ChannelMatching(np.array([[3], [1]]), num_teacher=5)
    _, columns = matching_order(np.full((2, 5), 1.0), matching)
    assert set(columns[:2]) == {1, 3}
    assert list(columns[2:]) == [0, 2, 4]


def test_a_cost_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\).*2 student and 4 teacher"):
        draw_matching(np.ones((3, 4)), solve_matching(np.ones((2, 4))))


@pytest.mark.parametrize(("students", "teachers"), [(8, 24), (40, 10), (1, 3)])
def test_the_heat_map_shows_the_ordered_cost_and_frames_all_pairs(students: int, teachers: int) -> None:
    found = _report(students, teachers)
    figure = draw_matching(found.cost, found.matching, "p3")
    main = figure.axes[0]
    rows, columns = matching_order(found.cost, found.matching)
    np.testing.assert_allclose(main.images[0].get_array(), found.cost[np.ix_(rows, columns)])
    (frames,) = (item for item in main.collections if isinstance(item, PatchCollection))
    framed = sum(path.get_extents().width for path in frames.get_paths())
    assert framed == pytest.approx(found.matching.group_sizes.sum())
    assert _pixels(figure).std() > 5


def test_a_group_is_drawn_with_its_image() -> None:
    maps = np.random.default_rng(0).normal(size=(10, 6, 8))
    image = np.zeros((12, 16, 3), dtype=np.uint8)
    figure = draw_group(maps[0], list(maps[1:9]), maps[9], image, "p3", names=[f"t{k}" for k in range(8)])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["image", "student", "t0"]
    assert "reduced" in titles
    assert _pixels(figure).std() > 5
    with pytest.raises(ValueError, match="without teacher channels"):
        draw_group(maps[0], [], maps[1])


def test_the_history_of_a_training_is_read_and_drawn(tmp_path: Path) -> None:
    for step in (100, 0, 1000):
        save_reports(tmp_path / f"iter_{step:07d}.npz", {n: _report(4, 8, step // 100 % 4, n) for n in ("p3", "p4")})
    (tmp_path / "other.npz").write_bytes(b"")
    history = load_history(tmp_path)
    assert list(history) == [0, 100, 1000]
    figure = draw_rematches(history)
    assert len(figure.axes[1].lines) == 2  # changed, of each feature
    assert _pixels(figure).std() > 5
    _pixels(draw_rematches({0: history[0]}))
    with pytest.raises(FileNotFoundError, match="no matching"):
        load_history(tmp_path / "nothing")


# --- trainings ---


def test_metrics_of_a_resumed_training_that_was_cut_off(tmp_path: Path) -> None:
    lines = [
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 39, "total_loss": 2.0},
        {"iteration": 19, "total_loss": 2.5},
        {"iteration": 19, "bbox/AP": 1.5},
    ]
    path = tmp_path / "metrics.json"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 5')
    assert read_metrics(path) == [
        {"iteration": 19, "total_loss": 2.5, "bbox/AP": 1.5},
        {"iteration": 39, "total_loss": 2.0},
    ]


def test_metrics_by_epoch_and_of_another_training(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"epoch": 2, "err1": 3.0}\n{"epoch": 1, "err1": NaN}\n')
    assert [row["epoch"] for row in read_metrics(path, "epoch")] == [1, 2]
    with pytest.raises(ValueError, match="has no key 'iteration'"):
        read_metrics(path)


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    np.testing.assert_allclose(smoothed([2.0] * 7, 5), [2.0] * 7)
    np.testing.assert_allclose(smoothed([0.0, 3.0, 0.0], 3), [1.5, 1.0, 1.5])
    assert len(smoothed([1.0, 2.0], 9)) == 2


def test_curves_of_runs_of_different_length() -> None:
    long = [{"iteration": i, "loss": 1.0 / (i + 1), "bbox/AP": None if i % 10 else float(i)} for i in range(40)]
    short = [{"iteration": i, "loss": 2.0} for i in range(3)]
    panels = {"loss": "loss", "AP": "bbox/AP"}
    figure = draw_curves({"one": long, "two": short}, panels, {"two": "#000000"}, logarithmic=["loss"])
    left, right = figure.axes
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    assert [line.get_color() for line in left.lines][-1] == "#000000"
    assert list(right.lines[0].get_xdata()) == [0, 10, 20, 30]
    assert _pixels(figure).std() > 2
    with pytest.raises(ValueError, match="no run has"):
        draw_curves({"one": long}, {"x": "nothing"})


def test_curves_of_many_runs_over_epochs_without_what_is_no_number() -> None:
    rows = [{"epoch": epoch, "err1": float("nan") if epoch == 3 else 50.0 / epoch} for epoch in range(1, 30)]
    figure = draw_curves({f"a run with a long name {n}": rows for n in range(11)}, {"error": "err1"}, step="epoch")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "epochs"
    assert all(3 not in line.get_xdata() and np.isfinite(line.get_ydata()).all() for line in axes.lines)
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
    assert _pixels(figure).std() > 2


# --- what networks find ---


def _found(scores: list[float]) -> Detections:
    boxes = np.array([[2.0, 2.0, 12.0, 12.0], [15.0, 15.0, 25.0, 28.0]])[: len(scores)]
    return Detections(boxes, np.arange(len(scores)), np.array(scores))


def _boxes(figure: Figure, panel: int) -> list:
    return figure.axes[panel].patches[::2]  # each has a dark rim below it


def test_detections_below_the_threshold_are_left_out_and_wrong_ones_dashed() -> None:
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    truth = Detections(np.array([[2.0, 2.0, 12.0, 12.0]]), np.array([0]))
    columns = {"truth": [truth], "model": [_found([0.9, 0.8])], "weak": [_found([0.9, 0.3])], "none": [_found([])]}
    figure = draw_detections([image], columns, ["ball", "fish"], threshold=0.5, truth="truth")
    assert [len(_boxes(figure, panel)) for panel in range(4)] == [1, 2, 1, 0]
    hit, miss = _boxes(figure, 1)
    assert hit.get_linestyle() in ("-", "solid")
    assert miss.get_linestyle() not in ("-", "solid")
    assert _pixels(figure).std() > 5


def test_detections_of_another_number_of_images_are_an_error() -> None:
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="'model' has detections of 1 images, but there are 2"):
        draw_detections([image, image], {"model": [_found([0.5])]}, ["ball"])


def test_the_true_class_stands_out() -> None:
    images = [np.full((8, 8, 3), 90, dtype=np.uint8)] * 2
    sure = Prediction(["cat", "dog", "x" * 60], np.array([0.7, 0.2, 0.1]))
    figure = draw_predictions(images, ["cat", "emu"], {"a": [sure, sure]})
    right, wrong = figure.axes[1], figure.axes[3]
    assert len({bar.get_facecolor() for bar in right.patches}) == 2
    assert len({bar.get_facecolor() for bar in wrong.patches}) == 1
    assert [bar.get_width() for bar in right.patches] == [0.7, 0.2, 0.1]
    assert any(text.get_text().endswith("…") for text in right.texts)
    assert _pixels(figure).std() > 2
    with pytest.raises(ValueError, match="'a' is of 1 images, but there are 2"):
        draw_predictions(images, ["cat", "emu"], {"a": [sure]})


# --- reports ---


class _Page(HTMLParser):
    """Checks that tags are balanced, and collects sources and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_report_is_written_twice_and_needs_no_other_file(tmp_path: Path) -> None:
    report = Report("A <title>", lead="found `x < y` & **more**")
    report.heading("Numbers")
    report.table(["network", "AP"], [["one", "1.0"], ["two", "2.0"]], emphasised=[1])
    report.bars([Bar("one", None, "#000"), Bar("two", 2.0, "#111")], "AP")
    report.figure("matching", draw_matching(np.eye(3), solve_matching(np.eye(3)), "p3"), 'the `cost` of "all"')
    report.code("python x.py --a '<b>'")
    markdown, page = report.write(tmp_path)

    parsed = _Page()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert parsed.open == []
    assert len(parsed.sources) == 1
    assert parsed.sources[0].startswith("data:image/png;base64,")
    text = "".join(parsed.words)
    assert "A <title>" in text
    assert "x < y" in text
    assert "--a '<b>'" in text

    written = markdown.read_text(encoding="utf-8")
    assert "| two | 2.0 |" in written
    (link,) = re.findall(r"\]\((.+?)\)", written)
    assert Image.open(tmp_path / link).width > 100


def test_a_row_that_does_not_fit_its_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 cells and the header has 2"):
        Report("x").table(["a", "b"], [["1", "2", "3"]])


def test_equal_values_draw_equal_bars(tmp_path: Path) -> None:
    report = Report("x")
    report.bars([Bar("one", 0.01, "#000"), Bar("two", 0.04, "#111"), Bar("three", None, "#222")], "AP")
    report.bars([Bar("one", 20.01, "#000"), Bar("two", 40.04, "#111"), Bar("three", 39.96, "#222")], "AP")
    page = report.write(tmp_path)[1].read_text(encoding="utf-8")
    assert re.findall(r"width:([\d.]+)%", page) == ["0.0", "0.0", "0.0", "50.0", "100.0", "100.0"]
