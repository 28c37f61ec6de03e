"""Processes that torchrun starts anew after one of them was lost."""

from __future__ import annotations

import os
import uuid
from datetime import timedelta

import torch.distributed as dist

__all__ = ["join_processes", "restarted"]

_PATIENCE = timedelta(seconds=2)  # for an answer from a process that may be gone
_QUESTIONS = 900


def join_processes(backend: str) -> None:
    """``init_process_group`` from torchrun's environment, after a restart too.

    torchrun keeps one store over all restarts, in which the addresses of lost processes still stand: who reads them
    waits for a connection that does not come (https://github.com/pytorch/pytorch/issues/135712). Its count of restarts
    differs between machines, so it cannot tell the attempts apart; here the first process names each.

    Args:
        backend: ``nccl`` or ``gloo``.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store = dist.PrefixStore(_attempt(store, rank, world_size), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def restarted() -> bool:
    """Whether torchrun has started this process anew after a failure, as its agent on this machine counts them.

    An agent that came later has counted none, so a group must ask all of its processes.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that all living processes agree on: an earlier one gets no answer from the first process of its time."""
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", own)
        for other in range(1, world_size):
            asker = store.get(f"{own}/asks/{other}").decode()
            store.set(f"{own}/answers/{asker}", "")
        return own
    for _ in range(_QUESTIONS):
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/asks/{rank}", own)
        try:
            store.wait([f"{attempt}/answers/{own}"], _PATIENCE)
            return attempt
        except dist.DistStoreError:  # not yet, or that process is gone and the next has not named its attempt
            continue
    raise RuntimeError(f"process {rank} waited half an hour for the first process, which did not come.")
