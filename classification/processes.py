"""The ranks of a run: started by the published flags, each with its device."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from d2_mgd.errors import CommonError, UserError
from d2_mgd.training.launch import rank_status, report, start_ranks, under_launcher
from d2_mgd.training.processes import local_rank, process_group, share_cores


@dataclass(frozen=True)
class Process:
    """One rank of a run.

    Args:
        rank, world: rank and world size.
        local_rank, local_world: the same among the ranks of this machine.
        device: of this rank.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0


Work = Callable[[Process, argparse.Namespace], None]


def launch(work: Work, options: argparse.Namespace) -> int:
    """Run ``work`` on each rank that the options, or torchrun's environment, define on this machine.

    Returns:
        The exit status: 0, 2 after a :class:`UserError`, 130 after a Ctrl-C before there was anything to save, or that
        of the rank that failed first.
    """
    machines = max(1, options.world_size)
    if under_launcher() or not (options.multiprocessing_distributed or machines > 1):
        return _rank(work, options)
    try:
        return _start(work, options, machines)
    except UserError as error:
        return report(error)


def _start(work: Work, options: argparse.Namespace, machines: int) -> int:
    machine = max(0, options.rank)
    if machine >= machines:
        raise UserError(f"--rank {machine} must be 0 to {machines - 1} with --world-size {machines}.")
    ranks = 1
    if options.multiprocessing_distributed:
        ranks = options.nproc or (torch.cuda.device_count() if _device(options, 0).type == "cuda" else 1)
    _check_ranks(options, ranks)
    url = options.dist_url or ""
    return start_ranks(_rank, (work, options), ranks=ranks, machines=machines, machine=machine, url=url)


def _rank(work: Work, options: argparse.Namespace) -> int:
    return rank_status(lambda: _work(work, options))


def _work(work: Work, options: argparse.Namespace) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    _check_ranks(options, local_world)
    process = Process(rank, world, local_rank(), local_world, _device(options, local_rank()))
    on_gpu = process.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(process.device)
    else:
        share_cores(local_world)
    backend = options.dist_backend or ("nccl" if on_gpu else "gloo")
    if backend == "nccl" and not on_gpu:
        raise CommonError("--dist-backend nccl needs GPUs; on CPUs use gloo.")
    with process_group(backend) if world > 1 else nullcontext():
        work(process, options)


def _check_ranks(options: argparse.Namespace, ranks: int) -> None:
    """Check the options for ``ranks`` processes on this machine."""
    if options.batch_size < ranks:
        raise CommonError(
            f"--batch-size {options.batch_size} is smaller than this machine's number of processes, {ranks}."
        )
    named = f"--device {options.device}" if options.gpu is None else f"--gpu {options.gpu}"
    if ranks > 1 and (options.gpu is not None or options.device.startswith("cuda:")):
        raise CommonError(
            f"{named} names one GPU for {ranks} processes, and each needs its own: leave it out, and select GPUs with "
            "CUDA_VISIBLE_DEVICES."
        )


def _device(options: argparse.Namespace, number: int) -> torch.device:
    if options.gpu is not None:
        wanted = torch.device("cuda", options.gpu)
    elif options.device == "auto":
        wanted = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            wanted = torch.device(options.device)
        except RuntimeError as error:
            raise UserError(f"--device {options.device} is not a device: use auto, cpu, cuda or cuda:N.") from error
    if wanted.type not in ("cpu", "cuda"):
        raise UserError(f"--device {options.device} is not supported: use auto, cpu, cuda or cuda:N.")
    if wanted.type == "cuda":
        index = number if wanted.index is None else wanted.index
        if index >= torch.cuda.device_count():
            raise UserError(f"GPU {index} does not exist: PyTorch finds {torch.cuda.device_count()} GPU(s).")
        return torch.device("cuda", index)
    return wanted
