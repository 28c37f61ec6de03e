"""``checkpoints.json``: which checkpoints a training wrote, in what state they must be found, and which may go.

A checkpoint that was cut short, or whose bits have changed since, has another digest than its entry.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from d2_mgd.training.files import file_digest, write_atomically

__all__ = ["CheckpointManifest"]


@dataclass(frozen=True)
class _Entry:
    iteration: int
    bytes: int
    sha256: str


class CheckpointManifest:
    """The checkpoints of one folder.

    Args:
        folder: of the run.
        read: reads a checkpoint, to see whether one that has no entry is whole; raises ``ValueError`` where it is not.
        names: a regular expression for the file names of checkpoints, by which those that have no entry are found.
    """

    def __init__(self, folder: str | os.PathLike[str], read: Callable[[str], Any], names: str) -> None:
        self.folder = os.fspath(folder)
        self.path = os.path.join(self.folder, "checkpoints.json")
        self._read_checkpoint = read
        self._names = re.compile(names)

    def read(self) -> dict[str, _Entry]:
        """File name -> entry, in the order of writing; empty where there is no list, or none that can be read."""
        try:
            with open(self.path, encoding="utf-8") as file:
                return {name: _Entry(**entry) for name, entry in json.load(file).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def forget(self, name: str) -> None:
        """Take an entry out: its file is about to be replaced."""
        entries = self.read()
        if entries.pop(name, None) is not None:
            self._write(entries)

    def add(self, name: str, iteration: int) -> None:
        """Enter a file that was just written, as the newest."""
        path = os.path.join(self.folder, name)
        entries = self.read()
        entries.pop(name, None)
        entries[name] = _Entry(iteration, os.path.getsize(path), file_digest(path))
        self._write(entries)

    def prune(self, keep: int) -> list[str]:
        """Remove all but the ``keep`` files that were written last; 0 keeps all. Returns the removed names."""
        entries = self.read()
        old = list(entries)[:-keep] if keep else []
        for name in old:
            del entries[name]
        if old:
            self._write(entries)
        for name in old:
            path = os.path.join(self.folder, name)
            if os.path.exists(path):
                os.remove(path)
        return old

    def damage(self, name: str) -> str | None:
        """What is wrong with a checkpoint's file, as the end of a sentence; None if nothing is."""
        path = os.path.join(self.folder, name)
        if not os.path.isfile(path):
            return "is gone"
        entry = self.read().get(name)
        if entry is None:  # copied here from elsewhere, say
            try:
                self._read_checkpoint(path)
            except ValueError as error:
                return f"cannot be read ({error})"
            return None
        size = os.path.getsize(path)
        if size != entry.bytes:
            return f"has {size} bytes of the {entry.bytes} that were written"
        if file_digest(path) != entry.sha256:
            return "has changed since it was written: its SHA-256 is another"
        return None

    def before(self, name: str) -> list[str]:
        """The checkpoints of fewer iterations than ``name``, the newest first."""
        entries = self.read()
        if name not in entries:
            return []
        earlier = [other for other, entry in entries.items() if entry.iteration < entries[name].iteration]
        return sorted(earlier, key=lambda other: entries[other].iteration, reverse=True)

    def instead_of(self, name: str | None) -> list[str]:
        """The checkpoints to try where ``name`` is damaged, or where nothing says which is the last (None).

        Those :meth:`before` it, then those of which no entry says when they were written: the newest file first.
        """
        entries = self.read()
        known = set(entries) if name in entries else {name}
        return [*([] if name is None else self.before(name)), *(one for one in self.files() if one not in known)]

    def files(self) -> list[str]:
        """Names of the folder's checkpoints, listed or not, the newest file first."""
        if not os.path.isdir(self.folder):
            return []
        found = [entry for entry in os.scandir(self.folder) if self._names.fullmatch(entry.name) and entry.is_file()]
        return [entry.name for entry in sorted(found, key=lambda entry: (entry.stat().st_mtime_ns, entry.name))][::-1]

    def _write(self, entries: dict[str, _Entry]) -> None:
        plain = {name: asdict(entry) for name, entry in entries.items()}
        write_atomically(self.path, lambda file: file.write(json.dumps(plain, indent=2).encode()))
