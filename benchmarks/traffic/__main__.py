"""Measure what processes send and hold, and compare it with the formulas of docs/scaling.md.

    python -m benchmarks.traffic [--processes 1 2 4] [--output benchmarks/results/traffic_cpu.json]

A small student is distilled by classification's trainer, in one process and in several that share the same batches over
gloo, twice:

- ``traffic``: float32, as users train. Every collective of every process is counted, with its payload and its purpose.
  Where the system allows it (unshare), the processes have a network namespace, whose loopback device counts the bytes
  that were really sent.
- ``equality``: float64 with synchronised norms, where the number of processes may change rounding alone. In float32,
  training multiplies rounding errors by tens a step, so that weights cannot be compared after a few steps.

The run fails if a count differs from its formula, or if matchings or weights depend on the number of processes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import ROOT, commit, machine
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
_UNSHARE = ["unshare", "--net", "--map-root-user"]


def run(world: int, kind: str, folder: Path) -> dict[str, Any]:
    """Train with ``world`` processes, in a network namespace where that is possible.

    Returns:
        The counts of the first process; ``others`` has the bytes of the others.
    """
    target = folder / f"{kind}_{world}"
    target.mkdir()
    command = [sys.executable, "-m", "benchmarks.traffic", "--part", str(world), kind, str(target)]
    own_network = subprocess.run([*_UNSHARE, "true"], capture_output=True).returncode == 0
    words = [*_UNSHARE, *command, "--own-network"] if own_network else command
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the run of {world} processes failed:\n{done.stderr}")
    return collected(world, kind, target, own_network)


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
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--own-network", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        train(int(options.part[0]), options.part[1], Path(options.part[2]), options.own_network)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "data")
        runs = [run(world, kind, folder) for kind in KINDS for world in options.processes]
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
