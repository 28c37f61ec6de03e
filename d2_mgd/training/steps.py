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
    """The precision in which networks run, and its loss scaling. Losses and matching costs are float32 in any.

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
        precision: in which it runs.
        wrapped: what the losses are computed with; a DistributedDataParallel around the module with several ranks.
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
        """Gradients of a batch that goes through the networks in ``parts`` (micro-batches); the weights do not change.

        DDP exchanges gradients once, with the last part.

        Args:
            parts: of the batch.
            losses_of: part -> name -> loss, with gradients.
            divisor: the gradients are those of the sum of all losses of all parts, divided by it.

        Returns:
            Name -> sum of the loss over the parts, without gradients.
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
        """Exchange with all ranks what decides about this step: the only collective of a step beside DDP's.

        Reading the result waits for the device, once a step and with a single rank too: the weights must not change
        before.

        Args:
            losses: of this rank.
            received: number of the signal that this rank received; 0 for none.
            measured: numbers that become their mean over the ranks, such as what a balance has measured.

        Returns:
            The largest signal number of all ranks, and whether a loss or gradient of any rank is not finite.
        """
        bad = self._nonfinite(losses).to(torch.int64)
        # filled on the device: a copy from the host would wait for it
        numbers = torch.stack([torch.full_like(bad, received), bad])
        number, stop = largest(numbers) if measured is None else largest_and_mean(numbers, measured)
        return number, bool(stop)

    def apply(self) -> None:
        """Step with the gradients. Loss scaling skips the step where they overflow, and lowers its scale."""
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()

    def nonfinite_gradients(self) -> list[str]:
        """Names of the parameters whose gradients are not finite; none while loss scaling may be the cause."""
        if self.precision.scaler.is_enabled() and self.precision.scaler.get_scale() > _SMALLEST_SCALE:
            return []
        return [name for name, gradient in self._gradients().items() if not torch.isfinite(gradient).all()]

    def _nonfinite(self, losses: Mapping[str, Tensor]) -> Tensor:
        """() bool: whether a loss or gradient is not finite, computed without waiting for the device."""
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
