"""The console commands of an installation: the scripts of ``tools``, which a wheel contains as ``d2_mgd_tools``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["check", "compare", "compare_runs", "export", "train"]

_BESIDE = Path(__file__).resolve().parents[1]


def _main(script: str) -> Any:
    """``main`` of a script. Scripts import each other by name, so their folder goes to ``sys.path``."""
    in_wheel = _BESIDE / "d2_mgd_tools"
    sys.path.insert(0, str(in_wheel if in_wheel.is_dir() else _BESIDE / "tools"))
    return importlib.import_module(script).main


def train() -> None:
    """Train a detector."""
    _main("train_net")()


def compare() -> int:
    """Show trainings side by side."""
    return _main("compare")()


def compare_runs(folders: Sequence[str | Path], output: str | Path) -> int:
    """Write the page that compares trainings, and print its path and, of two, how far they are apart."""
    return _main("compare")([*map(str, folders), "--output", str(output)])


def check() -> int:
    """Check a data set for a detector."""
    return _main("check_dataset")()


def export() -> int:
    """Export a student."""
    return _main("export_student")()
