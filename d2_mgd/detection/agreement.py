"""What all processes of a training do alike: what happens to one of them becomes that of all.

Collectives of a few bytes on the CPU, so that none waits for a GPU. A process alone agrees with itself.
"""

from __future__ import annotations

import detectron2.utils.comm as comm
import torch
import torch.distributed as dist

__all__ = ["first_failure", "largest"]


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
