"""Logs of a training in Weights & Biases and MLflow.

Calls of a service run in order in a thread, so that a slow service does not slow the training. The first call that
fails ends the log with a warning; the training continues.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from d2_mgd.errors import UserError, reason
from d2_mgd.training.files import write_atomically

logger = logging.getLogger(__name__)

_PROJECT = "d2-mgd"
_LAST_CALLS = 600.0  # seconds for the remaining calls at the end of a training, such as uploads of large files
_LAST_CALLS_SHORT = 20.0  # seconds if the service has not answered yet, or after a signal, before a scheduler kills
_MLFLOW_BATCH = 100  # MLflow's limit of values in one request
_MLFLOW_VALUE = 500  # MLflow's limit of characters of a parameter
_NOT_IN_MLFLOW = re.compile(r"[^\w\-. /]")


class Service(Protocol):
    """One run in one service. Every method may raise any error of the service's library."""

    def start(self) -> str:
        """Open the run; returns its id, with which a resumed training continues it."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, name: str, image: np.ndarray, step: int) -> None: ...

    def file(self, path: Path) -> None: ...

    def finish(self, success: bool) -> None: ...


class _WandB:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step_name: str, run_id: str | None) -> None:
        self.run_id = run_id or uuid.uuid4().hex[:8]
        self.options: dict[str, Any] = {"dir": folder, "name": name, "config": dict(config)}
        self.step_name = step_name
        self.run: Any = None

    def start(self) -> str:
        import wandb

        settings = wandb.Settings(console="off")
        where: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", _PROJECT),
            "mode": os.environ.get("WANDB_MODE"),
        }
        self.run = wandb.init(id=self.run_id, resume="allow", settings=settings, **where, **self.options)
        # W&B's default step cannot decrease, but a resumed training repeats steps.
        self.run.define_metric("*", step_metric=self.step_name)
        return self.run_id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, self.step_name: step})

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        import wandb

        self.run.log({name: wandb.Image(image), self.step_name: step})

    def file(self, path: Path) -> None:
        self.run.log_artifact(str(path), name=re.sub(r"[^\w.-]", "_", path.name), type="model")

    def finish(self, success: bool) -> None:
        self.run.finish(exit_code=0 if success else 1)


class _MLflow:
    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step_name: str, run_id: str | None) -> None:
        self.name, self.config, self.run_id = name, config, run_id or ""
        self.client: Any = None

    def start(self) -> str:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        if self.run_id:
            self.client.update_run(self.run_id, status="RUNNING")
            return self.run_id
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self.client.get_experiment_by_name(experiment)
        number = self.client.create_experiment(experiment) if found is None else found.experiment_id
        self.run_id = self.client.create_run(number, run_name=self.name).info.run_id
        from mlflow.entities import Param

        values = [(key, str(value)[:_MLFLOW_VALUE]) for key, value in _flat(self.config)]
        for part in _parts([Param(_NOT_IN_MLFLOW.sub("_", key), value) for key, value in values]):
            self.client.log_batch(self.run_id, params=part)
        return self.run_id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        for part in _parts([Metric(_NOT_IN_MLFLOW.sub("_", key), value, now, step) for key, value in values.items()]):
            self.client.log_batch(self.run_id, metrics=part)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        self.client.log_image(self.run_id, image, artifact_file=f"{_NOT_IN_MLFLOW.sub('_', name)}/{step:07d}.png")

    def file(self, path: Path) -> None:
        self.client.log_artifact(self.run_id, str(path), "student")

    def finish(self, success: bool) -> None:
        self.client.set_terminated(self.run_id, "FINISHED" if success else "KILLED")


SERVICES: dict[str, Callable[[Path, str, Mapping[str, Any], str, str | None], Service]] = {
    "wandb": _WandB,
    "mlflow": _MLflow,
}


class ServiceLog:
    """The log of one training in one service.

    Args:
        name: of the service, for messages.
        service: opened in the thread of the log.
        id_file: file to write the run's id to.
    """

    def __init__(self, name: str, service: Service, id_file: Path) -> None:
        self.name, self.service = name, service
        self._calls: queue.Queue[Callable[[], Any] | None] = queue.Queue()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(id_file,), name=f"log {name}", daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of one step."""
        values = dict(values)
        self._calls.put(lambda: self.service.scalars(values, step))

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Log a picture, (H, W, 3) uint8 RGB."""
        self._calls.put(lambda: self.service.image(name, image, step))

    def file(self, path: Path) -> None:
        """Store a file with the run; it must stay until :meth:`close`."""
        self._calls.put(lambda: self.service.file(path))

    def close(self, success: bool) -> None:
        """Make the remaining calls and end the run.

        Args:
            success: whether the training has finished.
        """
        self._calls.put(lambda: self.service.finish(success))
        self._calls.put(None)
        seconds = _LAST_CALLS if success and self._opened.is_set() else _LAST_CALLS_SHORT
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.warning(
                "--log %s: the log is incomplete, because the service did not finish within %.0f s.", self.name, seconds
            )

    def _work(self, id_file: Path) -> None:
        try:
            run_id = self.service.start()
            self._opened.set()
            write_atomically(id_file, lambda file: file.write(run_id.encode()))
            while (call := self._calls.get()) is not None:
                call()
        except Exception as error:  # wandb and mlflow raise any type, and a lost log must not end the training
            logger.warning("--log %s stops, and the training continues: %s", self.name, reason(error))


def add_log_arguments(parser: argparse._ActionsContainer) -> None:
    """Add --log and --log-student."""
    parser.add_argument(
        "--log",
        action="append",
        default=[],
        choices=list(SERVICES),
        help="log metrics, settings and matchings to Weights & Biases or MLflow; may be repeated",
    )
    parser.add_argument("--log-student", action="store_true", help="with --log: upload the final student")


def check_services(names: Sequence[str], log_student: bool = False) -> None:
    """Check ``--log`` and ``--log-student`` before a training starts.

    Raises:
        UserError: a service's package is not installed, W&B has no API key, or there is no service for the student.
    """
    if log_student and not names:
        raise UserError("--log-student needs a service: add --log wandb or --log mlflow.")
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log {name} needs the package {name}, which is not installed: pip install {name}.")
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun"):
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise UserError(
                "--log wandb has no API key: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to "
                "upload later with `wandb sync`."
            )


def open_logs(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], step_name: str, resume: bool
) -> list[ServiceLog]:
    """Open a log in each service; call it on one rank only.

    Args:
        names: of ``SERVICES``.
        folder: output folder of the training, whose name is the run's name.
        config: all settings, possibly nested.
        step_name: name of the step's number: "iteration" or "step".
        resume: continue the runs of an earlier start of this training.
    """
    logs = []
    for name in dict.fromkeys(names):
        id_file = folder / f"{name}_run.txt"
        run_id = None
        if resume:
            with suppress(FileNotFoundError):
                run_id = id_file.read_text().strip()
        service = SERVICES[name](folder, folder.resolve().name, config, step_name, run_id)
        logs.append(ServiceLog(name, service, id_file))
    return logs


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parts(values: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(values), _MLFLOW_BATCH):
        yield values[start : start + _MLFLOW_BATCH]
