"""Runs a study: every run that has no result yet, those first that others start from, a few at a time."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from benchmarks.accuracy.commands import FINISHED, run_command
from benchmarks.accuracy.data import Choice, Split, StudyError, load_split
from benchmarks.accuracy.results import Results, as_line
from benchmarks.accuracy.study import AnyRun, AnyStudy, Run, Study
from benchmarks.accuracy.training import Engine, Outcome, WeightStore, train

__all__ = ["run_study"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a worker finds what it needs."""

    data: Path
    weights: Path
    engine: Engine


def run_study(
    study: AnyStudy,
    results: Results,
    *,
    data: Path,
    weights: Path,
    engine: Engine,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
) -> int:
    """Run what has no result yet; each result is written as its run ends.

    Args:
        study, results: what to run, and what is there.
        data: the ``.npz``; for a study of commands the folder that its ``{data}`` stands for.
        weights: folder for the weights of runs; teachers and starts are taken from there.
        engine: what to compute with.
        methods, seeds: only these rows and seeds; all by default. What they start from runs too.
        jobs: processes at a time, all on the engine's device. A small network leaves most of a GPU idle, so several
            are faster there; each process does many runs, and reads the data once.

    Returns:
        int: how many runs failed; their errors are logged, and the others go on.

    Raises:
        StudyError: an unknown row or seed, or data that does not fit.
    """
    wanted = _wanted(study, methods, seeds)
    if isinstance(study, Study):
        load_split(data, study.data, torch.device("cpu"))  # a mistake shows before any process starts
    elif not data.is_dir():
        raise StudyError(f"there is no folder {data}: {study.name} wants the folder of its data set.")
    pending = _with_needs([run for run in wanted if results.of(run) is None], WeightStore(weights))
    logger.info("%s: %d runs have a result, %d to do.", study.name, len(wanted) - _left(wanted, results), len(pending))
    table = {run.digest for run in study.runs()}

    def done(run: AnyRun, outcome: Outcome) -> None:
        logger.info("%s, seed %d: %.2f in %.0f s", run.method, run.seed, outcome.accuracy[-1], outcome.seconds)
        if run.digest in table and results.of(run) is None:
            results.add(as_line(study, run, outcome, engine))

    place = _Place(data, weights, engine)
    return _in_turn(pending, place, done) if jobs == 1 else _in_processes(pending, place, done, jobs)


def _left(wanted: Sequence[AnyRun], results: Results) -> int:
    return sum(results.of(run) is None for run in wanted)


def _wanted(study: AnyStudy, methods: Sequence[str], seeds: Sequence[int]) -> list[AnyRun]:
    unknown = [name for name in methods if name not in study.rows]
    if unknown:
        raise StudyError(f"{study.name} has no {', '.join(unknown)}; it has: {', '.join(study.rows)}.")
    other = [str(seed) for seed in seeds if seed not in study.seeds]
    if other:
        raise StudyError(f"{study.name} has no seed {', '.join(other)}; it has: {', '.join(map(str, study.seeds))}.")
    return [
        run
        for run in study.runs()
        if (not methods or run.method in methods) and (not seeds or run.seed in seeds or run.method == "teacher")
    ]


def _with_needs(runs: Sequence[AnyRun], weights: WeightStore) -> list[AnyRun]:
    """The runs and all that they start from and that has no weights, each once and after what it needs."""
    ordered: dict[str, AnyRun] = {}

    def add(run: AnyRun) -> None:
        for needed in run.needs:
            if not _is_stored(needed, weights):
                add(needed)
        ordered.setdefault(run.digest, run)

    for run in runs:
        add(run)
    return list(ordered.values())


def _is_stored(run: AnyRun, weights: WeightStore) -> bool:
    if isinstance(run, Run):
        return weights.path(run).exists()
    return (weights.folder / run.digest / FINISHED).exists()


def _in_turn(pending: Sequence[AnyRun], place: _Place, done: Callable[[AnyRun, Outcome], None]) -> int:
    failed: list[AnyRun] = []
    for run in pending:
        if _cannot(run, failed):
            continue
        try:
            done(run, _work(run, place))
        except StudyError as error:
            _fail(run, error, failed)
    return len(failed)


def _in_processes(pending: Sequence[AnyRun], place: _Place, done: Callable[[AnyRun, Outcome], None], jobs: int) -> int:
    failed: list[AnyRun] = []
    waiting = list(pending)
    working: dict[Future[Outcome], AnyRun] = {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        while waiting or working:
            missing = {run.digest for run in (*waiting, *working.values())}
            for run in list(waiting):
                if _cannot(run, failed):
                    waiting.remove(run)
                elif len(working) < jobs and not any(needed.digest in missing for needed in run.needs):
                    waiting.remove(run)
                    working[pool.submit(_work, run, place)] = run
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                run = working.pop(future)
                try:
                    done(run, future.result())
                except (StudyError, BrokenProcessPool) as error:
                    _fail(run, error, failed)
                    if isinstance(error, BrokenProcessPool):
                        raise StudyError(
                            "a process ended without a word (out of memory?); start again to go on."
                        ) from error
    return len(failed)


def _fail(run: AnyRun, error: Exception, failed: list[AnyRun]) -> None:
    logger.error("%s, seed %d, failed: %s", run.method, run.seed, error)
    failed.append(run)


def _cannot(run: AnyRun, failed: list[AnyRun]) -> bool:
    lost = {other.digest for other in failed}
    for needed in run.needs:
        if needed.digest in lost:
            _fail(run, StudyError(f"it needs {needed.method}, which failed."), failed)
            return True
    return False


# ---- in a worker, which keeps the data from run to run

_splits: dict[tuple[Path, Choice, str], Split] = {}


def _begin() -> None:
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _work(run: AnyRun, place: _Place) -> Outcome:
    if not isinstance(run, Run):
        values, metrics, seconds = run_command(run, place.weights, place.data, str(place.engine.device))
        return Outcome(values, seconds, metrics=metrics)
    key = (place.data, run.data, str(place.engine.device))
    if key not in _splits:
        _splits[key] = load_split(place.data, run.data, place.engine.device)
    return train(run, _splits[key], place.engine, WeightStore(place.weights))
