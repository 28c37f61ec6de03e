"""Run the runs of a study that have no result yet, several at a time."""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from graphlib import TopologicalSorter
from pathlib import Path

import torch

from benchmarks.accuracy.commands import FINISHED, CommandRun, run_command
from benchmarks.accuracy.data import Choice, Split, StudyError, load_split
from benchmarks.accuracy.engine import Engine, Outcome, WeightStore, error_line
from benchmarks.accuracy.results import Results, as_line
from benchmarks.accuracy.study import AnyRun, AnyStudy, Run, Study
from benchmarks.accuracy.training import train

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a run needs beside its settings."""

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
) -> list[str]:
    """Run what has no result yet. Each result is written when its run ends.

    Args:
        study: what to run.
        results: of earlier starts.
        data: the ``.npz``; for a study of commands the folder that replaces ``{data}``.
        weights: folder of the weights of runs; teachers and starts are taken from there.
        engine: what to compute with.
        methods: only these rows, and the runs that they start from; all by default.
        seeds: only these seeds; all by default.
        jobs: runs at a time, each in its own process on the engine's device. A small network leaves most of a GPU
            idle, so several runs at a time are faster there.

    Returns:
        list: a line for each run that failed for any reason, such as a lack of memory. Only runs that need the
        weights of a failed run fail with it.

    Raises:
        StudyError: an unknown row or seed, or data that does not fit.
    """
    wanted = _wanted(study, methods, seeds)
    if isinstance(study, Study):
        load_split(data, study.data, torch.device("cpu"))  # an error before any process starts
    elif not data.is_dir():
        raise StudyError(f"there is no folder {data}: {study.name} wants the folder of its data set.")
    missing = [run for run in wanted if results.of(run) is None]
    pending = _with_needs(missing, WeightStore(weights))
    logger.info("%s: %d runs have a result, %d to do.", study.name, len(wanted) - len(missing), len(pending))
    table = {run.digest for run in study.runs()}

    def done(run: AnyRun, outcome: Outcome) -> None:
        logger.info("%s, seed %d: %.2f in %.0f s", run.method, run.seed, outcome.accuracy[-1], outcome.seconds)
        if run.digest in table and results.of(run) is None:
            results.add(as_line(study, run, outcome, engine))

    ledger, place = _Ledger(done), _Place(data, weights, engine)
    if jobs == 1:
        for run in pending:
            if not ledger.cannot_start(run):
                ledger.take(run, _work(run, place))
    else:
        _in_processes(pending, place, ledger, jobs)
    return ledger.failures


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
    """Return the runs, each once, after all runs that they need and that have no stored weights."""
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


class _Ledger:
    """Failed runs. Calls ``done`` with the others."""

    def __init__(self, done: Callable[[AnyRun, Outcome], None]) -> None:
        self.done = done
        self.failures: list[str] = []
        self._lost: set[str] = set()  # digests of runs without a result

    def take(self, run: AnyRun, outcome: Outcome | str) -> None:
        """Take a run's outcome, or the reason why it has none."""
        if isinstance(outcome, str):
            self._lost.add(run.digest)
            self._note(run, outcome)
            return
        self.done(run, outcome)
        if outcome.trouble:
            self._note(run, f"{outcome.trouble}; its result is kept.")

    def cannot_start(self, run: AnyRun) -> bool:
        """Whether a run needs one that failed. It then fails too."""
        failed = next((needed for needed in run.needs if needed.digest in self._lost), None)
        if failed is not None:
            self.take(run, f"it needs {failed.method}, which failed.")
        return failed is not None

    def _note(self, run: AnyRun, why: str) -> None:
        self.failures.append(f"{run.method}, seed {run.seed}: {why}")
        logger.error("failed: %s", self.failures[-1])


def _in_processes(pending: Sequence[AnyRun], place: _Place, ledger: _Ledger, jobs: int) -> None:
    runs = {run.digest: run for run in pending}
    order = TopologicalSorter(
        {run.digest: [needed.digest for needed in run.needs if needed.digest in runs] for run in pending}
    )
    order.prepare()
    ready: list[str] = []
    working: dict[Future[Outcome | str], AnyRun] = {}
    with ThreadPoolExecutor(jobs) as threads:
        while order.is_active():
            ready += order.get_ready()
            while ready and len(working) < jobs:
                run = runs[ready.pop(0)]
                if ledger.cannot_start(run):
                    order.done(run.digest)
                else:
                    working[threads.submit(_in_a_process, run, place)] = run
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                run = working.pop(future)
                ledger.take(run, future.result())
                order.done(run.digest)


def _in_a_process(run: AnyRun, place: _Place) -> Outcome | str:
    if isinstance(run, CommandRun):
        return _work(run, place)  # a command is a process
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        try:
            return pool.submit(_work, run, place).result()
        except BrokenProcessPool:
            return "its process was killed (out of memory?)."


def _begin() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _end_with_parent() -> None:
    """End this process with the study that started it, so that the device is free for a new start."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(run: AnyRun, place: _Place) -> Outcome | str:
    """Return a run's outcome, or in one line why it has none: not every error can be sent between processes."""
    try:
        return _outcome(run, place)
    except StudyError as error:
        return error_line(error)
    except Exception as error:  # any: the other runs continue
        logger.exception("%s, seed %d", run.method, run.seed)
        return error_line(error)
    finally:
        gc.collect()  # the networks of a run are in reference cycles
        if place.engine.device.type == "cuda":
            torch.cuda.empty_cache()


def _outcome(run: AnyRun, place: _Place) -> Outcome:
    if isinstance(run, CommandRun):
        values, metrics, seconds = run_command(run, place.weights, place.data, str(place.engine.device))
        return Outcome(values, seconds, metrics=metrics)
    return train(run, _split(place.data, run.data, place.engine.device), place.engine, WeightStore(place.weights))


@functools.cache
def _split(data: Path, choice: Choice, device: torch.device) -> Split:
    return load_split(data, choice, device)
