"""Errors that a user can correct: commands print the message on standard error and exit with status 2, no traceback.

All packages import this module; it imports none of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 200  # characters of another library's message


class UserError(ValueError):
    """The message states what is wrong with which value, then what to do."""


class CommonError(UserError):
    """An error that every rank raises; only one rank per machine prints it."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Context that puts ``where`` before the message of a :class:`UserError`. Other errors pass unchanged."""
    try:
        yield
    except UserError as error:
        kind = CommonError if isinstance(error, CommonError) else UserError
        raise kind(f"{where}{error}") from error


def missing(what: str, path: str | os.PathLike[str]) -> UserError:
    """The error about a file that does not exist. Relative paths count from the working directory, so it is named."""
    return UserError(f"{what} {path} does not exist{'' if os.path.isabs(path) else f' in {os.getcwd()}'}.")


def reason(error: BaseException) -> str:
    """The message of a library's error in one line, without a full stop; of an OSError, only the system's text.

    torch wraps an OSError in an error without that text, so the causes of the error are searched for it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    message = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() of a KeyError adds quotes
    text = " ".join(str(message).split()).split(" Exception raised from")[0]
    return text[:_LONGEST].rstrip(".") or type(error).__name__
