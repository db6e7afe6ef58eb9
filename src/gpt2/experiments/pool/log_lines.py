"""Lines in the log files of owners and workers: `2026-11-21 13:00:00 4711 | text`."""

import contextlib
import os
import time


def write_line(handle: int, text: str) -> None:
    """Writes a line, with time and pid in front, to an open file.

    It is a single write, so that lines of several processes do not mix. An OSError is ignored: a
    full disk ends no experiment.
    """
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {os.getpid()} | {text}\n"
    with contextlib.suppress(OSError):
        os.write(handle, line.encode(errors="backslashreplace"))
