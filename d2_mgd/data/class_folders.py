"""A data set with a folder per class, as a training walks it and as a check of it does.

Links are followed. Folders whose name begins with a dot (``.ipynb_checkpoints``, ``.git``) hold no images of anybody's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

__all__ = ["class_names", "files_below"]


def class_names(split: str | os.PathLike[str]) -> list[str]:
    """Names of the class folders of a split, sorted."""
    with os.scandir(split) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name))


def files_below(
    folder: str | os.PathLike[str], refused: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Each folder at any depth below ``folder``, itself first, and the names of its files, all sorted.

    A folder is entered once, by the first way to it, so that links round in a circle end.

    Args:
        folder: of a class.
        refused: hears of folders that cannot be listed.
    """
    entered: set[str] = set()
    for parent, children, names in os.walk(folder, followlinks=True, onerror=refused):
        real = os.path.realpath(parent)
        if real in entered:
            children.clear()
            continue
        entered.add(real)
        children[:] = sorted(child for child in children if not _is_hidden(child))
        yield parent, sorted(names)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
