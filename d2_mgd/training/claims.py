"""A folder that one training at a time writes to."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # a system without POSIX locks, where nothing is claimed
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderInUse", "claimed_folder"]

_NAME = ".in_use"


class FolderInUse(ValueError):
    """Another process trains in the folder; the message is one sentence."""


@contextmanager
def claimed_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within, no other process can claim the folder; nor on other machines, where its file system shares locks.

    The claim ends with the process, however that ends; the file ``.in_use`` stays, and claims nothing by itself.
    Loading processes that are forked meanwhile do not have the claim.

    Args:
        folder: exists and can be written to.

    Raises:
        FolderInUse: another process has claimed it.
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


def _lock(descriptor: int, folder: str | os.PathLike[str]) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        raise FolderInUse(
            f"{os.fspath(folder)} is in use by {holder}: two trainings would overwrite each other, so stop that one or "
            "name another folder."
        ) from None
    except OSError:  # the file system has no locks
        return
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
