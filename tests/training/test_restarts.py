"""Processes that meet in a store where earlier ones have left their traces."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from d2_mgd.training import restarts


@pytest.mark.parametrize("late", [0, 2], ids=["first process late", "last process late"])
def test_a_restarted_group_agrees_on_a_new_name(monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    monkeypatch.setattr(restarts, "_TIMEOUT", timedelta(milliseconds=50))
    store = dist.HashStore()
    names: list[list[str]] = []
    for _ in range(3):  # attempts; each group but the last is lost after it has met
        names.append(meet(store, late))
    assert all(len(set(group)) == 1 for group in names)
    assert len({group[0] for group in names}) == 3


def test_a_group_that_was_lost_while_it_met_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "_TIMEOUT", timedelta(milliseconds=50))
    store = dist.HashStore()
    store.set("attempt", "lost")
    store.set("lost/asks/1", "somebody")
    store.set("lost/answers/somebody", "")
    names = meet(store, late=0)
    assert len(set(names)) == 1 and "lost" not in names


def meet(store: dist.Store, late: int, world_size: int = 3) -> list[str]:
    names = [""] * world_size

    def join(rank: int) -> None:
        if rank == late:
            time.sleep(0.2)
        names[rank] = restarts._attempt(store, rank, world_size)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return names
