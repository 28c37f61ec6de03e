"""Errors that a user can correct: commands print the message on standard error and exit with status 2, no traceback.

Below all packages, so that each can raise them; imports nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """The message states what is wrong with which value, then what to do."""


class CommonError(UserError):
    """A user's mistake that every rank finds: only one rank per machine prints it."""


@contextmanager
def user_errors(where: str = "") -> Iterator[None]:
    """Raise ``ValueError`` and ``TypeError`` of the block as :class:`UserError`, with ``where`` before the message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}{error}") from error
