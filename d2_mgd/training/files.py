"""Atomic writing of files, and their digests."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from typing import IO, Any

_LEFTOVER = re.compile(r"\..+\.\d+\.tmp")


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file atomically: even after a crash, ``path`` is the complete old file or the complete new one.

    Args:
        path: of the file; its folder exists.
        write: receives a file opened for writing bytes.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    _sync_folder(folder)


def remove_leftovers(folder: str | os.PathLike[str]) -> list[str]:
    """Remove temporary files of :func:`write_atomically` whose process was killed; no process may be writing there.

    Returns:
        The names of the removed files.
    """
    names = [name for name in os.listdir(folder) if _LEFTOVER.fullmatch(name)]
    for name in names:
        os.remove(os.path.join(folder, name))
    return names


def _sync_folder(folder: str) -> None:
    """Flush renames in ``folder`` to the disk, if the system supports it."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
