"""The output folder of a training, detection or classification, read for programs that show it. No network is built.

A detection run is what tools/train_net.py leaves (``config.yaml``), a classification run what classification/main_*.py
leave (``run.json``). :mod:`detection_run` and :mod:`classification_run` make their networks from them.

Shape shorthand: S student channels, T teacher channels, H, W pixels of a map or image.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from d2_mgd import configs, visualize
from d2_mgd._warnings import ignore_deprecations
from d2_mgd.data.images import ImageError, read_rgb
from d2_mgd.distill import MATCHED_ALIGNMENTS, RematchReport
from d2_mgd.errors import UserError, reason
from d2_mgd.visualize.report import Report

BAD_INPUT = 2  # exit status, as in argparse
CONFIG, RECORD = "config.yaml", "run.json"
History = dict[int, dict[str, RematchReport]]  # finished iterations or epochs -> feature -> report


# What a damaged file of a run makes its readers raise.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, yaml.YAMLError, zipfile.BadZipFile)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Context around a file's readers, whose errors become :class:`UserError` with ``what`` before the reason."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGED as error:
        raise UserError(f"{what}: {reason(error)}.") from error


@dataclass(frozen=True)
class Maps:
    """One image, and the maps of both networks on it, by feature.

    Args:
        image: (H, W, 3) uint8 RGB, the part that the networks saw.
        student: feature -> (1, S, H, W).
        teacher: feature -> (1, T, H, W).
        weights: the student's file.
    """

    image: np.ndarray
    student: dict[str, torch.Tensor]
    teacher: dict[str, torch.Tensor]
    weights: Path


@dataclass(frozen=True)
class Run:
    """A run's folder.

    Args:
        folder: of the run.
        kind: ``detection``, ``classification``, or ``matchings`` where nothing but those is left.
        record: the content of ``config.yaml`` or ``run.json``.
    """

    folder: Path
    kind: str
    record: Mapping[str, Any]

    @property
    def step(self) -> str:
        """What its metrics count: ``iteration`` or ``epoch``."""
        return "epoch" if self.kind == "classification" else "iteration"

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by its name: keys of the config with dots, or options."""
        if self.kind == "classification":
            return dict(self.record["options"])
        return dict(_flat(self.record))

    def uses(self, key: str) -> bool:
        """Whether a setting has an effect: those of the distillation have none in a run without a teacher."""
        if self.kind == "classification":
            return key in self.settings or self.settings.get("method") != "base"
        group, _, name = key.partition(".")
        used = ("ENABLED", *configs.WITHOUT_TEACHER)
        return group != "MGD" or self.settings.get("MGD.ENABLED", False) or name.split(".")[0] in used

    @property
    def evaluated_on(self) -> str:
        """The data of its evaluations, as its settings name them."""
        settings = self.settings
        if self.kind == "classification":
            return " ".join(str(settings[key]) for key in ("data", "val_split") if settings.get(key))
        return ", ".join(settings.get("DATASETS.TEST", ()))

    @property
    def reducer(self) -> str:
        return str(self.settings["mgd_reducer" if self.kind == "classification" else "MGD.REDUCER"])

    def metrics(self) -> list[dict[str, Any]]:
        """Its ``metrics.json``, a dict an iteration or epoch, ascending.

        Raises:
            UserError: there is none, or nothing in it yet.
        """
        path = self.folder / "metrics.json"
        with reading(f"{path} cannot be read"):
            if not path.is_file():
                raise UserError(f"{self.folder} has no metrics.json: its training has measured nothing yet.")
            rows = visualize.read_metrics(path, self.step)
        if not rows:
            raise UserError(f"{path} is empty: its training has measured nothing yet.")
        return rows

    def history(self) -> tuple[History, str]:
        """All its rematches, and whether their numbers are of ``iterations`` or ``epochs``.

        Raises:
            UserError: there is none, with the reason where the settings tell it; or a file is damaged.
        """
        folder = self.folder / "matching" if (self.folder / "matching").is_dir() else self.folder
        with reading(f"a matching in {folder} is damaged"):
            try:
                found = visualize.load_history(folder)
            except FileNotFoundError:
                raise UserError(f"{self.folder} holds no matching: {self._why_unmatched()}.") from None
        return found, "epochs" if any(folder.glob("epoch_*.npz")) else "iterations"

    def _why_unmatched(self) -> str:
        if self.kind == "matchings":
            return (
                "give the output folder of tools/train_net.py or of classification/main_mgd.py, or one with files such "
                "as matching/iter_0001000.npz"
            )
        settings = self.settings
        if self.kind == "classification":
            distilled, align = settings.get("distiller") == "mgd", settings.get("mgd_align")
        else:
            distilled, align = settings.get("MGD.ENABLED", False), settings.get("MGD.ALIGN")
        if not distilled:
            return "it was trained without a teacher's features"
        if align not in MATCHED_ALIGNMENTS:
            return f"its channels are aligned by {align}"
        return "it has not been matched yet, or its trainer lacks the hooks of distillation_hooks, which write it"


def open_run(folder: str | os.PathLike[str]) -> Run:
    """The run in a folder.

    Raises:
        UserError: there is no such folder, or its config cannot be read.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}.")
    with reading(f"{path} is not readable as a run"):
        if (path / RECORD).is_file():
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
            options = record.get("options") if isinstance(record, dict) else None
            if not isinstance(options, dict) or not {"arch", "data", "method"} <= options.keys():
                raise UserError(f"{path / RECORD} was not written by classification/main_base.py or main_mgd.py.")
            return Run(path, "classification", record)
        if (path / CONFIG).is_file():
            text = (path / CONFIG).read_text(encoding="utf-8")
            if "_target_:" in text:
                raise UserError(f"{path} is of a python config (LazyConfig), which this tool does not read.")
            config = yaml.safe_load(text)
            if not isinstance(config, dict) or "MODEL" not in config:
                raise UserError(f"{path / CONFIG} is not the config of a Detectron2 training.")
            return Run(path, "detection", config)
    return Run(path, "matchings", {})


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: as many of its last parts as tell it from the others.

    Raises:
        UserError: a folder is given twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for index, one in enumerate(parts):
        if one in parts[:index]:
            raise UserError(f"{folders[index]} is given twice.")
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB.

    Raises:
        UserError: it does not exist, or is no image.
    """
    try:
        return np.asarray(read_rgb(path))
    except ImageError as error:
        raise UserError(f"{path} {error}.") from error


def write_page(build: Callable[[], tuple[Report, str]], output: Path) -> int:
    """Build and write a report, and print its path; returns the exit status.

    Args:
        build: returns the report, and lines to print after its path, or an empty string.
        output: folder to write to.
    """
    ignore_deprecations()
    try:
        report, lines = build()
        try:
            _, page = report.write(output)
        except OSError as error:
            raise UserError(f"--output {output} cannot be written to: {error.strerror}.") from error
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"{page}\n{lines}".rstrip())
    return 0


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
