"""The official CUB-200-2011 layout, in miniature, becomes train/ and valid/."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import prepare_cub200
import pytest
from PIL import Image
from prepare_cub200 import LISTS, main

CLASSES = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three classes of four images each: two to train on, two to validate with."""
    root = tmp_path / "official" / "CUB_200_2011"
    lists: dict[str, list[str]] = {name: [] for name in LISTS}
    for label, name in enumerate(CLASSES, start=1):
        lists["classes.txt"].append(f"{label} {name}")
        (root / "images" / name).mkdir(parents=True)
        for number in range(4):
            key = len(lists["images.txt"]) + 1
            path = f"{name}/{name[4:]}_{number:04d}.jpg"
            Image.new("RGB", (8, 8), (key, 0, 0)).save(root / "images" / path)
            lists["images.txt"].append(f"{key} {path}")
            lists["train_test_split.txt"].append(f"{key} {number % 2}")
            lists["image_class_labels.txt"].append(f"{key} {label}")
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def archive(source: Path) -> Path:
    """As the official one: a file beside the folder, lists in between the images."""
    path = source.parent / "CUB_200_2011.tgz"
    with tarfile.open(path, "w:gz") as out:
        (source.parent / "attributes.txt").write_text("1 has_bill_shape::curved\n")
        out.add(source.parent / "attributes.txt", "./attributes.txt")
        out.add(source, "CUB_200_2011")
    return path


def _files(output: Path) -> dict[str, bytes]:
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def _expected(source: Path) -> dict[str, bytes]:
    expected = {}
    for path in (source / "images").rglob("*.jpg"):
        split = "train" if int(path.stem[-1]) % 2 else "valid"
        expected[f"{split}/{path.parent.name}/{path.name}"] = path.read_bytes()
    return expected


@pytest.mark.parametrize("mode", ["symlink", "hardlink", "copy"])
def test_folder(source: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cub"
    assert main([str(source), str(output), "--mode", mode, "--subset"]) == 0
    assert "6 images in train, 6 in valid, 12 new" in capsys.readouterr().out
    assert _files(output) == _expected(source)
    some = output / "train" / CLASSES[0] / "Black_footed_Albatross_0001.jpg"
    assert some.is_symlink() == (mode == "symlink")
    assert some.samefile(source / "images" / CLASSES[0] / some.name) == (mode != "copy")


def test_folder_above_and_relative_path(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["official", "deep/er/cub", "--subset"]) == 0
    assert _files(tmp_path / "deep/er/cub") == _expected(source)


def test_archive_gives_the_same_as_the_folder(source: Path, archive: Path, tmp_path: Path) -> None:
    assert main([str(archive), str(tmp_path / "cub"), "--subset"]) == 0
    assert _files(tmp_path / "cub") == _expected(source)


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_goes_on_after_an_interruption(
    source: Path, archive: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cub"
    command = [str(source if kind == "folder" else archive), str(output), "--mode", "copy", "--subset"]
    assert main(command) == 0
    absent, cut, partial = sorted((output / "train").rglob("*.jpg"))[:3]
    absent.unlink()
    cut.write_bytes(cut.read_bytes()[:50])
    partial.rename(partial.with_name(f".{partial.name}.partial"))
    capsys.readouterr()
    assert main(command) == 0
    assert "3 new" in capsys.readouterr().out
    assert _files(output) == _expected(source)


def test_another_mode_replaces_the_links_and_not_what_they_point_to(source: Path, tmp_path: Path) -> None:
    command = [str(source), str(tmp_path / "cub"), "--subset"]
    before = _expected(source)
    assert main(command) == 0
    assert main([*command, "--mode", "copy"]) == 0
    assert not any(path.is_symlink() for path in (tmp_path / "cub").rglob("*"))
    assert _files(tmp_path / "cub") == before == _expected(source)


def test_counts_are_those_of_the_official_set(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(source), str(tmp_path / "cub")]
    assert main(command) == 1
    assert "CUB-200-2011 has 5,994 of 200" in capsys.readouterr().err
    assert not (tmp_path / "cub").exists()
    monkeypatch.setattr(prepare_cub200, "OFFICIAL_COUNTS", {"train": 6, "valid": 6})
    monkeypatch.setattr(prepare_cub200, "OFFICIAL_CLASSES", 3)
    assert main(command) == 0


def test_absent_images(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = next((source / "images" / CLASSES[2]).glob("*_0001.jpg"))
    gone.unlink()
    assert main([str(source), str(tmp_path / "cub")]) == 1
    assert f"{gone.name} is listed but absent (1 of 12 images)" in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "cub"), "--subset"]) == 0
    assert "5 images in train, 6 in valid" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../evil.jpg", "CUB_200_2011/images/../../../evil.jpg", ""])
def test_a_hostile_archive_writes_nowhere_else(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that leave the folder are refused, links are skipped."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    hostile, first = tmp_path / "hostile.tar", min((source / "images").rglob("*.jpg"))
    with tarfile.open(hostile, "w") as out:
        for path in sorted(source.rglob("*.*")):
            if path.is_file() and path != first:
                out.add(path, f"CUB_200_2011/{path.relative_to(source).as_posix()}")
        link = tarfile.TarInfo(f"CUB_200_2011/{first.relative_to(source).as_posix()}")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        out.addfile(link)
        if name:
            member = tarfile.TarInfo(name)
            member.size = 4
            out.addfile(member, io.BytesIO(b"evil"))
    assert main([str(hostile), str(tmp_path / "in" / "cub"), "--subset"]) == (1 if name else 0)
    assert ("is outside the destination" in capsys.readouterr().err) == bool(name)
    if not name:
        assert len(_files(tmp_path / "in" / "cub")) == 11
        assert main([str(hostile), str(tmp_path / "cub")]) == 1
        assert f"{first.name} is listed but absent" in capsys.readouterr().err
    assert b"secret" not in _files(tmp_path / "in").values()
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.rglob(".cub200_*"))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("images.txt", "001.Black_footed_Albatross/B", "../B", r"has the path '\.\./Black"),
        ("images.txt", "001.Black_footed_Albatross/B", "/etc/B", "has the path '/etc/B"),
        ("images.txt", "\n2 ", "\n1 ", "line 2: the id 1 occurs twice"),
        ("images.txt", "Albatross_0001.jpg", "Albatross_0000.jpg", "more than once"),
        ("images.txt", "1 001", "1", "line 1: expected '<id> <value>'"),
        ("train_test_split.txt", "1 0", "1 7", "image 1 has '7', expected 0 or 1"),
        ("train_test_split.txt", "12 1\n", "", r"12 is missing in train_test_split\.txt"),
        ("image_class_labels.txt", "1 1", "1 9", "class 9, which classes.txt does not have"),
        ("image_class_labels.txt", "1 1", "1 2", "is labelled 002.Laysan_Albatross"),
        ("classes.txt", None, "", "classes.txt is empty"),
    ],
)
def test_wrong_lists(
    source: Path,
    tmp_path: Path,
    name: str,
    old: str | None,
    new: str,
    message: str,
) -> None:
    text = (source / name).read_text()
    (source / name).write_text(new if old is None else text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        prepare_cub200.prepare(source, tmp_path / "cub", subset=True)
    assert not (tmp_path / "cub").exists()


def test_wrong_sources(source: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "cub")

    def error(*arguments: str) -> str:
        assert main([*arguments, "--subset"]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        return lines[-1]

    assert "does not exist" in error(str(tmp_path / "absent"), output)
    assert "has no images.txt" in error(str(tmp_path), output)
    assert "nothing to symlink in an archive" in error(str(archive), output, "--mode", "symlink")
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    assert "cut short or damaged" in error(str(archive), output)
    archive.write_bytes(b"<html>404</html>")
    assert "not a tar archive" in error(str(archive), output)
    (source / "classes.txt").unlink()
    assert "has no classes.txt" in error(str(source), output)


def test_does_not_mix_with_other_files(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stranger = tmp_path / "cub" / "train" / "cats" / "tom.jpg"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"cat")
    assert main([str(source), str(tmp_path / "cub"), "--subset"]) == 1
    assert f"{stranger} does not belong to this data set" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that this user cannot write to")
def test_output_that_cannot_be_written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert main([str(source), str(tmp_path / "closed" / "cub"), "--subset"]) == 1
    assert "Permission denied" in capsys.readouterr().err
