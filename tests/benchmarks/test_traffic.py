"""What processes send is what the formulas say, and the comparison would tell if it were not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.traffic.__main__ import write_images
from benchmarks.traffic.compare import collected, compare
from benchmarks.traffic.formulas import sizes
from benchmarks.traffic.process import KINDS

ROOT = Path(__file__).resolve().parents[2]
TRAIN = """
import sys; from pathlib import Path; from benchmarks.traffic.process import KINDS, train
for kind in KINDS:
    for world in (1, 2):
        folder = Path(sys.argv[1]) / f"{kind}_{world}"
        folder.mkdir()
        train(world, kind, folder)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one and of two processes, of both kinds."""
    folder = tmp_path_factory.mktemp("traffic")
    write_images(folder / "data")
    # in a process without other tests' tensors, which would be counted
    subprocess.run([sys.executable, "-c", TRAIN, folder], cwd=ROOT, check=True, timeout=240)
    return folder


def runs(folder: Path) -> list[dict[str, Any]]:
    return [collected(world, kind, folder / f"{kind}_{world}") for kind in KINDS for world in (1, 2)]


def test_traffic_memory_and_results_are_as_the_formulas_say(folder: Path) -> None:
    found = runs(folder)
    assert compare(found, folder) == []
    alone, two = found[0], found[1]
    assert alone["bytes"] == {}
    assert two["expected"]["gradients: all_reduce"] > two["expected"]["rematch: all_reduce"] > 0
    assert set(two["expected"]) <= set(two["bytes"])
    equal = found[3]
    assert equal["same_matchings"] == [True, True]
    assert 0 < equal["largest_difference"] < 1e-5  # they did train, each on its own share
    assert equal["expected"]["synchronised norms: all_reduce"] > 0


@pytest.mark.parametrize(
    ("purpose", "sentence"),
    [("gradients: all_reduce", "gradients: all_reduce: "), ("start: broadcast", "start: broadcast: ")],
)
def test_a_byte_more_is_told(folder: Path, purpose: str, sentence: str) -> None:
    found = runs(folder)
    found[1]["others"][0][purpose] += 1
    said = compare(found, folder)
    assert len(said) == 1
    assert sentence in said[0]


def test_sizes_of_published_networks() -> None:
    """4,231,976 parameters of MobileNet-V1 and 3,840 of the norms of its 1,920 tapped channels, of four bytes each."""
    found = sizes("mobilenet_v1", "resnet50")
    assert found["step_bytes"] == 4 * (4_231_976 + 2 * 1920) + 16
    assert found["rematch_bytes"] == 8 * (128 * 256 + 256 * 512 + 512 * 1024 + 1024 * 2048 + 4)
