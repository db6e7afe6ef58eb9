"""Files that are there whole or not at all, whatever kills the process or the machine."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def writing(
    path: Path, before_replacing: Callable[[], object] = lambda: None
) -> Iterator[BinaryIO]:
    """A file to write, which takes the name `path` when the block ends without an error.

    Durable before it has its name: data, then name, then folder reach the disk in that order.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before_replacing()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces the content of `path`, durably."""
    with writing(path) as file:
        file.write(text.encode())


def point(link: Path, target: str) -> None:
    """Makes `link` a relative symlink to `target`, replacing what it was in one step."""
    temporary = link.with_name(link.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    _sync_folder(link.parent)


def sweep(folder: Path, mine: Callable[[str], bool]) -> None:
    """Removes the temporary files in `folder` that a killed writer left; `mine` knows names."""
    for path in folder.glob("*" + TEMPORARY_SUFFIX):
        if mine(path.name.removesuffix(TEMPORARY_SUFFIX)):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
