"""Runs a study: every run that has no result yet, those first that others start from, a few at a time."""

from __future__ import annotations

import dataclasses
import gc
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
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
    """Where a worker finds what it needs."""

    data: Path
    weights: Path
    engine: Engine


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that left no result (``lost``), or not all that belongs to it; and why, in one line."""

    run: AnyRun
    why: str
    lost: bool = True

    def __str__(self) -> str:
        return f"{self.run.method}, seed {self.run.seed}: {self.why}"


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
) -> list[Failure]:
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
        list: the runs that failed, whatever the error was (out of memory too). They are logged, and the others go on,
        save those that need a failed one's weights. A process that ends without a word takes no other run with it:
        what was at work beside it is started again.

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

    ledger = _Ledger(done)
    if jobs == 1:
        _in_turn(pending, _Place(data, weights, engine), ledger)
    else:
        _in_processes(pending, _Place(data, weights, engine), ledger, jobs)
    return ledger.failures


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


class _Ledger:
    """What became of each run: ``done`` is called with those that have a result."""

    def __init__(self, done: Callable[[AnyRun, Outcome], None]) -> None:
        self.done = done
        self.failures: list[Failure] = []

    def take(self, run: AnyRun, outcome: Outcome | str) -> None:
        """A run's outcome, or why it has none."""
        if isinstance(outcome, str):
            self._note(Failure(run, outcome))
            return
        self.done(run, outcome)
        if outcome.trouble:
            self._note(Failure(run, f"{outcome.trouble}; its result is kept.", lost=False))

    def cannot_start(self, run: AnyRun) -> bool:
        """Whether a run needs one that failed; then it fails, too."""
        lost = {failure.run.digest for failure in self.failures if failure.lost}
        missing = next((needed for needed in run.needs if needed.digest in lost), None)
        if missing is not None:
            self.take(run, f"it needs {missing.method}, which failed.")
        return missing is not None

    def _note(self, failure: Failure) -> None:
        logger.error("failed: %s", failure)
        self.failures.append(failure)


def _in_turn(pending: Sequence[AnyRun], place: _Place, ledger: _Ledger) -> None:
    for run in pending:
        if not ledger.cannot_start(run):
            ledger.take(run, _work(run, place))


def _in_processes(pending: Sequence[AnyRun], place: _Place, ledger: _Ledger, jobs: int) -> None:
    waiting = list(pending)
    while waiting:
        for run in _until_a_process_ends(waiting, place, ledger, jobs):
            # which of those at work was to blame shows when each has a process, and the memory, for itself
            if _until_a_process_ends([run], place, ledger, 1):
                ledger.take(run, "its process ended without a word (out of memory?).")


def _until_a_process_ends(waiting: list[AnyRun], place: _Place, ledger: _Ledger, jobs: int) -> list[AnyRun]:
    """Take runs from ``waiting`` until none is left, or until a process ends: then those that were at work."""
    working: dict[Future[Outcome | str], AnyRun] = {}
    with _pool(waiting, jobs) as pool:
        whole = True
        while whole and (waiting or working):
            try:
                _start(waiting, working, lambda run: pool.submit(_work, run, place), ledger, jobs)
            except BrokenProcessPool:
                whole = False
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                if isinstance(future.exception(), BrokenProcessPool):
                    whole = False
                else:
                    ledger.take(working.pop(future), future.result())
    return list(working.values())


def _pool(runs: Sequence[AnyRun], jobs: int) -> Executor:
    if all(isinstance(run, CommandRun) for run in runs):
        return ThreadPoolExecutor(jobs)  # a command has a process of its own
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _start(
    waiting: list[AnyRun],
    working: dict[Future[Outcome | str], AnyRun],
    submit: Callable[[AnyRun], Future[Outcome | str]],
    ledger: _Ledger,
    jobs: int,
) -> None:
    """Put to work what may start now, up to ``jobs`` at a time."""
    missing = {run.digest for run in (*waiting, *working.values())}
    for run in list(waiting):
        if ledger.cannot_start(run):
            waiting.remove(run)
        elif len(working) < jobs and not any(needed.digest in missing for needed in run.needs):
            working[submit(run)] = run
            waiting.remove(run)


# ---- in a worker, which keeps the data from run to run

_splits: dict[tuple[Path, Choice, str], Split] = {}


def _begin() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _end_with_parent() -> None:
    """Nobody would take the results, and a study that is started again needs the device."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(run: AnyRun, place: _Place) -> Outcome | str:
    """A run's outcome, or in one line why it has none: what crosses processes is a text, since not every error can."""
    try:
        return _outcome(run, place)
    except StudyError as error:
        return error_line(error)
    except Exception as error:  # any: the others go on
        logger.exception("%s, seed %d", run.method, run.seed)
        return error_line(error)
    finally:
        _give_memory_back(run, place.engine)


def _give_memory_back(run: AnyRun, engine: Engine) -> None:
    """Networks and graphs of a finished run, to the processes beside this one."""
    if not isinstance(run, Run):
        return
    if engine.compiled is not None:
        torch._dynamo.reset()
    gc.collect()  # a run's objects know each other
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def _outcome(run: AnyRun, place: _Place) -> Outcome:
    if not isinstance(run, Run):
        values, metrics, seconds = run_command(run, place.weights, place.data, str(place.engine.device))
        return Outcome(values, seconds, metrics=metrics)
    key = (place.data, run.data, str(place.engine.device))
    if key not in _splits:
        _splits[key] = load_split(place.data, run.data, place.engine.device)
    return train(run, _splits[key], place.engine, WeightStore(place.weights))
