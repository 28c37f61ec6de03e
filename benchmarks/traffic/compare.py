"""Compare what runs sent and held with the formulas, and their results with each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.traffic.process import TOGETHER
from d2_mgd.distill import load_reports

# Largest difference of a weight from the run of one process, over the largest weight of its tensor, in float64.
ROUNDING = 1e-5


def collected(world: int, kind: str, target: Path) -> dict[str, Any]:
    """Return what the processes of a run wrote to ``target``."""
    ranks = [json.loads((target / f"rank_{rank}.json").read_text()) for rank in range(world)]
    about = {"kind": kind, "processes": world, "images": TOGETHER // world}
    return {**about, **ranks[0], "others": [rank["bytes"] for rank in ranks[1:]]}


def compare(runs: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Return what differs from the formulas and between the runs; adds to each run its difference from one process.

    Args:
        runs: of :func:`collected`; the others of a kind are compared with its first.
        folder: parent of the runs' folders.

    Returns:
        Sentences; empty if nothing differs.
    """
    wrong: list[str] = []
    references: dict[str, dict[str, Any]] = {}
    for found in runs:
        kind, world = found["kind"], found["processes"]
        who = f"{kind}, {world} processes"
        for counted in (found["bytes"], *found.pop("others")):
            for purpose, size in found["expected"].items():
                if counted.get(purpose) != size:
                    wrong.append(f"{who}, {purpose}: {counted.get(purpose)} bytes, expected {size}.")
        if abs(found["held"] / found["expected_held"] - 1.0) > 0.02:
            wrong.append(f"{who} hold {found['held']} bytes each, expected {found['expected_held']}.")
        reference = references.setdefault(kind, found)
        if kind == "traffic":  # synchronised norms keep maps of their own
            found["expected_saved"] = reference["saved"] * found["images"] // reference["images"]
            if abs(found["saved"] / found["expected_saved"] - 1.0) > 0.05:
                wrong.append(f"{who} keep {found['saved']} bytes each, expected {found['expected_saved']}.")
        own = folder / f"{kind}_{world}"
        one = folder / f"{kind}_{reference['processes']}"
        found["same_matchings"] = _same_matchings(one, own)
        found["largest_difference"] = _largest_difference(one / "student.pth", own / "student.pth")
        same = found["same_matchings"] if kind == "equality" else found["same_matchings"][:1]
        if not all(same):
            wrong.append(f"{who} found other matchings than one process.")
        if kind == "equality" and found["largest_difference"] > ROUNDING:
            wrong.append(f"{who}: weights differ by {found['largest_difference']:.1e}.")
    return wrong


def _same_matchings(one: Path, other: Path) -> list[bool]:
    """Return for each rematch whether all features have the same matching."""
    files = sorted(path.name for path in (one / "matching").iterdir())
    assert files == sorted(path.name for path in (other / "matching").iterdir())
    pairs = [(load_reports(one / "matching" / name), load_reports(other / "matching" / name)) for name in files]
    return [all(left[name].matching == right[name].matching for name in left) for left, right in pairs]


def _largest_difference(one: Path, other: Path) -> float:
    left, right = (torch.load(path, weights_only=True) for path in (one, other))
    floats = [name for name, value in left.items() if value.is_floating_point()]
    return max(float((left[name] - right[name]).abs().max() / left[name].abs().max()) for name in floats)
