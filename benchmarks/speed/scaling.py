"""How time and memory of the cost, the solve, and reducer and loss grow with the maps.

Shape shorthand: N images, S student channels, T teacher channels, G = T / S the group size, (H, H) maps.

One of the four varies, the others stay at the middle point. Growth is the slope of log time over log size, and only
over sizes that take more than a millisecond, below which a call costs the same whatever it does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.measure import in_turn, peak_tensor_bytes
from benchmarks.tables import markdown
from d2_mgd.distill import MatchingGuidedDistiller
from d2_mgd.matching import ChannelCost, solve_matching

_MIDDLE = {"T": 512, "G": 4, "H": 14, "N": 8}
_AXES = {
    "T": ("teacher channels T", (64, 128, 256, 512, 1024, 2048, 4096)),
    "G": ("group size G (T = 1024)", (1, 2, 4, 8, 16)),
    "H": ("side H of the maps", (7, 14, 28, 56)),
    "N": ("images N", (2, 4, 8, 16, 32)),
}
_QUICK = {"T": (8, 16, 32), "G": (1, 2), "H": (4, 8), "N": (1, 2)}
_PARTS = {"cost": "cost, one batch", "solve": "solve", "loss": "reducer and loss, forward and backward"}


def measure_scaling(quick: bool = False) -> list[dict[str, Any]]:
    """One record for each size: the axis, the size, seconds and peak bytes of each part."""
    records = []
    for axis, (_, sizes) in _AXES.items():
        for size in _QUICK[axis] if quick else sizes:
            shape = {**_MIDDLE, **({"T": 1024} if axis == "G" else {}), axis: size}
            if quick:
                shape = {**{"T": 16, "G": 2, "H": 4, "N": 2}, axis: size}
            records.append({"axis": axis, "size": size, **shape, **_measure(shape, 1 if quick else 5)})
    return records


def _measure(shape: dict[str, int], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    teachers, students = shape["T"], max(1, shape["T"] // shape["G"])
    size = (shape["H"], shape["H"])
    student = torch.randn(shape["N"], students, *size).contiguous(memory_format=torch.channels_last)
    teacher = torch.randn(shape["N"], teachers, *size).contiguous(memory_format=torch.channels_last)
    cost = ChannelCost(students, teachers)
    costs = np.random.default_rng(0).random((students, teachers))
    distiller = MatchingGuidedDistiller({"map": (students, teachers)}, loss="partial_l2", norm="bn").train()
    distiller.observe({"map": student}, {"map": teacher})
    distiller.rematch()
    student.requires_grad_()

    def loss() -> None:
        student.grad = None
        distiller({"map": student}, {"map": teacher})["loss_distill/map"].backward()

    things: dict[str, Callable[[], Any]] = {
        "cost": lambda: cost.update(student.detach(), teacher),
        "solve": lambda: solve_matching(costs),
        "loss": loss,
    }
    seconds = in_turn(things, rounds)
    return {
        "S": students,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "peak_bytes": {name: peak_tensor_bytes(things[name]) for name in ("cost", "loss")},
        "map_bytes": student.nbytes + teacher.nbytes,
    }


def growth(records: Sequence[dict[str, Any]], axis: str, part: str, of: str = "seconds") -> float | None:
    """The slope k of ``of`` ~ size^k over the sizes of an axis; None where all are too quick to tell."""
    points = [(record["size"], record[of][part]) for record in records if record["axis"] == axis]
    if of == "seconds":
        points = [(size, value) for size, value in points if value > 1e-3]
    if len(points) < 3:
        return None
    sizes, values = (np.log([point[index] for point in points]) for index in (0, 1))
    return float(np.polyfit(sizes, values, 1)[0])


def as_markdown(records: Sequence[dict[str, Any]]) -> str:
    """Return a table of the growth, and one of all sizes."""
    growths = []
    for axis, (label, _) in _AXES.items():
        slopes = [growth(records, axis, part) for part in _PARTS]
        slopes += [growth(records, axis, part, "peak_bytes") for part in ("cost", "loss")]
        growths.append([label, *("" if k is None else f"{k:.2f}" for k in slopes)])
    rows = []
    for record in records:
        megabytes = (record["map_bytes"], record["peak_bytes"]["cost"], record["peak_bytes"]["loss"])
        cells = [str(record[key]) for key in ("T", "S", "G", "H", "N")]
        cells += [f"{1e3 * record['seconds'][part]:.2f}" for part in _PARTS]
        rows.append([*cells, *(f"{value / 2**20:.2f}" for value in megabytes)])
    head = ("grows with", "cost", "solve", "reducer and loss", "memory of the cost", "memory of reducer and loss")
    sizes = ("T", "S", "G", "H", "N", "cost, ms", "solve, ms", "reducer and loss, ms", "both maps, MiB",
             "peak of cost, MiB", "peak of reducer and loss, MiB")  # fmt: skip
    return (
        "Growth: time ~ size^k over the sizes that take more than a millisecond. The solve's work is in S T arcs: with "
        f"G fixed S T grows as T squared, with T fixed it falls as 1 / G.\n\n{markdown(head, growths)}\n"
        f"{markdown(sizes, rows)}"
    )


def plot_scaling(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: a panel for each axis, time of each part over the size, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(_AXES), figsize=(16, 4.6), constrained_layout=True)
    for panel, (axis, (label, _)) in zip(panels, _AXES.items()):
        chosen = [record for record in records if record["axis"] == axis]
        sizes = [record["size"] for record in chosen]
        for part, name in _PARTS.items():
            slope = growth(records, axis, part)
            text = name if slope is None or math.isnan(slope) else f"{name}: ~ size^{slope:.2f}"
            panel.loglog(sizes, [1e3 * record["seconds"][part] for record in chosen], marker="o", label=text)
        panel.set_xlabel(label)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    panels[0].set_ylabel("milliseconds")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
