"""The logs of experiments and their workers: lines with time and pid in front."""

import contextlib
import os
import time
from pathlib import Path


def write_line(handle: int, text: str) -> None:
    """Writes a line to the file, with one call, so that no other process's output cuts it."""
    line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {os.getpid()} | {text}\n"
    with contextlib.suppress(OSError):  # a full disk ends no experiment, and no job
        os.write(handle, line.encode(errors="backslashreplace"))


class ExperimentLog:
    """The log of an experiment's owner."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, text: str) -> None:
        write_line(self._handle, text)

    def close(self) -> None:
        os.close(self._handle)
