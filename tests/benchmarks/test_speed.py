"""The speed benchmarks run, compare equals with equals, and say what they did not run."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from benchmarks.run import main
from benchmarks.speed import classification, detection
from benchmarks.speed.kernels import _distiller, _PlainLoss, _shipped, copied_rows
from benchmarks.speed.measure import CLOCKS, in_turn, peak_tensor_bytes, ratio_row
from benchmarks.speed.memory import in_a_process
from benchmarks.speed.pair import Pair
from benchmarks.speed.profiling import profile_step
from benchmarks.speed.reference import Published
from d2_mgd.matching import solve_matching


def test_things_take_turns_and_are_compared_round_by_round() -> None:
    order: list[str] = []
    seconds = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3 and [len(values) for values in seconds.values()] == [2, 2]
    row = ratio_row("a / b", 1.0, {"a": [2.0, 30.0, 4.0], "b": [1.0, 10.0, 1.0]}, "a", "b", "")
    assert row.value == 3.0 and row.seconds == {"a": 4.0, "b": 1.0}


@pytest.mark.parametrize("size", [(6, 24), (5, 23)])
def test_scipy_solves_the_same_problem(size: tuple[int, int]) -> None:
    cost = np.random.default_rng(0).random(size)
    expanded = copied_rows(cost)
    assert expanded[linear_sum_assignment(expanded)].sum() == pytest.approx(solve_matching(cost).total_cost)


def test_the_floor_trains_the_same_student_as_the_distilled_step() -> None:
    pair = Pair(2, 64)
    names = [name for name, _ in pair.plain_student.named_parameters()]
    assert names == [name for name, _ in pair.student.network.named_parameters()]
    with torch.no_grad():
        deepest = pair.plain_teacher(pair.images)
        maps, _ = pair.teacher(pair.images)
    torch.testing.assert_close(deepest, maps["stage4"].relu())
    before = {name: value.clone() for name, value in pair.student.network.named_parameters()}
    pair.floor()
    pair.distilled(observe=True)
    assert any(not torch.equal(before[name], value) for name, value in pair.student.network.named_parameters())
    assert pair.distiller.costs["stage4"].num_images == 2


def test_a_run_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--only", "solve,loss,gpu_loss", "--output", str(tmp_path / "speed")]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    table = (tmp_path / "speed.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert result["machine"]["versions"]["torch"] == torch.__version__.split("+")[0]
    for row in result["rows"]:
        assert row["name"] in table and row["value"] > 0
    assert torch.cuda.is_available() or "Not measured on this machine: gpu_loss (no GPU)." in table


def test_the_rows_of_a_gpu_run_in_bfloat16() -> None:
    """On the CPU here, in small sizes: the same code."""
    rows = list(classification.gpu_rows(quick=True, device="cpu"))
    if importlib.util.find_spec("detectron2") is not None:
        rows += detection.gpu_rows(quick=True, device="cpu")
    assert all(row.value > 0 and "bf16" in row.name for row in rows)
    pair = Pair(2, 64, dtype=torch.bfloat16)
    maps, _ = pair.teacher(pair.images)
    assert maps["stage4"].dtype == pair.student.maps(pair.images)["stage4"].dtype == torch.bfloat16


def test_the_shipped_loss_equals_its_plain_operators() -> None:
    student, teacher = torch.randn(2, 4, 6, 6), torch.randn(2, 12, 6, 6)
    distiller = _distiller(student, teacher, "bn")
    plain = _PlainLoss(4, distiller.features["map"].get_buffer("groups"))
    torch.testing.assert_close(_shipped(distiller, student, teacher), plain(student, teacher))


def test_peak_counts_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(1000, 256)

    def together() -> None:
        _ = [torch.empty(1000, 256) for _ in range(3)]

    assert peak_tensor_bytes(one_after_the_other) == 1000 * 256 * 4
    assert peak_tensor_bytes(together) == 3 * 1000 * 256 * 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_process_whose_freed_blocks_are_returned_holds_less() -> None:
    before = dict(os.environ)
    pair = Pair(4, 64)
    pair.floor()
    returned = in_a_process("floor", 4, 64, returned=True)
    assert dict(os.environ) == before
    assert 0 < returned < 4 * peak_tensor_bytes(pair.floor)


def test_the_processors_clock_does_not_count_waiting() -> None:
    seconds = in_turn({"waits": lambda: time.sleep(0.05)}, 1, clock=CLOCKS["cpu"])["waits"]
    assert seconds[0] < 0.05 <= in_turn({"waits": lambda: time.sleep(0.05)}, 1)["waits"][0]


def test_parts_of_a_step_are_all_of_it() -> None:
    found = profile_step(quick=True)
    assert sum(part["share"] for part in found["parts"].values()) == pytest.approx(1.0)
    for name in ("teacher, forward", "student, forward", "distiller, forward", "distiller, backward"):
        assert found["parts"][name]["seconds"] > 0


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "speed"])
    assert "no benchmark speed; there are: solve, loss, classification" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"no mgd/builder\.py in it"):
        Published(tmp_path)
