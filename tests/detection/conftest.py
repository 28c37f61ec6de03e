"""One tiny data set, teacher and config for all tests that train: data sets are registered once a process."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from training_runs import Workplace

    return Workplace(tmp_path_factory.mktemp("workplace"))
