"""Matchings of real trainings as pictures; what is gone is left out and said; what cannot be is one sentence."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import detection_run
import numpy as np
import pytest
import torch
from run_folder import Maps, distinct_names, open_run
from visualize_matching import group_figure, group_members, main

from d2_mgd.distill import REDUCERS, RematchReport
from d2_mgd.errors import UserError
from d2_mgd.matching import solve_matching


def _figures(folder: Path) -> set[str]:
    """Names of the PNGs; all of them are in the page, and it needs no other file."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    return names


def _groups(figures: set[str]) -> set[str]:
    return {name for name in figures if name.startswith("group_")}


def _copy(run: Path, target: Path, *without: str) -> Path:
    return Path(shutil.copytree(run, target, ignore=shutil.ignore_patterns(*without)))


# --- whole runs ---


def test_a_detection_run(detection_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(detection_runs / "distilled"), "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "report.html")]
    figures = _figures(tmp_path)
    assert figures - _groups(figures) == {"rematches", "matching_res4", "matching_p4"}
    assert len([name for name in figures if name.startswith("group_p4_")]) == 3
    assert len([name for name in figures if name.startswith("group_res4_")]) == 3


def test_a_classification_run(classification_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = classification_runs / "distilled"
    assert main([str(run), "--feature", "stage3"]) == 0
    capsys.readouterr()
    figures = _figures(run / "matching_pictures")
    assert figures - _groups(figures) == {"rematches", "matching_stage3"}
    assert "epochs" in (run / "matching_pictures" / "report.md").read_text(encoding="utf-8")
    _, steps = open_run(run).history()
    assert steps == "epochs"


def test_chosen_feature_channels_and_image(
    detection_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = sorted((detection_runs / "tiny_train_images").iterdir())[1]
    words = ["--image", image, "--feature", "p4", "--channels", 5, 2, "--output", tmp_path]
    assert main([str(detection_runs / "distilled"), *map(str, words)]) == 0
    capsys.readouterr()
    assert _figures(tmp_path) == {"rematches", "matching_p4", "group_p4_5", "group_p4_2"}
    assert image.name in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_maps_are_those_of_the_real_pixels(detection_runs: Path) -> None:
    run = open_run(detection_runs / "distilled")
    newest = list(run.history()[0].values())[-1]
    maps = detection_run.feature_maps(run, detection_run.first_image(run))
    height, width = maps.image.shape[:2]  # 64 x 96, padded to 64 x 96 and more
    for name, stride in (("res4", 16), ("p4", 16)):
        matching = newest[name].matching
        size = (-(-height // stride), -(-width // stride))
        assert maps.student[name].shape == (1, matching.num_student, *size)
        assert maps.teacher[name].shape[:2] == (1, matching.num_teacher)


# --- a group ---


@pytest.mark.parametrize("reducer", ["amp", "mean", "rd"])
def test_a_group_shows_its_members_nearest_first_and_what_the_reducer_makes_of_them(reducer: str) -> None:
    cost = np.random.default_rng(3).uniform(0, 4, (4, 11))
    found = RematchReport("p3", solve_matching(cost), cost, 1.0, 0.0, 9)
    torch.manual_seed(0)
    maps = Maps(np.zeros((6, 8, 3), np.uint8), {"p3": torch.rand(1, 4, 3, 4)}, {"p3": torch.randn(1, 11, 3, 4)}, Path())
    figure = group_figure(found, maps, 2, reducer)
    panels = {axes.get_title(): np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images}
    members = group_members(found, 2)
    assert set(members) == {int(member) for member in found.matching.groups[2] if member >= 0}
    assert sorted(members, key=lambda member: cost[2, member]) == members
    captions = [f"teacher {member}\ncost {cost[2, member]:.2f}" for member in members]
    assert list(panels) == ["image", "student", *captions, "reduced"]
    np.testing.assert_array_equal(panels["student"], maps.student["p3"][0, 2])
    for caption, member in zip(captions, members):
        np.testing.assert_array_equal(panels[caption], maps.teacher["p3"][0, member])
    if reducer == "rd":  # one of the members at each location
        assert np.isin(panels["reduced"], maps.teacher["p3"][0, members]).all()
        return
    whole, _ = REDUCERS.get(reducer)(maps.teacher["p3"], torch.from_numpy(found.matching.groups.copy()), None, None)
    np.testing.assert_allclose(panels["reduced"], whole[0, 2], atol=1e-6)


# --- what is gone ---


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (("*.pth", "last_checkpoint", "checkpoints.json"), "holds no checkpoint"),
        (("datasets.json",), "no datasets.json"),
        (("config.yaml",), "only matchings, no config and no checkpoint"),
    ],
)
def test_without_a_part_of_a_detection_run_the_rest_is_shown(
    without: tuple[str, ...], said: str, detection_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(detection_runs / "distilled", tmp_path / "run", *without)
    assert main([str(run)]) == 0
    _, left_out = capsys.readouterr().out.splitlines()
    assert said in left_out
    assert left_out in (run / "matching_pictures" / "report.md").read_text(encoding="utf-8")
    assert _figures(run / "matching_pictures") == {"rematches", "matching_res4", "matching_p4"}


def test_with_nothing_but_matchings(
    classification_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(classification_runs / "distilled" / "matching", tmp_path / "kept")
    assert main([str(tmp_path / "kept")]) == 0
    assert "only matchings" in capsys.readouterr().out
    assert "rematches" in _figures(tmp_path / "kept" / "matching_pictures")


def test_another_or_no_teacher(classification_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = classification_runs / "teacher.pth"
    kept = teacher.read_bytes()
    words = [str(classification_runs / "distilled"), "--output", str(tmp_path)]
    try:
        content = torch.load(teacher, weights_only=True)
        content["state_dict"]["conv1.weight"] += 1.0
        torch.save(content, teacher)
        assert main(words) == 0
        assert "has changed since the training" in capsys.readouterr().out
        teacher.unlink()
        assert main(words) == 0
        assert f"{teacher} does not exist" in capsys.readouterr().out
    finally:
        teacher.write_bytes(kept)


# --- what cannot be shown ---


def _refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([*map(str, words)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


def test_bad_input_is_one_sentence(
    classification_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = classification_runs / "distilled"
    assert "there is no folder" in _refused(capsys, tmp_path / "nowhere")
    assert "has matchings of: stage2, stage3, stage4" in _refused(capsys, run, "--feature", "p3")
    assert "are 0 to 47" in _refused(capsys, run, "--feature", "stage2", "--channels", 47, 48)
    assert "no.png does not exist" in _refused(capsys, run, "--image", tmp_path / "no.png")
    (tmp_path / "text.png").write_text("text")
    assert "is not an image format that Pillow can read" in _refused(capsys, run, "--image", tmp_path / "text.png")
    assert "without a teacher's features" in _refused(capsys, classification_runs / "alone")
    assert "give the output folder" in _refused(capsys, classification_runs)


def test_damaged_files_are_one_sentence(
    classification_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _copy(classification_runs / "distilled", tmp_path / "run", "matching_pictures")
    (run / "matching" / "epoch_0001.npz").write_bytes(b"PK cut short")
    assert "is damaged" in _refused(capsys, run)
    (run / "run.json").write_text("{")
    assert "not readable as a run" in _refused(capsys, run)


def test_names_tell_folders_apart() -> None:
    assert distinct_names([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert distinct_names([Path("a/x"), Path("b/x"), Path("b/y")]) == ["a/x", "b/x", "b/y"]
    with pytest.raises(UserError, match="given twice"):
        distinct_names([Path("a/x"), Path("a/../a/x")])
