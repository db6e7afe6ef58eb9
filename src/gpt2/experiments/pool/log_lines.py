"""Lines in the log files of owners and workers: `2026-11-21 13:00:00 4711 | text`."""

import contextlib
import io
import os
import threading
import time
from typing import Any


def write_line(handle: int, text: str) -> None:
    """Writes a line, with time and pid in front, to an open file.

    It is a single write, so that lines of several processes do not mix. An OSError is ignored: a
    full disk ends no experiment.
    """
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {os.getpid()} | {text}\n"
    with contextlib.suppress(OSError):
        os.write(handle, line.encode(errors="backslashreplace"))


def text_stream(handle: int) -> io.TextIOWrapper:
    """A text stream, as standard output is one, that writes such lines to an open file."""
    return io.TextIOWrapper(
        LineBuffer(handle), "utf-8", errors="backslashreplace", newline="\n", write_through=True
    )


class LineBuffer(io.BufferedIOBase):
    """Writes whole lines with `write_line`; the beginning of a line waits for its end, or for
    `flush`. It does not own the file, which stays open."""

    def __init__(self, handle: int) -> None:
        self._handle, self._rest = handle, b""
        self._lock = threading.RLock()
        self.name = handle

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._handle

    def write(self, data: Any) -> int:
        received = bytes(data)
        with self._lock:
            text = (self._rest + received).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            *lines, self._rest = text.split(b"\n")
            for line in lines:
                write_line(self._handle, line.decode(errors="backslashreplace"))
        return len(received)

    def flush(self) -> None:
        with self._lock:
            if self._rest:
                self.write(b"\n")
