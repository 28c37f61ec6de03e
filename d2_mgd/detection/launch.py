"""Starting the ranks that Detectron2's flags --num-gpus, --num-machines, --machine-rank and --dist-url ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import detectron2.utils.comm as comm
import torch

from d2_mgd.errors import UserError
from d2_mgd.training.launch import rank_status, start_ranks, under_launcher
from d2_mgd.training.processes import local_rank, process_group, share_cores


def run_ranks(work: Callable[..., Any], args: tuple[Any, ...], flags: argparse.Namespace, *, gpus: bool) -> Any:
    """Run ``work`` in this process, or in every rank: one per GPU, or ``--num-gpus`` processes on CPUs.

    Args:
        work: a function at the top level of a module.
        args: its arguments.
        flags: of Detectron2's parser; ``dist_url`` may also be "auto", a free port. Under torchrun they do not count.
        gpus: whether the ranks compute on GPUs, each on its own.

    Returns:
        What ``work`` returns, if it ran in this process.

    Raises:
        SystemExit: with the exit status of the rank that failed first.
        UserError: there are fewer GPUs than asked for, or the address cannot be used.
    """
    if under_launcher() or flags.num_gpus * flags.num_machines <= 1:
        return _run_rank(work, args, gpus)
    if gpus and flags.num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus is {flags.num_gpus}, but this machine has {torch.cuda.device_count()} GPUs.")
    status = start_ranks(
        _rank,
        (work, args, gpus),
        ranks=flags.num_gpus,
        machines=flags.num_machines,
        machine=flags.machine_rank,
        url="" if flags.dist_url == "auto" else flags.dist_url,
    )
    if status:
        raise SystemExit(status)
    return None


def _rank(work: Callable[..., Any], args: tuple[Any, ...], gpus: bool) -> int:
    return rank_status(lambda: _run_rank(work, args, gpus))


def _run_rank(work: Callable[..., Any], args: tuple[Any, ...], gpus: bool) -> Any:
    """This process's part; under a launcher, the environment says which of how many ranks it is."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return work(*args)
    if gpus:
        torch.cuda.set_device(local_rank())
    with process_group("nccl" if gpus else "gloo"):
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        if not gpus:
            share_cores(comm.get_local_size())
        return work(*args)
