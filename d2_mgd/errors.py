"""Errors that a user can correct: commands print the message on standard error and exit with status 2, no traceback.

Below all packages, so that each can raise them; imports nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 200  # characters of another library's message


class UserError(ValueError):
    """The message states what is wrong with which value, then what to do."""


class CommonError(UserError):
    """A user's mistake that every rank finds: only one rank per machine prints it."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Add ``where`` to the front of a :class:`UserError` of the block. Other errors pass unchanged."""
    try:
        yield
    except UserError as error:
        kind = CommonError if isinstance(error, CommonError) else UserError
        raise kind(f"{where}{error}") from error


def reason(error: BaseException) -> str:
    """An error of a library on one line, without its full stop; of an operating-system error only the system's text.

    torch's errors about files contain no such text. It is in the error that they were raised from.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    said = error.args[0] if isinstance(error, KeyError) and error.args else error  # str() of a KeyError adds quotes
    text = " ".join(str(said).split()).split(" Exception raised from")[0]
    return text[:_LONGEST].rstrip(".") or type(error).__name__
