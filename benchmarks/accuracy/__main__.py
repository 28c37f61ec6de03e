"""Command line of the accuracy studies, from the root of the repository.

    python -m benchmarks.accuracy run cifar100_r32x4_r8x4 --data cifar100.npz
    python -m benchmarks.accuracy table cifar100_r32x4_r8x4
    python -m benchmarks.accuracy plot cifar100_r32x4_r8x4 --output curves.png
    python -m benchmarks.accuracy report

A study is a name in benchmarks/accuracy/studies or a YAML file. Start a stopped study again to run what is missing.
`report` writes docs/results.md from all studies and results.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.accuracy.data import StudyError
from benchmarks.accuracy.engine import Engine
from benchmarks.accuracy.loading import load_study
from benchmarks.accuracy.report import write_report
from benchmarks.accuracy.results import Results, plot, projection_table, rematch_table, table
from benchmarks.accuracy.runner import run_study
from benchmarks.accuracy.study import AnyStudy

HERE = Path(__file__).resolve().parent
STUDIES = HERE / "studies"
RESULTS = HERE / "results"
REPORT = HERE.parents[1] / "docs" / "results.md"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what has no result yet")
    run.add_argument("study", nargs="+")
    run.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PATH",
        help="CIFAR-100 as one .npz; for a study of commands the folder of its data set",
    )
    run.add_argument("--weights", type=Path, default=Path("runs/accuracy"), help="folder for the weights of runs")
    run.add_argument("--methods", nargs="+", default=(), help="only these rows of the table")
    run.add_argument("--seeds", nargs="+", type=int, default=(), help="only these seeds")
    run.add_argument("--jobs", type=int, default=1, help="runs at a time, each in its own process")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--mixed-precision", action="store_true", help="forward passes of training in bfloat16")
    run.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile a step's forward")
    run.add_argument("--graphs", action="store_true", help="replay a step as one CUDA graph")
    for name, what in (("table", "markdown to the screen"), ("plot", "accuracy by epoch as an image")):
        other = commands.add_parser(name, help=what)
        other.add_argument("study", nargs="+" if name == "table" else None)
    other.add_argument("--output", type=Path, required=True, metavar="PNG")
    report = commands.add_parser("report", help="write docs/results.md")
    report.add_argument("--output", type=Path, default=REPORT)
    for command in commands.choices.values():
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the json lines")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 where a run failed, 2 for bad input."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = _parser().parse_args(arguments)
    try:
        if options.command == "report":
            write_report(STUDIES, options.results, options.output)
        elif options.command == "plot":
            study = _study(options.study)
            plot(study, _results(study, options.results), options.output)
        elif options.command == "table":
            for study in map(_study, options.study):
                results = _results(study, options.results)
                print(f"{study.title}\n\n{table(study, results)}\n{rematch_table(study, results)}")
                print(projection_table(study, results))
        else:
            return _run(options)
    except StudyError as error:
        print(f"python -m benchmarks.accuracy: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> int:
    if options.jobs < 1:
        raise StudyError(f"--jobs must be 1 or more, got {options.jobs}.")
    if options.compile is not None and options.compile not in torch._dynamo.list_backends(exclude_tags=()):
        known = ", ".join(torch._dynamo.list_backends(exclude_tags=()))
        raise StudyError(f"--compile {options.compile} is no backend of torch.compile; there are: {known}.")
    device = _device(options.device)
    if options.graphs and device.type != "cuda":
        raise StudyError("--graphs needs a CUDA device.")
    engine = Engine(device, options.mixed_precision, options.compile, options.graphs)
    studies = [_study(name) for name in options.study]
    failures = []
    for study in studies:
        results = _results(study, options.results)
        failures += run_study(
            study,
            results,
            data=options.data,
            weights=options.weights,
            engine=engine,
            methods=options.methods,
            seeds=options.seeds,
            jobs=options.jobs,
        )
        print(f"{study.title}\n\n{table(study, results)}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise StudyError(f"--device {name} is no device: auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StudyError(f"--device {name}: torch finds no CUDA device here.")
    return device


def _study(name: str) -> AnyStudy:
    path = Path(name) if name.endswith((".yaml", ".yml")) else STUDIES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in STUDIES.glob("*.yaml")))
        raise StudyError(f"there is no study {name!r}; there are: {known}.")
    return load_study(path)


def _results(study: AnyStudy, folder: Path) -> Results:
    return Results(folder / f"{study.name}.jsonl")


if __name__ == "__main__":
    sys.exit(main())
