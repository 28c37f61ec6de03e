"""One thread a test process, fixed seeds, and closing lines that say what this machine could not test."""

from __future__ import annotations

import atexit
import importlib.metadata
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Iterator

# Before torch starts its threads. Tests run in one process a core, and sums are the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import numpy as np
import pytest
import torch

from d2_mgd._install import DETECTRON2_INSTALL

# The caches of a user are not written to, and say nothing of what a test has yet to evaluate.
os.environ["FVCORE_CACHE"] = tempfile.mkdtemp(prefix="d2_mgd_tests_")
atexit.register(shutil.rmtree, os.environ["FVCORE_CACHE"], ignore_errors=True)

# Cores are shared with other tests, so no deadlines; where CI is set, every run draws the same examples.
hypothesis.settings.register_profile("project", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("project")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _rounding_of_a_fresh_process() -> Iterator[None]:
    """TorchScript changes a function's rounding after its first calls, and a test before may have made them."""
    with torch.jit.optimized_execution(False):
        yield


@pytest.fixture(autouse=True)
def _default_dtype_kept() -> Iterator[None]:
    """A test that changes torch's process-wide defaults must not change the next one."""
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


@pytest.fixture(autouse=True)
def _logging_kept() -> Iterator[None]:
    """Commands in this process add handlers to closed streams, and Detectron2 stops a logger from propagating."""

    def settings() -> dict[logging.Logger, tuple[list[logging.Handler], bool, int]]:
        named = [one for one in logging.Logger.manager.loggerDict.values() if isinstance(one, logging.Logger)]
        return {logger: (list(logger.handlers), logger.propagate, logger.level) for logger in (logging.root, *named)}

    before = settings()
    yield
    for logger in settings():
        handlers, logger.propagate, level = before.get(logger, ([], True, logging.NOTSET))
        logger.setLevel(level)
        for handler in [one for one in logger.handlers if one not in handlers]:
            logger.removeHandler(handler)


def _detectron2() -> str:
    try:
        return f"installed, {importlib.metadata.version('detectron2')}"
    except importlib.metadata.PackageNotFoundError:
        return f"not installed, so the tests that need it are skipped; to install it: {DETECTRON2_INSTALL}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = len(terminalreporter.stats.get("skipped", []))
    device = (
        torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none, so the tests that need one are skipped"
    )
    terminalreporter.section("what this machine could test")
    terminalreporter.write_line(f"Detectron2: {_detectron2()}")
    terminalreporter.write_line(f"CUDA device: {device}")
    terminalreporter.write_line(f"skipped: {skipped} (a skipped file counts as one); the reasons follow")
