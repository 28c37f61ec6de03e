"""Claims on an output folder, so that only one training at a time writes to it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from d2_mgd.errors import UserError
from d2_mgd.training.processes import failing_together, rank

try:
    import fcntl
except ImportError:  # a system without POSIX locks: folders are not claimed
    fcntl = None  # type: ignore[assignment]

_NAME = ".in_use"


@contextmanager
def claimed_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Context in which no other process can claim the folder; on other machines too, if its file system shares locks.

    The system releases the claim when the process ends, even if it is killed. The file ``.in_use`` stays; it is not the
    claim. Forked dataloader workers do not inherit the claim.

    Args:
        folder: an existing, writable folder.

    Raises:
        UserError: another process has claimed it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(os.path.join(folder, _NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def claimed_for_all_ranks(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Context in which rank 0 has claimed the folder for all ranks; creates the folder (collective on entry)."""
    with ExitStack() as claims:
        with failing_together():
            if rank() == 0:
                try:
                    os.makedirs(folder, exist_ok=True)
                    claims.enter_context(claimed_folder(folder))
                except OSError as error:
                    raise UserError(f"{os.fspath(folder)} is not writable: {error.strerror}.") from error
        yield


def _lock(descriptor: int, folder: str | os.PathLike[str]) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        raise UserError(
            f"{os.fspath(folder)} is in use by {holder}: two trainings would overwrite each other, so stop that one or "
            "name another folder."
        ) from None
    except OSError:  # the file system has no locks
        return
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
