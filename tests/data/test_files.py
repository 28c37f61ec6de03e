from __future__ import annotations

from pathlib import Path

import pytest

from d2_mgd.data.files import find_files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "set" / "images"
    (root / "deep").mkdir(parents=True)
    for name in ("a.png", "deep/b.png", "../c.png"):
        (root / name).touch()
    (tmp_path / "secret.png").touch()
    return root


def test_files_of_the_folder_are_found_and_missing_ones_named(root: Path) -> None:
    found = find_files(str(root), ["a.png", "deep/b.png", "deep/../a.png", "./a.png", str(root / "a.png")])
    assert not found.missing and not found.outside
    found = find_files(str(root), ["a.png", "none.png", "nowhere/a.png", "deep/a.png", ""])
    assert found.missing == [str(root / name) for name in ("none.png", "nowhere/a.png", "deep/a.png")] + [f"{root}/"]


@pytest.mark.parametrize(
    "name", ["../c.png", "../../secret.png", "deep/../../c.png", "/etc/passwd", "..", "../none.png"]
)
def test_names_that_leave_the_folder_are_told_whether_the_file_exists_or_not(root: Path, name: str) -> None:
    assert list(find_files(str(root), [name]).outside) == [name]


def test_a_folder_whose_name_only_begins_alike_is_outside(root: Path) -> None:
    (root.parent / "images2").mkdir()
    (root.parent / "images2" / "x.png").touch()
    assert list(find_files(str(root), ["../images2/x.png"]).outside) == ["../images2/x.png"]


def test_links_are_followed_before_it_is_judged(root: Path, tmp_path: Path) -> None:
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "inside.png").symlink_to(root / "a.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "gone.png").symlink_to(root / "nothing.png")
    (tmp_path / "alias").symlink_to(root)
    names = ["out.png", "inside.png", "folder/secret.png", "gone.png"]
    for place in (root, tmp_path / "alias"):  # the folder itself may be a link
        found = find_files(str(place), names)
        assert found.outside == {name: str(tmp_path / "secret.png") for name in ("out.png", "folder/secret.png")}
        assert found.missing == [str(place / "gone.png")]


def test_leaving_the_folder_may_be_allowed(root: Path, tmp_path: Path) -> None:
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    found = find_files(str(root), ["out.png", "../c.png", "../../none.png"], allow_outside=True)
    assert not found.outside and found.missing == [str(root / "../../none.png")]
