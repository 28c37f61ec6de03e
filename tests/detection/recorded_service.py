"""A service that records what a training logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class RecordedService:
    """In place of a service of d2_mgd.training.services; the class keeps the runs of a test in ``opened``.

    Args:
        fail_at: name of the method that raises.
    """

    opened: list[RecordedService] = []
    fail_at = ""

    def __init__(self, folder: Path, name: str, config: Any, step_name: str, run_id: str | None) -> None:
        self.folder, self.config, self.step_name, self.run_id = folder, config, step_name, run_id
        self.numbers: dict[str, dict[int, float]] = {}
        self.images: list[tuple[str, int]] = []
        self.files: list[str] = []
        self.success: bool | None = None
        self.opened.append(self)

    def start(self) -> str:
        self._called("start")
        return self.run_id or "first"

    def scalars(self, values: Any, step: int) -> None:
        self._called("scalars")
        for name, value in values.items():
            self.numbers.setdefault(name, {})[step] = value

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        self.images.append((name, step))

    def file(self, path: Path) -> None:
        assert path.is_file()
        self.files.append(path.name)

    def finish(self, success: bool) -> None:
        self.success = success

    def _called(self, method: str) -> None:
        if method == self.fail_at:
            raise ConnectionError("no route to host")
