"""The checkpoints of one folder: written atomically, listed with their SHA-256, and checked before they are read.

``checkpoints.json`` lists them. A checkpoint that was cut short or changed differs from the digest of its entry.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from d2_mgd.errors import UserError, reason
from d2_mgd.training.files import file_digest, remove_leftovers, write_atomically
from d2_mgd.training.weights_files import UntrustedFileError, read_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    iteration: int
    bytes: int
    sha256: str


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context that converts errors of writing a file of a training to a :class:`UserError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer wraps a full disk in a RuntimeError
        raise UserError(
            f"{os.fspath(path)} could not be written ({reason(error)}); earlier checkpoints are intact, and "
            "--resume continues from the last of them."
        ) from error


class Checkpoints:
    """The checkpoints of one folder, and the pointer to the last of them.

    Args:
        folder: of the training.
        names: a regular expression for the file names of checkpoints, by which those without an entry are found.
        pointer: name of the file that contains the last checkpoint's name.
        link: the pointer is a symbolic link instead.
        keep: how many checkpoints stay; older ones are removed after each that was written. 0 keeps all.
    """

    def __init__(
        self, folder: str | os.PathLike[str], names: str, pointer: str, *, link: bool = False, keep: int = 0
    ) -> None:
        self.folder = os.fspath(folder)
        self.keep = keep
        self._names = re.compile(names)
        self._pointer = os.path.join(self.folder, pointer)
        self._link = link
        self._list_path = os.path.join(self.folder, "checkpoints.json")

    # ---- writing

    def write(self, name: str, content: Mapping[str, Any], iteration: int) -> None:
        """Write a checkpoint, move the pointer to it, and remove old ones.

        Args:
            name: of the file.
            content: tensors and plain containers.
            iteration: position in the training; grows as it continues.

        Raises:
            UserError: the file cannot be written; earlier checkpoints and the pointer are unchanged.
        """
        path = os.path.join(self.folder, name)
        logger.info("Saving checkpoint to %s", path)
        with disk_errors(path):
            for leftover in remove_leftovers(self.folder):
                logger.info("Removed %s, the incomplete file of a training that was killed", leftover)
            self._forget([name])  # otherwise, after a crash, the old digest would mark the new file as damaged
            write_atomically(path, lambda file: torch.save(dict(content), file))
            self._list({**self.read(), name: _Entry(iteration, os.path.getsize(path), file_digest(path))})
            self.point_to(name)
            for old in self._prune(name):
                logger.info("Removed the old checkpoint %s", old)

    def point_to(self, name: str) -> None:
        """Make a checkpoint the last one."""
        if not self._link:
            write_atomically(self._pointer, lambda file: file.write(name.encode()))
            return
        temporary = os.path.join(self.folder, f".{os.path.basename(self._pointer)}.{os.getpid()}.tmp")
        with suppress(FileNotFoundError):
            os.remove(temporary)
        os.symlink(name, temporary)
        os.replace(temporary, self._pointer)

    def _prune(self, newest: str) -> list[str]:
        if not self.keep:
            return []
        entries = self.read()
        # Entries of the same or later iterations are damaged: otherwise the training would have continued from them.
        useful = [name for name, entry in entries.items() if entry.iteration < entries[newest].iteration]
        kept = {newest, *useful[max(0, len(useful) + 1 - self.keep) :]}
        old = [name for name in entries if name not in kept]
        self._forget(old)
        for name in old:
            with suppress(FileNotFoundError):
                os.remove(os.path.join(self.folder, name))
        return old

    def _forget(self, names: list[str]) -> None:
        entries = self.read()
        left = {name: entry for name, entry in entries.items() if name not in names}
        if left != entries:
            self._list(left)

    def _list(self, entries: Mapping[str, _Entry]) -> None:
        plain = {name: asdict(entry) for name, entry in entries.items()}
        write_atomically(self._list_path, lambda file: file.write(json.dumps(plain, indent=2).encode()))

    def clear(self) -> None:
        """Remove all checkpoints."""
        names = {*self.read(), *self.files(), os.path.basename(self._pointer), os.path.basename(self._list_path)}
        for name in names:
            with suppress(FileNotFoundError):
                os.remove(os.path.join(self.folder, name))

    # ---- finding

    def read(self) -> dict[str, _Entry]:
        """File name -> entry, in the order of writing; empty where there is no list, or none that can be read."""
        try:
            with open(self._list_path, encoding="utf-8") as file:
                return {name: _Entry(**entry) for name, entry in json.load(file).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def files(self) -> list[str]:
        """Names of the folder's checkpoints, listed or not, the newest file first."""
        if not os.path.isdir(self.folder):
            return []
        found = [entry for entry in os.scandir(self.folder) if self._names.fullmatch(entry.name) and entry.is_file()]
        return [entry.name for entry in sorted(found, key=lambda entry: (entry.stat().st_mtime_ns, entry.name))][::-1]

    def pointed(self) -> str:
        """Name of the last checkpoint; "" where the pointer is missing or empty."""
        try:
            if os.path.islink(self._pointer):
                return os.path.basename(os.readlink(self._pointer))
            if self._link:
                return os.path.basename(self._pointer) if os.path.isfile(self._pointer) else ""
            with open(self._pointer, encoding="utf-8", errors="replace") as file:
                return os.path.basename(file.read().strip())
        except OSError:
            return ""

    def exist(self) -> bool:
        """Whether there is a pointer, or without one any checkpoint."""
        return os.path.lexists(self._pointer) or bool(self.files())

    def newest_whole(self, name: str | None = None) -> str:
        """Path of a checkpoint, or if it is damaged, with a warning, of the newest intact one before it.

        If the order of the checkpoints is unknown, all others of the folder are tried.

        Args:
            name: of the checkpoint; by default the last one.

        Raises:
            UserError: no checkpoint is intact.
        """
        name = self.pointed() if name is None else name
        damaged: dict[str, str] = {}
        for candidate in [*([name] if name else []), *self.instead_of(name)]:
            problem = self.damage(candidate)
            if problem is None:
                break
            damaged[candidate] = problem
        else:
            if not name:
                raise UserError(f"{self._pointer} names no checkpoint, and the folder contains no intact one.")
            path = os.path.join(self.folder, name)
            raise UserError(f"the checkpoint {path} {damaged[name]}; no earlier checkpoint is intact.")
        if not name:
            logger.warning("%s names no checkpoint: %s, the newest intact one, is used.", self._pointer, candidate)
        for bad, problem in damaged.items():
            logger.warning("The checkpoint %s %s: %s is used.", os.path.join(self.folder, bad), problem, candidate)
        return os.path.join(self.folder, candidate)

    def damage(self, name: str) -> str | None:
        """Describe the damage of a checkpoint's file, as the end of a sentence; None if it is intact."""
        path = os.path.join(self.folder, name)
        if not os.path.isfile(path):
            return "is gone"
        entry = self.read().get(name)
        if entry is None:  # such as a copy from another folder
            try:
                read_tensors(path)
            except UntrustedFileError as error:
                return f"cannot be read ({error.problem})"
            return None
        size = os.path.getsize(path)
        if size != entry.bytes:
            return f"has {size} bytes of the {entry.bytes} that were written"
        if file_digest(path) != entry.sha256:
            return "has changed since it was written: its SHA-256 differs"
        return None

    def instead_of(self, name: str) -> list[str]:
        """Names of the checkpoints to try if ``name`` is damaged, or "" because the last one is unknown.

        Those of fewer iterations, the newest first; then those without an entry, the newest file first.
        """
        entries = self.read()
        if name not in entries:
            return [other for other in self.files() if other != name]
        earlier = [other for other, entry in entries.items() if entry.iteration < entries[name].iteration]
        earlier.sort(key=lambda other: entries[other].iteration, reverse=True)
        return [*earlier, *(other for other in self.files() if other not in entries)]


def check_same_teacher(path: str | os.PathLike[str], recorded: Mapping[str, str], teacher: Mapping[str, str]) -> None:
    """Check that a training resumes with the teacher of its checkpoint.

    Args:
        path: the checkpoint's, for the message.
        recorded: the teacher's ``weights`` (its file), ``digest`` and ``precision``, as written in the checkpoint.
        teacher: the same of the teacher of this start.

    Raises:
        UserError: the digests differ. A file that was only moved is the same teacher.
    """
    if recorded["digest"] != teacher["digest"]:
        raise UserError(
            f"{os.fspath(path)} was trained with the teacher {recorded['weights']} (SHA-256 "
            f"{recorded['digest'][:12]}...), but {teacher['weights']} differs ({teacher['digest'][:12]}...). To "
            "use another teacher, start a new training from the student's weights in another folder, without --resume."
        )
    if recorded["weights"] != teacher["weights"]:
        logger.info("The teacher %s is the same file as %s", teacher["weights"], recorded["weights"])
    precision = recorded.get("precision", "as the student")  # what it was before it was written
    if precision != teacher["precision"]:
        logger.warning(
            "The teacher's forward runs in another way (%s) than before %s (%s), so the training does not continue "
            "exactly.",
            teacher["precision"], os.fspath(path), precision,
        )  # fmt: skip
