"""Checks that the files of a data set exist and are inside its folder.

Data sets are untrusted: without this check, a name such as ``../../secret.png``, an absolute path or a link could read
any file of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["FoundFiles", "find_files"]


@dataclass
class FoundFiles:
    """Faulty files, in the order of the names.

    Args:
        missing: paths (``root`` joined with the name) that do not exist.
        outside: name -> resolved path, for files outside the folder; their existence is not checked.
    """

    missing: list[str] = field(default_factory=list)
    outside: dict[str, str] = field(default_factory=dict)


def find_files(root: str, names: Iterable[str], allow_outside: bool = False) -> FoundFiles:
    """Find missing files and files outside a folder, after all links are resolved. ``root`` itself may be a link.

    Each folder is listed once, which is faster than a system call for every file.

    Args:
        root: the folder.
        names: of files, relative to it.
        allow_outside: accept files outside the folder.
    """
    found = FoundFiles()
    real_root = os.path.realpath(root)
    folders: dict[str, _Folder] = {}
    for name in names:
        path = os.path.join(root, name)
        parent, base = os.path.split(path)
        if parent not in folders:
            folders[parent] = _Folder(parent)
        folder = folders[parent]
        leads_to = os.path.realpath(path) if base in folder.links else os.path.join(folder.real, base)
        if not allow_outside and not _is_inside(leads_to, real_root):
            found.outside[name] = leads_to
        elif base not in folder.files or (base in folder.links and not os.path.exists(leads_to)):
            found.missing.append(path)
    return found


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep) and os.pardir not in path[len(folder) :].split(os.sep)


class _Folder:
    """The entries of a folder, and those of them that are links."""

    def __init__(self, path: str) -> None:
        self.real = os.path.realpath(path)
        self.files: set[str] = set()
        self.links: set[str] = set()
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                for entry in entries:
                    self.files.add(entry.name)
                    if entry.is_symlink():
                        self.links.add(entry.name)
