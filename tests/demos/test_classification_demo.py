"""The drawn data set, and the demo through the real entry points."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from demos.beetles import SPECIES, render_beetle, write_image_folder
from demos.classification_demo import DISTILLED, conclusion, folder_name, main, measure

ROOT = Path(__file__).resolve().parents[2]


def _beetle(species: str, *seed: int, size: int = 64) -> np.ndarray:
    return render_beetle(species, np.random.default_rng(seed), size)


def test_an_image_follows_from_its_random_state() -> None:
    image = _beetle("striped", 3)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert np.array_equal(image, _beetle("striped", 3))
    assert not np.array_equal(image, _beetle("striped", 4))


def test_species_differ_by_their_marks_alone() -> None:
    names = list(SPECIES)
    for first, second in zip(names, names[1:] + names[:1]):
        shares = []
        for seed in range(5):
            difference = np.abs(_beetle(first, seed).astype(int) - _beetle(second, seed)).max(axis=2)
            shares.append((difference > 24).mean())
        assert 0.003 < np.mean(shares) < 0.3, (first, second, shares)


def test_colours_say_nothing_about_the_species() -> None:
    mean = {
        name: np.array([_beetle(name, index, n, size=24).mean(axis=(0, 1)) for n in range(24)])
        for index, name in enumerate(SPECIES)
    }
    centres = np.array([colours[:16].mean(axis=0) for colours in mean.values()])
    right = [
        np.linalg.norm(centres - colour, axis=1).argmin() == index
        for index, colours in enumerate(mean.values())
        for colour in colours[16:]
    ]
    assert np.mean(right) < 0.3  # chance is 1 / 8


def test_image_folder(tmp_path: Path) -> None:
    counts = {"train": 3, "valid": 2}
    write_image_folder(tmp_path, counts, size=32, seed=1, workers=2, progress=False)
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.jpg")}
    assert len(files) == len(set(files.values())) == 5 * len(SPECIES)
    assert {name.split("/")[1] for name in files} == set(SPECIES)
    some = tmp_path / "valid" / "rimmed" / "0001.jpg"
    before = some.stat().st_mtime_ns
    write_image_folder(tmp_path, counts, size=32, seed=1, progress=False)
    assert some.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other settings"):
        write_image_folder(tmp_path, counts, size=32, seed=2, progress=False)
    (tmp_path / "recipe.json").unlink()  # as after an interruption
    some.unlink()
    write_image_folder(tmp_path, counts, size=32, seed=1, progress=False)
    assert files == {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.jpg")}


def _history(folder: Path, errors: list[float]) -> None:
    folder.mkdir(parents=True)
    lines = [json.dumps({"epoch": n, "err1": error, "seconds": 2.0}) for n, error in enumerate(errors, start=1)]
    (folder / "metrics.json").write_text("\n".join(lines) + "\n")


def test_numbers_and_what_they_say(tmp_path: Path) -> None:
    errors = {"teacher": 5.0, "student alone": 30.0, "KD": 29.0, "MGD": 20.0, "MGD + KD": 41.0}
    for title, error in errors.items():
        _history(tmp_path / folder_name(title), [90.0, 15.0, error])
    rows = measure(tmp_path, list(errors), num_images=2100)
    alone = rows[1]
    assert (alone["err1"], alone["best_err1"], alone["best_epoch"], alone["seconds"]) == (30.0, 15.0, 2, 6.0)
    assert alone["standard_error"] == pytest.approx(1.0)
    text = conclusion(rows)
    assert "KD ends 1.0 points below (within the noise of the student)" in text
    assert "MGD ends 10.0 points below (better than the student)" in text
    assert "MGD + KD ends 11.0 points above (worse than the student)" in text


def test_demo_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "demos" / "classification_demo.py"), "--quick", "--device", "cpu"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = (tmp_path / "out" / "report.md").read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    titles = ["teacher", "student alone", *DISTILLED]
    assert [row["network"].split(" (")[0] for row in results["rows"]] == titles
    assert all(0 <= row["err1"] <= 100 for row in results["rows"])
    for row in results["rows"]:
        assert f"| {row['network']} | {row['err1']:.1f}" in report
        assert f"| {row['network']} | {row['err1']:.1f}" in done.stdout
    assert "main_base.py" in results["commands"]["teacher"] and "main_mgd.py" in results["commands"]["MGD"]
    assert (tmp_path / "out" / "mgd" / "matching").is_dir()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=.(?!data:)", page)


def test_told_to_leave_it_waits_for_its_training_to_save(tmp_path: Path) -> None:
    small = 'demo.FULL = demo.QUICK._replace(counts={"train": 8, "valid": 1}, teacher_epochs=100_000)'
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import demos.classification_demo as demo; {small}; "
    )
    command = [sys.executable, "-c", program + "sys.exit(demo.main())", "--device", "cpu", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "teacher" / "checkpoint.pth").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 143, said
    assert "Waiting for the training (teacher) to save and leave." in said
    assert "all of it saved" in (tmp_path / "teacher" / "log.txt").read_text()


def test_output_of_another_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "beetles").mkdir()
    (tmp_path / "beetles" / "recipe.json").write_text("{}")
    assert main(["--quick", "--output", str(tmp_path)]) == 1
    assert "name another folder" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["--quick", "--output", str(tmp_path / "file" / "output")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --output {tmp_path / 'file' / 'output'} cannot be used: ")
    assert said.endswith(": Not a directory.\n") and said.count("\n") == 1
