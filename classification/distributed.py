"""Processes: how they start, who they are, and the few things that they tell each other.

The published spawn flags, `torchrun`, and a single process end in the same place: :func:`launch` calls the work with a
:class:`Process`. NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from classification.errors import UserError
from d2_mgd.distill.norms import MaskedBatchNorm

__all__ = [
    "Process",
    "average_buffers",
    "barrier",
    "first_then_others",
    "gather_objects",
    "launch",
    "say",
    "sum_over_processes",
    "synchronised_norms",
]

Work = Callable[["Process", argparse.Namespace], None]


@dataclass(frozen=True)
class Process:
    """One of the processes of a run.

    Args:
        rank, world: its number of all, over all machines.
        local_rank, local_world: its number of those on this machine.
        device: where it computes.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether it writes files and speaks."""
        return self.rank == 0


def launch(work: Work, options: argparse.Namespace) -> int:
    """Run ``work`` in as many processes as the options (or torchrun's environment) ask for.

    Returns:
        int: exit status: 0, 2 after a :class:`UserError` (said on standard error), another where a process died.
    """
    try:
        if options.multiprocessing_distributed:
            return _spawn(work, options)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return _work(work, options, _torchrun_process(options), "env://")
        if options.world_size > 1:
            return _work(work, options, _lone_process_of_many(options), _url(options))
        return _work(work, options, Process(0, 1, 0, 1, _device(options, 0)), None)
    except UserError as error:
        return say(error)


def say(error: UserError, rank: int | None = None) -> int:
    """Print the sentence, and return the exit status.

    Args:
        error: what went wrong.
        rank: the process that it went wrong in; None where all find the same, and one of each machine says so.
    """
    if rank is not None or os.environ.get("LOCAL_RANK", "0") == "0":
        who = f"rank {rank}: " if rank else ""
        print(f"{os.path.basename(sys.argv[0])}: error: {who}{error}", file=sys.stderr, flush=True)
    return 2


def _torchrun_process(options: argparse.Namespace) -> Process:
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Process(rank, world, local_rank, local_world, _device(options, local_rank))


def _lone_process_of_many(options: argparse.Namespace) -> Process:
    if not 0 <= options.rank < options.world_size:
        raise UserError(f"--rank must be 0 to {options.world_size - 1} with --world-size {options.world_size}.")
    if options.rank == 0:
        _check_port(_url(options))
    return Process(options.rank, options.world_size, 0, 1, _device(options, 0))


def _spawn(work: Work, options: argparse.Namespace) -> int:
    nodes = max(1, options.world_size)
    node = max(0, options.rank)
    if node >= nodes:
        raise UserError(f"--rank must be 0 to {nodes - 1} with --world-size {nodes}.")
    here = options.nproc or (torch.cuda.device_count() if _device(options, 0).type == "cuda" else 1)
    if options.batch_size < here:
        raise UserError(f"--batch-size {options.batch_size} is smaller than the number of processes, {here}.")
    url = _url(options)
    if node == 0:
        _check_port(url)
    try:
        mp.spawn(_spawned, nprocs=here, args=(work, options, node, nodes, here, url))
    except mp.ProcessExitedException as error:  # it has said why
        return error.exit_code if error.exit_code > 0 else 1
    return 0


def _spawned(
    local_rank: int, work: Work, options: argparse.Namespace, node: int, nodes: int, here: int, url: str
) -> None:
    rank = node * here + local_rank
    process = Process(rank, nodes * here, local_rank, here, _device(options, local_rank))
    status = _work(work, options, process, url)
    if status:
        sys.exit(status)


def _work(work: Work, options: argparse.Namespace, process: Process, url: str | None) -> int:
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    elif process.local_world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.local_world))
    try:
        if options.batch_size < process.local_world:
            raise UserError(
                f"--batch-size {options.batch_size} is smaller than the number of processes, {process.local_world}."
            )
        if url is not None:
            _meet(options, process, url)
        work(process, options)
        return 0
    except UserError as error:
        return say(error, process.rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(options: argparse.Namespace, process: Process, url: str) -> None:
    backend = options.dist_backend or ("nccl" if process.device.type == "cuda" else "gloo")
    if backend == "nccl" and process.device.type != "cuda":
        raise UserError("--dist-backend nccl needs GPUs; on CPUs it is gloo.")
    try:
        dist.init_process_group(backend, init_method=url, world_size=process.world, rank=process.rank)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the processes could not meet at {url}: {str(error).splitlines()[0]}") from error


def _url(options: argparse.Namespace) -> str:
    if options.dist_url is not None:
        return options.dist_url
    if options.multiprocessing_distributed and options.world_size <= 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{free.getsockname()[1]}"
    raise UserError("several machines need --dist-url tcp://ADDRESS_OF_RANK_0:PORT.")


def _check_port(url: str) -> None:
    parsed = urlparse(url)
    if parsed.scheme != "tcp":
        return
    if parsed.hostname is None or parsed.port is None:
        raise UserError(f"--dist-url {url} is not of the form tcp://ADDRESS:PORT.")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", parsed.port))
        except OSError as error:
            raise UserError(
                f"port {parsed.port} of --dist-url {url} cannot be used ({error.strerror}): choose another."
            ) from error


def _device(options: argparse.Namespace, local_rank: int) -> torch.device:
    if options.gpu is not None:
        wanted = torch.device("cuda", options.gpu)
    elif options.device == "auto":
        wanted = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            wanted = torch.device(options.device)
        except RuntimeError as error:
            raise UserError(f"--device {options.device} is no device: use auto, cpu, cuda or cuda:N.") from error
    if wanted.type not in ("cpu", "cuda"):
        raise UserError(f"--device {options.device} is not supported: use auto, cpu, cuda or cuda:N.")
    if wanted.type == "cuda":
        index = local_rank if wanted.index is None else wanted.index
        if index >= torch.cuda.device_count():
            raise UserError(f"GPU {index} was asked for, and PyTorch sees {torch.cuda.device_count()} GPU(s).")
        return torch.device("cuda", index)
    return wanted


# ---- what processes tell each other; each of these does nothing in a single process


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of all processes' tensors, in each of them; in place."""
    if _together():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for all processes."""
    if _together():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """All processes' values in the first process; elsewhere an empty list."""
    if not _together():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, gathered if dist.get_rank() == 0 else None, dst=0)
    return gathered


@contextlib.contextmanager
def first_then_others(process: Process) -> Iterator[None]:
    """Let one process of each machine go through first, such as to download a file that all of them need."""
    if process.local_rank != 0:
        barrier()
    try:
        yield
    finally:
        if process.local_rank == 0:
            barrier()


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Give all processes the mean of their running statistics, which each has from its own images."""
    if not _together():
        return
    statistics = [buffer for buffer in module.buffers() if buffer.dtype in (torch.float32, torch.float64)]
    flat = torch.cat([buffer.double().flatten() for buffer in statistics])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(statistics, flat.split([buffer.numel() for buffer in statistics])):
        buffer.copy_(mean.view_as(buffer))


def synchronised_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """Every batch-norm's statistics over all processes' images; the same parameters under the same names.

    PyTorch's own synchronised batch-norm where it works, on GPUs; elsewhere the distiller's.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, nn.BatchNorm2d) and not isinstance(module, MaskedBatchNorm):
        replacement = MaskedBatchNorm(module.num_features, sync=True)
        replacement.eps, replacement.momentum = module.eps, module.momentum
        replacement.load_state_dict(module.state_dict())
        return replacement
    for name, child in module.named_children():
        setattr(module, name, synchronised_norms(child, device))
    return module
