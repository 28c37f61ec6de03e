"""Starting the ranks of this machine with torchrun's launcher, and the exit statuses of ranks.

Ranks read their place from the same environment variables as under torchrun.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from d2_mgd.errors import CommonError, UserError, reason
from d2_mgd.training.processes import local_rank

BAD_INPUT = 2  # exit status after a UserError, as in argparse
_PATIENCE = 10.0  # seconds for the first rank of a machine to print its error
_SAVING = "600"  # seconds for the ranks to write a checkpoint after a signal


def under_launcher() -> bool:
    """Whether torchrun or :func:`start_ranks` has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(
    work: Callable[..., int], args: tuple[Any, ...], *, ranks: int, machines: int = 1, machine: int = 0, url: str = ""
) -> int:
    """Run ``work`` in several processes of this machine, and forward SIGTERM and Ctrl-C to them.

    Args:
        work: a function at the top level of a module, called with ``args``; returns the exit status of its process.
        ranks: number of processes of this machine.
        machines, machine: number of machines, and index of this one.
        url: ``tcp://ADDRESS:PORT`` of machine 0; "" for a free port with one machine.

    Returns:
        0, the exit status of the rank that failed first, or 128 + the number of the signal that this process received.

    Raises:
        UserError: the address is malformed, in use, or does not answer.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SAVING)
    where: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    if url:
        where = {"rdzv_backend": "static", "rdzv_endpoint": _endpoint(url), "rdzv_configs": {"rank": machine}}
    elif machines > 1:
        raise UserError("several machines need --dist-url tcp://ADDRESS_OF_MACHINE_0:PORT, the same on all of them.")
    config = LaunchConfig(machines, machines, ranks, run_id="d2_mgd", max_restarts=0, monitor_interval=0.1, **where)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    logging.disable(logging.ERROR)  # the launcher's reports; the ranks print their own errors
    try:
        elastic_launch(config, _rank)(work, args)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status >= 0 else 128 - status
    except SignalException as error:
        return 128 + error.sigval
    except dist.DistNetworkError as error:
        raise UserError(
            f"--dist-url {url} cannot be used ({reason(error)}): check the address or choose another port."
        ) from error
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def _rank(work: Callable[..., int], args: tuple[Any, ...]) -> None:
    status = work(*args)
    if status:
        sys.exit(status)


def _endpoint(url: str) -> str:
    parsed = urlsplit(url)
    if parsed.scheme != "tcp" or parsed.hostname is None or parsed.port is None:
        raise UserError(f"--dist-url {url} is not of the form tcp://ADDRESS:PORT.")
    return f"{parsed.hostname}:{parsed.port}"


def rank_status(work: Callable[[], Any]) -> int:
    """Run one rank, or a program of one process, and return its exit status.

    Returns:
        0; 2 after a :class:`UserError`, whose message is printed; 130 after a Ctrl-C before there was anything to save;
        1 if a collective failed because another rank has ended.
    """
    status = 1  # of an exception that is a bug
    if under_launcher():
        _exit_without_finalizing(lambda: status)
    try:
        work()
        status = 0
    except UserError as error:
        status = report(error)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except SystemExit as left:  # after a signal
        status = int(left.code or 0)
        raise
    except RuntimeError as error:
        if not _lost_rank(error):
            raise
        _print(f"rank {os.environ.get('RANK', 0)}: another rank has ended; its error is the cause ({reason(error)}).")
        time.sleep(3 * _PATIENCE)  # longer than report(): the launcher's status is that of the rank that ends first
    return status


def _exit_without_finalizing(status: Callable[[], int]) -> None:
    """End this process after its exit functions, before the interpreter is finalized.

    Gloo's threads release the tensors of finished collectives, and live as long as anything refers to their group, such
    as a DDP module. A thread that releases a tensor during finalization cannot take the GIL, and the process dies:
    "terminate called without an active exception".
    """

    def leave() -> None:
        atexit.unregister(leave)
        atexit._run_exitfuncs()  # the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status())

    atexit.register(leave)


def _lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed. Gloo has no error type (PyTorch 2.14); its messages start with its source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def report(error: UserError) -> int:
    """Print a :class:`UserError` on standard error and return the exit status.

    The launcher ends the other ranks of a machine when one has failed. They wait, so that the first can print an error
    that all ranks raise.
    """
    local = local_rank()
    if local:
        time.sleep(_PATIENCE)
    if not (local and isinstance(error, CommonError)):
        _print(f"rank {os.environ.get('RANK')}: {error}" if local else str(error))
    return BAD_INPUT


def _print(message: str) -> None:
    program = os.path.basename(sys.argv[0])
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
