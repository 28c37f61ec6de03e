"""One tiny data set, teacher and config for all tests that train: data sets are registered once a process."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from training_runs import Workplace

    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What this project logs, also after a training has set up its loggers."""
    monkeypatch.setattr(logging.getLogger("d2_mgd"), "propagate", True)
    caplog.set_level("INFO")
    return caplog


@pytest.fixture(autouse=True)
def _program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Command lines that tests run in this process print errors under the name of the program."""
    monkeypatch.setattr(sys, "argv", ["train_net.py"])
