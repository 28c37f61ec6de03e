"""What all processes of a training do alike: what happens to one of them becomes that of all.

Collectives of a few bytes on the CPU, so that none waits for a GPU. A process alone agrees with itself.
"""

from __future__ import annotations

import detectron2.utils.comm as comm
import torch
import torch.distributed as dist
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn

from d2_mgd.distill.norms import MaskedBatchNorm

__all__ = ["FailedElsewhere", "first_failure", "largest", "synchronises"]


class FailedElsewhere(FloatingPointError):
    """Predictions are not finite in another process, which says what they are."""


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if not (dist.is_available() and dist.is_initialized()):
        return number
    shared = torch.tensor(number)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
    return int(shared)


def first_failure(sentence: str) -> str:
    """The sentence of the first process that has one; "" where nothing failed, which costs one number.

    Args:
        sentence: what went wrong in this process, or "".
    """
    if not largest(int(bool(sentence))):
        return ""
    return next(text for text in comm.all_gather(sentence) if text)


def synchronises(module: nn.Module) -> bool:
    """Whether forward and backward passes wait for other processes, in a norm with the statistics of all."""
    kinds = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
    return any(isinstance(one, kinds) or (isinstance(one, MaskedBatchNorm) and one.sync) for one in module.modules())
