"""Opening of files by name, which may be that of a folder, or of a FIFO, whose opening waits
until another process opens its other end."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

OPEN_ALREADY = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""names of what this process has open, such as a pipe that a shell gave it by `<(…)`"""


def open_to_read(path: Path) -> BufferedReader:
    """Opens a file. Raises OSError, at once, if there is none or it is not a regular file."""
    if str(path).startswith(OPEN_ALREADY):
        return path.open("rb")
    # Without O_NONBLOCK, opening a FIFO waits for a process that writes to it.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(path, os.fstat(handle).st_mode)
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def require(path: Path) -> None:
    """Raises OSError if there is no file at `path`, or it is not a regular one, for what opens
    files by itself."""
    if not str(path).startswith(OPEN_ALREADY):
        _require_regular(path, path.stat().st_mode)


def open_to_append(path: Path, mode: str = "ab", **options: Any) -> IO[Any]:
    """Opens a log, and creates it if there is none; `options` are those of `open`. Raises OSError,
    at once, for a folder, and for a FIFO that no process reads."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        handle = os.open(path, flags | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "it is a FIFO that no process reads", str(path)) from None
        raise
    os.set_blocking(handle, True)
    return os.fdopen(handle, mode, **options)


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises OSError as `open_to_read` does."""
    with open_to_read(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """The content of a file, without the mark that some editors put in front of UTF-8. Raises
    OSError as `open_to_read` does, and ValueError if it is not UTF-8."""
    return read_bytes(path).decode("utf-8-sig")
