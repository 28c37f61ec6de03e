"""Processes: how they start, who they are, and the few things that they tell each other.

The published spawn flags, `torchrun`, and a single process end in the same place: :func:`launch` calls the work with a
:class:`Process`. NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from d2_mgd.distill.norms import MaskedBatchNorm
from d2_mgd.errors import CommonError, UserError
from d2_mgd.training import forwarded_signals, join_processes

__all__ = [
    "Process",
    "average_buffers",
    "averaged_buffers",
    "barrier",
    "fail_together",
    "first_then_others",
    "from_main",
    "gather_objects",
    "largest",
    "launch",
    "say",
    "sum_over_processes",
    "synchronised_norms",
    "union_over_processes",
]

_TORCHRUN = "env://"
_PATIENCE = 30.0  # seconds between the end of a process that failed and that of the others

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
        int: exit status: 0, 2 after a :class:`UserError` (said on standard error), 130 after a Ctrl-C before there was
            anything to save, another where a process died.
    """
    try:
        if options.multiprocessing_distributed:
            return _spawn(work, options)
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return _work(work, options, _torchrun_process(options), _TORCHRUN)
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
    common = rank is None or isinstance(error, CommonError)
    if not common or os.environ.get("LOCAL_RANK", "0") == "0":
        who = f"rank {rank}: " if rank and not common else ""
        print(f"{os.path.basename(sys.argv[0])}: error: {who}{error}", file=sys.stderr, flush=True)
    return 2


def _torchrun_process(options: argparse.Namespace) -> Process:
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    _check_named_gpu(options, local_world)
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
    _check_named_gpu(options, here)
    url = _url(options)
    if node == 0:
        _check_port(url)
    with forwarded_signals():
        context = mp.spawn(_spawned, nprocs=here, args=(work, options, node, nodes, here, url), join=False)
        return _wait(context.processes)


def _wait(processes: list[Any]) -> int:
    """Wait for all; after one that failed the others, which may wait for it, get a little time, and then an end.

    Returns:
        Status of the first that failed, 0 if none did.
    """
    left, failed = list(processes), 0
    while left:
        ready = connection.wait([process.sentinel for process in left], _PATIENCE if failed else None)
        if not ready:
            for process in left:
                process.kill()
        for process in [process for process in left if process.sentinel in ready]:
            process.join()
            left.remove(process)
            failed = failed or process.exitcode
    return failed if failed >= 0 else 128 - failed


def _spawned(
    local_rank: int, work: Work, options: argparse.Namespace, node: int, nodes: int, here: int, url: str
) -> None:
    os.environ["LOCAL_RANK"] = str(local_rank)
    rank = node * here + local_rank
    process = Process(rank, nodes * here, local_rank, here, _device(options, local_rank))
    try:
        status = _work(work, options, process, url)
    except Exception:
        traceback.print_exc()
        status = 1
    sys.exit(status)


def _work(work: Work, options: argparse.Namespace, process: Process, url: str | None) -> int:
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
    elif process.local_world > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.local_world))
    try:
        if options.batch_size < process.local_world:
            raise CommonError(
                f"--batch-size {options.batch_size} is smaller than the number of processes, {process.local_world}."
            )
        if url is not None:
            _meet(options, process, url)
        work(process, options)
        return 0
    except UserError as error:
        return say(error, process.rank)
    except KeyboardInterrupt:  # before there was anything to save
        return 128 + signal.SIGINT
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        lost = UserError(f"another process ended, which says why ({str(error).splitlines()[0][:200]}).")
        say(lost, process.rank)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(options: argparse.Namespace, process: Process, url: str) -> None:
    backend = options.dist_backend or ("nccl" if process.device.type == "cuda" else "gloo")
    if backend == "nccl" and process.device.type != "cuda":
        raise UserError("--dist-backend nccl needs GPUs; on CPUs it is gloo.")
    try:
        if url == _TORCHRUN:
            join_processes(backend)
        else:
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


def _check_named_gpu(options: argparse.Namespace, processes: int) -> None:
    named = f"--device {options.device}" if options.gpu is None else f"--gpu {options.gpu}"
    if processes > 1 and (options.gpu is not None or options.device.startswith("cuda:")):
        raise UserError(
            f"{named} is one GPU for all of the {processes} processes of this machine, which take one each: leave it "
            "out, and choose GPUs by CUDA_VISIBLE_DEVICES."
        )


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


def largest(values: Tensor) -> list[int]:
    """The largest of all processes' integers, each for itself; (n,) int64 in."""
    if _together():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def from_main(value: Any) -> Any:
    """The first process's value, in all."""
    if not _together():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def fail_together(failure: str | None) -> None:
    """Where the first process failed at what it does for all, all fail with its sentence.

    Raises:
        CommonError: ``failure`` of the first process is not None.
    """
    failure = from_main(failure)
    if failure is not None:
        raise CommonError(failure)


def gather_objects(value: Any) -> list[Any]:
    """All processes' values in the first process; elsewhere an empty list."""
    if not _together():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, gathered if dist.get_rank() == 0 else None, dst=0)
    return gathered


def union_over_processes(values: set[str]) -> set[str]:
    """What any of the processes has, in all."""
    if not _together():
        return values
    gathered: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return set().union(*gathered)


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
def averaged_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Name -> the mean over processes of a running statistic, which each process has from its own images (collective).

    Empty in a single process, whose statistics are their own means.
    """
    if not _together():
        return {}
    own = {name: buffer for name, buffer in module.named_buffers() if buffer.dtype in (torch.float32, torch.float64)}
    flat = torch.cat([buffer.double().flatten() for buffer in own.values()])
    dist.all_reduce(flat)
    means = (flat / dist.get_world_size()).split([buffer.numel() for buffer in own.values()])
    return {name: mean.view_as(buffer).to(buffer) for (name, buffer), mean in zip(own.items(), means)}


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Give all processes the mean of their running statistics (collective)."""
    buffers = dict(module.named_buffers())
    for name, mean in averaged_buffers(module).items():
        buffers[name].copy_(mean)


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
