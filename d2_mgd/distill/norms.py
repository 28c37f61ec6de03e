"""Normalisation of the student's maps before they are compared; statistics ignore padding.

Shape shorthand: N images, S student channels.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2_mgd.errors import UserError

__all__ = ["NORMS", "MaskedBatchNorm", "MaskedGroupNorm", "build_norm"]

NORMS = ("bn", "sync_bn", "gn", "none")


def build_norm(name: str, channels: int) -> nn.Module:
    """A norm that is called with a map (N, S, H, W) and a mask (N, 1, H, W) of real pixels or None.

    Args:
        name: ``bn`` (published for classification), ``sync_bn`` (its statistics over all processes), ``gn`` (published
            for detection; 32 groups, or the largest divisor of S below), ``none``.
        channels: S.

    Raises:
        ValueError: an unknown name.
    """
    if name == "bn":
        return MaskedBatchNorm(channels)
    if name == "sync_bn":
        return MaskedBatchNorm(channels, sync=True)
    if name == "gn":
        return MaskedGroupNorm(math.gcd(32, channels), channels)
    if name == "none":
        return _NoNorm()
    raise UserError(f"unknown norm {name!r}; there are: {', '.join(NORMS)}.")


class _NoNorm(nn.Module):
    def forward(self, maps: Tensor, valid: Tensor | None = None) -> Tensor:
        return maps


class MaskedBatchNorm(nn.BatchNorm2d):
    """Batch-norm whose statistics are those of real pixels, over all processes if ``sync``.

    Without a mask and without ``sync`` it is ``nn.BatchNorm2d``. A single value a channel, which PyTorch refuses, has
    variance zero here.
    """

    def __init__(self, channels: int, sync: bool = False) -> None:
        super().__init__(channels)
        self.sync = sync

    def forward(self, maps: Tensor, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if valid is not None:
            maps = maps.masked_fill(~valid, 0.0)  # not a product: the padding may hold NaN
        if not self.training or self._is_plain(maps, valid):
            return super().forward(maps)
        sync = self._synchronises()
        mean, variance, count = self._statistics(maps, valid, sync)
        self._update_running(mean, variance, count)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return maps * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)

    def _is_plain(self, maps: Tensor, valid: Tensor | None) -> bool:
        """Whether training statistics of these maps are those of ``nn.BatchNorm2d``."""
        return valid is None and not self._synchronises() and maps.shape[0] * maps.shape[2] * maps.shape[3] > 1

    def _synchronises(self) -> bool:
        return self.sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def _statistics(self, maps: Tensor, valid: Tensor | None, sync: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (S,), variance (S,), number of values of a channel (), of maps that are zero where they are not real."""
        if valid is None:
            count = maps.new_tensor(maps.shape[0] * maps.shape[2] * maps.shape[3])
            total = maps.sum(dim=(0, 2, 3))
        else:
            count = valid.sum().to(maps.dtype)
            total = maps.sum(dim=(0, 2, 3))
        if sync:
            packed = _sum_over_processes(torch.cat([total, count.view(1)]))
            total, count = packed[:-1], packed[-1].detach()
        mean = total / count.clamp(min=1)
        squares = (maps - mean.view(1, -1, 1, 1)).square()
        if valid is not None:
            squares = squares.masked_fill(~valid, 0.0)
        deviation = squares.sum(dim=(0, 2, 3))
        if sync:
            deviation = _sum_over_processes(deviation)
        return mean, deviation / count.clamp(min=1), count

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Take a batch's mean (S,) and biased variance (S,) over ``count`` values into the running statistics."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class MaskedGroupNorm(nn.GroupNorm):
    """Group-norm whose statistics are those of real pixels. Without a mask it is ``nn.GroupNorm``."""

    def forward(self, maps: Tensor, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if valid is None:
            return super().forward(maps)
        images, channels, height, width = maps.shape
        grouped = maps.masked_fill(~valid, 0.0).view(images, self.num_groups, -1, height, width)
        real = valid.view(images, 1, 1, height, width)
        count = (real.sum(dim=(2, 3, 4), keepdim=True) * grouped.shape[2]).clamp(min=1)
        mean = grouped.sum(dim=(2, 3, 4), keepdim=True) / count
        centred = (grouped - mean).masked_fill(~real, 0.0)
        variance = centred.square().sum(dim=(2, 3, 4), keepdim=True) / count
        normalised = (centred * torch.rsqrt(variance + self.eps)).view(images, channels, height, width)
        return normalised * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def synchronised_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """Every batch-norm with the statistics of all ranks' images; the same parameters under the same names.

    On GPUs these are PyTorch's own synchronised batch-norms, which do not work on CPUs; there the distiller's.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, nn.BatchNorm2d) and not isinstance(module, MaskedBatchNorm):
        replacement = MaskedBatchNorm(module.num_features, sync=True)
        replacement.eps, replacement.momentum = module.eps, module.momentum
        replacement.load_state_dict(module.state_dict())
        return replacement
    for name, child in module.named_children():
        setattr(module, name, synchronised_norms(child, device))
    return module


def _sum_over_processes(values: Tensor) -> Tensor:
    """All-reduce that a gradient passes through (its backward sums the gradients of all processes)."""
    from torch.distributed.nn.functional import all_reduce  # imports process-group code: only where it is needed

    return all_reduce(values)
