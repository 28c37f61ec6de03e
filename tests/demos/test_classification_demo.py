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
from demos.classification_demo import TITLES, folder_name, main, read_histories, table_rows

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
    write_image_folder(tmp_path, counts, size=32, seed=1)
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.jpg")}
    assert len(files) == len(set(files.values())) == 5 * len(SPECIES)
    assert {name.split("/")[1] for name in files} == set(SPECIES)
    (tmp_path / "valid" / "rimmed" / "0001.jpg").unlink()  # as after an interruption
    kept = (tmp_path / "valid" / "rimmed" / "0000.jpg").stat().st_mtime_ns
    write_image_folder(tmp_path, counts, size=32, seed=1)
    assert (tmp_path / "valid" / "rimmed" / "0000.jpg").stat().st_mtime_ns == kept
    assert files == {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.jpg")}


def _history(folder: Path, errors: list[float]) -> None:
    folder.mkdir(parents=True)
    lines = [json.dumps({"epoch": n, "err1": error, "seconds": 2.0}) for n, error in enumerate(errors, start=1)]
    (folder / "metrics.json").write_text("\n".join(lines) + "\n")


def test_accuracies_of_all_networks(tmp_path: Path) -> None:
    for title, error in zip(TITLES, (5.0, 30.0, 29.0, 20.0, 41.0)):
        _history(tmp_path / folder_name(title), [90.0, 15.0, error])
    rows = table_rows(read_histories(tmp_path), num_images=2100)
    assert rows[1] == ["student alone (shufflenet_v2_x0_5)", "70.0 ± 1.0", "85.0 (epoch 2)", "3", "6"]


def test_demo_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "demos" / "classification_demo.py"), "--quick", "--device", "cpu"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = (tmp_path / "out" / "report.md").read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report.startswith("# The teacher is worth ")
    assert list(results["accuracy"]) == list(TITLES)
    for accuracy in results["accuracy"].values():
        assert 0 <= accuracy <= 100
        assert f"| {accuracy:.1f} ± " in report and f" {accuracy:.1f} ± " in done.stdout
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
    assert "Waiting for the training of the teacher to save and exit." in said
    assert "all of it saved" in (tmp_path / "teacher" / "log.txt").read_text()


def test_a_folder_that_no_demo_made_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "beetles").mkdir()
    assert main(["--quick", "--output", str(tmp_path)]) == 2
    assert "is not of this demo" in capsys.readouterr().err
    assert (tmp_path / "beetles").exists()


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["--quick", "--output", str(tmp_path / "file" / "output")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"classification_demo.py: error: --output {tmp_path / 'file' / 'output'} cannot be used: ")
    assert said.endswith(": Not a directory.\n") and said.count("\n") == 1
