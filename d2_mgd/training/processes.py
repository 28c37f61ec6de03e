"""The ranks of a training: their process group, and collectives after which all ranks go on, or fail, alike.

Without a process group, or with one rank, each collective returns what this rank gives.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2_mgd.errors import CommonError, UserError
from d2_mgd.training.restarts import join_processes

Value = TypeVar("Value")

# (default group, its gloo group beside NCCL)
_beside_nccl: tuple[Any, Any] = (None, None)


@contextmanager
def process_group(backend: str) -> Iterator[None]:
    """Context with the default group of the ranks that torchrun's environment variables describe.

    Args:
        backend: ``nccl`` or ``gloo``.
    """
    join_processes(backend)
    try:
        yield
    finally:
        global _beside_nccl
        _beside_nccl = (None, None)
        dist.destroy_process_group()


def together() -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this rank; 0 is the main rank, which writes files and logs."""
    return dist.get_rank() if together() else 0


def local_rank() -> int:
    """Number of this rank on its machine, as the launcher counts."""
    return int(os.environ.get("LOCAL_RANK", 0))


def share_cores(ranks: int) -> None:
    """Divide the machine's cores among its ranks, unless OMP_NUM_THREADS is set."""
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))


def _cpu_group() -> Any:
    """A group for tensors and objects on the CPU, so that exchanging them does not wait for a GPU."""
    global _beside_nccl
    default = dist.group.WORLD
    if dist.get_backend() != "nccl":
        return default
    if _beside_nccl[0] is not default:
        _beside_nccl = (default, dist.new_group(backend="gloo"))
    return _beside_nccl[1]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' tensors, in place (collective)."""
    if together():
        dist.all_reduce(values, group=None if values.is_cuda else _cpu_group())
    return values


def largest(values: Tensor | Sequence[int]) -> list[int]:
    """The element-wise maximum of all ranks' integers, (n,) int64 (collective)."""
    values = torch.as_tensor(values)
    if together():
        dist.all_reduce(values, dist.ReduceOp.MAX, group=None if values.is_cuda else _cpu_group())
    found: list[int] = values.tolist()
    return found


def largest_and_mean(integers: Tensor, values: Tensor) -> list[int]:
    """As :func:`largest` for (n,) integers; the same collective replaces ``values`` by their mean over ranks."""
    if not together():
        return largest(integers)
    # each rank fills one row and leaves -inf in the others, so that the maximum gathers all rows
    rows = values.new_full((dist.get_world_size(), values.numel()), -math.inf, dtype=torch.float64)
    rows[rank()] = torch.where(torch.isfinite(values), values, math.inf).flatten()  # no NaN in a maximum
    packed = torch.cat([integers.double(), rows.flatten()])
    dist.all_reduce(packed, dist.ReduceOp.MAX, group=None if packed.is_cuda else _cpu_group())
    values.copy_(packed[len(integers) :].view_as(rows).mean(dim=0).view_as(values))
    return [int(number) for number in packed[: len(integers)].tolist()]


def barrier() -> None:
    """Wait for all ranks (collective)."""
    largest([0])


def all_gather(value: Value) -> list[Value]:
    """All ranks' values, by rank (collective)."""
    if not together():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=_cpu_group())
    return gathered


def gather(value: Value) -> list[Value]:
    """All ranks' values, by rank, on rank 0; an empty list elsewhere (collective)."""
    if not together():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size() if rank() == 0 else []
    dist.gather_object(value, gathered or None, dst=0, group=_cpu_group())
    return gathered


def from_main(value: Value) -> Value:
    """Rank 0's value, on every rank (collective)."""
    shared = [value]
    if together():
        dist.broadcast_object_list(shared, src=0, group=_cpu_group())
    return shared[0]


def first_failure(message: str) -> str:
    """The message of the lowest rank that has one; "" where none has (collective).

    Where nothing failed, this exchanges one number.
    """
    if not largest([int(bool(message))])[0]:
        return ""
    return next(text for text in all_gather(message) if text)


@contextmanager
def failing_together() -> Iterator[None]:
    """A :class:`UserError` of the block on any rank is raised on every rank, as a :class:`CommonError` (collective)."""
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    message = first_failure("" if failure is None else str(failure))
    if message:
        raise CommonError(message) from failure


@contextmanager
def one_rank_first() -> Iterator[None]:
    """One rank of each machine runs the block before the others, such as a download that all need (collective)."""
    if local_rank() != 0:
        barrier()
    try:
        yield
    finally:
        if local_rank() == 0:
            barrier()


def distributed(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """A module in DDP whose forward sends no buffers: running statistics are averaged where they are read."""
    device = next(module.parameters()).device
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # new and old name
    options |= {buffers: False, "device_ids": [device] if device.type == "cuda" else None}
    return DistributedDataParallel(module, **options)


@torch.no_grad()
def averaged_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Name -> mean over ranks of a running statistic, which each rank has from its own images (collective).

    Empty with one rank, whose statistics are their own means.
    """
    own = {name: buffer for name, buffer in module.named_buffers() if buffer.dtype in (torch.float32, torch.float64)}
    if not (together() and own):
        return {}
    flat = sum_over_ranks(torch.cat([buffer.double().flatten() for buffer in own.values()]))
    means = (flat / dist.get_world_size()).split([buffer.numel() for buffer in own.values()])
    return {name: mean.view_as(buffer).to(buffer) for (name, buffer), mean in zip(own.items(), means)}


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Replace each running statistic by its mean over ranks (collective)."""
    buffers = dict(module.named_buffers())
    for name, mean in averaged_buffers(module).items():
        buffers[name].copy_(mean)
