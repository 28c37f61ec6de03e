"""One step of the optimiser: a batch in one or several parts, in full or mixed precision, on one or many processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2_mgd.detection.nonfinite import NonFinitePolicy, StepReport
from d2_mgd.detection.norms import FailedElsewhere, synchronises
from d2_mgd.errors import UserError
from d2_mgd.training.processes import first_failure, largest

__all__ = ["Precision", "StepTrainer", "predict_in_float32"]

Batch = list[dict[str, Any]]

# Here a scaler no longer explains gradients that are not finite: what float16 cannot hold is 7e7 without it.
_SMALLEST_SCALE = 2.0**-10


class Precision:
    """In which precision networks run. Losses and matching costs are float32 in any.

    Args:
        device: ``cuda`` or ``cpu``.
        dtype: of the autocast: ``float16``, whose gradients a scaler keeps from vanishing, ``bfloat16``, which needs
            none, or ``float32``, which is none.
    """

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Precision:
        """Of SOLVER.AMP.ENABLED and MGD.PRECISION.

        Raises:
            ValueError: this device cannot compute in it.
        """
        device = torch.device(cfg.MODEL.DEVICE).type
        if not cfg.SOLVER.AMP.ENABLED:
            return cls(device)
        name = cfg.MGD.PRECISION or ("float16" if device == "cuda" else "bfloat16")
        if name == "float16" and device != "cuda":
            raise UserError(f"MGD.PRECISION float16 needs a GPU, and MODEL.DEVICE is {device}: use bfloat16.")
        if name == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported():
            raise UserError(f"MGD.PRECISION bfloat16 is not known to {torch.cuda.get_device_name()}: use float16.")
        return cls(device, getattr(torch, name))

    @property
    def mixed(self) -> bool:
        return self.dtype != torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """Context in which networks run."""
        return torch.autocast(self.device, dtype=self.dtype) if self.mixed else nullcontext()


def predict_in_float32(student: nn.Module) -> None:
    """Let the predictions of a dense head leave it in float32, where its losses are computed.

    Other heads' losses do so by themselves; those of FCOS cannot take two dtypes.
    """
    if isinstance(student, DenseDetector):
        student.head.register_forward_hook(lambda module, inputs, outputs: _in_float32(outputs))


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float()
    return type(value)(_in_float32(one) for one in value)


class StepTrainer(SimpleTrainer):
    """Detectron2's trainer, with micro-batches, precisions, and an eye on numbers that are not finite.

    Args:
        model: gives the losses of a batch, wrapped for DDP where there are several processes.
        data_loader: batches of this process.
        optimizer: of the model.
        micro_batches: into how many parts, one after the other, a batch is cut. Gradients are the mean over parts and
            are exchanged once.
        precision: of the networks.
        policy: what becomes of a step whose losses or gradients are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Batch],
        optimizer: torch.optim.Optimizer,
        *,
        policy: NonFinitePolicy,
        micro_batches: int = 1,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.policy = policy
        self.micro_batches = micro_batches
        self.precision = precision or Precision("cpu")
        self._synchronises = synchronises(model)

    def run_step(self) -> None:
        """Losses, gradients, and a step of the optimiser if all are finite. A collective.

        Raises:
            NonFiniteError: they are not, and the policy says to stop; in all processes.
        """
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        seconds = time.perf_counter() - start
        self.policy.remember()
        self.optimizer.zero_grad()
        report = self._backward(batch)
        if largest([not report.finite])[0]:
            self.policy.handle(self.iter, report, batch)
            return
        self.policy.passed()
        self._write_metrics({name: torch.tensor(loss) for name, loss in report.losses.items()}, seconds)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()

    def _backward(self, batch: Batch) -> StepReport:
        """Gradients of a batch, and the means of its losses over the parts."""
        parts = _cut(batch, self.micro_batches)
        sums: dict[str, Tensor] = {}
        failure = ""
        observes = getattr(self._detector, "observe_next", False)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            if observes:  # all of the batch
                self._detector.observe_next = True
            with self._exchanged(last):
                losses: dict[str, Tensor] = {}
                if not failure:
                    losses, failure = self._forward(part)
                # The others would wait in this backward pass for a process that does not come to it.
                if (last or self._synchronises) and first_failure(failure):
                    return StepReport({}, [], failure)
                if not failure:
                    total = torch.stack([loss.float() for loss in losses.values()]).sum() / len(parts)
                    self.precision.scaler.scale(total).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach().float() / len(parts)
        return self._report(sums)

    def _forward(self, part: Batch) -> tuple[dict[str, Tensor], str]:
        """Losses, or what Detectron2 says of predictions that are not finite."""
        try:
            with self.precision.autocast():
                return self.model(part), ""
        except FailedElsewhere:
            return {}, ""
        except FloatingPointError as error:
            return {}, " ".join(str(error).split())

    @property
    def _detector(self) -> Any:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def _exchanged(self, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _report(self, losses: dict[str, Tensor]) -> StepReport:
        """One look at the device for all numbers."""
        gradients = self._gradients()
        numbers = torch.stack([*losses.values()])
        if gradients:
            norms = torch._foreach_norm([*gradients.values()])
            largest_norm = torch.stack([norm.float() for norm in norms]).max()
            scale = self.precision.scaler.scale(torch.ones_like(largest_norm))
            numbers = torch.cat([numbers, largest_norm.view(1), scale.view(1)])
        values = numbers.tolist()
        bad = []
        if gradients and not math.isfinite(values[-2]) and not self._scales_less(values[-1]):
            # a norm overflows before its elements do
            bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
        return StepReport(dict(zip(losses, values)), bad)

    def _scales_less(self, scale: float) -> bool:
        """Whether gradients that are not finite are the scaler's business: it leaves the step out and halves."""
        return self.precision.scaler.is_enabled() and scale > _SMALLEST_SCALE

    def _gradients(self) -> dict[str, Tensor]:
        return {name: one.grad for name, one in self._detector.named_parameters() if one.grad is not None}

    def close(self) -> None:
        """End the loading processes, which would be torn down with noise at the end of the program."""
        self._data_loader_iter_obj = None

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "nonfinite": self.policy.state_dict()}
        if self.precision.scaler.is_enabled():
            state["grad_scaler"] = self.precision.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.policy.load_state_dict(state_dict["nonfinite"])
        if self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(state_dict["grad_scaler"])


def _cut(batch: Batch, parts: int) -> list[Batch]:
    """Equal parts, in order."""
    size = len(batch) // parts
    return [batch[start : start + size] for start in range(0, len(batch), size)]
