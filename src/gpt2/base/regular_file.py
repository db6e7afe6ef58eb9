"""Reading of files by name, which may be that of a folder, or of a FIFO that blocks its readers."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

OPEN_ALREADY = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""names of what this process has open, such as a pipe that a shell gave it by `<(…)`"""


def open_to_read(path: Path) -> BufferedReader:
    """Opens a file. Raises OSError, at once, if there is none or it is not a regular file."""
    if str(path).startswith(OPEN_ALREADY):
        return path.open("rb")
    # Without O_NONBLOCK, opening a FIFO waits for a process that writes to it.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_bytes(path: Path) -> bytes:
    """The content of a file; raises OSError as `open_to_read` does."""
    with open_to_read(path) as file:
        return file.read()


def read_text(path: Path) -> str:
    """The content of a file, without the mark that some editors put in front of UTF-8. Raises
    OSError as `open_to_read` does, and ValueError if it is not UTF-8."""
    return read_bytes(path).decode("utf-8-sig")
