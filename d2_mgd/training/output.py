"""Standard output and standard error that stay writable after their reader has exited.

Ctrl-C ends all programs of a pipeline, including the `tee` that reads a training's output.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_GONE = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a terminal that was closed


@contextmanager
def lasting_output() -> Iterator[None]:
    """Context that ignores writes after the reader of stdout or stderr is gone.

    Python would raise BrokenPipeError or exit with status 120. From the first such write on, the stream is the null
    device.
    """
    streams = [(name, getattr(sys, name)) for name in ("stdout", "stderr")]
    lasting = {name: _Lasting(stream) for name, stream in streams if stream is not None}
    for name, stream in lasting.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in streams:
            if name in lasting and getattr(sys, name) is lasting[name]:
                lasting[name].flush()
                setattr(sys, name, stream)


class _Lasting:
    """A text stream that can be written to after its reader is gone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # copy.copy asks for attributes before __init__
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Redirect the buffered text, and all that follows, to the null device."""
        if error.errno not in _GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
