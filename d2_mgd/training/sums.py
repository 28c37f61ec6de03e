"""Sums and means over the images of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2_mgd.training.processes import sum_over_ranks


class Sums:
    """Sums over the images of all batches and ranks, kept on the device so that adding does not synchronise."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.values: dict[str, Tensor] = {}

    def add(self, images: int, values: Mapping[str, Tensor]) -> None:
        """Add a batch: the number of images, and sums over them."""
        count = torch.full((), images, dtype=torch.float64, device=self.device)  # filled on the device: no copy
        for name, value in {"images": count, **values}.items():
            value = value.detach().to(device=self.device, dtype=torch.float64).sum()
            self.values[name] = self.values[name] + value if name in self.values else value

    def totals(self, names: Sequence[str]) -> tuple[int, dict[str, float]]:
        """Number of images and sums of all ranks (collective; all pass the same names)."""
        images, *totals = sum_over_ranks(self._packed(names)).tolist()
        return round(images), dict(zip(names, totals))

    def means(self, names: Sequence[str]) -> dict[str, float]:
        """Means over the images of all ranks, NaN without images (collective; all pass the same names)."""
        images, totals = self.totals(names)
        return {name: total / images if images else math.nan for name, total in totals.items()}

    def _packed(self, names: Sequence[str]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack([self.values.get(name, zero) for name in ("images", *names)])

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self.values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.values = {}
        self.add_state(state)

    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Add the sums of another rank."""
        for name, value in state.items():
            value = value.to(self.device)
            self.values[name] = self.values[name] + value if name in self.values else value
