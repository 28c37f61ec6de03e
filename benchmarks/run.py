"""Speed and memory, side by side with the floor and the alternatives (`make bench`), from the root of the repository:

    python -m benchmarks.run [--quick] [--only solve,data | gpu] [--reference DIR] [--output benchmarks/results/speed]

Writes a JSON file and a Markdown page.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import commit, machine
from benchmarks.speed import classification, data, detection, kernels, memory, profiling
from benchmarks.speed.measure import CLOCKS, Row, as_table, use_clock
from benchmarks.speed.reference import Published

RESULTS = Path(__file__).resolve().parent / "results"
_PROFILE = "profile"  # a section after the table


def _parts(quick: bool, published: Published | None) -> dict[str, Callable[[], Iterable[Row]]]:
    steps = None if published is None else published.steps
    solve = None if published is None else published.solve
    return {
        "solve": lambda: kernels.solve_rows(quick, solve),
        "loss": lambda: kernels.loss_rows("cpu", quick),
        "classification": lambda: classification.rows(quick, steps),
        "memory": lambda: memory.rows(quick),
        "detection": lambda: detection.rows(quick),
        "data": lambda: data.rows(quick),
        "gpu_loss": lambda: kernels.loss_rows("cuda", quick),
        "gpu_classification": lambda: classification.gpu_rows(quick),
        "gpu_detection": lambda: detection.gpu_rows(quick),
    }


def _obstacle(part: str) -> str:
    """Return why a part cannot run on this machine, or an empty string."""
    if part.startswith("gpu_") and not torch.cuda.is_available():
        return f"{part} (no GPU)"
    if part.endswith("detection") and importlib.util.find_spec("detectron2") is None:
        return f"{part} (no Detectron2)"
    return ""


def _write(result: dict[str, Any], output: Path) -> None:
    result["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(_page(result), encoding="utf-8")


def _page(result: dict[str, Any]) -> str:
    page = f"# Speed\n\n`{result['command']}`, commit {result['commit']}.\n\n" + as_table(result)
    if _PROFILE in result:
        page += "\n## Where the time of a step goes\n\n" + profiling.as_markdown(result[_PROFILE])
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit status."""
    names = [*_parts(True, None), _PROFILE]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: whether everything runs; its times mean nothing"
    )
    parser.add_argument("--only", default=",".join(names), help=f"some of: {','.join(names)}; gpu: all gpu_*")
    parser.add_argument("--reference", type=Path, help="checkout of the published implementation, to be timed too")
    parser.add_argument("--output", type=Path, default=RESULTS / "speed", help="path without suffix of the two files")
    parser.add_argument("--threads", type=int, help="of torch; by default one a core")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall",
        help="cpu: the time that the process had a processor, for a busy machine; with one thread",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    gpu = [name for name in names if name.startswith("gpu_")]
    chosen = [name for word in options.only.split(",") for name in (gpu if word == "gpu" else [word])]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        parser.error(f"--only: no benchmark {', '.join(unknown)}; there are: {', '.join(names)}.")
    if options.clock == "cpu":
        if options.threads not in (None, 1) or torch.cuda.is_available():
            parser.error(
                "--clock cpu goes with one thread and without a GPU: threads that wait count as if they worked."
            )
        options.threads = 1
    use_clock(options.clock)
    if options.threads:
        torch.set_num_threads(options.threads)

    parts = _parts(options.quick, None if options.reference is None else Published(options.reference))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.run {' '.join(sys.argv[1:] if arguments is None else arguments)}".strip(),
        "commit": commit(),
        "quick": options.quick,
        "clock": options.clock,
        "machine": machine(),
        "left_out": [reason for reason in map(_obstacle, chosen) if reason],
        "rows": [],
    }
    for name in chosen:
        if _obstacle(name):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name == _PROFILE:
            result[_PROFILE] = profiling.profile_step(options.quick)
        else:
            for row in parts[name]():
                result["rows"].append(dataclasses.asdict(row))
                _write(result, options.output)  # rows stay if a later one fails
        _write(result, options.output)
    print(_page(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
