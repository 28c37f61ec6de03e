"""Count what a process passes to ``torch.distributed``."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor


class Meter:
    """Counts the calls and bytes of this process's collectives, by purpose.

    Args:
        purpose: of collectives outside of :meth:`of`.
    """

    def __init__(self, purpose: str = "other") -> None:
        self.purpose = purpose
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count collectives inside; those for Python objects count as the collectives that they consist of."""
        originals = {name: getattr(c10d, name) for name in ("all_reduce", "broadcast", "all_gather", "gather")}
        coalesced = dist._broadcast_coalesced
        for name, original in originals.items():
            for place in (c10d, dist):
                setattr(place, name, self._counted(name, original))

        def broadcast_coalesced(group: Any, tensors: list[Tensor], *rest: Any) -> Any:
            self.add("broadcast", sum(tensor_bytes(tensor) for tensor in tensors))
            return coalesced(group, tensors, *rest)

        dist._broadcast_coalesced = broadcast_coalesced  # type: ignore[assignment]
        try:
            yield
        finally:
            dist._broadcast_coalesced = coalesced
            for name, original in originals.items():
                for place in (c10d, dist):
                    setattr(place, name, original)

    def add(self, collective: str, size: int) -> None:
        self.calls[f"{self.purpose}: {collective}"] += 1
        self.bytes[f"{self.purpose}: {collective}"] += size

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Any, *rest: Any, **options: Any) -> Any:
            own = rest[0] if name == "all_gather" else tensor
            self.add(name, tensor_bytes(own))
            return original(tensor, *rest, **options)

        return counted

    @contextlib.contextmanager
    def of(self, purpose: str) -> Iterator[None]:
        """Count collectives inside under ``purpose``."""
        before, self.purpose = self.purpose, purpose
        try:
            yield
        finally:
            self.purpose = before

    def attach(self, owner: Any, name: str, purpose: str) -> None:
        """Count what a function sends under ``purpose``."""
        original = getattr(owner, name)

        def purposeful(*arguments: Any, **options: Any) -> Any:
            with self.of(purpose):
                return original(*arguments, **options)

        setattr(owner, name, purposeful)


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of its elements."""
    return tensor.numel() * tensor.element_size()
