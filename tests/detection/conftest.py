"""One tiny data set, teacher and config for all tests that train: data sets are registered once a process."""

from __future__ import annotations

import sys
from typing import Any

import pytest


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from training_runs import Workplace

    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(autouse=True)
def _program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Command lines that tests run in this process print errors under the name of the program."""
    monkeypatch.setattr(sys, "argv", ["train_net.py"])
