"""Joining a process group, including after torchrun has restarted the ranks."""

from __future__ import annotations

import os
import uuid
from datetime import timedelta

import torch.distributed as dist

_TIMEOUT = timedelta(seconds=2)  # for an answer of rank 0, whose process may have ended
_TRIES = 900


def join_processes(backend: str) -> None:
    """``init_process_group`` from torchrun's environment, after a restart too.

    torchrun keeps one store over all restarts, which still contains the addresses of lost ranks: connecting to them
    hangs (https://github.com/pytorch/pytorch/issues/135712). Its count of restarts differs between machines and cannot
    identify an attempt, so rank 0 names each attempt.

    Args:
        backend: ``nccl`` or ``gloo``.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store = dist.PrefixStore(_attempt(store, rank, world_size), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def restarted() -> bool:
    """Whether torchrun has restarted this rank after a failure, by the count of its agent on this machine.

    An agent that joined later has counted no restarts, so combine the answers of all ranks.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """The store prefix that all ranks agree on. The prefix of a stale attempt is never acknowledged by its rank 0."""
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", own)
        for other in range(1, world_size):
            asker = store.get(f"{own}/asks/{other}").decode()
            store.set(f"{own}/answers/{asker}", "")
        return own
    for _ in range(_TRIES):
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/asks/{rank}", own)
        try:
            store.wait([f"{attempt}/answers/{own}"], _TIMEOUT)
            return attempt
        except dist.DistStoreError:  # rank 0 is slow, or the attempt is of a rank 0 that has ended
            continue
    raise RuntimeError(f"rank {rank} waited half an hour, but rank 0 did not join.")
