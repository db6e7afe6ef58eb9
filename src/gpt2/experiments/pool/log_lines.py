"""Lines in the log files of owners and workers: `2026-11-21 13:00:00 4711 | text`."""

import contextlib
import os
import time
from pathlib import Path


def write_line(handle: int, text: str) -> None:
    """Writes a line, with time and pid in front, to an open file.

    It is a single write, so that lines of several processes do not mix. An OSError is ignored: a
    full disk ends no experiment.
    """
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {os.getpid()} | {text}\n"
    with contextlib.suppress(OSError):
        os.write(handle, line.encode(errors="backslashreplace"))


class ExperimentLog:
    """The log file of an experiment's owner; appends."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, text: str) -> None:
        write_line(self._handle, text)

    def close(self) -> None:
        os.close(self._handle)
