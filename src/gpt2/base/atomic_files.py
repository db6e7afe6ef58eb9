"""Atomic writes: after a crash of the process or the machine, a file is complete or absent."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gpt2.base import regular_file

TEMPORARY_SUFFIX = ".tmp"
NO_SYMLINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # symlink(2)
TEXT_LINK = "link: "
"""first letters of a text file in place of a symlink"""
MAX_TEXT_LINK = 4096 + len(TEXT_LINK)


@contextmanager
def writing(
    path: Path, before_replacing: Callable[[], object] = lambda: None
) -> Iterator[BinaryIO]:
    """Yields a temporary file, which is renamed to `path` when the block ends without an error.

    Data, name and folder reach the disk in this order, so that the name never refers to a partial
    file. `before_replacing` runs between the first two.
    """
    temporary = Path(f"{path}{TEMPORARY_SUFFIX}")  # `with_name` raises ValueError for / and .
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
    """Yields an empty folder, which is renamed to `path` when the block ends without an error.

    An existing folder `path` is replaced. Files directly in the folder are flushed to the disk,
    those in subfolders are not.
    """
    path = path.resolve()
    temporary, old = (path.parent / f".{path.name}{suffix}" for suffix in (".tmp", ".old"))
    if old.exists() and not path.exists():  # a process was killed between the two renames below
        os.replace(old, path)
    for left in (temporary, old):  # by a process that was killed
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
    """Replaces the content of `path` atomically."""
    with writing(path) as file:
        file.write(text.encode())


def point(link: Path, target: str) -> None:
    """Makes `link` a relative symlink to `target`, replacing an existing one atomically.

    On a file system without symlinks (FAT, some network mounts) it becomes a text file that names
    `target`; `pointed_at` reads both.
    """
    temporary = link.with_name(link.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
    except OSError as error:
        if error.errno not in NO_SYMLINKS:
            raise
        write_text(link, f"{TEXT_LINK}{target}\n")
        return
    os.replace(temporary, link)
    _sync(link.parent)


def pointed_at(link: Path) -> Path | None:
    """The path that `link`, which `point` made, points at, in the folder of `link`; it may not
    exist. None if `link` is no such link."""
    if link.is_symlink():
        return link.parent / os.readlink(link)
    try:
        with regular_file.open_to_read(link) as file:
            content = file.read(MAX_TEXT_LINK)
    except OSError:  # no file
        return None
    if not content.startswith(TEXT_LINK.encode()):
        return None
    return link.parent / content.decode(errors="replace").removeprefix(TEXT_LINK).rstrip("\n")


def remove_temporary(folder: Path, owns: Callable[[str], bool]) -> None:
    """Removes temporary files that killed processes left in `folder`.

    `owns` says whether the caller owns the file of a given final name; others are kept.
    """
    for path in folder.glob("*" + TEMPORARY_SUFFIX):
        if owns(path.name.removesuffix(TEMPORARY_SUFFIX)):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flushes the content of a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
