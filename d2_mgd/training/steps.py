"""One step of the optimiser: micro-batches, mixed precision, loss scaling, and a check for non-finite numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2_mgd.training.processes import largest, largest_and_mean

Part = TypeVar("Part")

# Below this scale, non-finite gradients are not caused by loss scaling: unscaled they would exceed 7e7.
_SMALLEST_SCALE = 2.0**-10


class Precision:
    """The precision in which networks run, and its loss scaling. Losses and matching costs are always float32.

    Args:
        device: ``cuda`` or ``cpu``.
        dtype: ``float16`` (with loss scaling), ``bfloat16`` (no loss scaling) or ``float32`` (no autocast).
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    @property
    def mixed(self) -> bool:
        return self.dtype != torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """Context in which networks run. Enter it inside a forward: threads of DataParallel start without it."""
        return torch.autocast(self.device, dtype=self.dtype) if self.mixed else nullcontext()


class Stepper:
    """Computes the gradients of a batch, checks them together with all ranks, and applies them.

    Args:
        module: the trained module.
        optimizer: of the module.
        precision: of the forward pass.
        wrapped: computes the losses: the module, or with several ranks DistributedDataParallel around it.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, wrapped: nn.Module
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.precision = precision
        self.ddp = wrapped if isinstance(wrapped, DistributedDataParallel) else None

    def backward(
        self, parts: Sequence[Part], losses_of: Callable[[Part], Mapping[str, Tensor]], divisor: float
    ) -> dict[str, Tensor]:
        """Compute the gradients of a batch by gradient accumulation, without changing the weights.

        DDP exchanges gradients once, with the last micro-batch.

        Args:
            parts: micro-batches.
            losses_of: micro-batch -> name -> loss, with gradients.
            divisor: of the sum of all losses, before the gradients are computed.

        Returns:
            Name -> sum of the loss over micro-batches, without gradients.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last or self.ddp is None else self.ddp.no_sync():
                losses = {name: _single_or_double(loss) for name, loss in losses_of(part).items()}
                total = torch.stack([*losses.values()]).sum() / divisor
                self.precision.scaler.scale(total).backward()
            for name, loss in losses.items():
                sums[name] = sums[name] + loss.detach() if name in sums else loss.detach()
        return sums

    def agree(self, losses: Mapping[str, Tensor], received: int, measured: Tensor | None = None) -> tuple[int, bool]:
        """Agree with all ranks on signals and on whether to apply the step: its only collective besides DDP's.

        This synchronises with the device, also with one rank, because the weights must not change before the check.

        Args:
            losses: of this rank.
            received: number of the signal that this rank received; 0 for none.
            measured: replaced by their mean over ranks, such as the measurements of a balance.

        Returns:
            The largest signal number of all ranks, and whether a loss or gradient of any rank is not finite.
        """
        bad = self._nonfinite(losses).to(torch.int64)
        # full_like fills on the device; a copy from the host would synchronise
        numbers = torch.stack([torch.full_like(bad, received), bad])
        number, stop = largest(numbers) if measured is None else largest_and_mean(numbers, measured)
        return number, bool(stop)

    def apply(self) -> None:
        """Apply the gradients. If they overflow, loss scaling skips the step and lowers its scale."""
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()

    def nonfinite_gradients(self) -> list[str]:
        """Names of the parameters with non-finite gradients; none while loss scaling may be the cause."""
        if self.precision.scaler.is_enabled() and self.precision.scaler.get_scale() > _SMALLEST_SCALE:
            return []
        return [name for name, gradient in self._gradients().items() if not torch.isfinite(gradient).all()]

    def _nonfinite(self, losses: Mapping[str, Tensor]) -> Tensor:
        """() bool: whether a loss or gradient is non-finite, computed without synchronising with the device."""
        bad = ~torch.isfinite(torch.stack([*losses.values()])).all()
        gradients = [*self._gradients().values()]
        if gradients:
            # the largest element, because a sum of squares can overflow where all elements are finite
            largest = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, math.inf)])
            overflow = ~torch.isfinite(largest).all()
            if self.precision.scaler.is_enabled():
                overflow &= self.precision.scaler.scale(torch.ones_like(largest[0])) <= _SMALLEST_SCALE
            bad |= overflow
        return bad

    def _gradients(self) -> dict[str, Tensor]:
        return {name: one.grad for name, one in self.module.named_parameters() if one.grad is not None}


def _single_or_double(loss: Tensor) -> Tensor:
    return loss.to(torch.promote_types(loss.dtype, torch.float32)).sum()
