"""Where shards lie: a folder, or a URL of fsspec with copies in a local cache.

fsspec's `simplecache` makes the copies. What a long run on several ranks needs beside them is here:
one download per machine at a time, a check of what arrived, patience with a network that fails for
a while, and a limit on the disk space, so that a corpus may be larger than the disk.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import fsspec
from fsspec.implementations.cache_mapper import HashCacheMapper

from gpt2.config import DataConfig
from gpt2.errors import DataError

# Waiting between attempts: a network that is gone for minutes must not end a run of ten days.
PAUSES_S = (1, 2, 5, 10, 30, 60, 60, 120)
COPY_NAMES = HashCacheMapper()
HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError)

Check = Callable[[Path], str | None]
"""What is wrong with a file that arrived, or None."""


@dataclass(frozen=True)
class Cache:
    """Room for local copies of far shards."""

    folder: Path
    limit_bytes: int | None = None

    def __str__(self) -> str:
        limit = "" if self.limit_bytes is None else f", up to {self.limit_bytes / 1e9:g} GB"
        return f"copies in {self.folder}{limit}"


def is_url(root: str) -> bool:
    """Whether `root` is a URL of fsspec, such as s3://bucket/folder."""
    return re.match(r"[a-z][a-z0-9+.]*(::|://)", root) is not None


@dataclass(frozen=True)
class Storage:
    """A folder, here or far away, or the part of one that a glob names.

    Names are relative to `folder`. Raises DataError, naming the file, for what cannot be read.
    """

    root: str
    cache: Cache = Cache(Path("data/cache"))

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """Where the shards of a run lie."""
        limit_bytes = None if data.cache_gb is None else int(data.cache_gb * 1e9)
        return cls(data.data_root, Cache(data.cache_dir, limit_bytes))

    @property
    def path(self) -> Path | None:
        """The local folder (or glob), or None if it is far away."""
        return None if is_url(self.root) else Path(self.root)

    @property
    def is_glob(self) -> bool:
        return glob.has_magic(self.root)

    @property
    def folder(self) -> str:
        """The root without its glob."""
        root = self.root.rstrip("/")
        if magic := re.search(r"[*?\[]", root):
            return root[: magic.start()].rpartition("/")[0]
        return root

    def __str__(self) -> str:
        return self.folder

    def full(self, name: str) -> str:
        """The whole name of a file."""
        return f"{self.folder}/{name}" if self.folder else name

    def files(self) -> dict[str, int]:
        """All files below the folder, or those that the glob names, with their sizes in bytes."""
        with self._errors(self.root):
            try:
                self._fs.ls(self._home)  # find and glob take a refused connection for no files
            except (FileNotFoundError, NotADirectoryError):
                return {}
            if self.is_glob:
                found = self._fs.glob(self._fs._strip_protocol(self.root), detail=True)
            else:
                found = self._fs.find(self._home, detail=True)
        start = f"{self._home}/"
        sizes = {
            name.removeprefix(start): entry["size"]
            for name, entry in sorted(found.items())
            if name.startswith(start) and entry["type"] != "directory"  # links are files too
        }
        return {name: self.size(name) if size is None else size for name, size in sizes.items()}

    def read_if_any(self, name: str) -> bytes | None:
        """The content of a small file, or None if there is none."""
        with self._errors(self.full(name)):
            try:
                return bytes(self._fs.cat_file(self._far(name)))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def size(self, name: str) -> int:
        with self._errors(self.full(name)):
            return int(self._fs.size(self._far(name)))

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file; negative ones count from its end."""
        with self._errors(self.full(name)):
            return bytes(self._fs.cat_file(self._far(name), start=start, end=end))

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BufferedReader]:
        """The file, to be read once from its beginning; no copy is kept."""
        with self._errors(self.full(name)), self._fs.open(self._far(name), "rb") as file:
            yield file

    @contextlib.contextmanager
    def local_copy(self, name: str, size: int, check: Check) -> Iterator[Path]:
        """A file on this disk that `check` finds good; once opened, it can be read for ever.

        Far files are fetched if they are not in the cache. Room is made by removing the copies
        that were not used for longest; a memory map of one stays valid.
        """
        if self.path is not None:
            yield Path(self.full(name))
            return
        with self._lock(COPY_NAMES(self._far(name))):
            path = self._fetched(name, size, check)
            os.utime(path)
            yield path

    @cached_property
    def _fs(self) -> Any:
        try:
            return fsspec.core.url_to_fs(self.folder or ".")[0]
        except (ImportError, ValueError) as error:
            raise DataError(f"{self.root} cannot be opened: {error}") from error

    @cached_property
    def _home(self) -> str:
        return str(self._fs._strip_protocol(self.folder or ".")).rstrip("/")

    def _far(self, name: str) -> str:
        return f"{self._home}/{name}"

    @cached_property
    def _copies(self) -> Path:
        return self.cache.folder / hashlib.sha256(self.folder.encode()).hexdigest()[:16]

    @cached_property
    def _cached_fs(self) -> Any:
        return fsspec.filesystem(
            "simplecache", fs=self._fs, cache_storage=str(self._copies), cache_mapper=COPY_NAMES
        )

    def _fetched(self, name: str, size: int, check: Check) -> Path:
        """The local copy, fetched again as long as it is not good and there is patience."""
        path = self._copies / str(COPY_NAMES(self._far(name)))
        for pause_s in (*PAUSES_S, None):
            try:
                if not path.exists():
                    self._fetch(name, size)
                reason = check(path)
            except HOPELESS as error:
                raise DataError(f"{self.full(name)}: {_words(error)}") from error
            except Exception as error:  # each protocol has errors of its own
                reason = _words(error)
            if reason is None:
                return path
            path.unlink(missing_ok=True)  # half a download, of this process or a killed one
            if pause_s is not None:
                time.sleep(pause_s)
        raise DataError(
            f"{self.full(name)} did not arrive in {len(PAUSES_S) + 1} attempts: {reason}"
        )

    def _fetch(self, name: str, size: int) -> None:
        with self._lock("fetching"):  # one at a time, so that the limit holds
            self._make_room(size)
            self._cached_fs.open(self._far(name)).close()

    def _make_room(self, size: int) -> None:
        """Removes the copies that were not used for longest until `size` more bytes fit."""
        limit = self.cache.limit_bytes
        if limit is None:
            return
        with os.scandir(self._copies) as entries:
            copies = [entry for entry in entries if entry.is_file()]
        copies.sort(key=lambda entry: entry.stat().st_mtime)
        spare = limit - sum(entry.stat().st_size for entry in copies)
        for entry in copies:
            if spare >= size:
                return
            with self._lock(entry.name, wait=False) as free:
                if free:  # nobody is just opening it
                    os.remove(entry)
                    spare += entry.stat().st_size

    @contextlib.contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Whether this thread alone, on this machine, has to do with `name` now."""
        locks = self._copies / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # each protocol has errors of its own
            raise DataError(f"{name} cannot be read: {_words(error)}") from error


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
