"""Measure what processes send and hold, and compare it with the formulas of docs/scaling.md.

    python -m benchmarks.traffic [--processes 1 2 4] [--output benchmarks/results/traffic_cpu.json]

A small student is distilled by classification's trainer, in one process and in several that share the same batches over
gloo, twice:

- ``traffic``: float32, as users train. Every collective of every process is counted, with its payload and its purpose.
- ``equality``: float64 with synchronised norms, where the number of processes may change rounding alone. In float32,
  training multiplies rounding errors by tens a step, so that weights cannot be compared after a few steps.

The run fails if a count differs from its formula, or if matchings or weights depend on the number of processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.machine import commit, machine
from benchmarks.traffic.compare import ROUNDING, collected, compare
from benchmarks.traffic.formulas import sizes
from benchmarks.traffic.process import KINDS, OPTIONS, TOGETHER, train

# Published pairs, and a larger one, whose sizes are computed.
PAIRS = [
    ("mobilenet_v1", "resnet50"),
    ("mobilenet_v2", "resnet50"),
    ("resnet18", "resnet50"),
    ("resnet50", "resnet152"),
]


def write_images(folder: Path) -> None:
    """Write coloured noise: 16 training and 4 evaluation images of each of three classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("valid", 4)):
        for index in range(3 * count):
            path = folder / split / f"class{index % 3}" / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (72, 72, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--output", type=Path, help="json file for what was measured")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "data")
        runs = []
        for kind, world in itertools.product(KINDS, options.processes):
            target = folder / f"{kind}_{world}"
            target.mkdir()
            train(world, kind, target)
            runs.append(collected(world, kind, target))
        wrong = compare(runs, folder)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.traffic", *(arguments or sys.argv[1:])]),
        "commit": commit(),
        "machine": machine(),
        "options": [*OPTIONS, "--batch-size (of all processes)", str(TOGETHER)],
        "rounding": ROUNDING,
        "runs": runs,
        "computed": [sizes(*pair) for pair in PAIRS],
        "wrong": wrong,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
