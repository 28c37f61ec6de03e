"""Speed and memory, side by side with the floor and the alternatives (`make bench`), from the root of the repository:

    python -m benchmarks.run [--quick] [--only solve,data] [--reference DIR] [--output benchmarks/results/speed]

Writes a json file and a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import classification, data, detection, kernels
from benchmarks.speed.measure import Row, as_table, machine
from benchmarks.speed.reference import Published

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results"


def _parts(quick: bool, published: Published | None) -> dict[str, Callable[[], list[Row]]]:
    steps = None if published is None else published.steps
    solve = None if published is None else published.solve
    return {
        "solve": lambda: kernels.solve_rows(quick, solve),
        "classification": lambda: classification.rows(quick, steps),
        "detection": lambda: detection.rows(quick),
        "loss": lambda: [kernels.loss_row(quick=quick)],
        "data": lambda: [data.row(quick)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit status."""
    names = list(_parts(True, None))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: whether everything runs; its times mean nothing"
    )
    parser.add_argument("--only", default=",".join(names), help=f"some of: {','.join(names)}")
    parser.add_argument("--reference", type=Path, help="checkout of the published implementation, to be timed too")
    parser.add_argument("--output", type=Path, default=RESULTS / "speed", help="path without suffix of the two files")
    parser.add_argument("--threads", type=int, help="of torch; by default one a core")
    options = parser.parse_args(arguments)
    chosen = options.only.split(",")
    unknown = [name for name in chosen if name not in names]
    if unknown:
        parser.error(f"--only: no benchmark {', '.join(unknown)}; there are: {', '.join(names)}.")
    if options.threads:
        torch.set_num_threads(options.threads)

    result: dict[str, Any] = {"quick": options.quick, "machine": machine(), "rows": []}
    parts = _parts(options.quick, None if options.reference is None else Published(options.reference))
    for name in chosen:
        result["rows"] += [dataclasses.asdict(row) for row in parts[name]()]
    result["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    table = as_table(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
