"""Look-up by name with an error that lists what there is."""

from __future__ import annotations

from typing import Any

from fvcore.common.registry import Registry

from d2_mgd.errors import UserError

__all__ = ["lookup", "names"]


def names(registry: Registry) -> list[str]:
    """All names registered, sorted."""
    return sorted(name for name, _ in registry)


def lookup(registry: Registry, kind: str, name: str) -> Any:
    """The object registered under ``name``.

    Raises:
        ValueError: there is none; the message lists those that exist.
    """
    if name not in registry:
        raise UserError(f"unknown {kind} {name!r}; there are: {', '.join(names(registry))}.")
    return registry.get(name)
