"""Detectron2's training step with micro-batches, mixed precision and a policy for non-finite numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Instances
from torch import Tensor, nn

from d2_mgd.detection.loader import SampleError
from d2_mgd.detection.norms import FailedElsewhere, synchronises
from d2_mgd.errors import UserError
from d2_mgd.training import received_signal
from d2_mgd.training.nonfinite import NonFinitePolicy, StepReport
from d2_mgd.training.processes import distributed, first_failure, largest, together
from d2_mgd.training.steps import Precision, Stepper

Batch = list[dict[str, Any]]


def precision_of(cfg: CfgNode) -> Precision:
    """The precision of SOLVER.AMP.ENABLED and MGD.PRECISION.

    Raises:
        UserError: this device cannot compute in it.
    """
    device = torch.device(cfg.MODEL.DEVICE).type
    if not cfg.SOLVER.AMP.ENABLED:
        return Precision(device)
    name = cfg.MGD.PRECISION or ("float16" if device == "cuda" else "bfloat16")
    if name == "float16" and device != "cuda":
        raise UserError(f"MGD.PRECISION float16 needs a GPU, and MODEL.DEVICE is {device}: use bfloat16.")
    if name == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"{torch.cuda.get_device_name()} does not support MGD.PRECISION bfloat16: use float16.")
    return Precision(device, getattr(torch, name))


def predict_in_float32(student: nn.Module) -> None:
    """Convert the predictions of a dense head to float32, in which its losses are computed.

    Other heads' losses convert them; those of FCOS cannot take two dtypes.
    """
    if isinstance(student, DenseDetector):
        student.head.register_forward_hook(lambda module, inputs, outputs: _in_float32(outputs))


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float()
    return type(value)(_in_float32(one) for one in value)


class StepTrainer(SimpleTrainer):
    """Detectron2's trainer of one model, on one or several ranks.

    Args:
        model: gives the losses of a batch; wrapped for DDP here where there are several ranks.
        data_loader: batches of this rank.
        optimizer: of the model.
        policy: what happens after a step with non-finite losses or gradients.
        micro_batches: number of equal parts that a batch goes through the model in. Gradients are the mean over parts.
        precision: of the networks.
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
        self.precision = precision or Precision()
        self.guarded = _GuardedLosses(model, self.precision)
        self.wrapped: nn.Module = distributed(self.guarded) if together() else self.guarded
        self.stepper = Stepper(model, optimizer, self.precision, self.wrapped)
        self.received = 0  # number of a signal to any rank, after a step
        self._unreadable: SampleError | None = None

    def run_step(self) -> None:
        """One step of the optimiser, unless the policy skips it (collective).

        Raises:
            NonFiniteError: losses or gradients are not finite, and the policy says to stop.
            SampleError: a rank cannot read an image.
        """
        assert self.model.training, "the model was changed to eval mode"
        batch, seconds = self._next_batch()
        self.policy.before_step(observing=getattr(self.model, "observes_next", False))
        losses = self._backward(batch)
        distiller = getattr(self.model, "distiller", None)
        measured = None if distiller is None else distiller.measured
        self.received, stop = self.stepper.agree(losses, received_signal(), measured)
        if stop:
            self._not_finite(batch, losses)
            return
        self.policy.after_finite_step()
        values = torch.stack([*losses.values()]).tolist()
        self._write_metrics({name: torch.tensor(value) for name, value in zip(losses, values)}, seconds)
        self.stepper.apply()
        if distiller is not None:
            self.model.update_balance(reduced=True)

    def _next_batch(self) -> tuple[Batch, float]:
        """A batch, or an empty one where an image cannot be read, and the seconds that it took."""
        start = time.perf_counter()
        self._unreadable = None
        batch: Batch = []
        try:
            batch = next(self._data_loader_iter)
        except SampleError as error:
            self._unreadable = error
        self.guarded.failure = str(self._unreadable or "")
        return batch, time.perf_counter() - start

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of a batch; returns the means of its losses over the parts."""
        size = len(batch) // self.micro_batches
        parts = [batch[index * size : (index + 1) * size] for index in range(self.micro_batches)]
        sums = self.stepper.backward(parts, self.wrapped, len(parts))
        return {name: loss / len(parts) for name, loss in sums.items()}

    def _not_finite(self, batch: Batch, losses: dict[str, Tensor]) -> None:
        unreadable = first_failure(str(self._unreadable or ""))
        if unreadable:
            raise SampleError(unreadable) from self._unreadable
        report = StepReport(
            losses={} if "failed" in losses else {name: float(loss) for name, loss in losses.items()},
            gradients=self.stepper.nonfinite_gradients(),
            images=[str(sample.get("file_name", f"number {index}")) for index, sample in enumerate(batch)],
            failure=self.guarded.failure,
        )
        self.policy.handle(f"iter_{self.iter:07d}", f"iteration {self.iter}", report, lambda: _plain(batch))

    def close(self) -> None:
        """End the dataloader workers, which would otherwise print errors at the end of the program."""
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


class _GuardedLosses(nn.Module):
    """A model's losses or, on a rank that has none, a NaN that every parameter takes part in.

    The other ranks wait in DDP's backward pass for the gradients of all ranks, so each has to run one. After it,
    :meth:`Stepper.agree` reports the NaN on all ranks, and no rank applies the step.

    Args:
        model: raises ``FloatingPointError`` where Detectron2 finds predictions that are not finite.
        precision: in which it runs.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.failure = ""  # why this rank's batch has no losses
        self._synchronises = synchronises(model)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        waits = self._synchronises or getattr(self.model, "rematches_next", False)
        if not self._failed(waits):
            losses = self._losses(batch)
            if not self._failed(waits):
                return losses
        sums = [parameter.float().sum() for parameter in self.model.parameters() if parameter.requires_grad]
        return {"failed": 0.0 * torch.stack(sums).sum() + math.nan}

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        try:
            with self.precision.autocast():
                losses: dict[str, Tensor] = self.model(batch)
                return losses
        except FailedElsewhere:
            return {}
        except FloatingPointError as error:
            self.failure = " ".join(str(error).split())
            return {}

    def _failed(self, waits: bool) -> bool:
        """Whether this rank has no losses; where the model waits for other ranks, whether any rank has none."""
        return bool(largest([int(bool(self.failure))])[0]) if waits else bool(self.failure)


def _plain(value: Any) -> Any:
    """A batch as tensors and plain containers, which can be read without running code."""
    if isinstance(value, Instances):
        return {"image_size": tuple(value.image_size), **_plain(value.get_fields())}
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, (Tensor, str, int, float, type(None))):
        return value
    for name in ("tensor", "polygons"):  # of Detectron2's structures
        if hasattr(value, name):
            return _plain(getattr(value, name))
    return str(value)
