"""The device and precision of a run, its results, and the files of its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.data import StudyError
from benchmarks.accuracy.networks import Staged
from benchmarks.accuracy.study import Run


@dataclass(frozen=True)
class Engine:
    """Device, precision and compilation of a run. They decide its speed, not what is trained.

    Args:
        device: where networks and data are.
        mixed_precision: forward passes of training under bfloat16 autocast.
        compiled: backend of ``torch.compile`` for a step's forward, or None.
        graphs: replay a whole step (augmentation, both networks, losses, optimiser) as one CUDA graph. Small networks
            at small batches spend most of a step on launching kernels.
    """

    device: torch.device
    mixed_precision: bool = False
    compiled: str | None = None
    graphs: bool = False

    def placed(self, network: Staged) -> Staged:
        """Return the network on the device, in channels_last on a GPU: convolutions in bfloat16 are faster."""
        network = network.to(self.device)
        return network.to(memory_format=torch.channels_last) if self.device.type == "cuda" else network  # type: ignore[call-overload]

    def autocast(self) -> torch.autocast:
        # a graph must not keep casts of weights from before its capture
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.mixed_precision, cache_enabled=not self.graphs
        )


@dataclass
class Outcome:
    """The results of a run.

    Args:
        accuracy: top-1 in percent on the test images, after each epoch.
        seconds: of training and evaluation, without reading data.
        rematches: for each feature of each rematch, see :meth:`Distillation.measure_and_rematch`.
        projections: for each feature of a learned projection, see :meth:`Distillation.measure_projections`.
        metrics: other values at the end, by name: of a command line, or of a distiller's balance.
        trouble: which other measurement failed, and why; empty if none did.
    """

    accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rematches: list[dict[str, Any]] = field(default_factory=list)
    projections: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    trouble: str = ""


class WeightStore:
    """Weights of finished runs, by digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.digest}.pt"

    def save(self, run: Run, network: nn.Module) -> None:
        """Write the weights in one rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{run.digest}.{os.getpid()}.tmp"
        torch.save(network.state_dict(), temporary)
        os.replace(temporary, self.path(run))

    def load(self, run: Run) -> dict[str, Tensor]:
        """Return the weights of a run, on the CPU."""
        return torch.load(self.path(run), map_location="cpu", weights_only=True)


def error_line(error: Exception) -> str:
    """Return an error as one line: its message, with its type unless it is a :class:`StudyError`."""
    said = (str(error).strip() or "no message").splitlines()[0]
    return said if isinstance(error, StudyError) else f"{type(error).__name__}: {said}"
