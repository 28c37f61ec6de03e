"""Several GPUs in one process: ``nn.DataParallel``, the published default, and what it requires of a step.

DataParallel copies the module to each GPU, runs the copies in threads on shares of the batch, and concatenates their
outputs. Therefore a step
- returns each loss as :func:`summable`: (1,) and summed over its images, so that the shares of several GPUs add up;
- enters autocast inside its forward, because a thread starts without it;
- runs taps in its copy of the network (``FeatureTaps.run_in``); each thread has its own maps.
"""

from __future__ import annotations

import argparse
import logging

import torch
from torch import Tensor, nn

from classification.processes import Process
from d2_mgd.errors import UserError

logger = logging.getLogger(__name__)


def over_gpus(process: Process, options: argparse.Namespace, step: nn.Module) -> nn.Module:
    """Wrap the step in DataParallel over all GPUs, unless the options name a GPU or there is only one."""
    number = torch.cuda.device_count()
    if process.device.type != "cuda" or options.gpu is not None or ":" in options.device or number < 2:
        return step
    if options.method != "base" and options.teacher_compile:
        raise UserError("--teacher-compile 1 needs one process per GPU: add --multiprocessing-distributed.")
    logger.info("DataParallel on %d GPUs in one process; --multiprocessing-distributed is faster.", number)
    return nn.DataParallel(step)


def over_same_gpus(step: nn.Module, model: nn.Module) -> nn.Module:
    """Wrap another model in DataParallel if the step is."""
    return nn.DataParallel(model) if isinstance(step, nn.DataParallel) else model


def summable(losses: dict[str, Tensor], images: int) -> dict[str, Tensor]:
    """Convert mean losses of ``images`` images to (1,) sums over the images."""
    return {name: loss.reshape(1) * images for name, loss in losses.items()}
