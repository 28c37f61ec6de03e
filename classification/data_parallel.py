"""Several GPUs in one process (``nn.DataParallel``, the published default), and what it requires of a step.

DataParallel copies the module to each GPU, runs the copies in threads on shares of the batch, and concatenates their
outputs. Therefore a step
- returns each loss as :func:`summable`: (1,) and summed over its images, so that the shares of several GPUs add up;
- enters autocast inside its forward, because a thread starts without it;
- runs taps in the copy that it belongs to (``FeatureTaps.run_in``), each thread with its own maps.
"""

from __future__ import annotations

import argparse
import logging

import torch
from torch import Tensor, nn

from classification.processes import Process

logger = logging.getLogger(__name__)


def over_gpus(process: Process, options: argparse.Namespace, step: nn.Module) -> nn.Module:
    """The step over all GPUs, unless the options name one, or there are not several."""
    number = torch.cuda.device_count()
    if process.device.type != "cuda" or options.gpu is not None or ":" in options.device or number < 2:
        return step
    logger.info("data parallel on %d GPUs in one process; --multiprocessing-distributed is faster.", number)
    return nn.DataParallel(step)


def over_same_gpus(step: nn.Module, model: nn.Module) -> nn.Module:
    """Another model over the GPUs of the step."""
    return nn.DataParallel(model) if isinstance(step, nn.DataParallel) else model


def summable(losses: dict[str, Tensor], images: int) -> dict[str, Tensor]:
    """Mean losses of a number of images as (1,) sums over them."""
    return {name: loss.reshape(1) * images for name, loss in losses.items()}
