"""Dataloaders whose batches depend only on their keys, so that a resumed training can skip those it has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from d2_mgd.training.signals import loader_process_signals


def keyed_loader(
    dataset: Dataset,
    batches: Iterable[list[Any]],
    workers: int,
    collate: Callable[[list[Any]], Any],
    *,
    pin_memory: bool = False,
    keep_workers: bool = False,
) -> DataLoader:
    """A dataloader that neither draws from the global RNG nor ends on signals to the process group.

    Args:
        dataset: key -> item. A key holds everything that determines its item, random augmentation included.
        batches: the keys of each batch. Images of skipped keys are not read.
        workers: number of worker processes; 0 loads in this one. Batches are the same with any number.
        collate: items of a batch -> the batch.
        pin_memory: copy batches into pinned memory, for GPUs.
        keep_workers: keep the workers from one epoch to the next.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # it accepts any iterable
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=keep_workers and workers > 0,
        worker_init_fn=loader_process_signals,
        generator=torch.Generator(),  # without it, starting workers advances the global RNG
    )
