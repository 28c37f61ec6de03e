"""Mistakes that a user can mend: one sentence on standard error and exit status 2, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["CommonError", "UserError", "user_errors"]


class UserError(Exception):
    """What is wrong, where, and what would be right, in one sentence."""


class CommonError(UserError):
    """One that all processes raise alike: one of each machine says it."""


@contextmanager
def user_errors(where: str = "") -> Iterator[None]:
    """Turn the ``ValueError`` and ``TypeError`` sentences of the core into :class:`UserError`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}{error}") from error
