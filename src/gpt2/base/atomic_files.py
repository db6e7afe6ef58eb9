"""Files that are there whole or not at all, whatever kills the process or the machine."""

import contextlib
import os
import shutil
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
    _sync(path.parent)


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `path` when the block ends without an error.

    A folder of that name is replaced; its subfolders are not looked into.
    """
    path = path.resolve()
    temporary, old = (path.with_name(f".{path.name}{suffix}") for suffix in (".tmp", ".old"))
    for left in (temporary, old):  # by a killed writer
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for part in (*temporary.iterdir(), temporary):
            _sync(part)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


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
    _sync(link.parent)


def sweep(folder: Path, mine: Callable[[str], bool]) -> None:
    """Removes the temporary files in `folder` that a killed writer left; `mine` knows names."""
    for path in folder.glob("*" + TEMPORARY_SUFFIX):
        if mine(path.name.removesuffix(TEMPORARY_SUFFIX)):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Lets a file's content, or a folder's names, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
